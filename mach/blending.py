"""The choice of a re-ranker's blend on rows that nothing has learned from: weight, prior, strength of repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mach.config import RerankingConfig, RerankingLoss
from mach.ordering import prior_terms, repeat_terms
from mach.reranker import Blend, combine

# Weight and prior that held-out rows choose from, from networks first to classifiers first, and at last for rare
# classes first, where none has many rows. The best of all lies near this path on every data set seen, and few choices
# are harder to mistake than many. Networks alone are no choice: where rows cannot tell, a little of both finds more of
# the rare classes. Classifiers that see pairs of features are worth more: their path begins in the middle. The usual
# blend of a path stays unless another one is better beyond chance.
Blends = tuple[tuple[float, float], ...]
RARE_FIRST: Blends = ((1.0, -1.0), (1.0, -1.6), (1.2, -2.5))
HINGE: Blends = (
    (0.1, -0.01),
    (0.2, -0.02),
    (0.3, -0.05),
    (0.5, -0.1),
    (0.7, -0.2),
    (1.0, -0.3),
    (1.5, -0.45),
    (2.0, -0.6),
    (3.0, -0.6),
    *RARE_FIRST,
)
PAIRS: Blends = ((0.5, -0.02), (0.8, -0.02), (1.2, -0.05), *HINGE[3:])
LOGISTIC: Blends = (
    (0.2, -0.01),
    (0.3, -0.02),
    (0.5, 0.0),
    (0.5, -0.05),
    (0.8, 0.0),
    (0.8, -0.1),
    (1.2, -0.02),
    (1.2, -0.2),
    (1.2, -0.45),
    (2.0, -0.45),
    (2.0, -0.6),
    (3.0, -0.6),
)
USUAL: dict[Blends, tuple[float, float]] = {PAIRS: (1.2, -0.05), LOGISTIC: (1.2, -0.02)}
REPEATS = (0.0, 2.0, -3.0, -12.0)  # strengths that held-out rows choose from: -12 puts what is known last,
SURE = 3.0  # which takes so many standard errors, as it answers otherwise than a user expects who asks a training row
LEAST_ROWS = 10  # that a choice answers otherwise than the usual one
RANKS = np.array([1 + 1 / 3 + 1 / 5, 1 / 3 + 1 / 5, 1 / 3 + 1 / 5, 1 / 5, 1 / 5]) / 3  # in the mean of P@1, P@3 and P@5


@dataclass(frozen=True, eq=False)
class Judged:
    """Candidates of held-out rows, with all that a blend weighs, and whether they are right.

    Attributes
    ----------
    ids_NC, scores_NC, margins_NC : int64 and float32 arrays of shape (N, C)
        Classes, their aggregates, and the margins of their classifiers.
    known_NC, alike_N : uint8 arrays of shape (N, C) and (N,)
        Training rows with a row's features: those that have the class, and all.
    right_NC : bool array of shape (N, C)
    counts_K : int64 array
        Training rows of every class.
    """

    ids_NC: NDArray[np.int64]
    scores_NC: NDArray[np.float32]
    margins_NC: NDArray[np.float32]
    known_NC: NDArray[np.uint8]
    alike_N: NDArray[np.uint8]
    right_NC: NDArray[np.bool_]
    counts_K: NDArray[np.int64]

    def gains(self, blend: Blend, loss: RerankingLoss) -> NDArray[np.float64]:
        """Of every row the mean of P@1, P@3 and P@5 by a blend, shape (N,)."""
        terms_NC = prior_terms(self.counts_K, blend.prior)[np.maximum(self.ids_NC, 0)]
        terms_NC = terms_NC + repeat_terms(self.known_NC, self.alike_N, blend.repeats)
        return precisions(combine(self.scores_NC, self.margins_NC, terms_NC, blend.weight, loss), self.right_NC)


def is_open(settings: RerankingConfig) -> bool:
    """Whether the settings leave some of the blend to held-out rows."""
    return None in (settings.weight, settings.prior, settings.repeats)


def given(settings: RerankingConfig, weight: float = 0.5, prior: float = -0.1, repeats: float = 0.0) -> Blend:
    """What the settings fix of the blend, and else what is given here."""
    return Blend(
        weight=weight if settings.weight is None else settings.weight,
        prior=prior if settings.prior is None else settings.prior,
        repeats=repeats if settings.repeats is None else settings.repeats,
    )


def choose(judged: Judged, settings: RerankingConfig) -> Blend:
    """The blend of largest gain: weight and prior first, then strength of repeats, and if that is not 0 those anew."""

    def best(choices: Sequence[Blend], usual: Blend | None) -> Blend:
        choices = list(dict.fromkeys(choices))  # settings that are fixed make some alike
        gains_AN = np.stack([judged.gains(blend, settings.loss) for blend in choices])
        errors_A = np.array([SURE if blend.repeats < 0 else 1.0 for blend in choices])
        return choices[best_of(gains_AN, None if usual is None else choices.index(usual), errors_A)]

    def best_at(repeats: float) -> Blend:
        path = blends_of(settings)
        usual = USUAL.get(path)
        choices = [given(settings, *pair, repeats) for pair in path]
        return best(choices, None if usual is None else given(settings, *usual, repeats))

    blend = best_at(0.0)
    if not judged.alike_N.any():
        return blend
    choices = [given(settings, blend.weight, blend.prior, repeats) for repeats in REPEATS]
    repeats = best(choices, choices[0]).repeats
    return best_at(repeats) if repeats else blend


def blends_of(settings: RerankingConfig) -> Blends:
    """Weights and priors that held-out rows choose from."""
    if settings.loss == "logistic":
        return LOGISTIC
    return PAIRS if settings.pairs else HINGE


def best_of(
    gains_AN: NDArray[np.float64], usual: int | None = None, errors_A: NDArray[np.float64] | float = 1.0
) -> int:
    """The choice of largest mean gain over rows; if one is usual, of those that gain enough more than it.

    Enough are so many standard errors, by ten rows and more.

    Examples
    --------
    >>> gains_AN = np.array([[0.0, 1, 0, 1], [0, 1, 1, 1]])
    >>> best_of(gains_AN), best_of(gains_AN, usual=0), best_of(np.tile(gains_AN, 10), usual=0)
    (1, 0, 1)
    """
    means_A = gains_AN.mean(axis=1)
    if usual is not None:
        more_AN = gains_AN - gains_AN[usual]
        least_A = errors_A * more_AN.std(axis=1) / np.sqrt(more_AN.shape[1])
        is_open_A = (more_AN.mean(axis=1) > least_A) & ((more_AN != 0).sum(axis=1) >= LEAST_ROWS)
        is_open_A[usual] = True
        means_A = np.where(is_open_A, means_A, -np.inf)
    return int(means_A.argmax())


def mean_precision(scores_NC: NDArray[np.float32], right_NC: NDArray[np.bool_]) -> float:
    """Mean of P@1, P@3 and P@5 of candidates in the order of their scores, and over the rows."""
    return float(precisions(scores_NC, right_NC).mean())


def precisions(scores_NC: NDArray[np.float32], right_NC: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of P@1, P@3 and P@5 of every row's candidates in the order of their scores, shape (N,)."""
    k = min(len(RANKS), scores_NC.shape[1])
    best_Nk = np.argpartition(scores_NC, -k, axis=1)[:, -k:]
    order_Nk = np.argsort(-np.take_along_axis(scores_NC, best_Nk, axis=1), axis=1, kind="stable")
    right_Nk = np.take_along_axis(right_NC, np.take_along_axis(best_Nk, order_Nk, axis=1), axis=1)
    return np.asarray(right_Nk @ RANKS[:k])
