"""Likeness of a query and the text of a class: BM25 over the features that they share.

    sum over shared features f of  idf_f n (K1 + 1) / (n + K1 (1 - B + B length / mean length))

of a class's text that has f n times, each as often as the query has it (Robertson & Zaragoza, The probabilistic
relevance framework, 2009). How often that is follows from its values, which are counts times inverse row frequencies,
scaled to a length of 1. The index leads from features to classes and their weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.reranking.kernels.best import keep
from mach.sketch.kernels.sorting import sort

K1, B = 0.4, 0.75  # chosen on descriptions of embedded characters, whose texts are their names
CODES = 65_535
MOST_ENTRIES = 2**18  # of the index that a query reads, those of its rarest features; 0.1 to 0.5 ms
Array = NDArray[Any]


def weights_of(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    counts: NDArray[np.int64],
    n_features: int,
    others_D: NDArray[np.int64] | None = None,
    n_others: int = 0,
) -> NDArray[np.float64]:
    """Weights of the features of some texts, by how often each occurs in which.

    ``others_D`` says how many of ``n_others`` texts have each feature: then these are the corpus, else the texts.
    """
    sizes_K = np.diff(indptr)
    K = len(sizes_K)
    lengths_K = np.bincount(np.repeat(np.arange(K), sizes_K), counts, K)
    frequencies_D, n, mean = np.bincount(indices, minlength=n_features), K, lengths_K.mean()
    if others_D is not None:
        frequencies_D, n, mean = others_D, n_others, others_D.sum() / max(n_others, 1)
    idf_D = np.log(1 + (n - frequencies_D + 0.5) / (frequencies_D + 0.5))
    norms_K = K1 * (1 - B + B * lengths_K / max(mean, 1e-9))
    return np.asarray(idf_D[indices] * counts * (K1 + 1) / (counts + np.repeat(norms_K, sizes_K)))


def scratch_of(n_classes: int) -> tuple[Array, Array]:
    """Zeros for the sums of all classes, and room for those that a row shares a feature with."""
    return np.zeros(n_classes, np.float32), np.empty(min(n_classes, MOST_ENTRIES), np.int32)


@kernel(error_model="numpy")
def _add_up(
    csr: tuple[Array, ...], row: int, index: tuple[Array, ...], sum_K: Array, touched: Array
) -> tuple[int, np.float32]:
    """Add up the codes of a row's features for every class; returns how many classes share one, and the largest sum."""
    (indptr, indices, values), (offsets, classes, codes, counts_D) = csr, index
    begin, end = indptr[row], indptr[row + 1]
    sizes, once = np.empty(end - begin, np.int64), np.float32(0)
    for j in range(begin, end):
        if 0 <= indices[j] < len(counts_D):
            count = abs(values[j]) * counts_D[indices[j]]
            once = count if once == 0 or 0 < count < once else once
    for j in range(begin, end):  # rarest first: size and place in one number
        feature = indices[j]
        is_known = 0 <= feature < len(offsets) - 1
        sizes[j - begin] = ((offsets[feature + 1] - offsets[feature]) << 24 if is_known else 0) + j - begin
    sort(sizes)
    n, n_read, most = 0, 0, np.float32(0)
    for size in sizes:
        n_read += size >> 24
        if n_read > MOST_ENTRIES:
            break
        if size >> 24 == 0:
            continue
        j = begin + (size & 0xFFFFFF)
        feature, times = indices[j], np.float32(1)
        if values[j] != 0:  # else no training row has it, and nothing tells how often it is there
            times = max(np.rint(abs(values[j]) * counts_D[feature] / once), np.float32(1))
        for entry in range(offsets[feature], offsets[feature + 1]):
            k = classes[entry]
            if sum_K[k] == 0:
                touched[n] = k
                n += 1
            sum_K[k] += times * np.float32(codes[entry])
            most = max(most, sum_K[k])
    return n, most


@kernel(error_model="numpy")
def most_alike(csr: tuple[Array, ...], index: tuple[Array, ...], scratch: tuple[Array, Array], ids_NP: Array) -> None:
    """Write the classes that are most like each row, best first, of equal ones the first; -1 for none.

    ``scratch`` is of `scratch_of`, and is left as it was.
    """
    sum_K, touched = scratch
    best_P = np.empty(ids_NP.shape[1], np.float32)
    for row in range(len(csr[0]) - 1):
        n_touched, _ = _add_up(csr, row, index, sum_K, touched)
        ids_P = ids_NP[row]
        ids_P[:], best_P[:] = -1, -np.inf
        for i in range(n_touched):
            k = touched[i]
            keep(ids_P, best_P, k, sum_K[k])
            sum_K[k] = 0


@kernel(error_model="numpy")
def likeness_of(
    csr: tuple[Array, ...],
    index: tuple[Array, ...],
    totals_K: Array,
    scratch: tuple[Array, Array],
    ids_NC: Array,
    out_NC3: Array,
) -> None:
    """What a row and given classes share, in codes: the sum, its share of the row's largest, and of the class's own."""
    sum_K, touched = scratch
    for row in range(len(csr[0]) - 1):
        n_touched, most = _add_up(csr, row, index, sum_K, touched)
        for c in range(ids_NC.shape[1]):
            k = ids_NC[row, c]
            value = sum_K[k] if k >= 0 else np.float32(0)
            out_NC3[row, c, 0] = value
            out_NC3[row, c, 1] = value / max(most, np.float32(1))
            out_NC3[row, c, 2] = value / max(totals_K[k], np.float32(1)) if k >= 0 else np.float32(0)
        for i in range(n_touched):
            sum_K[touched[i]] = 0
