"""The blend: aggregate and a few signals, each with a strength, and the choice of the strengths on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mach.reranking.settings import FitSettings
from mach.reranking.signals.contract import BlendedSignal, Signal

WEIGHT, PRIOR = "weight", "prior"  # strengths of classifiers and prior, which are chosen together
UNTRIED = {WEIGHT: 0.5, PRIOR: -0.1, "repeats": 0.0}  # where no rows are held out
# Where rows are phrases of the classes' own texts, they cannot say what else is worth beside these (docs/log.md).
OF_DOCUMENTS = {WEIGHT: 0.0, PRIOR: 0.0, "repeats": 0.0, "mention": 0.0, "likeness": 100.0}
# Weight and prior that held-out rows choose from, from networks first to classifiers first, and at last for rare
# classes first, where none has many rows. The best of all lies near this path on every data set seen, and few choices
# are harder to mistake than many. Networks alone are no choice: where rows cannot tell, a little of both finds more of
# the rare classes. Classifiers that see pairs of features are worth more: their path begins in the middle. The usual
# blend of a path stays unless another one is better beyond chance.
Path = tuple[tuple[float, float], ...]
RARE_FIRST: Path = ((1.0, -1.0), (1.0, -1.6), (1.2, -2.5))
MIDDLE: Path = ((0.5, -0.1), (0.7, -0.2), (1.0, -0.3), (1.5, -0.45), (2.0, -0.6), (3.0, -0.6))
HINGE: Path = ((0.1, -0.01), (0.2, -0.02), (0.3, -0.05), *MIDDLE, *RARE_FIRST)
PAIRS: Path = ((0.5, -0.02), (0.8, -0.02), (1.2, -0.05), *MIDDLE, *RARE_FIRST)
LOGISTIC: Path = (
    *((0.2, -0.01), (0.3, -0.02), (0.5, 0.0), (0.5, -0.05), (0.8, 0.0), (0.8, -0.1)),
    *((1.2, -0.02), (1.2, -0.2), (1.2, -0.45), (2.0, -0.45), (2.0, -0.6), (3.0, -0.6)),
)
USUAL: dict[Path, tuple[float, float]] = {PAIRS: (1.2, -0.05), LOGISTIC: (1.2, -0.02)}
SURE = 3.0  # standard errors that a strength below 0 must gain: it answers otherwise than a user expects
LEAST_ROWS = 10  # that a choice answers otherwise than the usual one
RANKS = np.array([1 + 1 / 3 + 1 / 5, 1 / 3 + 1 / 5, 1 / 3 + 1 / 5, 1 / 5, 1 / 5]) / 3  # in the mean of P@1, P@3 and P@5


@dataclass(frozen=True)
class Blend:
    """Strengths of signals by their names on disk, such as ``{"weight": 0.5, "prior": -0.1, "repeats": 0}``."""

    strengths: Mapping[str, float]

    def of(self, signal: Signal) -> float:
        """The strength of a signal; 0 where the blend leaves it out."""
        return self.strengths.get(signal.strength, 0.0) if isinstance(signal, BlendedSignal) else 0.0

    def scores(
        self,
        scores_NC: NDArray[np.float32],
        ids_NC: NDArray[np.int64],
        signals: Sequence[Signal],
        columns: Callable[[Signal], NDArray[np.float32]],
    ) -> NDArray[np.float32]:
        """Aggregates and the terms of the signals, shape (N, C).

        Terms are at most 0, so no score exceeds its aggregate. Those of classifiers come first, then the sum of all
        others, so that stored runs keep their bits. Only signals with a strength are asked for their columns.
        """
        sum_NC = np.zeros_like(scores_NC)
        for signal in signals:
            if isinstance(signal, BlendedSignal) and (strength := self.of(signal)):
                terms_NC = signal.terms(columns(signal), ids_NC, strength)
                if signal.strength == WEIGHT:
                    scores_NC = scores_NC + terms_NC
                else:
                    sum_NC = sum_NC + terms_NC
        return scores_NC + sum_NC


@dataclass(frozen=True, eq=False)
class Trial:
    """Shortlists of held-out rows, on which blends are tried."""

    signals: Sequence[Signal]
    ids_NC: NDArray[np.int64]  # classes
    scores_NC: NDArray[np.float32]  # and their aggregates
    columns: Mapping[str, NDArray[np.float32]]  # of every signal that may have a strength, by its name
    right_NC: NDArray[np.bool_]  # whether a class is one of the row's own

    def gains(self, blend: Blend) -> NDArray[np.float64]:
        """Of every row the mean of P@1, P@3 and P@5 by a blend, shape (N,)."""
        return precisions(self.scores(blend), self.right_NC)

    def scores(self, blend: Blend) -> NDArray[np.float32]:
        """Scores by a blend, shape (N, C)."""
        return blend.scores(self.scores_NC, self.ids_NC, self.signals, lambda signal: self.columns[signal.name])

    def best(self, choices: Sequence[Blend], usual: int | None) -> Blend:
        """The blend of largest gain, see `best_of`; those of a strength below 0 have to be surer."""
        alone = [signal for signal in self.signals if isinstance(signal, BlendedSignal) and signal.choices]
        errors_A = np.array([SURE if any(blend.of(one) < 0 for one in alone) else 1.0 for blend in choices])
        return choices[best_of(np.stack([self.gains(blend) for blend in choices]), usual, errors_A)]


def choose(trial: Trial, settings: FitSettings, given: Mapping[str, float]) -> Blend:
    """The blend of largest gain: weight and prior first, then every other strength, and after each that is not 0 anew.

    The settings are those that classifiers were fitted with; strengths that are given are not chosen.
    """
    path = path_of(settings)
    usual = path.index(USUAL[path]) if path in USUAL else None
    alone = {one.strength: one for one in trial.signals if isinstance(one, BlendedSignal) and one.choices}
    others = dict.fromkeys(alone, 0.0) | dict(given)

    def best_on_path() -> Blend:
        return trial.best([Blend({WEIGHT: weight, PRIOR: prior, **others}) for weight, prior in path], usual)

    blend = best_on_path()
    for name, signal in alone.items():
        if name in given or not trial.columns[signal.name].any():
            continue
        others[name] = trial.best([Blend({**blend.strengths, name: one}) for one in signal.choices], 0).of(signal)
        blend = best_on_path() if others[name] else blend
    return blend


def path_of(settings: FitSettings) -> Path:
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


def precisions(scores_NC: NDArray[np.float32], right_NC: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of P@1, P@3 and P@5 of every row's candidates in the order of their scores, shape (N,)."""
    k = min(len(RANKS), scores_NC.shape[1])
    best_Nk = np.argpartition(scores_NC, -k, axis=1)[:, -k:]
    order_Nk = np.argsort(-np.take_along_axis(scores_NC, best_Nk, axis=1), axis=1, kind="stable")
    right_Nk = np.take_along_axis(right_NC, np.take_along_axis(best_Nk, order_Nk, axis=1), axis=1)
    return np.asarray(right_Nk @ RANKS[:k])
