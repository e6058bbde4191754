"""Kernels of explicit assignments: sums of bucket probabilities by class, and the least loaded of a class's choices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def add_probabilities(
    places: NDArray[np.int64], rows: NDArray[np.int64], probs_NO: NDArray[np.float32], sums_CO: NDArray[np.float32]
) -> None:
    """``sums_CO[places[i]] += probs_NO[rows[i]]`` for every pair, in their order; cost O(n O)."""
    for i in range(len(places)):
        for o in range(probs_NO.shape[1]):
            sums_CO[places[i], o] += probs_NO[rows[i], o]


@njit(cache=True, nogil=True)
def place_least_loaded(
    order_K: NDArray[np.int64], choices_KC: NDArray[Any], loads_K: NDArray[np.int64], n_buckets: int
) -> Any:
    """Every class, in the given order, into that of its C buckets with the least load so far; (K,) int32, O(K C).

    Of equally loaded ones it is the first of its row, the one that it prefers.
    """
    loads_B = np.zeros(n_buckets, np.int64)
    buckets_K = np.empty(len(order_K), np.int32)
    for k in order_K:
        best = np.int64(choices_KC[k, 0])
        for c in range(1, choices_KC.shape[1]):
            bucket = np.int64(choices_KC[k, c])
            if loads_B[bucket] < loads_B[best]:
                best = bucket
        buckets_K[k] = best
        loads_B[best] += loads_K[k]
    return buckets_K
