"""How many buckets and repetitions, and what they cost: bounds, the ledger of a configuration, a planner.

Pure functions of integers. Every parameter and byte is counted, the R input layers included: in published
MACH they hold 90 to 99 % of all parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError

TRAINING_BYTES = 12  # a parameter while training: a float32 weight and Adam's two float32 moments
MIN_BUCKETS, MAX_BUCKETS = 64, 16384


def repetitions_needed(n_classes: int, n_buckets: int, delta: float = 0.01) -> int:
    """Smallest R that tells all pairs of K classes apart with probability at least 1 - delta.

    A pair shares all R buckets with probability ``B^-R``; the union bound over fewer than ``K^2`` pairs
    gives ``R >= 2 log(K / sqrt(delta)) / log B`` (Medini et al., NeurIPS 2019, theorem 2).

    Raises
    ------
    ConfigError
        When K < 1, B < 2 or delta is not in (0, 1).

    Examples
    --------
    >>> repetitions_needed(n_classes=26_000, n_buckets=1024, delta=0.01)
    4
    """
    if n_classes < 1 or n_buckets < 2 or not 0 < delta < 1:
        raise ConfigError(
            f"n_classes {n_classes}, n_buckets {n_buckets}, delta {delta}: need at least 1, at least 2, inside (0, 1)"
        )
    return max(1, math.ceil(2 * math.log(n_classes / math.sqrt(delta)) / math.log(n_buckets)))


def estimator_variance(class_probs: ArrayLike, n_buckets: int, n_repetitions: int) -> NDArray[np.float64]:
    """Variance over the hash functions of the unbiased estimate of each class, shape (K,).

    ``sum_{l != k} p_l^2 / (R (B - 1))`` for exclusive classes, exactly known bucket probabilities and buckets
    that are independent three by three: the noise depends on the product of R and B. The universal family is
    independent two by two; for classes in arithmetic progression up to 1.5 times this variance was measured.
    """
    squares_K = np.square(np.asarray(class_probs, dtype=np.float64))
    return (squares_K.sum() - squares_K) / (n_repetitions * (n_buckets - 1))


@dataclass(frozen=True)
class Ledger:
    """What one configuration costs; all counts exact, FLOPs with a multiply-add as two.

    Attributes
    ----------
    n_classes, n_features, n_buckets, n_repetitions : int
        K, D, B and R.
    n_input, n_hidden, n_output : int
        Parameters (weights and biases) of one repetition's first, middle and last layers; the linear
        network has no other layer than its first, counted as input.
    n_parameters, n_one_vs_all_parameters : int
        All R repetitions; one network of the same hidden widths with K outputs.
    disk_bytes, training_bytes : int
        All repetitions and assignments on disk; weights and Adam moments of the one repetition that a
        worker trains at a time (activations and data come on top).
    query_flops, one_vs_all_query_flops, example_flops, one_vs_all_example_flops : int
        Forward pass of one row through all repetitions; forward and backward pass in training.
    """

    n_classes: int
    n_features: int
    n_buckets: int
    n_repetitions: int
    n_input: int
    n_hidden: int
    n_output: int
    n_one_vs_all_parameters: int
    disk_bytes: int
    query_flops: int
    one_vs_all_query_flops: int
    example_flops: int
    one_vs_all_example_flops: int

    @property
    def n_repetition_parameters(self) -> int:
        return self.n_input + self.n_hidden + self.n_output

    @property
    def n_parameters(self) -> int:
        return self.n_repetitions * self.n_repetition_parameters

    @property
    def training_bytes(self) -> int:
        return TRAINING_BYTES * self.n_repetition_parameters

    def rows(self) -> list[tuple[str, float, str]]:
        """Lines to print: (name, value, unit)."""
        per_repetition = self.n_repetition_parameters
        return [
            ("classes", self.n_classes, ""),
            ("features", self.n_features, ""),
            ("buckets", self.n_buckets, ""),
            ("repetitions", self.n_repetitions, ""),
            ("parameters a repetition", per_repetition, ""),
            ("input layer", 100 * self.n_input / per_repetition, "%"),
            ("hidden layers", 100 * self.n_hidden / per_repetition, "%"),
            ("output layer", 100 * self.n_output / per_repetition, "%"),
            ("parameters", self.n_parameters, ""),
            ("parameters, one-vs-all", self.n_one_vs_all_parameters, ""),
            ("model on disk", self.disk_bytes, "bytes"),
            ("training memory a worker", self.training_bytes, "bytes"),
            ("training", self.example_flops, "FLOPs a row"),
            ("training, one-vs-all", self.one_vs_all_example_flops, "FLOPs a row"),
            ("query", self.query_flops, "FLOPs"),
            ("query, one-vs-all", self.one_vs_all_query_flops, "FLOPs"),
        ]


def ledger(
    n_classes: int,
    n_features: int,
    n_buckets: int,
    n_repetitions: int,
    hidden: tuple[int, ...] = (512,),
    *,
    dense_input: bool = False,
    weight_bytes: int = 2,
    nonzeros_per_row: int = 100,
    n_assignment_bytes: int = 0,
) -> Ledger:
    """Count one configuration.

    Parameters
    ----------
    n_classes, n_features, n_buckets, n_repetitions : int
        K, D, B and R, each at least 1.
    hidden : tuple of int
        Widths of the hidden layers; ``()`` is the linear network, sparse input straight into B outputs.
    dense_input : bool
        Whether a row has all D features rather than `nonzeros_per_row`; changes FLOPs only.
    weight_bytes : int
        Of one weight on disk: 2 is bfloat16.
    nonzeros_per_row : int
        Mean number of features of a sparse row.
    n_assignment_bytes : int
        Of all assignments on disk: about 0 for the universal family.

    Raises
    ------
    ConfigError
        When a count is below 1.
    """
    for name, count in {
        "n_classes": n_classes,
        "n_features": n_features,
        "n_buckets": n_buckets,
        "n_repetitions": n_repetitions,
        "hidden": min(hidden, default=1),
    }.items():
        if count < 1:
            raise ConfigError(f"{name} is {count}: must be at least 1")
    n_active = n_features if dense_input else min(nonzeros_per_row, n_features)
    layers = _layers(n_features, hidden, n_buckets)
    one_vs_all = _layers(n_features, hidden, n_classes)
    n_each = sum(layers)
    return Ledger(
        n_classes=n_classes,
        n_features=n_features,
        n_buckets=n_buckets,
        n_repetitions=n_repetitions,
        n_input=layers[0],
        n_hidden=sum(layers[1:-1]),
        n_output=layers[-1] if hidden else 0,
        n_one_vs_all_parameters=sum(one_vs_all),
        disk_bytes=n_repetitions * n_each * weight_bytes + n_assignment_bytes,
        query_flops=n_repetitions * _forward_flops(n_active, hidden, n_buckets),
        one_vs_all_query_flops=_forward_flops(n_active, hidden, n_classes),
        example_flops=n_repetitions * _training_flops(n_active, hidden, n_buckets),
        one_vs_all_example_flops=_training_flops(n_active, hidden, n_classes),
    )


@dataclass(frozen=True)
class Plan:
    """A configuration that fits: its ledger, and how many rounds W workers need for R repetitions."""

    ledger: Ledger
    n_waves: int

    def rows(self) -> list[tuple[str, float, str]]:
        """Lines to print: (name, value, unit)."""
        return [*self.ledger.rows(), ("rounds of training", self.n_waves, "")]


def plan(
    n_classes: int,
    n_features: int,
    *,
    memory_bytes: int | None = None,
    n_parameters: int | None = None,
    n_workers: int = 1,
    delta: float = 0.01,
    hidden: tuple[int, ...] = (512,),
    n_repetitions: int | None = None,
    n_buckets: int | None = None,
    **costs: Any,
) -> Plan:
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
        Limits for the whole model, all repetitions together.
    n_workers : int
        Repetitions trained at once.
    delta : float
        Accepted probability that some pair of classes cannot be told apart.
    hidden : tuple of int
        Widths of the hidden layers.
    n_repetitions, n_buckets : int, optional
        Fixed by the caller.
    **costs
        Passed on to `ledger`.

    Raises
    ------
    ConfigError
        When nothing fits; the message says how much the smallest choice takes.
    """
    if n_workers < 1:
        raise ConfigError(f"n_workers is {n_workers}: must be at least 1")
    limited = memory_bytes is not None or n_parameters is not None
    candidates = []
    for B in [n_buckets] if n_buckets else _bucket_choices(n_classes):
        least = max(2, repetitions_needed(n_classes, B, delta))
        choices = range(least, max(least, 8) + 1) if limited else [max(least, 4)]
        for R in [n_repetitions] if n_repetitions else choices:
            candidates.append(ledger(n_classes, n_features, B, R, hidden, **costs))
    bytes_limit, parameters_limit = memory_bytes or math.inf, n_parameters or math.inf
    fitting = [c for c in candidates if c.disk_bytes <= bytes_limit and c.n_parameters <= parameters_limit]
    if not fitting:
        least_costly = min(candidates, key=lambda c: c.n_parameters)
        raise ConfigError(
            f"no B and R fit memory_bytes {memory_bytes} and n_parameters {n_parameters}: the smallest choice, "
            f"B {least_costly.n_buckets} and R {least_costly.n_repetitions}, takes {least_costly.disk_bytes} bytes "
            f"and {least_costly.n_parameters} parameters: raise the budget or narrow hidden {hidden}"
        )
    best = max(fitting, key=lambda c: (c.n_buckets * c.n_repetitions, c.n_buckets))
    return Plan(best, math.ceil(best.n_repetitions / n_workers))


def _bucket_choices(n_classes: int) -> list[int]:
    """Powers of two from the starting point of `plan` down to 64 (or to the starting point, if that is less)."""
    start = 2 ** round(math.log2(max(n_classes / 16, 1)))
    start = min(max(start, MIN_BUCKETS), MAX_BUCKETS, 2 ** max(1, int(math.log2(n_classes))))
    choices = [start]
    while choices[-1] > MIN_BUCKETS:
        choices.append(choices[-1] // 2)
    return choices


def _layers(n_inputs: int, hidden: tuple[int, ...], n_outputs: int) -> list[int]:
    """Weights and biases of every layer."""
    widths = (n_inputs, *hidden, n_outputs)
    return [below * above + above for below, above in pairwise(widths)]


def _forward_flops(n_active: int, hidden: tuple[int, ...], n_outputs: int) -> int:
    widths = (n_active, *hidden, n_outputs)
    return sum(2 * below * above for below, above in pairwise(widths))


def _training_flops(n_active: int, hidden: tuple[int, ...], n_outputs: int) -> int:
    """Forward, gradient of the weights, and gradient of the inputs, which the first layer does not need."""
    first = hidden[0] if hidden else n_outputs
    return 3 * _forward_flops(n_active, hidden, n_outputs) - 2 * n_active * first
