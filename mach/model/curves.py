"""Increasing curves that turn scores into probabilities that a class is right, and how far these can be trusted.

A curve is isotonic regression (Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability
estimates", KDD 2002) or beta calibration (Kull, Silva Filho & Flach, "Beta calibration", AISTATS 2017; on scores that
are log-probabilities it includes Platt's logistic curve), whichever has the smaller expected calibration error under
cross-validation. It is stored as knots between which it is straight.

A curve knows the score alone, not the rank: it holds on average over the best `TOP` classes of a query, and the first
of them may be right more often than it says (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mach.config import Section
from mach.sketch.aggregates import naive

TOP = 10  # classes of a query that curves are fitted to and errors are measured on
BINS, FOLDS = 15, 5
GROUP_PAIRS = 25  # least pairs behind a knot of isotonic regression
BETA_KNOTS = 257

Knots = tuple[NDArray[np.float64], NDArray[np.float64]]  # scores and probabilities, ascending


class Curve(Section):
    """A calibrated map from scores to probabilities, and how well it does.

    ``ece_before`` and ``ece_after`` are expected calibration errors on the rows that it was fitted to: of the
    probabilities that scores look like (`mach.sketch.aggregates.naive`), and of the curve, each row by a curve
    fitted to the others. ``precision`` is the share of these rows whose best class is right; earlier curves have none.
    """

    method: Literal["isotonic", "beta"]
    scores: list[float] = Field(min_length=1)
    probabilities: list[float]
    n_pairs: int
    ece_before: float
    ece_after: float
    precision: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_ascending = np.all(np.diff(self.scores) > 0) and np.all(np.diff(self.probabilities) >= 0)
        is_share = min(self.probabilities, default=-1) >= 0 and max(self.probabilities, default=2) <= 1
        if len(self.scores) != len(self.probabilities) or not (is_ascending and is_share):
            raise ValueError("the knots of a curve do not ascend within 0 and 1")
        return self

    def __call__(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities, in the shape of the scores; 0 where a score is -inf, beside an id of -1."""
        probabilities = np.interp(np.asarray(scores, np.float64), self.scores, self.probabilities)
        return np.where(np.isneginf(scores), 0, probabilities).astype(np.float32)


def reliability(probabilities: NDArray[Any], right: NDArray[np.bool_], n_bins: int = BINS) -> NDArray[np.float64]:
    """Rows of pairs, mean probability and share that is right, in bins of about as many pairs, by probability.

    Examples
    --------
    >>> reliability(np.array([0.9, 0.1, 0.2, 0.8]), np.array([True, False, False, True]), n_bins=2).round(2).tolist()
    [[2.0, 0.15, 0.0], [2.0, 0.85, 1.0]]
    """
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, n_bins) if len(part)]
    return np.array([(len(part), np.mean(probabilities[part]), np.mean(right[part])) for part in parts])


def calibration_error(probabilities: NDArray[Any], right: NDArray[np.bool_], n_bins: int = BINS) -> float:
    """Mean over pairs of the difference between probability and share that is right in their bin.

    The expected calibration error (Naeini, Cooper & Hauskrecht, AAAI 2015) in bins of equal mass (Nixon et al.,
    "Measuring calibration in deep learning", CVPR workshops 2019).
    """
    n, mean, share = reliability(probabilities, right, n_bins).T
    return float(np.sum(n * np.abs(mean - share)) / n.sum())


def pairs_of(
    ids_Nk: NDArray[np.int64], scores_Nk: NDArray[np.float32], right_Nk: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    """Scores, whether they are right, and queries, of all pairs of query and class in answers."""
    is_there = ids_Nk >= 0
    return scores_Nk[is_there], right_Nk[is_there], np.nonzero(is_there)[0]


def fit(scores: NDArray[np.float32], right: NDArray[np.bool_], rows: NDArray[np.int64], aggregate: str) -> Curve:
    """The curve of least expected calibration error under cross-validation.

    Of each pair, arrays of shape (n_pairs,), the score, whether the class is right, and the query: pairs of one are
    never on both sides of a fold. The aggregate tells what scores look like, see `mach.sketch.aggregates.naive`.
    """
    values, folds = np.asarray(scores, np.float64), rows % FOLDS
    errors = {}
    for name, knots_of in METHODS.items():
        probabilities = np.empty(len(values))
        for fold in np.unique(folds):
            is_held = folds == fold
            probabilities[is_held] = np.interp(values[is_held], *knots_of(values[~is_held], right[~is_held], aggregate))
        errors[name] = calibration_error(probabilities, right)
    best: Any = min(errors, key=lambda name: errors[name])
    knots = METHODS[best](values, right, aggregate)
    return Curve(
        method=best,
        scores=knots[0].tolist(),
        probabilities=knots[1].tolist(),
        n_pairs=len(values),
        ece_before=calibration_error(naive(scores, aggregate), right),
        ece_after=errors[best],
    )


def isotonic_knots(scores: NDArray[np.float64], right: NDArray[np.bool_], aggregate: str) -> Knots:
    """Isotonic regression of groups of pairs: a knot at the mean score of each of its blocks.

    Half a pair that is right below all others, and half a wrong one above, keep the ends from 0 and 1.
    """
    from scipy.optimize import isotonic_regression

    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    _, groups = np.unique((np.cumsum(counts) - 1) // GROUP_PAIRS, return_inverse=True)  # equal scores stay together
    n, hits = np.bincount(groups, counts), np.bincount(groups[inverse], right)
    weights = n.copy()
    weights[0] += 0.5
    hits[0] += 0.5
    weights[-1] += 0.5
    fitted = isotonic_regression(hits / weights, weights=weights)
    begins = fitted.blocks[:-1]
    means = np.add.reduceat(np.bincount(groups, counts * values), begins) / np.add.reduceat(n, begins)
    return means, fitted.x[begins]


def beta_knots(scores: NDArray[np.float64], right: NDArray[np.bool_], aggregate: str) -> Knots:
    """``sigmoid(a log p - b log(1 - p) + c)`` of naive probabilities p, with a and b at least 0, at knots.

    Fitted to Platt's targets ("Probabilistic outputs for support vector machines", 1999), which keep it finite.
    """
    from scipy.optimize import minimize

    def features(values: NDArray[np.float64]) -> NDArray[np.float64]:
        p = np.clip(naive(values, aggregate), 1e-37, 1 - 1e-7)
        return np.stack([np.log(p), -np.log1p(-p), np.ones_like(p)], axis=1)

    n_right = right.sum()
    targets = np.where(right, (n_right + 1) / (n_right + 2), 1 / (len(right) - n_right + 2))
    design = features(scores)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margins = design @ parameters
        residuals = 0.5 * (1 + np.tanh(margins / 2)) - targets
        return float(np.mean(np.logaddexp(0, margins) - targets * margins)), design.T @ residuals / len(margins)

    bounds = [(0, None), (0, None), (None, None)]
    fitted = minimize(loss, [1.0, 1.0, 0.0], jac=True, method="L-BFGS-B", bounds=bounds)
    knots = np.unique(np.quantile(scores, np.linspace(0, 1, BETA_KNOTS)))
    probabilities = 0.5 * (1 + np.tanh(features(knots) @ fitted.x / 2))
    return knots, np.maximum.accumulate(probabilities)


METHODS: dict[str, Callable[..., Knots]] = {"isotonic": isotonic_knots, "beta": beta_knots}
