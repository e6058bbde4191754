"""Compiled exact top-k over hashed bucket scores (numba); `mach.decoding` prepares the arrays and is the way in.

Two ideas carry the speed. The members of a bucket, and their buckets in every other repetition, are
arithmetic progressions modulo p, so implicit members need neither a table nor a multiplication. And a
class is looked up in a few repetitions first; what is missing is bounded by the repetitions' frontiers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

LENGTH = 256  # members handled at once: their partial scores stay in the first cache level
PEERS = 3  # repetitions looked up for a whole block before single classes are followed
BLOCK = 64  # buckets under one node of the tournament that yields the largest unopened bucket
UNKNOWN = np.float32(-np.inf)


class Index(NamedTuple):
    """Where classes live: the arrays of one assignment, of either kind (the other kind's are empty).

    ``peer_steps_RGL[r, g, j]`` is ``j`` steps of the progression, in repetition ``(r + g) % R``, that the
    members of one bucket of repetition ``r`` run through; ``scan_steps_RL`` belongs to classes 0, 1, 2, ...
    """

    is_table: bool
    n_classes: int
    n_buckets: int
    prime: int
    multipliers_R: Any  # int64
    offsets_R: Any  # int64
    inverses_R: Any  # int64
    n_peers: int
    peer_steps_RGL: Any  # uint32
    peers_RGK: Any
    scan_steps_RL: Any  # uint32
    table_RK: Any  # uint16 or uint32
    table_KR: Any  # the same, class by class
    firsts_RB1: Any  # int64
    members_RK: Any  # int32


class Rule(NamedTuple):
    """How values become a score: ``gain * sum / R + shift``, or (``n_needed > 0``) an order statistic."""

    n_needed: int  # 0: sum; otherwise the number of values that must reach a score for the class to reach it
    gain: float
    shift: float


@njit(cache=True, inline="always")
def _bucket(index, r, k):
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


@njit(cache=True)
def _aggregate(row_R, rule):
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


@njit(cache=True)
def _worse(score, k, other_score, other_k):
    return score < other_score or (score == other_score and k > other_k)


@njit(cache=True)
def _sift_down(ids, scores, n):
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


@njit(cache=True)
def _offer(ids, scores, k, score):
    """Let class k replace the worst entry when it is better and not there yet (a class can be met twice)."""
    if not _worse(scores[0], ids[0], score, k):
        return
    for i in range(len(ids)):
        if ids[i] == k:
            return
    ids[0], scores[0] = k, score
    _sift_down(ids, scores, len(ids))


@njit(cache=True)
def _sort_heap(ids, scores):
    for last in range(len(ids) - 1, 0, -1):
        ids[0], ids[last] = ids[last], ids[0]
        scores[0], scores[last] = scores[last], scores[0]
        _sift_down(ids, scores, last)


@njit(cache=True, fastmath={"nsz", "nnan"})
def _fill_tournament(values_RB, work_RB, tops_RM):
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


@njit(cache=True, fastmath={"nsz", "nnan"})
def _max(values):
    top = UNKNOWN
    for i in range(len(values)):
        top = max(top, values[i])
    return top


@njit(cache=True)
def _position(values, value):
    for i in range(len(values)):
        if values[i] == value:
            return i
    return -1


@njit(cache=True)
def _pop(work_B, tops_M, top):
    """Take the largest unopened bucket, whose value is ``top``, out of the tournament."""
    m = _position(tops_M, top)
    block = work_B[m * BLOCK : m * BLOCK + BLOCK]
    i = _position(block, top)
    block[i] = UNKNOWN
    tops_M[m] = _max(block)
    return m * BLOCK + i


@njit(cache=True, fastmath={"nsz", "nnan"})
def _add_progression(sums_L, n, values_B, start, steps_L, prime):
    """Add the values of n classes whose images run through a progression modulo the prime."""
    B = len(values_B)
    p = np.uint32(prime)
    z0 = np.uint32(start)
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


@njit(cache=True, fastmath={"nsz", "nnan"})
def _add_listed(sums_L, n, values_B, buckets):
    for j in range(n):
        sums_L[j] += values_B[np.uint64(buckets[j])]


@njit(cache=True)
def _survivors(sums_L, n, needed, hits_L):
    """Positions whose sum reaches ``needed``; most blocks have none, which one vectorised maximum shows."""
    if _max(sums_L[:n]) < needed:
        return 0
    n_hits = 0
    for j in range(n):
        hits_L[n_hits] = j
        n_hits += sums_L[j] >= needed
    return n_hits


@njit(cache=True)
def _cutoff(score, rule, n_repetitions, slack):
    """Sum (or value) below which no class can reach ``score``; the slack covers every rounding."""
    if score == UNKNOWN or rule.n_needed > 0:
        return np.float64(score)
    return (score - rule.shift) / rule.gain * n_repetitions - slack


@njit(cache=True)
def _follow(values_RB, index, rule, frontier_R, bound, cut, r, k, row_R):
    """Look class k up, from repetition r on, until it cannot reach the cutoff any more (then False)."""
    n = len(row_R)
    misses = 0
    for i in range(n):
        s = r + i if r + i < n else r + i - n
        value = values_RB[s, _bucket(index, s, k)]
        row_R[s] = value
        if rule.n_needed == 0:
            bound += value - frontier_R[s]
            if bound < cut:
                return False
        else:
            misses += value < cut
            if misses > n - rule.n_needed:
                return False
    return True


@njit(cache=True)
def _visit(values_RB, index, rule, frontier_R, r, bucket, allowed_K, ids, scores, slack, state):
    """Score the members of one bucket of repetition r that may enter the heap; returns how many there were."""
    sums_L, hits_L, row_R = state
    R = len(row_R)
    if index.is_table:
        first = index.firsts_RB1[r, bucket]
        n_members = index.firsts_RB1[r, bucket + 1] - first
        origin = stride = 0
    else:
        first = 0
        n_members = (index.prime - bucket + index.n_buckets - 1) // index.n_buckets
        shifted = bucket - index.offsets_R[r]
        origin = (shifted + index.prime if shifted < 0 else shifted) * index.inverses_R[r] % index.prime
        stride = index.inverses_R[r] * index.n_buckets % index.prime
    bound = 0.0
    for s in range(R):
        bound += frontier_R[s]
    n_peers = index.n_peers if rule.n_needed == 0 else 0
    known = np.float64(values_RB[r, bucket])
    for g in range(1, n_peers + 1):
        known += frontier_R[(r + g) % R]
    for begin in range(0, n_members, LENGTH):
        n = min(LENGTH, n_members - begin)
        base = (origin + begin * stride) % index.prime
        cut = _cutoff(scores[0], rule, R, slack)
        sums_L[:n] = values_RB[r, bucket]
        for g in range(n_peers):
            s = (r + g + 1) % R
            if index.is_table:
                _add_listed(sums_L, n, values_RB[s], index.peers_RGK[r, g, first + begin : first + begin + n])
            else:
                start = (index.multipliers_R[s] * base + index.offsets_R[s]) % index.prime
                _add_progression(sums_L, n, values_RB[s], start, index.peer_steps_RGL[r, g], index.prime)
        n_hits = _survivors(sums_L, n, cut - (bound - known) if n_peers else UNKNOWN, hits_L)
        for h in range(n_hits):
            j = hits_L[h]
            k = (
                np.int64(index.members_RK[r, first + begin + j])
                if index.is_table
                else (base + j * stride) % index.prime
            )
            if k < index.n_classes and (len(allowed_K) == 0 or allowed_K[k]):
                cut = _cutoff(scores[0], rule, R, slack)
                if _follow(values_RB, index, rule, frontier_R, bound, cut, r, k, row_R):
                    _offer(ids, scores, k, _aggregate(row_R, rule))
    return n_members


@njit(cache=True)
def _choose(frontier_R, drops_R, rule):
    best = 0
    for r in range(1, len(frontier_R)):
        if drops_R[r] > drops_R[best]:
            best = r
    return best


@njit(cache=True)
def threshold(values_NRB, index, rule, allowed_K, budget, limit, mode, ids_Nk, scores_Nk, scored_N, opened_N, bound_N, surv):
    N, R, B = values_NRB.shape
    n_nodes = (B + BLOCK - 1) // BLOCK
    work_RB = np.full((R, n_nodes * BLOCK), UNKNOWN, dtype=np.float32)
    tops_RM = np.empty((R, n_nodes), dtype=np.float32)
    frontier_R = np.empty(R, dtype=np.float32)
    drops_R = np.empty(R, dtype=np.float32)
    opened_R = np.empty(R, dtype=np.int64)
    state = (np.empty(LENGTH, dtype=np.float32), np.empty(LENGTH + 1, dtype=np.int64), np.empty(R, dtype=np.float32))
    for q in range(N):
        values_RB = values_NRB[q]
        scale = _fill_tournament(values_RB, work_RB, tops_RM)
        slack = 2.0**-22 * R * R * (scale + abs(rule.shift))
        for r in range(R):
            frontier_R[r] = _max(tops_RM[r])
            drops_R[r] = np.float32(np.inf)
            opened_R[r] = 0
        ids, scores = ids_Nk[q], scores_Nk[q]
        n_scored = n_opened = 0
        turn = 0
        while True:
            if _aggregate(frontier_R, rule) < scores[0]:
                break
            if mode == 0:
                r = turn % R
            elif mode == 1:
                r = _choose(frontier_R, drops_R, rule)
            elif mode==3:
                r = np.argmin(frontier_R)
            else:
                r = np.argmax(frontier_R)
            turn += 1
            if n_scored > limit: break
            bucket = _pop(work_RB[r], tops_RM[r], frontier_R[r])
            n_scored += _visit(values_RB, index, rule, frontier_R, r, bucket, allowed_K, ids, scores, slack, state)
            n_opened += 1
            top = _max(tops_RM[r])
            drop = frontier_R[r] - top
            opened_R[r] += 1
            if opened_R[r]==1:
                drops_R[r] = drop
            else:
                drops_R[r] += np.float32(0.25) * (drop - drops_R[r])
            frontier_R[r] = top
            if top == UNKNOWN: break
        scored_N[q] = n_scored
        opened_N[q] = n_opened
        bound_N[q] = _aggregate(frontier_R, rule)
        _sort_heap(ids, scores)
