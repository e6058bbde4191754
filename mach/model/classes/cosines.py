"""Which exemplars, rows that classes were given, resemble a query: cosines through an inverted index."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(cache=True, nogil=True)
def resembling(
    csr: tuple[Array, Array, Array],
    features: Array,
    offsets: Array,
    postings: Array,
    values: Array,
    least: float,
    most: int,
    n_exemplars: int,
) -> tuple[Array, Array, Array]:
    """Pairs of query and exemplar whose cosine is at least ``least``, which is above 0: the ``most`` closest a query.

    Equal cosines at the edge are all taken. ``csr`` are indptr, indices and values of the queries. ``features`` of all
    exemplars ascend; ``postings[offsets[i] : offsets[i + 1]]`` are the exemplars that have ``features[i]``, with their
    ``values``. Exemplars have length 1.

    Returns
    -------
    indptr_N1, exemplars, cosines : int64, int32 and float32 arrays
        In no order within a query.

    Notes
    -----
    Cost: the exemplars that share a feature with a query, once a shared feature; 12 bytes of scratch an exemplar.
    """
    indptr, indices, data = csr
    N = len(indptr) - 1
    sums_M, touched = np.zeros(n_exemplars, np.float32), np.empty(n_exemplars, np.int32)
    above_M = np.empty(n_exemplars, np.float32)
    indptr_N1, n_found = np.zeros(N + 1, np.int64), 0
    found, cosines = np.empty(64, np.int32), np.empty(64, np.float32)
    for n in range(N):
        n_touched, square = 0, np.float32(0)
        for j in range(indptr[n], indptr[n + 1]):
            square += data[j] * data[j]
            i = np.searchsorted(features, indices[j])
            if i == len(features) or features[i] != indices[j]:
                continue
            for p in range(offsets[i], offsets[i + 1]):
                m = postings[p]
                if sums_M[m] == 0:  # a sum that came back to 0 is listed twice, and found once
                    touched[n_touched % n_exemplars] = m
                    n_touched += 1
                sums_M[m] += data[j] * values[p]
        floor = np.float32(least) * np.sqrt(square)
        if n_touched > n_exemplars:  # sums came back to 0: look at all
            n_touched = n_exemplars
            for m in range(n_exemplars):
                touched[m] = m
        n_above = 0
        for i in range(n_touched):
            if sums_M[touched[i]] >= floor and sums_M[touched[i]] > 0:
                above_M[n_above] = sums_M[touched[i]]
                n_above += 1
        if n_above > most:
            floor = np.partition(above_M[:n_above], n_above - most)[n_above - most]
        for i in range(n_touched):
            m = touched[i]
            if sums_M[m] >= floor and sums_M[m] > 0:
                if n_found == len(found):
                    found = np.concatenate((found, np.empty_like(found)))
                    cosines = np.concatenate((cosines, np.empty_like(cosines)))
                found[n_found], cosines[n_found] = m, sums_M[m] / np.sqrt(square)
                n_found += 1
            sums_M[m] = 0
        indptr_N1[n + 1] = n_found
    return indptr_N1, found[:n_found].copy(), cosines[:n_found].copy()
