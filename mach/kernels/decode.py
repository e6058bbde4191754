"""Compiled exact top-k over hashed bucket scores (numba); `mach.decoding` prepares the arrays and is the way in.

Two ideas carry the speed. The members of a bucket, and their buckets in every other repetition, are arithmetic
progressions modulo p, so implicit members need neither a table nor a multiplication; sixteen are looked up at once.
And most of them are dropped after one look: write a score's least sum as one of R thresholds. Around the circle of
repetitions, a class that reaches the sum has a place from where on every partial sum of its values reaches the sum of
the thresholds so far (the cycle lemma; Qin & Xiao, "Pigeonring", PVLDB 12, 2018). So it is enough to open, in each
repetition, the buckets above its threshold, and to follow a member while its partial sums suffice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from mach.kernels.heap import NO_CLASS, UNKNOWN, inlined, offer, sort_heap, uncounted
from mach.kernels.lanes import BLOCK, LANES, add_listed, add_progression, fill, largest_below, lowest_bit, n_bits, prefetch, reaching

LENGTH = 256  # members handled at once: their partial sums and steps stay in the first cache level
LINE = 32  # entries of a list in a cache line, or half as many
HEAD_START = 16  # buckets of repetition 0 opened before the others
FIRST_DOUBT = 32  # once this part of the classes was met it is estimated how many will be, and at every doubling
HOPE = 1.2  # the estimate may exceed the limit by so much, as the k-th score rises
TOGETHER = 4  # of a repetition that part of its opened buckets is opened next: the values looked at stay in the cache
SAMPLED = 8  # of so many blocks of classes one is looked at for an estimate of the k-th best score

LOWEST = np.float32(-3e38)  # below every value, above the padding

Array = NDArray[Any]


class Index(NamedTuple):
    """Where classes live: the arrays of one assignment, of either kind (the other kind's are empty).

    Implicit: ``steps_QRL[q, r, j]`` is ``j`` steps of the progression that the members of one bucket of repetition
    ``q`` run through in repetition ``r``; for ``q = R`` that of the classes 0, 1, 2, ...
    Table: bucket ``b`` of ``r`` holds ``members_RK[r, firsts_RB1[r, b] : firsts_RB1[r, b + 1]]``, and ``peers_RGK[r, g]``
    are the buckets of these very members in repetition ``r + 1 + g`` modulo R, followed by 16 zeros.
    """

    is_table: bool
    n_classes: int
    n_buckets: int
    prime: int
    modulus: tuple[Any, Any, Any, Any]  # see `lanes.add_progression`
    multipliers_R: Array  # int64
    offsets_R: Array  # int64
    inverses_R: Array  # int64
    steps_QRL: Array  # uint32
    table_1RK: Array  # uint16 or uint32
    table_1KR: Array  # the same by class
    firsts_RB1: Array  # int64
    members_RK: Array  # int32
    peers_RGK: Array  # as table_1RK


class Rule(NamedTuple):
    """How values become a score: ``gain * sum / R + shift``, or (``n_needed > 0``) an order statistic."""

    n_needed: int  # 0: sum; otherwise the number of values that must reach a score for the class to reach it
    gain: float
    shift: float
    largest: float  # no value has a larger magnitude


class Query(NamedTuple):
    """One query under way: its values, the heap of its best classes so far, and scratch space."""

    values_RP: Array  # float32, transformed; rows end in -inf up to a multiple of `BLOCK`
    allowed_K: Array  # bool; empty when every class is allowed
    ids: Array  # int64; a heap with its worst entry first
    scores: Array  # float32
    slack: float  # above the error of any float32 sum of R values
    sums_L: Array  # float32: partial sums of a block of classes
    row_R: Array  # float32: values of one class
    hits_L: Array  # int64: places in a block that are left
    live_G: Array  # int64: first places of its groups of 16 with some left
    masks_G: Array  # uint32: which
    next_R: Array  # int64: largest unopened buckets


@uncounted
def _fill_row(row_R: Array, values_RP: Array, index: Index, k: int) -> None:
    """The values of one class; remainders by a float64 reciprocal, corrected, hence exact below 2**62."""
    if index.is_table:
        for r in range(len(row_R)):
            row_R[r] = values_RP[r, np.int64(index.table_1KR[0, k, r])]
        return
    prime, n_buckets, reciprocal = index.prime, index.n_buckets, 1.0 / index.prime
    multiplier, shift = np.int64(index.modulus[2]), np.int64(index.modulus[3])
    for r in range(len(row_R)):
        x = index.multipliers_R[r] * k + index.offsets_R[r]
        z = x - np.int64(np.float64(x) * reciprocal) * prime
        z += prime * (z < 0) - prime * (z >= prime)
        row_R[r] = values_RP[r, z - (z * multiplier >> shift) * n_buckets]


@uncounted
def _aggregate(row_R: Array, rule: Rule) -> Any:
    """Score of one class from its R values: float64 in the order of repetitions, rounded once."""
    n = len(row_R)
    if rule.n_needed == 0:
        total = 0.0
        for r in range(n):
            total += np.float64(row_R[r])
        return np.float32(rule.gain * (total / n) + rule.shift)
    if rule.n_needed == n:
        return _ranked(row_R, 0)
    return np.float32((np.float64(_ranked(row_R, (n - 1) // 2)) + np.float64(_ranked(row_R, n // 2))) / 2)


@uncounted
def _ranked(row_R: Array, rank: int) -> Any:
    """The value that would stand at this place if they were sorted."""
    for value in row_R:
        n_less, n_equal = 0, 0
        for other in row_R:
            n_less += other < value
            n_equal += other == value
        if n_less <= rank < n_less + n_equal:
            return value
    return UNKNOWN


@uncounted
def _fill_tournament(values_RP: Array, tops_RM: Array) -> None:
    """The largest value of every block of buckets."""
    R, P = values_RP.shape
    for r in range(R):
        for m in range(P // BLOCK):
            tops_RM[r, m] = largest_below(values_RP, r, m * BLOCK, np.float32(np.inf))


@uncounted
def _top(tops_RM: Array, r: int) -> Any:
    top = UNKNOWN
    for m in range(0, tops_RM.shape[1], BLOCK):
        top = max(top, largest_below(tops_RM, r, m, np.float32(np.inf)))
    return top


@inlined
def _advance(query: Query, index: Index, tops_RM: Array, r: int, frontier_R: Array, next_R: Array) -> None:
    """Take the largest bucket of r that is left out of the tournament; equal ones by ascending bucket."""
    values_RP, peers_RGK = query.values_RP, index.peers_RGK
    top, last = UNKNOWN, next_R[r]
    for m in range(0, tops_RM.shape[1], BLOCK):
        top = max(top, largest_below(tops_RM, r, m, np.float32(np.inf)))
    m, found = -LANES, np.uint32(0)
    while found == 0:
        m += LANES
        found = reaching(tops_RM, r, m, top)
    m += lowest_bit(found)
    bucket = m * BLOCK
    if last >= bucket and top == frontier_R[r]:
        bucket = last + 1
    frontier_R[r] = top
    if top == UNKNOWN:
        return
    while values_RP[r, bucket] != top:
        bucket += 1
    rest = largest_below(values_RP, r, m * BLOCK, top)
    for b in range(bucket + 1, m * BLOCK + BLOCK):
        if values_RP[r, b] == top:
            rest = top
    tops_RM[r, m], next_R[r] = rest, bucket
    if index.is_table:
        for g in range(min(2, peers_RGK.shape[1])):
            for place in range(index.firsts_RB1[r, bucket], index.firsts_RB1[r, bucket + 1], LINE):
                prefetch(peers_RGK, r, g, place)


@njit(cache=True, nogil=True, inline="always")
def _least_sum(query: Query, rule: Rule) -> Any:
    """Sum below which no class can replace one of the best; the slack covers every rounding."""
    score = np.float64(query.scores[0])
    if rule.n_needed > 0:
        return 0.0
    return (score - rule.shift) / rule.gain * len(query.row_R) - query.slack


@uncounted
def _consider(query: Query, index: Index, rule: Rule, k: int) -> None:
    if k >= index.n_classes or (len(query.allowed_K) > 0 and not query.allowed_K[k]):
        return
    values_RP, row_R = query.values_RP, query.row_R  # a count a mention, in the loop too
    _fill_row(row_R, values_RP, index, k)
    offer(query.ids, query.scores, k, _aggregate(row_R, rule))


@inlined
def _sweep(
    query: Query,
    index: Index,
    rule: Rule,
    q: int,
    place: int,
    base: int,
    n: int,
    value: float,
    slopes_R: Array,
    offsets_QR: Array,
    least_sum: float,
) -> None:
    """Offer those of n <= LENGTH classes whose partial sums suffice.

    They are members of one bucket of repetition q, the first at ``place`` of its list or ``base`` itself; or, for
    q = R, consecutive classes from both on. Partial sum i is at least ``offsets_QR[first, i] + slopes_R[i] * least sum``.
    """
    values_RP, sums_L, live_G, masks_G = query.values_RP, query.sums_L, query.live_G, query.masks_G
    scores = query.scores
    steps_QRL, peers_RGK, table_1RK, modulus = index.steps_QRL, index.peers_RGK, index.table_1RK, index.modulus
    table_1KR, members_RK, hits_L = index.table_1KR, index.members_RK, query.hits_L
    is_table, is_counting = index.is_table, rule.n_needed > 0
    R = len(values_RP)
    begin = 0 if q == R else 1  # the opened bucket's own value is known
    first = q if q < R else 0
    end = min(R, 1 + peers_RGK.shape[1]) if is_table and q < R else R
    known = np.float32(value)
    if is_counting and q < R:
        known = np.float32(0 if value >= scores[0] else -1)
    least = max(_least_sum(query, rule), least_sum)
    n_live = 0
    for j in range(0, n, LANES):
        fill(sums_L, j, known)
        live_G[n_live], masks_G[n_live] = j, (1 << min(LANES, n - j)) - 1
        n_live += 1
    for i in range(begin, end):
        s = first + i if first + i < R else first + i - R
        test = (np.float32(offsets_QR[first, i] + slopes_R[i] * least), scores[0], is_counting)
        n_groups, n_live = n_live, 0
        if not is_table:
            start = np.uint32((index.multipliers_R[s] * base + index.offsets_R[s]) % index.prime)
            for g in range(n_groups):
                j = live_G[g]
                mask = masks_G[g] & add_progression(sums_L, j, values_RP, s, steps_QRL, q, start, modulus, test)
                live_G[n_live], masks_G[n_live] = j, mask
                n_live += mask != 0
        else:
            lists, a, b = (peers_RGK, q, i - 1) if q < R else (table_1RK, 0, s)
            for g in range(n_groups):
                j = live_G[g]
                mask = masks_G[g] & add_listed(sums_L, j, values_RP, s, lists, a, b, place + j, test)
                live_G[n_live], masks_G[n_live] = j, mask
                n_live += mask != 0
        if n_live == 0:
            return
    stride = index.inverses_R[q] * index.n_buckets % index.prime if not is_table and q < R else 1
    n_hits = 0
    for g in range(n_live):
        mask = masks_G[g]
        while mask != 0:
            at = live_G[g] + lowest_bit(mask)
            mask &= mask - np.uint32(1)
            hits_L[n_hits] = at
            n_hits += 1
            if is_table:
                prefetch(table_1KR, 0, np.int64(members_RK[q, place + at]) if q < R else base + at, 0)
    for h in range(n_hits):
        at = hits_L[h]
        total = np.float64(sums_L[at])
        if total < offsets_QR[first, end - 1] + slopes_R[end - 1] * least:  # the k-th score has risen meanwhile
            continue
        if q == R:
            k = base + at
        elif is_table:
            k = np.int64(members_RK[q, place + at])
        else:
            k = (base + at * stride) % index.prime
        i = end
        while i < R:  # beyond the lists of peers
            s = first + i if first + i < R else first + i - R
            found = values_RP[s, np.int64(table_1KR[0, k, s])]
            total += (0.0 if found >= scores[0] else -1.0) if is_counting else np.float64(found)
            if total < offsets_QR[first, i] + slopes_R[i] * least:
                break
            i += 1
        if i == R:
            _consider(query, index, rule, k)
            least = max(_least_sum(query, rule), least_sum)


@inlined
def _visit(
    query: Query, index: Index, rule: Rule, r: int, bucket: int, slopes_R: Array, offsets_RR: Array
) -> None:
    """Offer every member of one bucket that its partial sums, from repetition r on, do not rule out."""
    value = query.values_RP[r, bucket]
    place, n_members, base, stride = _members(index, r, bucket)
    for begin in range(0, n_members, LENGTH):
        n = min(LENGTH, n_members - begin)
        _sweep(query, index, rule, r, place + begin, base, n, value, slopes_R, offsets_RR, -np.inf)
        base = (base + n * stride) % index.prime


@njit(cache=True, nogil=True, inline="always")
def _members(index: Index, r: int, bucket: int) -> Any:
    """Members of a bucket: place of the first in the list, number, and (implicit) first class and stride modulo p."""
    if index.is_table:
        place = index.firsts_RB1[r, bucket]
        return place, index.firsts_RB1[r, bucket + 1] - place, np.int64(0), np.int64(0)
    n_members = (index.prime - bucket + index.n_buckets - 1) // index.n_buckets
    base = (bucket - index.offsets_R[r]) % index.prime * index.inverses_R[r] % index.prime
    return np.int64(0), n_members, base, index.inverses_R[r] * index.n_buckets % index.prime


@njit(cache=True, nogil=True)
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
                for j in range(0, n_block, LANES):
                    add_progression(sums, n + j, values_RP, r, steps_QRL, R, start, modulus, test)
        n += n_block
    return np.float64(np.partition(sums[:n], n - n_above)[n - n_above]) if n >= n_above else -np.inf


@uncounted
def _allows_most(allowed_K: Array) -> bool:
    """Whether an estimate of the k-th best score of all classes is one of those allowed; by a sample of the mask."""
    step, n_sampled, n_allowed = max(1, len(allowed_K) // LENGTH), 0, 0
    for k in range(0, len(allowed_K), step):
        n_sampled += 1
        n_allowed += allowed_K[k]
    return 4 * n_allowed >= 3 * n_sampled


@njit(cache=True, nogil=True)
def _scan(query: Query, index: Index, rule: Rule, tops_RM: Array) -> None:
    """Offer every class: the gather over all K. What a class lacks is bounded by the largest value of a repetition."""
    R = len(tops_RM)
    slopes_R, offsets_1R = np.ones(R), np.empty((1, R))
    rest = query.slack
    for r in range(R - 1, -1, -1):
        offsets_1R[0, r] = -rest
        rest += tops_RM[r].max()
    if rule.n_needed > 0:
        slopes_R[:], offsets_1R[:] = 0.0, rule.n_needed - R - 0.5
    likely = -np.inf
    if rule.n_needed == 0 and _allows_most(query.allowed_K):
        likely = _likely_sum(query, index)
    _sweep_all(query, index, rule, slopes_R, offsets_1R, likely)
    if likely > -np.inf and not _least_sum(query, rule) >= likely:  # a class below the estimate may be one of the best
        _sweep_all(query, index, rule, slopes_R, offsets_1R, -np.inf)


@uncounted
def _sweep_all(
    query: Query, index: Index, rule: Rule, slopes_R: Array, offsets_1R: Array, least_sum: float
) -> None:
    R = len(slopes_R)
    n_swept = index.n_classes // LANES * LANES if index.is_table else index.n_classes  # lists of classes end there
    for k in range(n_swept, index.n_classes):
        _consider(query, index, rule, k)
    for begin in range(0, n_swept, LENGTH):
        n = min(LENGTH, n_swept - begin)
        _sweep(query, index, rule, R, begin, begin, n, np.float32(0), slopes_R, offsets_1R, least_sum)


@uncounted
def clip(probs_NRB: Array, low: float, high: float, is_odds: bool, values_NRP: Array) -> None:
    """Bucket scores between ``low`` (also of NaN) and ``high``, or the odds of these; rows are filled up with 1."""
    N, R, B = probs_NRB.shape
    one = np.float32(1)
    for n in range(N):
        for r in range(R):
            for b in range(B):
                value = probs_NRB[n, r, b]
                value = value if value > low else low
                value = value if value < high else high
                values_NRP[n, r, b] = value / (one - value) if is_odds else value
            for b in range(B, values_NRP.shape[2]):
                values_NRP[n, r, b] = one


@njit(cache=True, nogil=True)
def search(
    values_NRP: Array, index: Index, rule: Rule, allowed_K: Array, budget: int, limit: int, outputs: tuple[Array, ...]
) -> None:
    """Write the best classes of every query to the outputs (the columns of `mach.decoding.TopK`).

    The threshold algorithm runs until it has a certificate, would score more than ``budget`` classes, or
    has met more than ``limit``, or is bound to, and a scan is cheaper; a negative ``limit`` scans at once.
    """
    ids_Nk, scores_Nk, exact_N, n_scored_N, n_opened_N, bound_N = outputs
    N, R, P = values_NRP.shape
    n_nodes = (P // BLOCK + BLOCK - 1) // BLOCK * BLOCK
    tops_RM = np.full((R, n_nodes), UNKNOWN)
    frontier_R, row_R = np.empty(R, np.float32), np.empty(R, np.float32)
    opened_R, thresholds = np.empty(R, np.int64), (np.empty(R), np.empty(R), np.empty((R, R)))
    sums_L, hits_L = np.zeros(LENGTH, np.float32), np.empty(LENGTH, np.int64)
    live_G, masks_G = np.empty(LENGTH // LANES, np.int64), np.empty(LENGTH // LANES, np.uint32)
    next_R = np.empty(R, np.int64)
    slack = 2.0**-22 * R * R * (rule.largest + abs(rule.shift))
    for n in range(N):
        query = Query(values_NRP[n], allowed_K, ids_Nk[n], scores_Nk[n], slack, sums_L, row_R, hits_L, live_G, masks_G, next_R)
        n_scored, exact = _open(query, index, rule, budget, limit, tops_RM, frontier_R, opened_R, thresholds)
        if not exact and n_scored + index.n_classes <= budget:
            _fill_tournament(query.values_RP, tops_RM)
            _scan(query, index, rule, tops_RM)
            n_scored, exact = n_scored + index.n_classes, True
        exact_N[n], n_scored_N[n], n_opened_N[n] = exact, n_scored, opened_R.sum()
        bound_N[n] = query.scores[0] if exact else _bound(query, rule, frontier_R, thresholds)
        sort_heap(query.ids, query.scores)


@uncounted
def _open(
    query: Query,
    index: Index,
    rule: Rule,
    budget: int,
    limit: int,
    tops_RM: Array,
    frontier_R: Array,
    opened_R: Array,
    thresholds: tuple[Array, Array, Array],
) -> Any:
    """Open buckets; returns the number of their members, and whether the best classes are known."""
    values_RP, ids, scores = query.values_RP, query.ids, query.scores
    slopes_R, shifts_R, offsets_RR = thresholds
    ids[:], scores[:] = NO_CLASS, UNKNOWN
    _fill_tournament(values_RP, tops_RM)
    opened_R[:] = 0
    _thresholds(tops_RM, rule, query.slack, slopes_R, shifts_R, offsets_RR)
    next_R = query.next_R
    next_R[:] = -1
    for r in range(len(frontier_R)):
        _advance(query, index, tops_RM, r, frontier_R, next_R)
    n_scored, n_until_doubt = 0, index.n_classes // FIRST_DOUBT if index.n_classes <= budget else budget  # no scan
    r, n_opened, n_together = 0, 0, 0
    while True:
        if rule.n_needed == 0 and n_scored > n_until_doubt:
            if _n_to_open(query, rule, slopes_R[0], shifts_R) * (index.n_classes // index.n_buckets) > HOPE * limit:
                break
            n_until_doubt *= 2
        share = slopes_R[0] * _least_sum(query, rule)
        if n_opened >= n_together or frontier_R[r] == UNKNOWN or frontier_R[r] < share + shifts_R[r]:
            r = _next(query, rule, share, shifts_R, frontier_R, opened_R)
            if r < 0:
                return n_scored, True
            n_opened, n_together = 0, 1 + opened_R[r] // TOGETHER if rule.n_needed == 0 else 1
        n_opened += 1
        n_members = _members(index, r, next_R[r])[1]
        if n_scored + n_members > min(budget, limit):
            break
        n_scored += n_members
        _visit(query, index, rule, r, next_R[r], slopes_R, offsets_RR)
        opened_R[r] += 1
        _advance(query, index, tops_RM, r, frontier_R, next_R)
    return n_scored, False


@uncounted
def _n_to_open(query: Query, rule: Rule, share: float, shifts_R: Array) -> Any:
    """Buckets above the present thresholds."""
    values_RP, least, total = query.values_RP, share * _least_sum(query, rule), np.int64(0)
    for r in range(values_RP.shape[0]):
        threshold = np.float32(max(least + shifts_R[r], LOWEST))
        for b in range(0, values_RP.shape[1], LANES):
            total += n_bits(reaching(values_RP, r, b, threshold))
    return total


@uncounted
def _bound(query: Query, rule: Rule, frontier_R: Array, thresholds: tuple[Array, Array, Array]) -> Any:
    """A score that no class exceeds which is not among the best: it would be in an opened bucket and have been found."""
    slopes_R, shifts_R, _ = thresholds
    if rule.n_needed == 0:
        least = _least_sum(query, rule)
        for r in range(len(frontier_R)):
            frontier_R[r] = max(frontier_R[r], np.float32(slopes_R[0] * least + shifts_R[r]))
    return max(query.scores[0], _aggregate(frontier_R, rule))


@uncounted
def _thresholds(
    tops_RM: Array, rule: Rule, slack: float, slopes_R: Array, shifts_R: Array, offsets_RR: Array
) -> None:
    """Thresholds of the repetitions, ``least sum / R + shifts_R[r]``, and what partial sums i from each r on must reach.

    They differ as the repetitions' large values do.
    """
    R = len(shifts_R)
    mean, n = 0.0, 0
    for r in range(R):
        shifts_R[r], n = 0.0, 0
        while n < tops_RM.shape[1] and tops_RM[r, n] > UNKNOWN:
            shifts_R[r] += tops_RM[r, n]
            n += 1
        shifts_R[r] /= n
        mean += shifts_R[r] / R
        slopes_R[r] = (r + 1) / R
    for r in range(R):
        shifts_R[r] -= mean
    for r in range(R):
        total = -slack
        for i in range(R):
            total += shifts_R[(r + i) % R]
            offsets_RR[r, i] = total
    if rule.n_needed > 0:
        slopes_R[:], offsets_RR[:] = 0.0, rule.n_needed - R - 0.5


@inlined
def _next(query: Query, rule: Rule, share: float, shifts_R: Array, frontier_R: Array, opened_R: Array) -> int:
    """Repetition whose largest unopened bucket is opened next; -1 if every class that is left out is known to be worse.

    Repetition 0 goes ahead: it finds the good classes once, and a high k-th score makes the rest cheap.
    """
    is_empty = query.scores[0] == UNKNOWN
    if rule.n_needed > 0 and not is_empty and _aggregate(frontier_R, rule) < query.scores[0]:
        return -1
    best, fewest = -1, np.int64(2**62)
    for r in range(len(frontier_R)):
        if frontier_R[r] == UNKNOWN:
            if is_empty or rule.n_needed > 0:  # all classes were met, and none of them was dropped for its place
                return -1
        elif rule.n_needed > 0 or frontier_R[r] >= share + shifts_R[r]:
            if r == 0 and opened_R[0] < min(len(query.ids), HEAD_START):
                return 0
            if opened_R[r] < fewest:
                best, fewest = r, opened_R[r]
    return best
