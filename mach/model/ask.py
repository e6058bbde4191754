"""What a user may want of an answer beside its length, and the answer."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.errors import ConfigError
from mach.sketch.answers import TopK

Allowed = Any  # see `Ask`


@dataclass(frozen=True)
class Ask:
    """The options of a query, as `MachModel.topk` takes them; ConfigError when one is out of range.

    Parameters
    ----------
    allowed : optional
        Classes that may be returned: ids or names, a bool array of shape (K,), the name of a stored subset, or what
        ``model.classes.subset`` prepared of these. None allows all.
    budget : int, optional
        Most trained classes to score a query; then the answer may be approximate, see `MachModel.search`.
    rerank : bool
        Whether the model's re-ranker, if it has one, orders the best classes.
    tail : float
        Favours rare classes by ``-tail * log(propensity)``: 0.5 to 1 suit PSP@k (`mach.sketch.terms.tail_terms`).
    repetitions : int, optional
        Use the first so many of the model's repetitions only: less work a query, less accuracy, as
        `MachModel.accuracy_curve` tells.

    Examples
    --------
    >>> Ask(tail=0.5).rerank
    True
    """

    allowed: Allowed = None
    budget: int | None = None
    rerank: bool = True
    tail: float = 0.0
    repetitions: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tail, bool) or not isinstance(self.tail, Real) or not 0 <= float(self.tail) < np.inf:
            raise ConfigError(f"tail {shown(self.tail)}: need a finite number of at least 0; 1 ranks by PSP@k")
        if self.budget is not None:
            whole("budget", self.budget, 0)
        if self.repetitions is not None:
            whole("repetitions", self.repetitions, 1)
        if not isinstance(self.rerank, bool | np.bool_):
            raise ConfigError(f"rerank {shown(self.rerank)}: need True or False")


DEFAULTS = Ask()


def whole(name: str, value: Any, least: int, most: int = 2**63 - 1, of: str = "") -> int:
    """An argument that must be a whole number within limits; ``of`` says what the upper one is.

    Raises
    ------
    ConfigError
        When it is another kind of thing, or out of range.

    Examples
    --------
    >>> whole("k", np.int32(5), 1, 26_296)
    5
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    limits = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most:,}"
    raise ConfigError(f"{name} {shown(value)}: need a whole number {limits}{of}")


def n_best(k: int | None, n_classes: int) -> int:
    """How many classes are asked for, by default 10; all where there are fewer."""
    return min(10 if k is None else whole("k", k, 1), n_classes)


def shown(value: Any) -> str:
    """An argument as a message shows it: what was typed, cut, and its type where that may be at fault."""
    text = repr(value)
    cut = text if len(text) <= 40 else text[:39] + "…"
    return " ".join(cut.split()) + ("" if isinstance(value, int | float) else f" ({type(value).__name__})")


@dataclass(frozen=True)
class Answer(TopK):
    """The best k classes of every query, as `TopK`, which repetitions they come from, and whether queries are known.

    Attributes
    ----------
    answered_NR : bool array of shape (N, R)
        Whether a repetition's scores went into the answer; only one kept in another process can be missing. Where the
        first so many repetitions were asked for, R is their number.
    known_N : bool array of shape (N,)
        Whether the model knows any feature of the query, or a class whose name or text has words of it. Where it knows
        none, as of an empty or foreign text, classes and scores say nothing of it, and probabilities are the classes'
        shares of the training rows.
    """

    answered_NR: NDArray[np.bool_]
    known_N: NDArray[np.bool_]

    @property
    def is_degraded(self) -> bool:
        """Whether a repetition was missing for some query; its answer is exact for those that were there."""
        return not self.answered_NR.all()


def by_chance(
    ids_Nk: NDArray[np.int64], chances_Nk: NDArray[np.float32], known_N: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Classes and their probabilities; those of queries that are not known in descending order of these.

    Scores say nothing of such a query, and order classes otherwise than their shares of the training rows do. Where a
    tail orders classes, it is to be kept: say that all are known.

    Examples
    --------
    >>> by_chance(np.array([[5, 7, 2, -1]]), np.array([[0.1, 0.0, 0.3, 0.0]]), np.array([False]))
    (array([[ 2,  5,  7, -1]]), array([[0.3, 0.1, 0. , 0. ]]))
    """
    if known_N.all():
        return ids_Nk, chances_Nk
    keys_Nk = np.where(known_N[:, None], -np.inf, np.where(ids_Nk < 0, np.inf, -chances_Nk))
    order_Nk = np.argsort(keys_Nk, axis=1, kind="stable")
    return np.take_along_axis(ids_Nk, order_Nk, 1), np.take_along_axis(chances_Nk, order_Nk, 1)
