"""Compiled exact top-k over hashed bucket scores (numba); `mach.sketch.decoder` prepares the arrays and is the way in.

Two ideas carry the speed. The members of a bucket, and their buckets in every other repetition, are arithmetic
progressions modulo p, so implicit members need neither a table nor a multiplication; sixteen are looked up at once.
And most of them are dropped after one look: write a score's least sum as one of R thresholds. Around the circle of
repetitions, a class that reaches the sum has a place from where on every partial sum of its values reaches the sum of
the thresholds so far (the cycle lemma; Qin & Xiao, "Pigeonring", PVLDB 12, 2018). So it is enough to open, in each
repetition, the buckets above its threshold, and to follow a member while its partial sums suffice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.sketch.kernels.lanes import BLOCK, LANES, largest_below, lowest_bit, prefetch, reaching
from mach.sketch.kernels.scan import scan_alone
from mach.sketch.kernels.sweep import (
    LENGTH,
    NO_CLASS,
    UNKNOWN,
    Index,
    Query,
    Rule,
    aggregate,
    least_sum,
    slack_of,
    sort_heap,
    spliced,
    sweep,
    uncounted,
)

AHEAD = 128  # buckets by which lists are asked for ahead of their turn
LINE = 32  # entries of a list in a cache line, or half as many
HEAD_START = 16  # buckets of repetition 0 opened before the others
FIRST_DOUBT = 32  # once this part of the classes was met it is estimated how many will be, and at every doubling
HOPE = 1.2  # the estimate may exceed the limit by so much, as the k-th score rises
TOGETHER = 4  # of a repetition that part of its opened buckets is opened next: the values looked at stay in the cache
UNLIMITED = np.iinfo(np.int64).max // 2  # a budget above every number of classes
LOWEST = np.float32(-3e38)  # below every value, above the padding

Array = NDArray[Any]
Thresholds = tuple[Array, Array, Array]  # slopes, shifts and offsets, see `_thresholds`


@uncounted
def _fill_tournament(values_RP: Array, tops_RM: Array) -> None:
    """The largest value of every block of buckets."""
    R, P = values_RP.shape
    for r in range(R):
        for m in range(P // BLOCK):
            tops_RM[r, m] = largest_below(values_RP, r, m * BLOCK, np.float32(np.inf))


@spliced
def _ask_for(index: Index, r: int, bucket: int) -> None:
    """Prefetch the lists of a bucket that is opened soon."""
    if index.is_table:
        for g in range(index.peers_RGK.shape[1]):
            for place in range(index.firsts_RB1[r, bucket], index.firsts_RB1[r, bucket + 1], LINE):
                prefetch(index.peers_RGK, r, g, place)


@spliced
def _advance(query: Query, index: Index, tops_RM: Array, r: int, frontier_R: Array, next_R: Array) -> None:
    """Take the largest bucket of r that is left out of the tournament; equal ones by ascending bucket."""
    values_RP, last, top = query.values_RP, next_R[r], UNKNOWN
    for node in range(0, tops_RM.shape[1], BLOCK):
        top = max(top, largest_below(tops_RM, r, node, np.float32(np.inf)))
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
    _ask_for(index, r, bucket)


@spliced
def _visit(query: Query, index: Index, rule: Rule, r: int, bucket: int, slopes_R: Array, offsets_RR: Array) -> None:
    """Offer every member of one bucket that its partial sums, from repetition r on, do not rule out."""
    value = query.values_RP[r, bucket]
    place, n_members, base, stride = _members(index, r, bucket)
    for begin in range(0, n_members, LENGTH):
        n = min(LENGTH, n_members - begin)
        sweep(query, index, rule, r, place + begin, base, n, value, slopes_R, offsets_RR, -np.inf)
        base = (base + n * stride) % index.prime


@spliced
def _members(index: Index, r: int, bucket: int) -> Any:
    """Members of a bucket: place of the first in the list, number, and (implicit) first class and stride modulo p."""
    if index.is_table:
        place = index.firsts_RB1[r, bucket]
        return place, index.firsts_RB1[r, bucket + 1] - place, np.int64(0), np.int64(0)
    n_members = (index.prime - bucket + index.n_buckets - 1) // index.n_buckets
    base = (bucket - index.offsets_R[r]) % index.prime * index.inverses_R[r] % index.prime
    return np.int64(0), n_members, base, index.inverses_R[r] * index.n_buckets % index.prime


@kernel()
def search(
    values_NRP: Array, index: Index, rule: Rule, allowed_K: Array, budget: int, limit: int, outputs: tuple[Array, ...]
) -> None:
    """Write the best classes of every query to the outputs (the columns of `mach.sketch.answers.TopK`).

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
    slack = slack_of(R, rule)
    for n in range(N):
        query = Query(
            values_NRP[n], allowed_K, ids_Nk[n], scores_Nk[n], slack, sums_L, row_R, hits_L, live_G, masks_G, next_R
        )
        n_scored, exact = _open(query, index, rule, budget, limit, tops_RM, frontier_R, opened_R, thresholds)
        if not exact and n_scored + index.n_classes <= budget:
            _fill_tournament(query.values_RP, tops_RM)
            scan_alone(query, index, rule, tops_RM)
            n_scored, exact = n_scored + index.n_classes, True
        exact_N[n], n_scored_N[n], n_opened_N[n] = exact, n_scored, 0
        for r in range(R):
            n_opened_N[n] += opened_R[r]
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
    thresholds: Thresholds,
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
            n_to_meet = _n_to_open(query, rule, slopes_R[0], shifts_R) * (index.n_classes // index.n_buckets)
            if n_to_meet > HOPE * limit:
                break
            if n_to_meet <= limit and budget == UNLIMITED and query.scores[0] > UNKNOWN:
                return _open_rest(query, index, rule, n_scored, frontier_R, opened_R, thresholds), True
            n_until_doubt *= 2
        share = slopes_R[0] * least_sum(query, rule)
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


@spliced
def _open_rest(
    query: Query, index: Index, rule: Rule, n_scored: int, frontier_R: Array, opened_R: Array, thresholds: Thresholds
) -> Any:
    """Open all buckets above the thresholds in the order they lie in; returns the number of members met in all."""
    values_RP, next_R = query.values_RP, query.next_R
    slopes_R, shifts_R, offsets_RR = thresholds
    mask: Any
    for r in range(values_RP.shape[0]):
        threshold = slopes_R[0] * least_sum(query, rule) + shifts_R[r]
        for b in range(0, values_RP.shape[1], LANES):
            if index.is_table and b + AHEAD < values_RP.shape[1]:
                mask = reaching(values_RP, r, b + AHEAD, np.float32(max(threshold, LOWEST)))
                while mask != 0:
                    _ask_for(index, r, b + AHEAD + lowest_bit(mask))
                    mask &= mask - np.uint32(1)
            mask = reaching(values_RP, r, b, np.float32(max(threshold, LOWEST)))
            while mask != 0:
                bucket = b + lowest_bit(mask)
                mask &= mask - np.uint32(1)
                value = values_RP[r, bucket]
                if value > frontier_R[r] or (value == frontier_R[r] and bucket < next_R[r]):
                    continue  # it is open
                n_scored += _members(index, r, bucket)[1]
                _visit(query, index, rule, r, bucket, slopes_R, offsets_RR)
                opened_R[r] += 1
    return n_scored


@spliced
def _n_to_open(query: Query, rule: Rule, share: float, shifts_R: Array) -> Any:
    """Buckets above the present thresholds."""
    values_RP, least, total = query.values_RP, share * least_sum(query, rule), np.int64(0)
    for r in range(values_RP.shape[0]):
        threshold = np.float32(max(least + shifts_R[r], LOWEST))
        for b in range(values_RP.shape[1]):
            total += values_RP[r, b] >= threshold
    return total


@uncounted
def _bound(query: Query, rule: Rule, frontier_R: Array, thresholds: Thresholds) -> Any:
    """A score that only classes exceed which were found: they are in an opened bucket and passed every test."""
    slopes_R, shifts_R, _ = thresholds
    if rule.n_needed == 0:
        least = least_sum(query, rule)
        for r in range(len(frontier_R)):
            frontier_R[r] = max(frontier_R[r], np.float32(slopes_R[0] * least + shifts_R[r]))
    return max(query.scores[0], aggregate(frontier_R, rule))


@spliced
def _thresholds(tops_RM: Array, rule: Rule, slack: float, slopes_R: Array, shifts_R: Array, offsets_RR: Array) -> None:
    """Thresholds of the repetitions, ``least sum / R + shifts_R[r]``, and what partial sums from each on must reach.

    Thresholds differ as the repetitions' large values do.
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


@spliced
def _next(query: Query, rule: Rule, share: float, shifts_R: Array, frontier_R: Array, opened_R: Array) -> int:
    """Repetition whose largest unopened bucket is opened next; -1 if every class that is left out is known to be worse.

    Repetition 0 goes ahead: it finds the good classes once, and a high k-th score makes the rest cheap.
    """
    is_empty = query.scores[0] == UNKNOWN
    if rule.n_needed > 0 and not is_empty and aggregate(frontier_R, rule) < query.scores[0]:
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
