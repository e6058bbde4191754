"""Exact top-k of many queries by passes over all classes, sixteen queries side by side.

A class's sums for sixteen queries are sums of whole rows of their transposed values, so a lookup serves all sixteen.
What reaches the estimate of a query's k-th best sum, a few times k classes, is scored exactly; where fewer than k prove
to be as good, the query is left to `mach.sketch.kernels.search.search`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.sketch.kernels.lanes import LANES, add_listed, add_progression, lowest_bit, sum_rows, transpose
from mach.sketch.kernels.sorting import descending
from mach.sketch.kernels.sweep import (
    LENGTH,
    NO_CLASS,
    UNKNOWN,
    Index,
    Query,
    Rule,
    consider,
    least_sum,
    sift_down,
    slack_of,
    sweep,
    uncounted,
)

SAMPLE, STRIDE = 2048, 16  # about so many classes, or one in so many, give the estimate
SAMPLED = 8  # of so many blocks of classes one is looked at for an estimate of the k-th best score
MOST_HITS, HITS_A_BEST = 2048, 8  # of a query: so many, and so many times k more

Array = NDArray[Any]


@kernel()
def scan(values_NRP: Array, places_KR: Array, rule: Rule, outputs: tuple[Array, ...]) -> NDArray[np.bool_]:
    """Write the best classes of queries to the outputs (columns of `mach.sketch.answers.TopK`), those of sums alone.

    ``places_KR`` says where a class's values stand in a query's (R, P) of them. Returns which queries are certain; what
    was written for others is not to be used.
    """
    ids_Nk, scores_Nk, exact_N, n_scored_N, n_opened_N, bound_N = outputs
    (N, R, P), (K, k) = values_NRP.shape, (len(places_KR), ids_Nk.shape[1])
    stride = max(STRIDE, K // SAMPLE)
    n_above, slack = 2 * k // stride + 4, slack_of(R, rule)
    values_QV, values_VQ = np.full((LANES, R * P), UNKNOWN), np.empty((R * P, LANES), np.float32)
    zeros_Q, starts_Q, places = np.zeros(LANES, np.float32), np.empty(LANES, np.float32), places_KR.reshape(-1)
    sums, sample = np.empty((1, LANES), np.float32), np.empty((-(-K // stride), LANES), np.float32)
    hits_Q, n_hits_Q = np.empty((LANES, MOST_HITS + HITS_A_BEST * k), np.int32), np.empty(LANES, np.int64)
    found, order_2H = np.empty(hits_Q.shape[1], np.float32), np.empty((2, hits_Q.shape[1]), np.int32)
    best_QA, no_ids, certain_N = (
        np.empty((LANES, n_above), np.float32),
        np.zeros(n_above, np.int64),
        np.zeros(N, np.bool_),
    )
    for begin in range(0, N, LANES):
        n_queries = min(LANES, N - begin)
        values_QV[:n_queries] = values_NRP[begin : begin + n_queries].reshape(n_queries, R * P)
        transpose(values_QV, 0, LANES, values_VQ)
        for i in range(len(sample)):
            at = i * stride * R
            sum_rows(sample, i, zeros_Q, values_VQ, places, at, at + R)
        starts_Q[:] = UNKNOWN  # lanes without a query reach nothing
        if len(sample) >= n_above:
            best_QA[:] = UNKNOWN  # heaps: numpy's partition takes longer, and 6 s to compile
            for i in range(len(sample)):
                for q in range(n_queries):
                    if sample[i, q] > best_QA[q, 0]:
                        best_QA[q, 0] = sample[i, q]
                        sift_down(no_ids, best_QA[q], n_above)
            for q in range(n_queries):
                starts_Q[q] = -best_QA[q, 0]
        n_hits_Q[:] = 0
        for hit in range(K):
            mask: Any = sum_rows(sums, 0, starts_Q, values_VQ, places, hit * R, hit * R + R)
            while mask != 0:
                q = lowest_bit(mask)
                mask &= mask - np.uint32(1)
                if n_hits_Q[q] < hits_Q.shape[1]:
                    hits_Q[q, n_hits_Q[q]] = hit
                n_hits_Q[q] += 1
        for q in range(n_queries):
            n, n_hits = begin + q, min(n_hits_Q[q], hits_Q.shape[1])
            ids, scores = ids_Nk[n], scores_Nk[n]
            ids[:], scores[:] = NO_CLASS, UNKNOWN
            for i in range(n_hits):  # as `sweep.aggregate`
                total, at = 0.0, np.int64(hits_Q[q, i]) * R
                for r in range(R):
                    total += np.float64(values_QV[q, places[at + r]])
                found[i] = np.float32(rule.gain * (total / R) + rule.shift) + np.float32(0.0)  # not -0.0
            descending(found[:n_hits], order_2H)
            for i in range(min(k, n_hits)):  # of equal ones the class of smaller number is first
                ids[i], scores[i] = hits_Q[q, order_2H[0, i]], found[order_2H[0, i]]
            least = (np.float64(scores[k - 1]) - rule.shift) / rule.gain * R - slack  # a sum of the k-th, at least
            is_whole = starts_Q[q] > UNKNOWN and n_hits_Q[q] <= hits_Q.shape[1]
            certain_N[n] = is_whole and least - slack >= -starts_Q[q]
            exact_N[n], n_scored_N[n], n_opened_N[n], bound_N[n] = True, K, 0, scores[k - 1]
    return certain_N


@kernel()
def _likely_sum(query: Query, index: Index) -> Any:
    """A sum that about twice k classes reach, from every `SAMPLED`-th block of classes; -inf where k is too large."""
    n_blocks = (index.n_classes + SAMPLED * LENGTH - 1) // (SAMPLED * LENGTH)
    n_above = 2 * len(query.ids) // SAMPLED + 4
    if n_blocks * LENGTH < 8 * n_above:
        return -np.inf
    values_RP, steps_QRL, table_1RK, modulus = query.values_RP, index.steps_QRL, index.table_1RK, index.modulus
    R, sums = len(values_RP), np.zeros(n_blocks * LENGTH, dtype=np.float32)
    test = (UNKNOWN, UNKNOWN, False)
    n = 0
    for i in range(n_blocks):
        begin = i * SAMPLED * LENGTH
        n_block = min(LENGTH, index.n_classes - begin) // LANES * LANES
        for r in range(R):
            if index.is_table:
                for j in range(0, n_block, LANES):
                    add_listed(sums, n + j, values_RP, r, table_1RK, 0, r, begin + j, test)
            else:
                start = np.uint32((index.multipliers_R[r] * begin + index.offsets_R[r]) % index.prime)
                sums_of_block = sums[n:]  # steps are counted from the block's first class
                for j in range(0, n_block, LANES):
                    add_progression(sums_of_block, j, values_RP, r, steps_QRL, R, start, modulus, test)
        n += n_block
    if n < n_above:
        return -np.inf
    best, no_ids = np.full(n_above, UNKNOWN), np.zeros(n_above, np.int64)  # a heap: numpy's partition compiles for 6 s
    for i in range(n):
        if sums[i] > best[0]:
            best[0] = sums[i]
            sift_down(no_ids, best, n_above)
    return np.float64(best[0])


@uncounted
def _allows_most(allowed_K: Array) -> bool:
    """Whether an estimate of the k-th best score of all classes is one of those allowed; by a sample of the mask."""
    step, n_sampled, n_allowed = max(1, len(allowed_K) // LENGTH), 0, 0
    for k in range(0, len(allowed_K), step):
        n_sampled += 1
        n_allowed += allowed_K[k]
    return 4 * n_allowed >= 3 * n_sampled


@kernel()
def scan_alone(query: Query, index: Index, rule: Rule, tops_RM: Array) -> None:
    """Offer every class: the gather over all K. What a class lacks is bounded by the largest value of a repetition."""
    R = len(tops_RM)
    slopes_R, offsets_1R = np.ones(R), np.empty((1, R))
    rest = query.slack
    for r in range(R - 1, -1, -1):
        offsets_1R[0, r] = -rest
        largest: Any = UNKNOWN  # a loop: numba's own maxima and sums have every process import scipy.linalg
        for m in range(tops_RM.shape[1]):
            largest = max(largest, tops_RM[r, m])
        rest += largest
    if rule.n_needed > 0:
        slopes_R[:], offsets_1R[:] = 0.0, rule.n_needed - R - 0.5
    likely = -np.inf
    if rule.n_needed == 0 and _allows_most(query.allowed_K):
        likely = _likely_sum(query, index)
    _sweep_all(query, index, rule, slopes_R, offsets_1R, likely)
    if likely > -np.inf and not least_sum(query, rule) >= likely:  # a class below the estimate may be one of the best
        _sweep_all(query, index, rule, slopes_R, offsets_1R, -np.inf)


@uncounted
def _sweep_all(query: Query, index: Index, rule: Rule, slopes_R: Array, offsets_1R: Array, least_sum: float) -> None:
    R = len(slopes_R)
    n_swept = index.n_classes // LANES * LANES if index.is_table else index.n_classes  # lists of classes end there
    for k in range(n_swept, index.n_classes):
        consider(query, index, rule, k)
    for begin in range(0, n_swept, LENGTH):
        n = min(LENGTH, n_swept - begin)
        sweep(query, index, rule, R, begin, begin, n, np.float32(0), slopes_R, offsets_1R, least_sum)
