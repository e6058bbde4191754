"""Rows gathered from CSR arrays, and the buckets of their classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel


@kernel()
def gather_rows(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    rows_N: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """Rows of a (memory-mapped) CSR matrix, in the given order, as a new CSR triple."""
    out_indptr = np.zeros(len(rows_N) + 1, np.int64)
    for n in range(len(rows_N)):
        out_indptr[n + 1] = out_indptr[n] + indptr[rows_N[n] + 1] - indptr[rows_N[n]]
    out_indices = np.empty(out_indptr[-1], np.int32)
    out_values = np.empty(out_indptr[-1], np.float32)
    for n in range(len(rows_N)):
        begin, out = indptr[rows_N[n]], out_indptr[n]
        for j in range(out_indptr[n + 1] - out):
            out_indices[out + j] = indices[begin + j]
            out_values[out + j] = values[begin + j]
    return out_indptr, out_indices, out_values


@kernel()
def batch_targets(
    counts_N: NDArray[np.int64], buckets_JM: NDArray[np.int32], n_buckets: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row, output) of the union of every row's buckets: output j B + b is bucket b of hash function j.

    ``buckets_JM`` holds the buckets of all rows' classes, one row's after another's.
    """
    n_functions, n_classes = buckets_JM.shape
    seen = np.full(n_functions * n_buckets, -1, np.int64)
    rows = np.empty(n_functions * n_classes, np.int64)
    outputs = np.empty(n_functions * n_classes, np.int64)
    n = begin = 0
    for row in range(len(counts_N)):
        for j in range(n_functions):
            for m in range(begin, begin + counts_N[row]):
                output = j * n_buckets + buckets_JM[j, m]
                if seen[output] != row:
                    seen[output] = row
                    rows[n], outputs[n] = row, output
                    n += 1
        begin += counts_N[row]
    return rows[:n], outputs[:n]
