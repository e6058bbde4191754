"""How rows are seen (`mach.data.rows`), compiled: cut, raised to a power, with products of their features.

A row's ``most`` features of largest magnitude, ``x_i``, give all products ``x_i x_j`` of i < j. With them a linear
classifier is quadratic. They are scaled to a vector `LENGTH` times as long as the row, so that they neither vanish
beside the features nor drown them, and hashed into `N_HASHED` features behind the row's own D: products that meet there
add up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.sketch.kernels.sorting import sort

N_HASHED = 2**20
LENGTH = 0.7
Array = NDArray[Any]


@kernel()
def keep_largest(
    indptr: NDArray[np.int64], indices: NDArray[np.int32], values: NDArray[np.float32], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """The entries of largest magnitude of every CSR row, at most so many, rescaled to the norm of the whole row.

    Of equal magnitudes the first are kept. Entries of value 0 do not count, and stay: they say that a word of a class
    is there, of which the rows knew nothing (`mach.data.text`).
    """
    out_indptr = np.zeros(len(indptr), np.int64)
    for n in range(len(indptr) - 1):
        n_zeros = 0
        for j in range(indptr[n], indptr[n + 1]):
            n_zeros += values[j] == 0
        out_indptr[n + 1] = out_indptr[n] + min(indptr[n + 1] - indptr[n] - n_zeros, most) + n_zeros
    out_indices, out_values = np.empty(out_indptr[-1], np.int32), np.empty(out_indptr[-1], np.float32)
    for n in range(len(indptr) - 1):
        begin, end, out = indptr[n], indptr[n + 1], out_indptr[n]
        n_equal, least, scale = end - begin, np.float32(-1.0), np.float32(1.0)
        if end - begin > most:
            sizes = np.empty(end - begin, np.float32)
            for j in range(begin, end):
                sizes[j - begin] = abs(values[j])
            sort(sizes)
            least, n_equal = sizes[len(sizes) - most], most
            square, square_of_kept = np.float32(0.0), np.float32(0.0)
            for i in range(len(sizes)):
                square += sizes[i] * sizes[i]
                if i >= len(sizes) - most:
                    square_of_kept += sizes[i] * sizes[i]
                n_equal -= sizes[i] > least
            if least > 0:
                scale = np.sqrt(square / square_of_kept)
        for j in range(begin, end):
            size = abs(values[j])
            if size > least or (size == least and n_equal > 0) or size == 0:
                n_equal -= size == least
                out_indices[out], out_values[out] = indices[j], values[j] * scale
                out += 1
    return out_indptr, out_indices, out_values


@kernel(error_model="numpy")
def raise_row(values: NDArray[np.float32], begin: int, end: int, power: float) -> None:
    """Values of one row to a power in place, signs kept, rescaled to the norm that they had."""
    before = after = 0.0
    for j in range(begin, end):
        size = abs(np.float64(values[j]))
        root = np.sqrt(size)  # faster than a power
        raised = root if power == 0.5 else size * root if power == 1.5 else size**power
        before, after = before + size * size, after + raised * raised
        values[j] = np.copysign(raised, values[j])
    scale = np.sqrt(before / after) if after > 0 else 1.0
    for j in range(begin, end):
        values[j] *= scale


@kernel()
def raise_values(indptr: NDArray[np.int64], values: NDArray[np.float32], power: float) -> NDArray[np.float32]:
    """A copy of the values of CSR rows, every row raised (`raise_row`)."""
    raised = values.copy()
    for n in range(len(indptr) - 1):
        raise_row(raised, indptr[n], indptr[n + 1], power)
    return raised


@kernel()
def hashed(i: int, j: int) -> Any:
    """Where the product of two features lies behind the D features, the same for (i, j) and (j, i)."""
    low, high = np.uint64(min(i, j)), np.uint64(max(i, j))
    key = low * np.uint64(0x9E3779B97F4A7C15) + high * np.uint64(0xC2B2AE3D27D4EB4F)
    key = (key ^ (key >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)  # as in SplitMix64's finaliser
    return np.int64((key ^ (key >> np.uint64(32))) % np.uint64(N_HASHED))


@kernel()
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


@kernel(error_model="numpy")
def with_pairs(
    indptr: Array, indices: Array, values: Array, rows: Array, most: int, n_features: int, power: float = 1.0
) -> tuple[Array, Array, Array]:
    """Some rows of a CSR matrix, raised (`raise_row`), each with the products of its ``most`` largest features.

    They have D + `N_HASHED` features, of which products are the last; where two products of a row meet, the feature
    stands there twice. With ``most`` 0 or 1 there are no products.
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
