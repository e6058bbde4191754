"""What a decoder is asked for and what it answers: sets of classes that may be returned, and the best k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from mach.sketch.hashing import Assignment


@dataclass(frozen=True)
class TopK:
    """The best k classes of every query, with what is known about them.

    Attributes
    ----------
    ids_Nk : int64 array of shape (N, k)
        Classes by descending score, equal scores by ascending class; -1 where there are fewer than k.
    scores_Nk : float32 array of shape (N, k)
        Their aggregates; -inf beside an id of -1.
    exact_N : bool array of shape (N,)
        Whether these are certainly the best; only a budget can make it False.
    n_scored_N : int64 array of shape (N,)
        Members of opened buckets, plus K after a pass over all classes; a class met twice counts twice.
    n_opened_N : int64 array of shape (N,)
        Buckets opened, summed over the repetitions.
    bound_N : float32 array of shape (N,)
        The certificate: no allowed class outside `ids_Nk` scores above it.
    """

    ids_Nk: NDArray[np.int64]
    scores_Nk: NDArray[np.float32]
    exact_N: NDArray[np.bool_]
    n_scored_N: NDArray[np.int64]
    n_opened_N: NDArray[np.int64]
    bound_N: NDArray[np.float32]

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """One answer from the answers to consecutive parts of a batch."""
        return cls(*(np.concatenate(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))

    @classmethod
    def empty(cls, n_queries: int, k: int) -> TopK:
        """Uninitialised columns to write answers into."""
        ids_Nk, scores_Nk = np.empty((n_queries, k), np.int64), np.empty((n_queries, k), np.float32)
        exact_N, bound_N = np.empty(n_queries, np.bool_), np.empty(n_queries, np.float32)
        return cls(ids_Nk, scores_Nk, exact_N, np.empty(n_queries, np.int64), np.empty(n_queries, np.int64), bound_N)


class Subset:
    """Classes that may be returned, prepared once for any number of queries: of K by their ids, or by a mask (K,).

    Examples
    --------
    >>> Subset(5, ids=np.array([3, 1, 3])).mask_K.tolist()
    [False, True, False, True, False]
    """

    def __init__(
        self, n_classes: int, *, ids: NDArray[np.int64] | None = None, mask_K: NDArray[np.bool_] | None = None
    ) -> None:
        self.n_classes = n_classes
        self._given, self._mask_K = ids, mask_K
        self._buckets: WeakKeyDictionary[Any, NDArray[np.int32]] = WeakKeyDictionary()

    @cached_property
    def ids_C(self) -> NDArray[np.int64]:
        """Ids, ascending."""
        if self._given is not None:
            return np.unique(self._given).astype(np.int64)
        assert self._mask_K is not None, "one of the two is given"
        return np.flatnonzero(self._mask_K)

    @cached_property
    def mask_K(self) -> NDArray[np.bool_]:
        """Whether a class is in it; a byte a class."""
        if self._mask_K is not None:
            return np.ascontiguousarray(self._mask_K)
        mask_K = np.zeros(self.n_classes, np.bool_)
        mask_K[self.ids_C] = True
        return mask_K

    def buckets(self, assignment: Assignment) -> NDArray[np.int32]:
        """Buckets of its classes, shape (R, C), kept for every assignment object that asks."""
        if assignment not in self._buckets:
            self._buckets[assignment] = assignment.buckets(self.ids_C)
        return self._buckets[assignment]


def best_of(
    ids_K: NDArray[np.int64], scores_NK: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Best k of classes in ascending order with scores (N, K), and their scores; ties go to the smaller class."""
    order_NK = np.argsort(-scores_NK, axis=1, kind="stable")[:, :k]
    padding = ((0, 0), (0, k - order_NK.shape[1]))
    scores_Nk = np.take_along_axis(scores_NK, order_NK, axis=1)
    return np.pad(ids_K[order_NK], padding, constant_values=-1), np.pad(scores_Nk, padding, constant_values=-np.inf)
