"""The sparse input layer: batch gathering, forward product, and backward pass fused with its optimiser.

The optimiser is RMSprop with one second moment a *row* of weights, and row-lazy: only the rows of features that occur
in the batch are read, moved and written, so the cost of a step follows the batch's non-zeros and not D, and a weight
takes 4 bytes in training instead of Adam's 12. Every kernel runs on one thread and in a fixed order: results are
deterministic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.networks.kernels.memory import CACHE_LINE, mixed, narrow_at_random, prefetch, wide_vectors, widen
from mach.networks.kernels.rows import add_rows

Array = NDArray[Any]
DECAY, EPSILON = 0.999, 1e-9
AHEAD = 2  # features between asking for a row of weights and moving it


@kernel(error_model="numpy", fastmath={"contract"})
def sparse_forward(
    indptr: Array, indices: Array, values: Array, weight_DH: Array, scale_D: Array, bias_H: Array, out_NH: Array
) -> None:
    """``out = X @ weight + bias`` for CSR X and float32, bfloat16 or int8 weights; reads nnz * H weights.

    The rows of weights are those given times ``scale_D``, unless that is empty. Types, shapes and features are trusted:
    `mach.networks.stored` looks at those of a file, `mach.data.queries` at those of a query.
    """
    scaled = values
    if len(scale_D):
        scaled = np.empty(len(values), np.float32)
        for j in range(len(values)):
            scaled[j] = values[j] * scale_D[indices[j]]
    for n in range(len(indptr) - 1):
        for h in range(len(bias_H)):
            out_NH[n, h] = bias_H[h]
        add_rows(out_NH[n], scaled, indices, indptr[n], indptr[n + 1], weight_DH, True)


@kernel(error_model="numpy", fastmath={"contract"})
def sparse_forward_kept(
    csr: tuple[Array, Array, Array], kept_1M: Array, offsets: Array, scale_D: Array, bias_H: Array, out_NH: Array
) -> None:
    """`sparse_forward` for weights of `mach.networks.kernels.memory.to_kept`; reads a byte a weight that is there.

    What a damaged file puts beyond the last unit is added to that.
    """
    indptr, indices, values = csr
    kept, last, beyond = kept_1M[0], len(indices) - 1, np.uint64(out_NH.shape[1] - 1)
    for n in range(len(indptr) - 1):
        row = out_NH[n]
        for i in range(len(bias_H)):
            row[i] = bias_H[i]
        for j in range(indptr[n], indptr[n + 1]):
            ahead = indices[min(j + 2, last)]
            for p in range(max(offsets[ahead], 0), min(offsets[ahead + 1], len(kept)), 64):
                prefetch(kept_1M, 0, p)
            value = values[j] * scale_D[indices[j]]
            begin, end, h = offsets[indices[j]], offsets[indices[j] + 1], np.uint64(0)
            if not 0 <= begin <= end <= len(kept):
                continue
            own = kept[begin:end]  # from 0: every index that may be below is looked at, a quarter of the time
            for p in range(len(own)):
                h += np.uint64(own[p] >> np.uint8(4))  # the next one waits for nothing more
                row[min(h, beyond)] += value * np.float32(np.int32(own[p] & np.uint8(15)) - np.int32(8))


@kernel()
def transpose_batch(indptr: Array, indices: Array, values: Array, slot_D: Array) -> tuple[Array, Array, Array, Array]:
    """Columns that occur in a CSR batch: (features_U, offsets, rows, values), entries of a column in row order.

    ``slot_D`` is scratch of zeros, left as zeros; the features stand in order of first occurrence.
    """
    n_nonzeros = len(indices)
    features_U = np.empty(n_nonzeros, np.int32)
    counts_U = np.zeros(n_nonzeros, np.int64)
    n_unique = 0
    for j in range(n_nonzeros):
        feature = indices[j]
        if slot_D[feature] == 0:
            features_U[n_unique] = feature
            n_unique += 1
            slot_D[feature] = n_unique
        counts_U[slot_D[feature] - 1] += 1
    offsets = np.zeros(n_unique + 1, np.int64)
    for u in range(n_unique):
        offsets[u + 1] = offsets[u] + counts_U[u]
        counts_U[u] = offsets[u]
    rows = np.empty(n_nonzeros, np.int32)
    column_values = np.empty(n_nonzeros, np.float32)
    for n in range(len(indptr) - 1):
        for j in range(indptr[n], indptr[n + 1]):
            u = slot_D[indices[j]] - 1
            rows[counts_U[u]] = n
            column_values[counts_U[u]] = values[j]
            counts_U[u] += 1
    for u in range(n_unique):
        slot_D[features_U[u]] = 0
    return features_U[:n_unique], offsets, rows, column_values


@kernel(error_model="numpy", fastmath={"contract", "reassoc"})
def _mean_square(vector: Array) -> np.float32:
    total = np.float32(0.0)
    for h in range(len(vector)):
        total += vector[h] * vector[h]
    return total / np.float32(len(vector))


@kernel(error_model="numpy", fastmath={"contract"})
def sparse_backward(
    columns: tuple[Array, ...], grad_NH: Array, weight_DH: Array, square_D: Array, rate: float, seed: int
) -> None:
    """Gradient of ``X @ weight`` and one step of row-wise RMSprop on the rows that the batch touches.

    The columns of the batch are those of `transpose_batch`.

    ``square_D`` is the running mean of a row's mean squared gradient over the batches that touch it, started at 0 and
    not corrected for that: a feature's first steps are up to 30 times longer than its later ones and shrink as in
    Adagrad, so that features of a few rows get somewhere at all. Reads and writes 4 bytes a weight, or 2: bfloat16
    weights are rounded up or down at random, by a hash of position and ``seed``, so that steps too small to show add up
    on average.
    """
    wide_vectors()
    features_U, offsets, rows, column_values = columns
    width = weight_DH.shape[1]
    gradient_H = np.empty(width, np.float32)
    decay, gain, epsilon = np.float32(DECAY), np.float32(1.0 - DECAY), np.float32(EPSILON)
    squares_D1 = square_D.reshape(-1, 1)
    last = len(features_U) - 1
    for u in range(len(features_U)):
        ahead = features_U[min(u + AHEAD, last)]
        prefetch(squares_D1, ahead, 0)
        for h in range(0, width, CACHE_LINE // weight_DH.itemsize):
            prefetch(weight_DH, ahead, h)
        gradient_H[:] = np.float32(0.0)
        add_rows(gradient_H, column_values, rows, offsets[u], offsets[u + 1], grad_NH, False)
        feature = features_U[u]
        square = decay * square_D[feature] + gain * _mean_square(gradient_H)
        square_D[feature] = square
        weight_H, pace = weight_DH[feature], np.float32(rate / (np.sqrt(square) + epsilon))
        bits = mixed(np.uint32((seed + feature * 40503) & 0xFFFFFFFF)) >> np.uint32(16)  # uniform over rows and steps,
        for h in range(width):  # and within a row they are spread evenly (multiples of the golden ratio)
            random = np.uint32(bits + np.uint32(h) * np.uint32(40503))
            weight_H[h] = narrow_at_random(weight_H[h], widen(weight_H[h]) - pace * gradient_H[h], random)
