"""Products of two features of a row as features of their own: with them a linear classifier is quadratic.

A row's ``most`` features of largest magnitude, ``x_i``, give all products ``x_i x_j`` of i < j. They are scaled to a
vector `LENGTH` times as long as the row, so that they neither vanish beside the features nor drown them, and hashed
into `N_HASHED` features behind the row's own D: feature pairs that meet there add up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from mach.kernels.sparse import raise_row

N_HASHED = 2**20
LENGTH = 0.7
Array = NDArray[Any]


@njit(cache=True, nogil=True)
def hashed(i: int, j: int) -> Any:
    """Where the product of two features lies behind the D features, the same for (i, j) and (j, i)."""
    low, high = np.uint64(min(i, j)), np.uint64(max(i, j))
    key = low * np.uint64(0x9E3779B97F4A7C15) + high * np.uint64(0xC2B2AE3D27D4EB4F)
    key = (key ^ (key >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)  # as in SplitMix64's finaliser
    return np.int64((key ^ (key >> np.uint64(32))) % np.uint64(N_HASHED))


@njit(cache=True, nogil=True)
def _largest(values: Array, begin: int, end: int, places: Array) -> Any:
    """Places of the values of largest magnitude, largest first, of equal ones the first; how many there are."""
    n = 0
    for j in range(begin, end):
        i = n
        while i > 0 and abs(values[places[i - 1]]) < abs(values[j]):
            i -= 1
        if i == len(places):
            continue
        n = min(n + 1, len(places))
        for other in range(n - 1, i, -1):
            places[other] = places[other - 1]
        places[i] = j
    return n


@njit(cache=True, nogil=True, error_model="numpy")
def with_pairs(
    indptr: Array, indices: Array, values: Array, rows: Array, most: int, n_features: int, power: float = 1.0
) -> tuple[Array, Array, Array]:
    """Some rows of a CSR matrix, each with the products of its ``most`` largest features behind its own features.

    Parameters
    ----------
    indptr, indices, values : int64, int32, float32 arrays
    rows : int array
    most : int
        0 or 1: the rows as they are.
    n_features : int
        D.
    power : float
        Rows are raised to it before, signs kept, and rescaled to the length that they had.

    Returns
    -------
    indptr, indices, values
        Of D + `N_HASHED` features. Where two pairs of a row meet, the feature stands there twice.
    """
    ends = np.zeros(len(rows) + 1, np.int64)
    for n in range(len(rows)):
        length = indptr[rows[n] + 1] - indptr[rows[n]]
        m = min(length, most)
        ends[n + 1] = ends[n] + length + m * (m - 1) // 2
    features, numbers = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
    places = np.empty(most, np.int64)
    for n in range(len(rows)):
        begin, end, at = indptr[rows[n]], indptr[rows[n] + 1], ends[n]
        own = at - begin  # from the place of a value to that of its number
        square = 0.0  # in float64, for products of huge or tiny values
        for j in range(begin, end):
            features[at], numbers[at] = indices[j], values[j]
            square += np.float64(values[j]) ** 2
            at += 1
        if power != 1.0:
            raise_row(numbers, begin + own, end + own, power)
        if most < 2:
            continue
        first, largest = at, 0.0
        m = _largest(values, begin, end, places)
        if m > 1:
            largest = np.float64(abs(numbers[places[0] + own])) * np.float64(abs(numbers[places[1] + own]))
        square_of_pairs = 0.0
        for i in range(m):
            for j in range(i):
                product = np.float64(numbers[places[i] + own]) * np.float64(numbers[places[j] + own])
                share = product / largest if largest > 0 else 0.0
                features[at] = n_features + hashed(indices[places[i]], indices[places[j]])
                numbers[at] = np.float32(share)
                square_of_pairs += share * share
                at += 1
        if square_of_pairs > 0:
            scale = LENGTH * np.sqrt(square / square_of_pairs)
            for j in range(first, at):
                numbers[j] = np.float32(numbers[j] * scale)
    return ends, features, numbers
