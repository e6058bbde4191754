"""Compiled exact top-k over hashed bucket scores (numba); `mach.decoding` prepares the arrays and is the way in.

Two ideas carry the speed. The members of a bucket, and their buckets in every other repetition, are
arithmetic progressions modulo p, so implicit members need neither a table nor a multiplication. And a
class is looked up in a few repetitions first; what is missing is bounded by the repetitions' frontiers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

LENGTH = 256  # members handled at once: their partial scores stay in the first cache level
FEW = 64  # one survivor in so many members is cheaper to follow alone than by blocks
HEAD_START = 16  # buckets of repetition 0 opened before the others
SAMPLED = 8  # of so many blocks of classes one is looked at for an estimate of the k-th best score
BLOCK = 64  # buckets under one node of the tournament that yields the largest unopened bucket
UNKNOWN = np.float32(-np.inf)
NO_CLASS = np.iinfo(np.int64).max  # the id of an empty heap entry: worse than every class

Array = NDArray[Any]


class Index(NamedTuple):
    """Where classes live: the arrays of one assignment, of either kind (the other kind's are empty).

    Implicit: ``steps_RSL[r, s, j]`` is ``j`` steps of the progression that the members of one bucket of
    repetition ``r`` run through in repetition ``s``; ``scan_steps_RL`` belongs to classes 0, 1, 2, ...
    Table: bucket ``b`` of ``r`` holds ``members_RK[r, firsts_RB1[r, b] : firsts_RB1[r, b + 1]]``, and
    ``peers_RGK[r, g]`` are the buckets of these very members in repetition ``r + 1 + g`` modulo R.
    """

    is_table: bool
    n_classes: int
    n_buckets: int
    prime: int
    multipliers_R: Array  # int64
    offsets_R: Array  # int64
    inverses_R: Array  # int64
    steps_RSL: Array  # uint32
    scan_steps_RL: Array  # uint32
    table_KR: Array  # uint16 or uint32
    firsts_RB1: Array  # int64
    members_RK: Array  # int32
    peers_RGK: Array  # as table_KR


class Rule(NamedTuple):
    """How values become a score: ``gain * sum / R + shift``, or (``n_needed > 0``) an order statistic."""

    n_needed: int  # 0: sum; otherwise the number of values that must reach a score for the class to reach it
    gain: float
    shift: float


class Query(NamedTuple):
    """One query under way: its values, the heap of its best classes so far, and scratch space."""

    values_RB: Array  # float32, transformed
    frontier_R: Array  # float32: values of the largest unopened buckets, above every class not met in r
    slack: float  # above the error of any float32 sum of R values
    allowed_K: Array  # bool; empty when every class is allowed
    ids: Array  # int64; a heap with its worst entry first
    scores: Array  # float32
    sums_L: Array  # float32: partial sums of a block of classes
    hits_L: Array  # int64, one longer: survivors of the block
    row_R: Array  # float32: values of one class


@njit(cache=True, nogil=True, inline="always")
def _bucket(index: Index, r: int, k: int) -> Any:
    """Bucket of one class; both remainders by a float64 reciprocal, corrected, hence exact below 2**62."""
    if index.is_table:
        return np.int64(index.table_KR[k, r])
    x = index.multipliers_R[r] * k + index.offsets_R[r]
    z = x - np.int64(np.float64(x) / index.prime) * index.prime
    if z < 0:
        z += index.prime
    elif z >= index.prime:
        z -= index.prime
    return z % index.n_buckets


@njit(cache=True, nogil=True)
def _aggregate(row_R: Array, rule: Rule) -> Any:
    """Score of one class from its R values: float64 in the order of repetitions, rounded once."""
    n = len(row_R)
    if rule.n_needed == 0:
        total = 0.0
        for r in range(n):
            total += np.float64(row_R[r])
        return np.float32(rule.gain * (total / n) + rule.shift)
    if rule.n_needed == n:
        return row_R.min()
    ordered = np.sort(row_R)
    return np.float32((np.float64(ordered[(n - 1) // 2]) + np.float64(ordered[n // 2])) / 2)


@njit(cache=True, nogil=True)
def _worse(score: float, k: int, other_score: float, other_k: int) -> bool:
    return score < other_score or (score == other_score and k > other_k)


@njit(cache=True, nogil=True)
def _sift_down(ids: Array, scores: Array, n: int) -> None:
    """Restore the heap whose root is the worst entry after its root was replaced."""
    parent, k, score = 0, ids[0], scores[0]
    while 2 * parent + 1 < n:
        child = 2 * parent + 1
        if child + 1 < n and _worse(scores[child + 1], ids[child + 1], scores[child], ids[child]):
            child += 1
        if not _worse(scores[child], ids[child], score, k):
            break
        ids[parent], scores[parent] = ids[child], scores[child]
        parent = child
    ids[parent], scores[parent] = k, score


@njit(cache=True, nogil=True)
def _offer(ids: Array, scores: Array, k: int, score: float) -> None:
    """Let class k replace the worst entry when it is better and not there yet (a class can be met twice)."""
    if not _worse(scores[0], ids[0], score, k):
        return
    for i in range(len(ids)):
        if ids[i] == k:
            return
    ids[0], scores[0] = k, score
    _sift_down(ids, scores, len(ids))


@njit(cache=True, nogil=True)
def _sort_heap(ids: Array, scores: Array) -> None:
    for last in range(len(ids) - 1, 0, -1):
        ids[0], ids[last] = ids[last], ids[0]
        scores[0], scores[last] = scores[last], scores[0]
        _sift_down(ids, scores, last)


@njit(cache=True, nogil=True, fastmath={"nsz", "nnan"})
def _fill_tournament(values_RB: Array, work_RB: Array, tops_RM: Array) -> Any:
    R, B = values_RB.shape
    scale = np.float32(0)
    for r in range(R):
        for m in range(tops_RM.shape[1]):
            top = UNKNOWN
            for b in range(m * BLOCK, min(B, m * BLOCK + BLOCK)):
                value = values_RB[r, b]
                work_RB[r, b] = value
                top = max(top, value)
                scale = max(scale, abs(value))
            tops_RM[r, m] = top
    return scale


@njit(cache=True, nogil=True, fastmath={"nsz", "nnan"})
def _max(values: Array) -> Any:
    top = UNKNOWN
    for i in range(len(values)):
        top = max(top, values[i])
    return top


@njit(cache=True, nogil=True)
def _pop(work_B: Array, tops_M: Array, top: float) -> int:
    """Take the largest unopened bucket, whose value is ``top``, out of the tournament."""
    m = 0
    while tops_M[m] != top:
        m += 1
    b = first = m * BLOCK
    while work_B[b] != top:
        b += 1
    work_B[b] = UNKNOWN
    tops_M[m] = _max(work_B[first : first + BLOCK])
    return b


@njit(cache=True, nogil=True, fastmath={"nsz", "nnan"})
def _add_progression(sums_L: Array, n: int, values_B: Array, start: int, steps_L: Array, prime: int) -> None:
    """Add the values of n classes whose images run through a progression modulo the prime."""
    B, p, z0 = len(values_B), np.uint32(prime), np.uint32(start)
    if B & (B - 1) == 0:
        mask = np.uint32(B - 1)
        for j in range(n):
            z = np.uint32(z0 + steps_L[j])
            z = min(z, np.uint32(z - p))  # below p the difference wraps to a larger number
            sums_L[j] += values_B[z & mask]
    else:
        reciprocal = 1.0 / B
        for j in range(n):
            z = np.uint32(z0 + steps_L[j])
            z = min(z, np.uint32(z - p))
            quotient = np.int32((np.float64(np.int32(z)) + 0.5) * reciprocal)  # exact: 0.5 / B exceeds any rounding
            sums_L[j] += values_B[np.int32(z) - quotient * np.int32(B)]


@njit(cache=True, nogil=True, fastmath={"nsz", "nnan"})
def _add_listed(sums_L: Array, n: int, values_B: Array, buckets: Array) -> None:
    for j in range(n):
        sums_L[j] += values_B[np.uint64(buckets[j])]


@njit(cache=True, nogil=True, fastmath={"nsz", "nnan"})
def _add_rows(sums_L: Array, n: int, values_B: Array, table_KR: Array, members: Array, s: int) -> None:
    for j in range(n):
        sums_L[j] += values_B[np.uint64(table_KR[np.uint64(members[j]), s])]


@njit(cache=True, nogil=True)
def _sum_rows(sums_L: Array, n: int, values_RB: Array, table_LR: Array) -> None:
    """Sums over all repetitions of n consecutive classes; scalar loads beat gather instructions here (measured)."""
    R, B = values_RB.shape
    values = values_RB.ravel()
    for j in range(n):
        total = np.float32(0)
        for r in range(R):
            total += values[np.uint64(r * B) + np.uint64(table_LR[j, r])]
        sums_L[j] = total


@njit(cache=True, nogil=True)
def _count(sums_L: Array, n: int, needed: float) -> Any:
    n_hits = np.int32(0)
    floor = np.float32(needed)
    for j in range(n):
        n_hits += np.int32(sums_L[j] >= floor)
    return n_hits


@njit(cache=True, nogil=True)
def _survivors(sums_L: Array, n: int, needed: float, hits_L: Array) -> Any:
    """Write the positions whose sum reaches ``needed`` to ``hits_L`` and return their number, without branches."""
    n_hits = 0
    floor = np.float32(needed)
    for j in range(n):
        hits_L[n_hits] = j
        n_hits += sums_L[j] >= floor
    return n_hits


@njit(cache=True, nogil=True, inline="always")
def _cutoff(score: float, rule: Rule, n_repetitions: int, slack: float) -> Any:
    """Sum (or value) below which no class can reach ``score``; the slack covers every rounding."""
    if score == UNKNOWN or rule.n_needed > 0:
        return np.float64(score)
    return (score - rule.shift) / rule.gain * n_repetitions - slack


@njit(cache=True, nogil=True, inline="always")
def _add_repetition(
    sums_L: Array, n: int, values_B: Array, index: Index, r: int, s: int, first: int, base: int
) -> None:
    """Add the values in repetition s of n members of a bucket of r, from list place ``first`` or class ``base`` on."""
    if not index.is_table:
        start = (index.multipliers_R[s] * base + index.offsets_R[s]) % index.prime
        _add_progression(sums_L, n, values_B, start, index.steps_RSL[r, s], index.prime)
        return
    g = s - r - 1 if s > r else s - r - 1 + len(index.peers_RGK)
    if g < index.peers_RGK.shape[1]:
        _add_listed(sums_L, n, values_B, index.peers_RGK[r, g, first : first + n])
    else:
        _add_rows(sums_L, n, values_B, index.table_KR, index.members_RK[r, first : first + n], s)


@njit(cache=True, nogil=True, inline="always")
def _consider(query: Query, index: Index, rule: Rule, bound: float, r: int, k: int) -> None:
    """Look class k up, from repetition r on, until it cannot reach the k-th score; offer it if that never happens.

    ``bound`` is the sum of the frontiers. A class met before may exceed one and be dropped: it was dealt with then.
    """
    if k >= index.n_classes or (len(query.allowed_K) > 0 and not query.allowed_K[k]):
        return
    values_RB, frontier_R, row_R = query.values_RB, query.frontier_R, query.row_R  # a count a mention, in the loop too
    R = len(row_R)
    cut = _cutoff(query.scores[0], rule, R, query.slack)
    misses = 0
    for i in range(R):
        s = r + i if r + i < R else r + i - R
        value = values_RB[s, _bucket(index, s, k)]
        row_R[s] = value
        bound += value - frontier_R[s]
        misses += value < cut
        if bound < cut if rule.n_needed == 0 else misses > R - rule.n_needed:
            return
    _offer(query.ids, query.scores, k, _aggregate(row_R, rule))


@njit(cache=True, nogil=True)
def _visit(query: Query, index: Index, rule: Rule, r: int, bucket: int) -> Any:
    """Offer every member of one bucket that the frontiers do not rule out; returns the number of members."""
    values_RB, sums_L, R = query.values_RB, query.sums_L, len(query.row_R)
    first, n_members, base, stride = _members(index, r, bucket)
    bound = np.float64(query.frontier_R.sum())
    for begin in range(0, n_members, LENGTH):
        n = min(LENGTH, n_members - begin)
        floor = np.float64(UNKNOWN)
        if rule.n_needed == 0 and query.scores[0] > UNKNOWN:
            sums_L[:n] = values_RB[r, bucket]
            floor = _cutoff(query.scores[0], rule, R, query.slack) - bound + query.frontier_R[r]
            for i in range(1, R):
                s = r + i if r + i < R else r + i - R
                _add_repetition(sums_L, n, values_RB[s], index, r, s, first + begin, base)
                floor += query.frontier_R[s]
                if _count(sums_L, n, floor) * FEW <= n:
                    break
        for h in range(_survivors(sums_L, n, floor, query.hits_L)):
            j = query.hits_L[h]
            k = int(index.members_RK[r, first + begin + j]) if index.is_table else (base + j * stride) % index.prime
            _consider(query, index, rule, bound, r, k)
        base = (base + n * stride) % index.prime
    return n_members


@njit(cache=True, nogil=True, inline="always")
def _members(index: Index, r: int, bucket: int) -> Any:
    """Members of a bucket: place of the first in the list, number, and (implicit) first class and stride modulo p."""
    if index.is_table:
        first = index.firsts_RB1[r, bucket]
        return first, index.firsts_RB1[r, bucket + 1] - first, np.int64(0), np.int64(0)
    n_members = (index.prime - bucket + index.n_buckets - 1) // index.n_buckets
    base = (bucket - index.offsets_R[r]) % index.prime * index.inverses_R[r] % index.prime
    return np.int64(0), n_members, base, index.inverses_R[r] * index.n_buckets % index.prime


@njit(cache=True, nogil=True)
def _sum_block(sums_L: Array, values_RB: Array, index: Index, begin: int) -> int:
    """Sums over all repetitions of the block of classes from ``begin`` on; returns their number."""
    n = min(LENGTH, index.n_classes - begin)
    if index.is_table:
        _sum_rows(sums_L, n, values_RB, index.table_KR[begin : begin + n])
        return n
    sums_L[:n] = 0
    for r in range(len(values_RB)):
        start = (index.multipliers_R[r] * begin + index.offsets_R[r]) % index.prime
        _add_progression(sums_L, n, values_RB[r], start, index.scan_steps_RL[r], index.prime)
    return n


@njit(cache=True, nogil=True)
def _next_block(sums_L: Array, values_RB: Array, index: Index, k0: int, floor: float) -> int:
    """First block of classes, from class k0 on, with a sum of at least ``floor``; its sums are left in ``sums_L``."""
    for begin in range(k0, index.n_classes, LENGTH):
        n = _sum_block(sums_L, values_RB, index, begin)
        if _max(sums_L[:n]) >= floor:
            return begin
    return index.n_classes


@njit(cache=True, nogil=True)
def _likely_floor(query: Query, index: Index, k: int) -> Any:
    """A sum that about twice k classes reach, from every `SAMPLED`-th block of classes; -inf where k is too large."""
    n_blocks = (index.n_classes + SAMPLED * LENGTH - 1) // (SAMPLED * LENGTH)
    n_above = 2 * k // SAMPLED + 4
    if n_blocks * LENGTH < 8 * n_above:
        return UNKNOWN
    sums = np.empty(n_blocks * LENGTH, dtype=np.float32)
    n = 0
    for i in range(n_blocks):
        n_block = _sum_block(query.sums_L, query.values_RB, index, i * SAMPLED * LENGTH)
        sums[n : n + n_block] = query.sums_L[:n_block]
        n += n_block
    return np.partition(sums[:n], n - n_above)[n - n_above] if n >= n_above else UNKNOWN


@njit(cache=True, nogil=True)
def _allows_most(allowed_K: Array) -> bool:
    """Whether an estimate of the k-th best score of all classes is one of those allowed; by a sample of the mask."""
    step, n_sampled, n_allowed = max(1, len(allowed_K) // LENGTH), 0, 0
    for k in range(0, len(allowed_K), step):
        n_sampled += 1
        n_allowed += allowed_K[k]
    return 4 * n_allowed >= 3 * n_sampled


@njit(cache=True, nogil=True)
def _scan(query: Query, index: Index, rule: Rule) -> None:
    """Offer every class: the gather over all K."""
    if (
        rule.n_needed == 0
        and query.scores[0] == UNKNOWN
        and _allows_most(query.allowed_K)
        and _scan_once(query, index, rule)
    ):
        return
    bound = np.float64(query.frontier_R.sum())
    k0, floor = 0, np.float64(UNKNOWN)
    while k0 < index.n_classes:
        if rule.n_needed == 0:
            floor = _cutoff(query.scores[0], rule, len(query.row_R), query.slack)
            k0 = _next_block(query.sums_L, query.values_RB, index, k0, floor)
        n = min(LENGTH, index.n_classes - k0)
        for h in range(_survivors(query.sums_L, n, floor, query.hits_L)):
            _consider(query, index, rule, bound, 0, k0 + query.hits_L[h])
        k0 += LENGTH


@njit(cache=True, nogil=True)
def _scan_once(query: Query, index: Index, rule: Rule) -> bool:
    """List the classes whose sums exceed an estimate and offer the best of them; False if the estimate was none."""
    k, sums_L = len(query.ids), query.sums_L
    least = _likely_floor(query, index, k)
    if least == UNKNOWN:
        return False
    ids, sums = np.empty(8 * k + 4 * LENGTH, dtype=np.int64), np.empty(8 * k + 4 * LENGTH, dtype=np.float32)
    n_listed = 0
    for begin in range(0, index.n_classes, LENGTH):
        n = _sum_block(sums_L, query.values_RB, index, begin)
        if _max(sums_L[:n]) < least:
            continue
        if n_listed + n > len(ids):
            return False
        for h in range(_survivors(sums_L, n, np.float64(least), query.hits_L)):
            k_listed = begin + query.hits_L[h]
            if len(query.allowed_K) == 0 or query.allowed_K[k_listed]:
                ids[n_listed], sums[n_listed] = k_listed, sums_L[query.hits_L[h]]
                n_listed += 1
    if n_listed < k:
        return False
    cut = np.float64(np.partition(sums[:n_listed], n_listed - k)[n_listed - k]) - 2 * query.slack
    if cut < least:  # a class that was not listed may be one of the best
        return False
    bound = np.float64(query.frontier_R.sum())
    for i in range(n_listed):
        if sums[i] >= cut:
            _consider(query, index, rule, bound, 0, ids[i])
    return True


@njit(cache=True, nogil=True)
def search(
    values_NRB: Array, index: Index, rule: Rule, allowed_K: Array, budget: int, limit: int, outputs: tuple[Array, ...]
) -> None:
    """Write the best classes of every query to the outputs (the columns of `mach.decoding.TopK`).

    The threshold algorithm runs until it has a certificate, would score more than ``budget`` classes, or
    has met more than ``limit`` and a scan is cheaper; a negative ``limit`` scans at once.
    """
    ids_Nk, scores_Nk, exact_N, n_scored_N, n_opened_N, bound_N = outputs
    N, R, B = values_NRB.shape
    n_nodes = (B + BLOCK - 1) // BLOCK
    work_RB = np.full((R, n_nodes * BLOCK), UNKNOWN, dtype=np.float32)
    tops_RM = np.empty((R, n_nodes), dtype=np.float32)
    frontier_R, row_R = np.empty(R, dtype=np.float32), np.empty(R, dtype=np.float32)
    opened_R = np.empty(R, dtype=np.int64)
    sums_L, hits_L = np.zeros(LENGTH, dtype=np.float32), np.empty(LENGTH + 1, dtype=np.int64)
    for q in range(N):
        ids, scores = ids_Nk[q], scores_Nk[q]
        ids[:], scores[:] = NO_CLASS, UNKNOWN
        scale = _fill_tournament(values_NRB[q], work_RB, tops_RM)
        slack = 2.0**-22 * R * R * (scale + abs(rule.shift))
        query = Query(values_NRB[q], frontier_R, slack, allowed_K, ids, scores, sums_L, hits_L, row_R)
        for r in range(R):
            frontier_R[r] = _max(tops_RM[r])
        opened_R[:] = 0
        n_scored, exact = 0, False
        while n_scored <= limit and not exact:
            # Repetition 0 goes ahead: it finds the good classes once, and a high k-th score makes the rest cheap.
            r = 0 if opened_R[0] < min(len(ids), HEAD_START) else int(np.argmin(opened_R))
            bucket = _pop(work_RB[r], tops_RM[r], frontier_R[r])
            if n_scored + _members(index, r, bucket)[1] > budget:
                break
            n_scored += _visit(query, index, rule, r, bucket)
            opened_R[r] += 1
            frontier_R[r] = _max(tops_RM[r])
            exact = frontier_R[r] == UNKNOWN or _aggregate(frontier_R, rule) < scores[0]
        if not exact and n_scored + index.n_classes <= budget:
            _scan(query, index, rule)
            n_scored, exact = n_scored + index.n_classes, True
        exact_N[q], n_scored_N[q], n_opened_N[q] = exact, n_scored, opened_R.sum()
        bound_N[q] = scores[0] if exact else max(scores[0], _aggregate(frontier_R, rule))
        _sort_heap(ids, scores)
