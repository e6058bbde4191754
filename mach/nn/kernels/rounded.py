"""Which classes may be among the best: a scan of weights that are rounded to a byte."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel

Array = NDArray[Any]

BLOCK = 256  # classes that all rows pass before the next: 32 KB of them at H = 128, a first-level cache


@kernel(error_model="numpy", fastmath={"nnan", "nsz"})
def possible(
    codes_KH: Array,
    scale_K: Array,
    reach_K: Array,
    offset_K: Array,
    queries_NH: Array,
    query_scale_N: Array,
    query_reach_N: Array,
    slack_N: Array,
    k: int,
    ids_NM: Array,
    n_found_N: Array,
) -> None:
    """For every query, the classes whose score may be one of the k largest; their number is -1 where M are too few.

    The score of class j is within ``reach_K[j] * query_reach_N[n] + slack_N[n]`` of ``scale_K[j] * query_scale_N[n]``
    times the integer product of ``codes_KH[j]`` (int8) and ``queries_NH[n]`` (int16), plus ``offset_K[j]``, -inf for a
    class that may not be named. The k largest lower bounds so far are at least the least of what is the best.
    """
    N, K, M = len(queries_NH), len(codes_KH), ids_NM.shape[1]
    least_Nk = np.full((N, k), -np.inf, np.float32)  # ascending: the k largest lower bounds
    upper_NM = np.empty((N, M), np.float32)
    n_found_N[:] = 0
    total_B = np.empty(BLOCK, np.int32)
    score_B, upper_B = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for begin in range(0, K, BLOCK):
        end = min(begin + BLOCK, K)
        scale_B, reach_B, offset_B = scale_K[begin:end], reach_K[begin:end], offset_K[begin:end]
        for n in range(N):
            found = n_found_N[n]
            if found < 0:
                continue
            _products(codes_KH[begin:end], queries_NH[n], total_B)
            least, ids, upper = least_Nk[n], ids_NM[n], upper_NM[n]
            threshold = least[0]
            highest = np.float32(-np.inf)
            for b in range(end - begin):
                score_B[b] = np.float32(total_B[b]) * (scale_B[b] * query_scale_N[n]) + offset_B[b]
                upper_B[b] = score_B[b] + (reach_B[b] * query_reach_N[n] + slack_N[n])
                highest = max(highest, upper_B[b])
            if highest < threshold:
                continue
            for b in range(end - begin):
                if upper_B[b] < threshold or upper_B[b] == -np.inf:
                    continue
                lower = score_B[b] - (upper_B[b] - score_B[b])
                place = 0
                while place < k and least[place] < lower:
                    if place > 0:
                        least[place - 1] = least[place]
                    least[place] = lower
                    place += 1
                threshold = least[0]
                if found == M:
                    found = _kept(ids, upper, found, threshold)
                    if found > M // 2:
                        found = -1
                        break
                ids[found], upper[found] = begin + b, upper_B[b]
                found += 1
            n_found_N[n] = found
    for n in range(N):
        if n_found_N[n] > 0:
            n_found_N[n] = _kept(ids_NM[n], upper_NM[n], n_found_N[n], least_Nk[n, 0])


@kernel(error_model="numpy")
def _products(codes_BH: Array, query_H: Array, out_B: Array) -> None:
    """Into int32, and so without wider sums."""
    for b in range(len(codes_BH)):
        codes_H, total = codes_BH[b], np.int32(0)
        for h in range(len(codes_H)):
            total += np.int32(codes_H[h]) * np.int32(query_H[h])
        out_B[b] = total


@kernel(error_model="numpy")
def _kept(ids_M: Array, upper_M: Array, n: int, threshold: float) -> int:
    """Keep those of the first n whose upper bound is not below the threshold, in their order; how many they are."""
    n_kept = 0
    for i in range(n):
        if not upper_M[i] < threshold:
            ids_M[n_kept], upper_M[n_kept] = ids_M[i], upper_M[i]
            n_kept += 1
    return n_kept
