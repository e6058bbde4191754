"""Weights of rows and classes: rows of more weight are learned more often, those of none are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from mach.errors import ConfigError
from mach.estimator.rows import Rows

MOST_REPEATED, USUAL = 8.0, 2.0  # so often a row may be learned on average, and is where weights are no whole numbers


def weighted(
    rows: Rows,
    classes: NDArray[Any],
    sample_weight: NDArray[np.float64] | None,
    class_weight: Any,
    random: np.random.RandomState,
) -> Rows:
    """Rows as often as their weights say, in their order: whole numbers as they are, others scaled.

    ``class_weight`` is "balanced", a dictionary of class values or None; a row of several classes has their mean.
    ConfigError where it is something else, or where no weight is above 0.
    """
    if sample_weight is None and class_weight is None:
        return rows
    weights_N = np.ones(len(rows)) if sample_weight is None else sample_weight.astype(np.float64)
    if class_weight is not None:
        weights_N = weights_N * _by_class(rows.classes, classes, weights_N, class_weight)
    if not weights_N.any():
        raise ConfigError("no row has a weight above 0: raise sample_weight or class_weight")
    chosen = np.repeat(np.arange(len(rows)), _repeats(weights_N, random))
    return replace(rows.chosen(chosen), name=f"{rows.name}, as often as they weigh")


def _by_class(
    rows_NK: csr_array, classes: NDArray[Any], weights_N: NDArray[np.float64], class_weight: Any
) -> NDArray[np.float64]:
    if isinstance(class_weight, str) and class_weight == "balanced":
        sums_K = np.asarray(rows_NK.T @ weights_N, np.float64)
        weights_K = sums_K.sum() / (len(classes) * np.maximum(sums_K, 1e-300))
    elif isinstance(class_weight, dict):
        known = {value: float(weight) for value, weight in class_weight.items()}
        weights_K = np.array([known.get(value, 1.0) for value in classes.tolist()])
        if not (weights_K >= 0).all() or not np.isfinite(weights_K).all():
            raise ConfigError(f"class_weight {class_weight!r:.60}: weights are finite and not below 0")
    else:
        raise ConfigError(f"class_weight {class_weight!r:.60}: give 'balanced', or a dictionary of classes and weights")
    n_classes_N = np.diff(rows_NK.indptr)
    return np.asarray(np.where(n_classes_N > 0, (rows_NK @ weights_K) / np.maximum(n_classes_N, 1), 1.0))


def _repeats(weights_N: NDArray[np.float64], random: np.random.RandomState) -> NDArray[np.int64]:
    """How often rows are learned: the number below or above their weight, so that any run of rows has its due."""
    if (weights_N == np.floor(weights_N)).all() and weights_N.mean() <= MOST_REPEATED:
        return weights_N.astype(np.int64)
    begun = random.random_sample()
    ends = np.floor(np.cumsum(weights_N * (USUAL / weights_N.mean())) + begun).astype(np.int64)
    return np.diff(ends, prepend=0)
