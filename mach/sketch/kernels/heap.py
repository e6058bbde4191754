"""The best k classes so far, as a heap with the worst of them first; equal scores by ascending class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

UNKNOWN = np.float32(-np.inf)  # the score of an empty entry
NO_CLASS = np.iinfo(np.int64).max  # its id: worse than every class

Array = NDArray[Any]

# Without reference counts, which numba else keeps by two atomic additions a mention of an array, inside loops too: for
# functions that allocate nothing and return no array.
uncounted = njit(cache=True, nogil=True, _nrt=False)  # type: ignore[call-overload]
# Called with dozens of arrays, each eight words on the stack: part of the caller instead.
inlined = njit(cache=True, nogil=True, _nrt=False, forceinline=True)  # type: ignore[call-overload]


@uncounted
def _worse(score: float, k: int, other_score: float, other_k: int) -> bool:
    return score < other_score or (score == other_score and k > other_k)


@uncounted
def _sift_down(ids: Array, scores: Array, n: int) -> None:
    """Restore the heap whose root is the worst entry after its root was replaced."""
    parent, k, score = 0, ids[0], scores[0]
    while 2 * parent + 1 < n:
        child = 2 * parent + 1
        if child + 1 < n and _worse(scores[child + 1], ids[child + 1], scores[child], ids[child]):
            child += 1
        if not _worse(scores[child], ids[child], score, k):
            break
        ids[parent], scores[parent] = ids[child], scores[child]
        parent = child
    ids[parent], scores[parent] = k, score


@uncounted
def offer(ids: Array, scores: Array, k: int, score: float) -> None:
    """Let class k replace the worst entry when it is better and not there yet (a class can be met twice)."""
    if not _worse(scores[0], ids[0], score, k):
        return
    for i in range(len(ids)):
        if ids[i] == k:
            return
    ids[0], scores[0] = k, score
    _sift_down(ids, scores, len(ids))


@uncounted
def sort_heap(ids: Array, scores: Array) -> None:
    """Turn the heap into a list, best first."""
    for last in range(len(ids) - 1, 0, -1):
        ids[0], ids[last] = ids[last], ids[0]
        scores[0], scores[last] = scores[last], scores[0]
        _sift_down(ids, scores, last)
