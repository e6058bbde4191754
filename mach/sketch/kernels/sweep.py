"""The inner loop of the decoder: classes are looked up repetition by repetition while they can be among the best.

The best k so far are a heap with the worst of them first; of equal scores the larger class is worse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.sketch.kernels.lanes import LANES, add_listed, add_progression, fill, lowest_bit, prefetch

UNKNOWN = np.float32(-np.inf)  # the score of an empty entry
NO_CLASS = np.iinfo(np.int64).max  # its id: worse than every class
LENGTH = 256  # members handled at once: their partial sums and steps stay in the first cache level

Array = NDArray[Any]

# What only other kernels call has no way in from Python, which would take as long to compile as the kernel itself. So
# it must never be called from Python, tests included: it would crash the process.
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Without reference counts, which numba else keeps by two atomic additions a mention of an array, inside loops too: for
# functions that allocate nothing and return no array.
uncounted: Any = kernel(_nrt=False, **_INNER)
# Called with dozens of arrays, each eight words on the stack: part of the caller instead.
inlined: Any = kernel(_nrt=False, forceinline=True, **_INNER)
# Part of the caller before that is typed, so it is compiled once and not once more by itself: for parts of one caller.
spliced: Any = kernel(inline="always")


class Index(NamedTuple):
    """Where classes live: the arrays of one assignment, of either kind (the other kind's are empty).

    Implicit: ``steps_QRL[q, r, j]`` is ``j`` steps of the progression that the members of one bucket of repetition
    ``q`` run through in repetition ``r``; for ``q = R`` that of the classes 0, 1, 2, ...
    Table: bucket ``b`` of ``r`` holds ``members_RK[r, firsts_RB1[r, b] : firsts_RB1[r, b + 1]]``, and
    ``peers_RGK[r, g]`` are the buckets of these very members in repetition ``r + 1 + g`` modulo R, and then 16 zeros.
    """

    n_classes: int
    n_buckets: int
    is_table: bool = False
    prime: int = 1
    modulus: tuple[Any, ...] = (np.uint32(1), np.uint32(1), np.uint32(2**31), np.uint64(31))  # see `modulus_of`
    multipliers_R: Array = np.empty(0, np.int64)
    offsets_R: Array = np.empty(0, np.int64)
    inverses_R: Array = np.empty(0, np.int64)
    steps_QRL: Array = np.empty((0, 0, 0), np.uint32)
    table_1RK: Array = np.empty((0, 0, 0), np.uint16)  # or uint32
    table_1KR: Array = np.empty((0, 0, 0), np.uint16)  # the same by class
    firsts_RB1: Array = np.empty((0, 0), np.int64)
    members_RK: Array = np.empty((0, 0), np.int32)
    peers_RGK: Array = np.empty((0, 0, 0), np.uint16)  # as table_1RK


def modulus_of(prime: int, n_buckets: int) -> tuple[Any, Any, Any, Any]:
    """p, B, and the multiplier and shift that divide numbers below 2**31 by B.

    With ``2**(l - 1) < B <= 2**l`` the multiplier ``ceil(2**(31 + l) / B)`` has 32 bits and is exact enough (Granlund &
    Montgomery, "Division by invariant integers using multiplication", PLDI 1994).
    """
    shift = 31 + (n_buckets - 1).bit_length()
    return np.uint32(prime), np.uint32(n_buckets), np.uint32(-(-(2**shift) // n_buckets)), np.uint64(shift)


class Rule(NamedTuple):
    """How values become a score: ``gain * mean + shift``, of all values or (``n_needed > 0``) of some ranks."""

    n_needed: int  # 0: of all; otherwise the number of values that must reach a score for the class to reach it
    first: int  # rank of the first value in the mean, the smallest has 0,
    end: int  # and the one after the last
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
def _worse(score: float, k: int, other_score: float, other_k: int) -> bool:
    return score < other_score or (score == other_score and k > other_k)


@uncounted
def sift_down(ids: Array, scores: Array, n: int) -> None:
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


@uncounted
def offer(ids: Array, scores: Array, k: int, score: float) -> None:
    """Let class k replace the worst entry when it is better and not there yet (a class can be met twice)."""
    if not _worse(scores[0], ids[0], score, k):
        return
    for i in range(len(ids)):
        if ids[i] == k:
            return
    ids[0], scores[0] = k, score
    sift_down(ids, scores, len(ids))


@uncounted
def sort_heap(ids: Array, scores: Array) -> None:
    """Turn the heap into a list, best first."""
    for last in range(len(ids) - 1, 0, -1):
        ids[0], ids[last] = ids[last], ids[0]
        scores[0], scores[last] = scores[last], scores[0]
        sift_down(ids, scores, last)


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
def aggregate(row_R: Array, rule: Rule) -> Any:
    """Score of one class from its R values: a float64 sum, rounded once."""
    n = len(row_R)
    if rule.n_needed == 0:
        total = 0.0
        for r in range(n):
            total += np.float64(row_R[r])
        return np.float32(rule.gain * (total / n) + rule.shift)
    return np.float32(rule.gain * (_sum_of_ranks(row_R, rule.first, rule.end) / (rule.end - rule.first)) + rule.shift)


@uncounted
def _sum_of_ranks(row_R: Array, first: int, end: int) -> Any:
    """Sum of the values of ranks first to end - 1, in ascending order; equal values are found at once."""
    rank, last = 0, UNKNOWN
    for value in row_R:
        rank += value == UNKNOWN
    total = 0.0 if rank <= first else -np.inf
    while rank < end:
        smallest, n_equal = np.float32(np.inf), 0
        for value in row_R:
            if last < value < smallest:
                smallest, n_equal = value, 0
            n_equal += value == smallest
        for _ in range(max(rank, first), min(rank + n_equal, end)):
            total += np.float64(smallest)
        rank, last = rank + n_equal, smallest
    return total


@spliced
def slack_of(n_values: int, rule: Rule) -> Any:
    """More than the error of any float32 sum of so many values."""
    return 2.0**-22 * n_values * n_values * (rule.largest + abs(rule.shift))


@spliced
def least_sum(query: Query, rule: Rule) -> Any:
    """Sum below which no class can replace one of the best; the slack covers every rounding."""
    score = np.float64(query.scores[0])
    if rule.n_needed > 0:
        return 0.0
    return (score - rule.shift) / rule.gain * len(query.row_R) - query.slack


@uncounted
def consider(query: Query, index: Index, rule: Rule, k: int) -> None:
    """Score one class exactly and offer it."""
    if k >= index.n_classes or (len(query.allowed_K) > 0 and not query.allowed_K[k]):
        return
    values_RP, row_R = query.values_RP, query.row_R  # a count a mention, in the loop too
    _fill_row(row_R, values_RP, index, k)
    offer(query.ids, query.scores, k, aggregate(row_R, rule))


@inlined
def sweep(
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
    least_likely: float,
) -> None:
    """Offer those of n <= LENGTH classes whose partial sums suffice.

    They are members of one bucket of repetition q, the first at ``place`` of its list or ``base`` itself; or, for
    q = R, consecutive classes from both on. From repetition ``first`` on (q, or 0), partial sums must reach
    ``offsets_QR[first, i] + slopes_R[i] * least``, with the least sum of a class or ``least_likely`` if that is larger.
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
    least = max(least_sum(query, rule), least_likely)
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
            consider(query, index, rule, k)
            least = max(least_sum(query, rule), least_likely)
