"""How many buckets and repetitions K classes need, by bounds and within a budget."""

from __future__ import annotations

import math
from typing import Any

from mach.errors import ConfigError
from mach.sketch.ledger import Ledger, check_count, shown

MIN_BUCKETS, MAX_BUCKETS = 64, 16384


def repetitions_needed(n_classes: int, n_buckets: int, delta: float = 0.01) -> int:
    """Smallest R that tells all pairs of K classes apart with probability at least 1 - delta.

    A pair shares all R buckets with probability ``B^-R``; the union bound over fewer than ``K^2`` pairs
    gives ``R >= 2 log(K / sqrt(delta)) / log B`` (Medini et al., NeurIPS 2019, theorem 2).

    Raises
    ------
    ConfigError
        When K is not 1 to 2,147,483,647, B < 2 or delta is not in (0, 1).

    Examples
    --------
    >>> repetitions_needed(n_classes=26_000, n_buckets=1024, delta=0.01)
    4
    """
    check_count("n_classes", n_classes)
    check_count("n_buckets", n_buckets, least=2)
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta}: must lie between 0 and 1")
    return max(1, math.ceil(2 * math.log(n_classes / math.sqrt(delta)) / math.log(n_buckets)))


def plan(
    n_classes: int,
    n_features: int,
    *,
    memory_bytes: int | None = None,
    n_parameters: int | None = None,
    hidden: tuple[int, ...] = (512,),
    n_repetitions: int | None = None,
    n_buckets: int | None = None,
    n_heads: int = 1,
    **costs: Any,
) -> Ledger:
    """Choose B and R within a budget of bytes on disk, of parameters, or of both.

    The rule. B starts at the power of two nearest K / 16, within [64, 16384] and at most K (at K = 26
    thousand 1024 to 2048 buckets measured best), and may be halved down to 64. R is at least 2 and at least
    `repetitions_needed`; without a budget it is the larger of that and 4, with one it may grow to 8 (the
    range that measured well). Of what fits, the largest product R B wins, for the noise depends on
    it alone; equal products go to the larger B, which has fewer input layers. Values given are kept as they are.

    Parameters
    ----------
    n_classes, n_features : int
        K and D.
    memory_bytes, n_parameters : int, optional
        Limits for the whole model, all repetitions together; zero is a limit as well.
    hidden : tuple of int
        Widths of the hidden layers.
    n_repetitions, n_buckets : int, optional
        Fixed by the caller.
    n_heads : int
        Hash functions of a repetition; R and the bounds on it count functions, and are divided by it.
    **costs
        Passed on to `Ledger`.

    Returns
    -------
    Ledger
        Of the choice.

    Raises
    ------
    ConfigError
        When a count is out of range or nothing fits; the message says how much the smallest choice takes.
    """
    check_count("n_classes", n_classes)
    for name, budget in {"memory_bytes": memory_bytes, "n_parameters": n_parameters}.items():
        if budget is not None and not 0 <= budget < math.inf:
            raise ConfigError(f"{name} is {shown(budget)}: a budget must be finite and at least 0")
    limited = memory_bytes is not None or n_parameters is not None
    candidates = []
    for B in _bucket_choices(n_classes) if n_buckets is None else [n_buckets]:
        least = -(-max(2, repetitions_needed(n_classes, B)) // n_heads)
        choices = range(least, max(least, -(-8 // n_heads)) + 1) if limited else [max(least, -(-4 // n_heads))]
        for R in choices if n_repetitions is None else [n_repetitions]:
            candidates.append(Ledger(n_classes, n_features, B, R, hidden, n_heads=n_heads, **costs))
    bytes_limit = math.inf if memory_bytes is None else memory_bytes
    parameters_limit = math.inf if n_parameters is None else n_parameters
    fitting = [c for c in candidates if c.disk_bytes <= bytes_limit and c.n_parameters <= parameters_limit]
    if not fitting:
        least_costly = min(candidates, key=lambda c: c.n_parameters)
        raise ConfigError(
            f"no B and R fit {shown(bytes_limit)} bytes and {shown(parameters_limit)} parameters: the smallest, "
            f"B {least_costly.n_buckets} and R {least_costly.n_repetitions}, takes {least_costly.disk_bytes} bytes "
            f"and {least_costly.n_parameters} parameters: raise the budget or narrow hidden {hidden}"
        )
    return max(fitting, key=lambda c: (c.n_buckets * c.n_repetitions, c.n_buckets))


def _bucket_choices(n_classes: int) -> list[int]:
    """Powers of two from the starting point of `plan` down to 64 (or to the starting point, if that is less)."""
    start = 2 ** round(math.log2(max(n_classes / 16, 1)))
    start = min(max(start, MIN_BUCKETS), MAX_BUCKETS, 2 ** max(1, int(math.log2(n_classes))))
    n_halvings = max(0, start.bit_length() - MIN_BUCKETS.bit_length())
    return [start >> i for i in range(n_halvings + 1)]
