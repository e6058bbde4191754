"""From bucket scores to classes: aggregates, exact top-k, and the plain numpy oracle beside the fast path.

Class ``k`` has one bucket score in each repetition, ``probs_NRB[n, r, h_r(k)]``; an *aggregate* turns the
R of them into one score, and every aggregate is monotone in each of them. Hence the threshold algorithm
(Fagin, Lotem & Naor, "Optimal aggregation algorithms for middleware", JCSS 66, 2003) finds the exact top
k after opening a few buckets of each repetition: no class outside them can score above the aggregate of
the R largest unopened bucket scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError, DataError
from mach.hashing import Assignment, TableAssignment, UniversalAssignment

if TYPE_CHECKING:
    from mach.kernels.sweep import Index, Rule

AGGREGATES = ("mean", "unbiased-mean", "log-mean", "logit-mean", "min", "median")
METHODS = ("auto", "gather", "threshold")

_TINY = np.finfo(np.float32).tiny
_BELOW_ONE = np.float32(1 - 2.0**-24)
_LOOK_NS, _MEMBER_NS, _BUCKET_NS = 0.45, 2.3, 150.0  # a class in a repetition of a scan; what opening a bucket costs
_N_PEERS = 2  # repetitions whose buckets a table keeps beside each list of members: 2 or 4 bytes a class each
FEW_CLASSES = 2048  # so many that are allowed are scored one by one, whatever K is: about 0.1 ms
MAX_PADDING = 10_000  # columns beyond the number of classes that may be asked for
_TOGETHER, _MOST_TOGETHER = 64, 2**21  # from so many queries on, and up to so many buckets of classes,
_MET = 0.45  # all are scanned sixteen at a time if the first sixteen met such a part of the classes
_CHUNK_VALUES = 2**18  # bucket scores transformed at once: they stay in the second cache level until searched
_indexes: WeakKeyDictionary[Any, Index] = WeakKeyDictionary()


@dataclass(frozen=True)
class TopK:
    """The best k classes of every query, with what is known about them.

    Attributes
    ----------
    ids_Nk : int64 array of shape (N, k)
        Classes by descending score, equal scores by ascending class; -1 where there are fewer than k.
    scores_Nk : float32 array of shape (N, k)
        Their aggregates; -inf beside an id of -1.
    exact_N : bool array of shape (N,)
        Whether these are certainly the best; only a budget can make it False.
    n_scored_N : int64 array of shape (N,)
        Members of opened buckets, plus K after a pass over all classes; a class met twice counts twice.
    n_opened_N : int64 array of shape (N,)
        Buckets opened, summed over the repetitions.
    bound_N : float32 array of shape (N,)
        The certificate: no allowed class outside `ids_Nk` scores above it.
    """

    ids_Nk: NDArray[np.int64]
    scores_Nk: NDArray[np.float32]
    exact_N: NDArray[np.bool_]
    n_scored_N: NDArray[np.int64]
    n_opened_N: NDArray[np.int64]
    bound_N: NDArray[np.float32]

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """One answer from the answers to consecutive parts of a batch."""
        return cls(*(np.concatenate(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))

    @classmethod
    def empty(cls, n_queries: int, k: int) -> TopK:
        """Uninitialised columns to write answers into."""
        return cls(
            ids_Nk=np.empty((n_queries, k), dtype=np.int64),
            scores_Nk=np.empty((n_queries, k), dtype=np.float32),
            exact_N=np.empty(n_queries, dtype=np.bool_),
            n_scored_N=np.empty(n_queries, dtype=np.int64),
            n_opened_N=np.empty(n_queries, dtype=np.int64),
            bound_N=np.empty(n_queries, dtype=np.float32),
        )


class Subset:
    """Classes that may be returned, prepared once for any number of queries: by their ids, or by a mask.

    Parameters
    ----------
    n_classes : int
        K.
    ids : int array, optional
    mask_K : bool array of shape (K,), optional
        One of the two.

    Examples
    --------
    >>> Subset(5, ids=np.array([3, 1, 3])).mask_K.tolist()
    [False, True, False, True, False]
    """

    def __init__(
        self, n_classes: int, *, ids: NDArray[np.int64] | None = None, mask_K: NDArray[np.bool_] | None = None
    ) -> None:
        self.n_classes = n_classes
        self._given, self._mask_K = ids, mask_K
        self._buckets: WeakKeyDictionary[Any, NDArray[np.int32]] = WeakKeyDictionary()

    @cached_property
    def ids_C(self) -> NDArray[np.int64]:
        """Ids, ascending."""
        if self._given is not None:
            return np.unique(self._given).astype(np.int64)
        assert self._mask_K is not None, "one of the two is given"
        return np.flatnonzero(self._mask_K)

    @cached_property
    def mask_K(self) -> NDArray[np.bool_]:
        """Whether a class is in it; a byte a class."""
        if self._mask_K is not None:
            return np.ascontiguousarray(self._mask_K)
        mask_K = np.zeros(self.n_classes, np.bool_)
        mask_K[self.ids_C] = True
        return mask_K

    def buckets(self, assignment: Assignment) -> NDArray[np.int32]:
        """Buckets of its classes, shape (R, C), kept for every assignment object that asks."""
        if assignment not in self._buckets:
            self._buckets[assignment] = assignment.buckets(self.ids_C)
        return self._buckets[assignment]


def transform(probs: ArrayLike, aggregate: str) -> NDArray[np.float32]:
    """Map bucket scores to the values that the aggregate reduces; monotone, finite, float32, same shape.

    Scores are clipped to [0, 1] and NaN becomes the lowest score. ``log-mean`` takes logarithms with a
    floor at the smallest normal float32 (-87.3), ``logit-mean`` log-odds between -87.3 and 16.6.

    Raises
    ------
    ConfigError
        When the aggregate is unknown.

    Examples
    --------
    >>> transform([0.0, 0.25, float("nan")], "mean").tolist()
    [0.0, 0.25, 0.0]
    """
    if aggregate not in AGGREGATES:
        raise ConfigError(f"unknown aggregate {aggregate!r}: choose one of {', '.join(AGGREGATES)}")
    low, high = limits(aggregate)
    values = np.fmax(np.ascontiguousarray(probs, dtype=np.float32), low)  # fmax, unlike maximum, drops NaN
    np.minimum(values, high, out=values)
    if aggregate == "logit-mean":
        values /= 1 - values
    return np.log(values, out=values) if low > 0 else values


def reduce(values: NDArray[np.float32], aggregate: str, n_buckets: int) -> NDArray[np.float32]:
    """Reduce the first axis (repetitions) of transformed values; float64 in the order of r, rounded once.

    ``unbiased-mean`` is ``B / (B - 1) * (mean - 1 / B)``, which estimates the probability of an exclusive
    class without bias (Medini et al., "Extreme Classification in Log Memory", NeurIPS 2019).
    """
    n = len(values)
    if aggregate == "min":
        return np.min(values, axis=0)
    if aggregate == "median":
        ordered = np.sort(values, axis=0).astype(np.float64)
        return ((ordered[(n - 1) // 2] + ordered[n // 2]) / 2).astype(np.float32)
    total = np.zeros(values.shape[1:])
    for row in values:
        total += row
    gain, shift = affine(aggregate, n_buckets)
    return (gain * (total / n) + shift).astype(np.float32)


def class_scores_oracle(probs_NRB: ArrayLike, assignment: Assignment, aggregate: str) -> NDArray[np.float32]:
    """Scores of all classes, shape (N, K), in plain numpy; the definition that every fast path must equal."""
    values_NRB = transform(probs_NRB, aggregate)
    buckets_RK = assignment.buckets(np.arange(assignment.n_classes))
    values_RNK = np.stack([values_NRB[:, r, row] for r, row in enumerate(buckets_RK)])
    return reduce(values_RNK, aggregate, assignment.n_buckets)


def topk_oracle(
    probs_NRB: ArrayLike, assignment: Assignment, k: int, aggregate: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Best k classes of each query and their scores by sorting all K scores; ties go to the smaller class."""
    scores_NK = class_scores_oracle(probs_NRB, assignment, aggregate)
    return _best(np.arange(assignment.n_classes), scores_NK, k)


class Decoder:
    """Everything prepared once to ask one assignment for classes; safe to share between threads.

    Parameters
    ----------
    assignment : Assignment
        Universal (nothing of size K is kept) or table (about ``R K (4 + 3 w)`` bytes more than its
        own, w = 2 for B up to 65,536 and 4 above; shared by all decoders of the assignment object).
    aggregate : str
        One of `AGGREGATES`.

    Examples
    --------
    >>> assignment = UniversalAssignment.draw(n_classes=1000, n_buckets=16, n_repetitions=4, seed=0)
    >>> probs_NRB = np.full((1, 4, 16), 0.01, dtype=np.float32)
    >>> probs_NRB[0, np.arange(4), assignment.buckets([42])[:, 0]] = 0.9
    >>> int(Decoder(assignment).topk(probs_NRB, k=3).ids_Nk[0, 0])
    42
    """

    def __init__(self, assignment: Assignment, aggregate: str = "log-mean") -> None:
        transform([], aggregate)  # an unknown aggregate fails here, not at the first query
        self.assignment = assignment
        self.aggregate = aggregate

    def topk(
        self,
        probs_NRB: ArrayLike,
        k: int = 10,
        *,
        allowed_K: NDArray[np.bool_] | Subset | None = None,
        budget: int | None = None,
        method: str = "auto",
    ) -> TopK:
        """Exact best k classes of each query.

        Parameters
        ----------
        probs_NRB : float array of shape (N, R, B)
            Bucket probabilities.
        k : int
            At least 1 and at most ``K + MAX_PADDING``; columns beyond the last class are padding.
        allowed_K : bool array of shape (K,) or Subset, optional
            Classes that may be returned.
        budget : int, optional
            Largest number of classes to score for a query; when it is too small for a certificate,
            `TopK.exact_N` is False and `TopK.bound_N` says what may have been missed.
        method : str
            ``threshold`` opens buckets in descending score and falls back to ``gather``, a pass over all
            classes, once it has met a large share of them; ``auto`` chooses. The answers are the same.

        Raises
        ------
        ConfigError, DataError
            When an argument or a shape does not fit.
        """
        from mach.kernels import decode
        from mach.kernels.heap import NO_CLASS
        from mach.kernels.lanes import LANES
        from mach.kernels.scan import scan

        probs_NRB = self._checked(probs_NRB)
        N, K = len(probs_NRB), self.assignment.n_classes
        if not 1 <= k <= K + MAX_PADDING:
            raise ConfigError(f"k {k} must be at least 1 and at most {K + MAX_PADDING}: there are K = {K} classes")
        if budget is not None and budget < 0:
            raise ConfigError(f"budget {budget} must be at least 0")
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
        if method == "gather" and budget is not None and budget < K:
            raise ConfigError(f"method 'gather' scores all {K} classes, above the budget {budget}: use 'threshold'")
        if allowed_K is not None and not isinstance(allowed_K, Subset):
            if np.shape(allowed_K) != (K,) or np.asarray(allowed_K).dtype != bool:
                raise DataError(f"allowed_K has shape {np.shape(allowed_K)}: need one bool a class, shape ({K},)")
            allowed_K = Subset(K, mask_K=allowed_K)
        index, rule = _index(self.assignment), self._rule
        if allowed_K is not None and method == "auto":
            few = min(max(K // 64, FEW_CLASSES), K if budget is None else budget)
            if len(allowed_K.ids_C) <= few:
                return self._topk_of(allowed_K, probs_NRB, k)
        mask_K = np.empty(0, dtype=bool) if allowed_K is None else allowed_K.mask_K
        most = decode.UNLIMITED if budget is None else budget
        limit = _scan_beyond(self.assignment, k, method, budget)
        is_open = method == "auto" and allowed_K is None and budget is None and self._may_scan_together(N, k)
        places_KR, top = None, TopK.empty(N, k)
        for part in self._chunks(N, LANES if is_open else 0):
            outputs = tuple(column[part] for column in vars(top).values())
            values_NRP = _padded(probs_NRB[part], self.aggregate)
            uncertain_N = np.arange(len(values_NRP))
            if places_KR is not None:
                uncertain_N = np.flatnonzero(~scan(values_NRP, places_KR, index, rule, outputs))
            if len(uncertain_N) == len(values_NRP):
                decode.search(values_NRP, index, rule, mask_K, most, limit, outputs)
            else:
                for n in uncertain_N:
                    one = tuple(column[n : n + 1] for column in outputs)
                    decode.search(values_NRP[n : n + 1], index, rule, mask_K, most, limit, one)
            if is_open and part.start == 0 and top.n_scored_N[part].mean() > K * _MET:
                places_KR = self._places_KR()
        top.ids_Nk[top.ids_Nk == NO_CLASS] = -1
        return top

    def _may_scan_together(self, n_queries: int, k: int) -> bool:
        """Whether passes over all classes for sixteen queries at once may be cheaper than searching for each."""
        K, R = self.assignment.n_classes, self.assignment.n_repetitions
        return self._rule.n_needed == 0 and n_queries >= _TOGETHER and k <= K // 32 and K * R <= _MOST_TOGETHER

    def _places_KR(self) -> NDArray[np.int32]:
        """Where every class's values stand in `_padded` ones of a query."""
        K, R = self.assignment.n_classes, self.assignment.n_repetitions
        firsts_R = np.arange(R) * _padded_width(self.assignment.n_buckets)
        return np.ascontiguousarray((self.assignment.buckets(np.arange(K)) + firsts_R[:, None]).T, np.int32)

    @cached_property
    def _rule(self) -> Rule:
        from mach.kernels.sweep import Rule

        n = self.assignment.n_repetitions
        needed = {"min": n, "median": (n + 1) // 2}.get(self.aggregate, 0)
        largest = -float(np.log(_TINY)) if limits(self.aggregate)[0] > 0 else 1.0
        return Rule(needed, *affine(self.aggregate, self.assignment.n_buckets), largest)

    def score(self, probs_NRB: ArrayLike, ids_NC: ArrayLike) -> NDArray[np.float32]:
        """Scores of given classes, shape (N, C), float32; an id of -1 scores -inf.

        Raises
        ------
        DataError
            When a class is no integer or out of range, or a shape does not fit.
        """
        probs_NRB, ids_NC = self._checked(probs_NRB), np.asarray(ids_NC)
        N, K = len(probs_NRB), self.assignment.n_classes
        if ids_NC.ndim != 2 or len(ids_NC) != N:
            raise DataError(f"candidates {ids_NC.shape}, bucket scores {probs_NRB.shape}: need ({N}, C), a row a query")
        if ids_NC.size and ids_NC.dtype.kind not in "iu":
            raise DataError(f"candidates are {ids_NC.dtype}: need integers, 0..{K - 1} or -1 for none")
        outside = ids_NC[(ids_NC < -1) | (ids_NC >= K)]
        if len(outside):
            raise DataError(f"candidate {outside[0]} is no class: need 0..{K - 1}, or -1 for none")
        ids_NC = ids_NC.astype(np.int64)
        scores_NC = np.empty(ids_NC.shape, dtype=np.float32)
        for part in self._chunks(N):
            values_NRB, ids = transform(probs_NRB[part], self.aggregate), ids_NC[part]
            buckets_RNC = self.assignment.buckets(np.maximum(ids, 0).ravel()).reshape(
                self.assignment.n_repetitions, *ids.shape
            )
            values_RNC = np.stack(
                [np.take_along_axis(values_NRB[:, r], row, axis=1) for r, row in enumerate(buckets_RNC)]
            )
            scores_NC[part] = reduce(values_RNC, self.aggregate, self.assignment.n_buckets)
        scores_NC[ids_NC == -1] = -np.inf
        return scores_NC

    def _topk_of(self, few: Subset, probs_NRB: NDArray[Any], k: int) -> TopK:
        """Best k among few classes, all of them scored."""
        top, ids_C = TopK.empty(len(probs_NRB), k), few.ids_C
        buckets_RC = few.buckets(self.assignment)
        functions_R1 = np.arange(self.assignment.n_repetitions)[:, None]
        for n, probs_RB in enumerate(probs_NRB):
            values_RC = transform(probs_RB[functions_R1, buckets_RC], self.aggregate)
            scores_1C = reduce(values_RC, self.aggregate, self.assignment.n_buckets)[None]
            top.ids_Nk[n : n + 1], top.scores_Nk[n : n + 1] = _best(ids_C, scores_1C, k)
        top.exact_N[:], top.n_scored_N[:], top.n_opened_N[:] = True, len(ids_C), 0
        top.bound_N[:] = top.scores_Nk[:, -1]
        return top

    def _checked(self, probs_NRB: ArrayLike) -> NDArray[Any]:
        probs = np.asarray(probs_NRB)
        shape = (self.assignment.n_repetitions, self.assignment.n_buckets)
        if probs.ndim != 3 or probs.shape[1:] != shape:
            raise DataError(f"bucket scores have shape {probs.shape}: need (N, R, B) = (N, {shape[0]}, {shape[1]})")
        return probs

    def _chunks(self, n_queries: int, first: int = 0) -> list[slice]:
        """Queries whose scores are transformed together, after the ``first`` ones in multiples of so many."""
        n = max(1, first, _CHUNK_VALUES // (self.assignment.n_repetitions * self.assignment.n_buckets))
        n -= n % max(first, 1)
        whole = [slice(0, first)] if first else []
        return whole + [slice(begin, begin + n) for begin in range(first, n_queries, n)]


def topk(
    probs_NRB: ArrayLike,
    assignment: Assignment,
    k: int = 10,
    *,
    aggregate: str = "log-mean",
    allowed_K: NDArray[np.bool_] | None = None,
    budget: int | None = None,
    method: str = "auto",
) -> TopK:
    """`Decoder.topk` without a decoder at hand; what an assignment needs is prepared once and kept with it."""
    return Decoder(assignment, aggregate).topk(probs_NRB, k, allowed_K=allowed_K, budget=budget, method=method)


def score(
    probs_NRB: ArrayLike, assignment: Assignment, ids_NC: ArrayLike, aggregate: str = "log-mean"
) -> NDArray[np.float32]:
    """`Decoder.score` without a decoder at hand."""
    return Decoder(assignment, aggregate).score(probs_NRB, ids_NC)


def _best(
    ids_K: NDArray[np.int64], scores_NK: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    order_NK = np.argsort(-scores_NK, axis=1, kind="stable")[:, :k]
    padding = ((0, 0), (0, k - order_NK.shape[1]))
    scores_Nk = np.take_along_axis(scores_NK, order_NK, axis=1)
    return np.pad(ids_K[order_NK], padding, constant_values=-1), np.pad(scores_Nk, padding, constant_values=-np.inf)


def affine(aggregate: str, n_buckets: int) -> tuple[float, float]:
    """What a mean is multiplied with, and what is added."""
    if aggregate == "unbiased-mean":
        return n_buckets / (n_buckets - 1), -1 / (n_buckets - 1)
    return 1.0, 0.0


def _padded(probs_NRB: NDArray[Any], aggregate: str) -> NDArray[np.float32]:
    """`transform` in fewer passes over memory, with rows that end in -inf up to a multiple of `lanes.BLOCK`."""
    from mach.kernels.decode import clip

    N, R, B = probs_NRB.shape
    values_NRP = np.empty((N, R, _padded_width(B)), np.float32)
    low, high = limits(aggregate)
    clip(np.ascontiguousarray(probs_NRB, np.float32), low, high, aggregate == "logit-mean", values_NRP)
    if low > 0:
        np.log(values_NRP, out=values_NRP)
    values_NRP[:, :, B:] = -np.inf
    return values_NRP


def _padded_width(n_buckets: int) -> int:
    from mach.kernels.lanes import BLOCK

    return -(-n_buckets // BLOCK) * BLOCK


def limits(aggregate: str) -> tuple[np.float32, np.float32]:
    """Between which bucket scores are clipped; above 0, logarithms follow."""
    low = _TINY if aggregate in {"log-mean", "logit-mean"} else np.float32(0)
    return low, _BELOW_ONE if aggregate == "logit-mean" else np.float32(1)


def _scan_beyond(assignment: Assignment, k: int, method: str, budget: int | None) -> int:
    """Classes that the threshold algorithm may meet before a scan is cheaper; -1 scans at once."""
    K = assignment.n_classes
    if method == "gather" or (method == "auto" and k > K // 32 and (budget is None or budget >= K)):
        return -1
    if budget is not None and budget < K:
        return budget  # no scan could follow
    a_member = _MEMBER_NS + _BUCKET_NS * assignment.n_buckets / K
    limit = int(K * assignment.n_repetitions * _LOOK_NS / a_member)
    return limit if budget is None else min(limit, budget - K)


def _index(assignment: Assignment) -> Index:
    if assignment not in _indexes:
        if isinstance(assignment, UniversalAssignment):
            _indexes[assignment] = _universal_index(assignment)
        elif isinstance(assignment, TableAssignment):
            _indexes[assignment] = _table_index(assignment)
        else:
            raise ConfigError(f"cannot decode a {type(assignment).__name__}: need a universal or a table assignment")
    return _indexes[assignment]


def _universal_index(assignment: UniversalAssignment) -> Index:
    from mach.kernels.sweep import LENGTH, Index

    p = assignment.prime
    multipliers_R, inverses_R = assignment.multipliers_R, assignment.inverses_R
    strides_Q = np.append(inverses_R * assignment.n_buckets % p, 1)  # from one member of a bucket to the next
    steps_QR = strides_Q[:, None] * multipliers_R[None, :] % p
    none = np.empty((0, 0, 0), dtype=np.uint16)
    return Index(
        is_table=False,
        n_classes=assignment.n_classes,
        n_buckets=assignment.n_buckets,
        prime=p,
        modulus=_modulus(p, assignment.n_buckets),
        multipliers_R=multipliers_R,
        offsets_R=assignment.offsets_R,
        inverses_R=inverses_R,
        steps_QRL=(steps_QR[:, :, None] * np.arange(LENGTH) % p).astype(np.uint32),
        table_1RK=none,
        table_1KR=none,
        firsts_RB1=np.empty((0, 0), dtype=np.int64),
        members_RK=np.empty((0, 0), dtype=np.int32),
        peers_RGK=none,
    )


def _modulus(prime: int, n_buckets: int) -> tuple[Any, Any, Any, Any]:
    """p, B, and the multiplier and shift that divide numbers below 2**31 by B.

    With ``2**(l - 1) < B <= 2**l`` the multiplier ``ceil(2**(31 + l) / B)`` has 32 bits and is exact enough (Granlund &
    Montgomery, "Division by invariant integers using multiplication", PLDI 1994).
    """
    shift = 31 + (n_buckets - 1).bit_length()
    return np.uint32(prime), np.uint32(n_buckets), np.uint32(-(-(2**shift) // n_buckets)), np.uint64(shift)


def _table_index(assignment: TableAssignment) -> Index:
    from mach.kernels.lanes import LANES
    from mach.kernels.sweep import Index

    R, K = assignment.n_repetitions, assignment.n_classes
    table_RK = assignment.table_RK.astype(np.uint16 if assignment.n_buckets <= 2**16 else np.uint32, copy=False)
    firsts_RB1, members_RK = assignment.inverse
    peers_RGK = np.zeros((R, min(_N_PEERS, R - 1), K + LANES), dtype=table_RK.dtype)
    for r in range(R):
        for g in range(peers_RGK.shape[1]):
            peers_RGK[r, g, :K] = table_RK[(r + 1 + g) % R, members_RK[r]]
    none = np.empty(0, dtype=np.int64)
    return Index(
        is_table=True,
        n_classes=K,
        n_buckets=assignment.n_buckets,
        prime=1,
        modulus=_modulus(1, 1),
        multipliers_R=none,
        offsets_R=none,
        inverses_R=none,
        steps_QRL=np.empty((0, 0, 0), dtype=np.uint32),
        table_1RK=table_RK[None],
        table_1KR=np.ascontiguousarray(table_RK.T)[None],
        firsts_RB1=firsts_RB1,
        members_RK=members_RK,
        peers_RGK=peers_RGK,
    )
