"""What a user may want of an answer beside its length, and the answer."""

from __future__ import annotations

from dataclasses import dataclass
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
        if not 0 <= self.tail < np.inf:
            raise ConfigError(f"tail {self.tail} must be at least 0 and finite: 1 ranks by propensity-scored precision")
        if self.budget is not None and self.budget < 0:
            raise ConfigError(f"budget {self.budget} must be at least 0")
        if self.repetitions is not None and self.repetitions < 1:
            raise ConfigError(f"repetitions {self.repetitions} must be at least 1")


DEFAULTS = Ask()


@dataclass(frozen=True)
class Answer(TopK):
    """The best k classes of every query, as `TopK`, and which repetitions they come from.

    Attributes
    ----------
    answered_NR : bool array of shape (N, R)
        Whether a repetition's scores went into the answer; only one kept in another process can be missing. Where the
        first so many repetitions were asked for, R is their number.
    """

    answered_NR: NDArray[np.bool_]

    @property
    def is_degraded(self) -> bool:
        """Whether a repetition was missing for some query; its answer is exact for those that were there."""
        return not self.answered_NR.all()
