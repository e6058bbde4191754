"""Rules "a row with feature f has class k", by their confidence: the share of training rows with f that have k.

The confidence of a rule is ``n_fk / (n_f + 1)``, of n_f rows with the feature n_fk with the class as well (association
rules, Agrawal, Imielinski & Swami, SIGMOD 1993). One in the denominator keeps rules that few rows speak for below those
of many. What a table holds of it is rounded to 8 bits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.reranking.kernels.best import keep

if TYPE_CHECKING:
    from scipy.sparse import csr_array

LEAST_CONFIDENCE = 0.02  # of a rule that is kept: at most 50 a feature
CODES = 255
MOST_CONFIDENCE = np.float32(0.995)  # in a noisy or
BLOCK_PRODUCTS = 2**21  # pairs of a feature and a class of a row that are counted at once; some 50 MB
Array = NDArray[Any]


def count_rules(x_ND: csr_array, y_NK: csr_array, n_least: int) -> tuple[Array, Array, Array, Array]:
    """All rules of rows with features ``x_ND``, of which those other than 0 count, and ones at their classes ``y_NK``.

    Those are kept that ``n_least`` rows and more speak for, and a confidence of `LEAST_CONFIDENCE`.

    Returns offsets (int64, D + 1), classes (int32), confidences (uint8: times `CODES`) and supports n_f (int32, D);
    rules of feature f are at ``offsets[f]..offsets[f + 1]``, classes ascending.
    """
    from scipy.sparse import csr_array  # here, as queries load this module and need none of it

    x_DN = csr_array((x_ND.data != 0, x_ND.indices, x_ND.indptr), shape=x_ND.shape, dtype=np.float32).T.tocsr()
    x_DN.eliminate_zeros()
    supports = np.diff(x_DN.indptr).astype(np.int32)
    products = np.concatenate([[0], np.cumsum(np.diff(y_NK.indptr)[x_DN.indices])])[x_DN.indptr]
    cuts = np.searchsorted(products, np.arange(BLOCK_PRODUCTS, products[-1], BLOCK_PRODUCTS), "right")
    bounds = np.unique([0, *cuts.tolist(), len(supports)])
    parts, sizes = [], np.zeros(len(supports) + 1, np.int64)
    for begin, end in pairwise(bounds):
        counts = (x_DN[begin:end] @ y_NK).tocsr()
        counts.sort_indices()
        features = np.repeat(np.arange(begin, end), np.diff(counts.indptr))
        shares = counts.data / (supports[features] + np.float32(1))
        kept = (counts.data >= n_least) & (shares >= LEAST_CONFIDENCE)
        sizes[1:] += np.bincount(features[kept], minlength=len(supports))
        parts.append((counts.indices[kept].astype(np.int32), np.rint(CODES * shares[kept]).astype(np.uint8)))
    classes, confidences = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return np.cumsum(sizes), classes, confidences, supports


def scratch_of(n_classes: int) -> tuple[Array, Array, Array]:
    """Sums and places of all classes, zeros that kernels leave as zeros, and room for those that rules speak of."""
    return np.zeros(n_classes, np.float32), np.zeros(n_classes, np.int32), np.empty(n_classes + 1, np.int32)


@kernel(error_model="numpy")
def rules_for(
    rules: tuple[Array, ...],
    csr: tuple[Array, Array, Array],
    scratch: tuple[Array, ...],
    ids_NC: Array,
    out_NC5: Array,
) -> None:
    """What the rules that a query fulfils say of its candidates; 0 where there is none, and for ids of -1.

    ``out_NC5`` (float32) gets the largest confidence, the rows with that rule's feature (of equal ones the first), the
    second largest confidence, the sum of ``-log(1 - confidence)`` ("noisy or"), and the mean confidence over the
    query's features, weighted by their magnitudes. ``scratch`` is of `scratch_of`.
    """
    (offsets, classes, confidences, supports), (indptr, indices, values), (_, place_K, _) = rules, csr, scratch
    for n in range(len(indptr) - 1):
        ids_C, out_C5 = ids_NC[n], out_NC5[n]
        out_C5[:] = 0
        for c in range(len(ids_C)):
            if 0 <= ids_C[c] < len(place_K):
                place_K[ids_C[c]] = c + 1  # of an id that is asked for twice the last one
        total = np.float32(0)
        for j in range(indptr[n], indptr[n + 1]):
            f, weight = indices[j], abs(values[j])
            if weight == 0 or not 0 <= f < len(supports):
                continue
            total += weight
            begin, end = offsets[f], offsets[f + 1]
            if not 0 <= begin <= end <= len(classes):
                continue
            for rule in range(begin, end):
                c = place_K[classes[rule]] - 1
                if c < 0:
                    continue
                found, confidence = out_C5[c], np.float32(confidences[rule]) / np.float32(CODES)
                if confidence > found[0]:
                    found[2], found[0], found[1] = found[0], confidence, supports[f]
                elif confidence > found[2]:
                    found[2] = confidence
                found[3] -= np.log1p(-min(confidence, MOST_CONFIDENCE))
                found[4] += weight * confidence
        for c in range(len(ids_C)):
            last = place_K[ids_C[c]] - 1 if 0 <= ids_C[c] < len(place_K) else c
            for i in range(5):
                out_C5[c, i] = out_C5[last, i]
            if total > 0:
                out_C5[c, 4] /= total
        for c in range(len(ids_C)):
            if 0 <= ids_C[c] < len(place_K):
                place_K[ids_C[c]] = 0


@kernel(error_model="numpy")
def most_ruled(
    rules: tuple[Array, ...], csr: tuple[Array, Array, Array], scratch: tuple[Array, ...], ids_NP: Array
) -> None:
    """Write the classes of largest mean confidence for each row, best first; -1 for none.

    ``scratch`` is of `scratch_of`.
    """
    (offsets, classes, confidences, supports), (indptr, indices, values), (sum_K, _, found) = rules, csr, scratch
    best_P = np.empty(ids_NP.shape[1], np.float32)
    for n in range(len(indptr) - 1):
        ids_P, n_found = ids_NP[n], 0
        ids_P[:], best_P[:] = -1, -np.inf
        for j in range(indptr[n], indptr[n + 1]):
            f, weight = indices[j], abs(values[j])
            if weight == 0 or not 0 <= f < len(supports):
                continue
            begin, end = offsets[f], offsets[f + 1]
            if not 0 <= begin <= end <= len(classes):
                continue
            for rule in range(begin, end):
                k = classes[rule]
                found[n_found] = k
                n_found = min(n_found + (sum_K[k] == 0), len(sum_K))  # a code of 0 is damage
                sum_K[k] += weight * np.float32(confidences[rule])
        for i in range(n_found):
            keep(ids_P, best_P, found[i], sum_K[found[i]])
            sum_K[found[i]] = 0
