"""How the R bucket scores of a class become one score.

Every aggregate puts bucket scores on a scale, ranks a class's R values, takes the mean of some ranks, and maps it by an
affine function. So each is monotone in every bucket score, which is all that exact top-k needs; and an entry of
`AGGREGATES` says all that the numpy oracle here and the compiled decoder have to know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError

_TINY = np.finfo(np.float32).tiny
_BELOW_ONE = np.float32(1 - 2.0**-24)
Scale = Literal["probability", "logarithm", "log-odds"]


@dataclass(frozen=True)
class Aggregate:
    """One way to make a score of R bucket scores.

    ``ranks`` tells of n values in ascending order the first whose mean is taken, and the one after the last; ``affine``
    for B buckets what the mean is multiplied with (above 0), and what is added then.
    """

    meaning: str  # one sentence
    scale: Scale = "probability"  # what bucket scores are mapped to before, see `transform`
    ranks: Callable[[int], tuple[int, int]] = lambda n: (0, n)
    affine: Callable[[int], tuple[float, float]] = lambda n_buckets: (1.0, 0.0)

    @property
    def limits(self) -> tuple[np.float32, np.float32]:
        """Between which bucket scores are clipped: logarithms of them are finite."""
        low = np.float32(0) if self.scale == "probability" else _TINY
        return low, _BELOW_ONE if self.scale == "log-odds" else np.float32(1)

    @property
    def largest(self) -> float:
        """No value on the scale has a larger magnitude."""
        return 1.0 if self.scale == "probability" else -float(np.log(_TINY))


AGGREGATES = {
    "mean": Aggregate("the mean probability"),
    "unbiased-mean": Aggregate(
        "B / (B - 1) * (mean - 1 / B), which estimates the probability of an exclusive class without bias "
        "(Medini et al., NeurIPS 2019)",
        affine=lambda n_buckets: (n_buckets / (n_buckets - 1), -1 / (n_buckets - 1)),
    ),
    "log-mean": Aggregate("the mean logarithm: a repetition that rules a class out is heard", "logarithm"),
    "logit-mean": Aggregate("the mean log-odds: a repetition that is sure is heard as well", "log-odds"),
    "min": Aggregate("the least probability: all repetitions must agree", ranks=lambda n: (0, 1)),
    "median": Aggregate(
        "the middle probability, or the mean of the middle two", ranks=lambda n: ((n - 1) // 2, n // 2 + 1)
    ),
    "trimmed-mean": Aggregate(
        "the mean without the lowest and the highest of three or more: one repetition that went wrong is not heard",
        ranks=lambda n: (1, n - 1) if n > 2 else (0, n),
    ),
}


def aggregate_of(name: str) -> Aggregate:
    """The entry of `AGGREGATES`; a ConfigError where there is none of this name."""
    if name not in AGGREGATES:
        raise ConfigError(f"unknown aggregate {name!r}: choose one of {', '.join(AGGREGATES)}")
    return AGGREGATES[name]


def transform(probs: ArrayLike, aggregate: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Put bucket scores on the scale of an aggregate; monotone, finite, float32, same shape.

    Scores are clipped to [0, 1] and NaN becomes the lowest score. Logarithms have a floor at the smallest normal
    float32 (-87.3), log-odds lie between -87.3 and 16.6. They are written into ``out``, if that is given.

    Raises
    ------
    ConfigError
        When the aggregate is unknown.

    Examples
    --------
    >>> transform([0.0, 0.25, float("nan")], "mean").tolist()
    [0.0, 0.25, 0.0]
    """
    entry = aggregate_of(aggregate)
    low, high = entry.limits
    above = np.fmax(np.ascontiguousarray(probs, dtype=np.float32), low)  # which of NaN and a number takes the number
    values: NDArray[np.float32] = np.minimum(above, high, out=out)
    if entry.scale == "log-odds":
        values /= 1 - values
    return values if entry.scale == "probability" else np.log(values, out=values)


def reduce(values: NDArray[np.float32], aggregate: str, n_buckets: int) -> NDArray[np.float32]:
    """Reduce the first axis (repetitions) of transformed values to scores.

    Sums are float64, rounded once: of all values in the order of repetitions, of some ranks in ascending order. Both
    are monotone in floating point as well.
    """
    entry = aggregate_of(aggregate)
    first, end = entry.ranks(len(values))
    if (first, end) != (0, len(values)):
        values = np.sort(values, axis=0)
    total = np.add.accumulate(values[first:end], axis=0, dtype=np.float64)[-1]  # a plain sum may pair them up
    gain, shift = entry.affine(n_buckets)
    return (gain * (total / (end - first)) + shift).astype(np.float32)


def naive(scores: ArrayLike, aggregate: str) -> NDArray[np.float64]:
    """The probability that a score looks like: its exponential, its logistic function or itself, by the scale."""
    values = np.asarray(scores, np.float64)
    scale = aggregate_of(aggregate).scale
    if scale == "logarithm":
        return np.exp(np.minimum(values, 0))
    return 1 / (1 + np.exp(-values)) if scale == "log-odds" else np.clip(values, 0, 1)
