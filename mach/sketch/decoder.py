"""From bucket scores to the best classes: exact top-k, and the plain numpy oracle beside the fast path.

Class ``k`` has one bucket score in each repetition, ``probs_NRB[n, r, h_r(k)]``; an aggregate makes one score of the R
of them, and is monotone in each. Hence the threshold algorithm (Fagin, Lotem & Naor, "Optimal aggregation algorithms
for middleware", JCSS 66, 2003) finds the exact top k after opening a few buckets of each repetition: no class outside
them can score above the aggregate of the R largest unopened bucket scores.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError, DataError
from mach.sketch.aggregates import aggregate_of, reduce, transform
from mach.sketch.answers import Subset, TopK, best_of
from mach.sketch.hashing import Assignment
from mach.sketch.kernels.lanes import BLOCK, LANES, LOOK_NS
from mach.sketch.kernels.scan import scan
from mach.sketch.kernels.search import UNLIMITED, search
from mach.sketch.kernels.sweep import NO_CLASS, Rule

METHODS = ("auto", "gather", "threshold")
MANY = 1_000  # a heap of so many, which is searched for repeats, takes longer than to sort all scores
FEW_CLASSES = 2048  # so many that are allowed are scored one by one, whatever K is: about 0.1 ms
MAX_PADDING = 10_000  # columns beyond the number of classes that may be asked for

_MEMBER_NS, _BUCKET_NS = 2.3, 150.0  # what opening a bucket costs
_TOGETHER, _MOST_TOGETHER = 64, 2**21  # from so many queries on, and up to so many buckets of classes,
_MET = 0.025  # all are scanned sixteen at a time if the first sixteen met such a part of the classes
_CHUNK_VALUES = 2**18  # bucket scores transformed at once: they stay in the second cache level until searched


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
    return best_of(np.arange(assignment.n_classes), scores_NK, k)


class Decoder:
    """Everything prepared once to ask one assignment for classes; safe to share between threads.

    Parameters
    ----------
    assignment : Assignment
        Universal (nothing of size K is kept) or table (about ``R K (4 + 3 w)`` bytes more than its
        own, w = 2 for B up to 65,536 and 4 above; shared by all decoders of the assignment object).
    aggregate : str
        One of `mach.sketch.aggregates.AGGREGATES`.

    Examples
    --------
    >>> from mach.sketch.hashing import UniversalAssignment
    >>> assignment = UniversalAssignment.draw(n_classes=1000, n_buckets=16, n_repetitions=4, seed=0)
    >>> probs_NRB = np.full((1, 4, 16), 0.01, dtype=np.float32)
    >>> probs_NRB[0, np.arange(4), assignment.buckets([42])[:, 0]] = 0.9
    >>> int(Decoder(assignment).topk(probs_NRB, k=3).ids_Nk[0, 0])
    42
    """

    def __init__(self, assignment: Assignment, aggregate: str = "log-mean") -> None:
        self.assignment, self.aggregate = assignment, aggregate
        self._entry = aggregate_of(aggregate)

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
        probs_NRB = self._checked(probs_NRB)
        self._refuse(k, budget, method)
        N, K = len(probs_NRB), self.assignment.n_classes
        allowed = self._subset(allowed_K)
        few = min(max(K // 64, FEW_CLASSES), K if budget is None else budget)
        if allowed is not None and method == "auto" and len(allowed.ids_C) <= few:
            return self._topk_of(allowed, probs_NRB, k)
        if method == "auto" and allowed is None and budget is None and k >= max(MANY, K // 32):
            return self._topk_of(self._all, probs_NRB, k)
        mask_K = np.empty(0, dtype=bool) if allowed is None else allowed.mask_K
        most, limit = UNLIMITED if budget is None else budget, self._scan_beyond(k, method, budget)
        options = self.assignment.index, self._rule, mask_K, most, limit
        is_open = method == "auto" and allowed is None and budget is None and self._may_scan_together(N, k)
        places_KR, top = None, TopK.empty(N, k)
        for part in self._chunks(N, LANES if is_open else 0):
            outputs = tuple(column[part] for column in vars(top).values())
            values_NRP = padded(probs_NRB[part], self.aggregate)
            if places_KR is None:
                search(values_NRP, *options, outputs)
            else:
                for n in np.flatnonzero(~scan(values_NRP, places_KR, self._rule, outputs)):
                    search(values_NRP[n : n + 1], *options, tuple(column[n : n + 1] for column in outputs))
            if is_open and part.start == 0 and top.n_scored_N[part].mean() > K * _MET:
                places_KR = self._places_KR()
        top.ids_Nk[top.ids_Nk == NO_CLASS] = -1
        return top

    def score(self, probs_NRB: ArrayLike, ids_NC: ArrayLike) -> NDArray[np.float32]:
        """Scores of given classes, shape (N, C), float32; -inf for an id of -1; a DataError if a shape does not fit."""
        probs_NRB, ids_NC = self._checked(probs_NRB), np.asarray(ids_NC, np.int64)
        if ids_NC.ndim != 2 or len(ids_NC) != len(probs_NRB):
            raise DataError(f"candidates {ids_NC.shape}, bucket scores {probs_NRB.shape}: need (N, C), a row a query")
        scores_NC = np.empty(ids_NC.shape, dtype=np.float32)
        for part in self._chunks(len(probs_NRB)):
            ids, R = ids_NC[part], probs_NRB.shape[1]
            buckets_RNC = self.assignment.buckets(np.maximum(ids, 0).ravel()).reshape(R, *ids.shape)
            rows_N1, functions_R11 = np.arange(len(ids))[:, None], np.arange(R)[:, None, None]
            values_RNC = transform(probs_NRB[part][rows_N1, functions_R11, buckets_RNC], self.aggregate)
            scores_NC[part] = reduce(values_RNC, self.aggregate, self.assignment.n_buckets)
        scores_NC[ids_NC == -1] = -np.inf
        return scores_NC

    def _checked(self, probs_NRB: ArrayLike) -> NDArray[Any]:
        probs = np.asarray(probs_NRB)
        shape = (self.assignment.n_repetitions, self.assignment.n_buckets)
        if probs.ndim != 3 or probs.shape[1:] != shape:
            raise DataError(f"bucket scores have shape {probs.shape}: need (N, R, B) = (N, {shape[0]}, {shape[1]})")
        return probs

    def _refuse(self, k: int, budget: int | None, method: str) -> None:
        K = self.assignment.n_classes
        if not 1 <= k <= K + MAX_PADDING:
            raise ConfigError(f"k {k} must be at least 1 and at most {K + MAX_PADDING}: there are K = {K} classes")
        if budget is not None and budget < 0:
            raise ConfigError(f"budget {budget} must be at least 0")
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
        if method == "gather" and budget is not None and budget < K:
            raise ConfigError(f"method 'gather' scores all {K} classes, above the budget {budget}: use 'threshold'")

    def _subset(self, allowed_K: NDArray[np.bool_] | Subset | None) -> Subset | None:
        if allowed_K is None or isinstance(allowed_K, Subset):
            return allowed_K
        K = self.assignment.n_classes
        if np.shape(allowed_K) != (K,) or np.asarray(allowed_K).dtype != bool:
            raise DataError(f"allowed_K has shape {np.shape(allowed_K)}: need one bool a class, shape ({K},)")
        return Subset(K, mask_K=allowed_K)

    @cached_property
    def _all(self) -> Subset:
        return Subset(self.assignment.n_classes, ids=np.arange(self.assignment.n_classes))

    def _topk_of(self, few: Subset, probs_NRB: NDArray[Any], k: int) -> TopK:
        """Best k among some classes, all of them scored."""
        top, ids_C = TopK.empty(len(probs_NRB), k), few.ids_C
        buckets_RC = few.buckets(self.assignment)
        functions_R1 = np.arange(self.assignment.n_repetitions)[:, None]
        for n, probs_RB in enumerate(probs_NRB):
            values_RC = transform(probs_RB[functions_R1, buckets_RC], self.aggregate)
            scores_C = reduce(values_RC, self.aggregate, self.assignment.n_buckets)
            best = scores_C >= np.partition(scores_C, -k)[-k] if k < len(ids_C) else slice(None)  # few are to be sorted
            top.ids_Nk[n : n + 1], top.scores_Nk[n : n + 1] = best_of(ids_C[best], scores_C[best][None], k)
        top.exact_N[:], top.n_scored_N[:], top.n_opened_N[:] = True, len(ids_C), 0
        top.bound_N[:] = top.scores_Nk[:, -1]
        return top

    def _may_scan_together(self, n_queries: int, k: int) -> bool:
        """Whether passes over all classes for sixteen queries at once may be cheaper than searching for each."""
        K, R = self.assignment.n_classes, self.assignment.n_repetitions
        return self._rule.n_needed == 0 and n_queries >= _TOGETHER and k <= K // 32 and K * R <= _MOST_TOGETHER

    def _scan_beyond(self, k: int, method: str, budget: int | None) -> int:
        """Classes that the threshold algorithm may meet before a scan is cheaper; -1 scans at once."""
        K = self.assignment.n_classes
        if method == "gather" or (method == "auto" and k > K // 32 and (budget is None or budget >= K)):
            return -1
        if budget is not None and budget < K:
            return budget  # no scan could follow
        a_member = _MEMBER_NS + _BUCKET_NS * self.assignment.n_buckets / K
        limit = int(K * self.assignment.n_repetitions * LOOK_NS / a_member)
        return limit if budget is None else min(limit, budget - K)

    def _places_KR(self) -> NDArray[np.int32]:
        """Where every class's values stand in the `padded` ones of a query."""
        K, R = self.assignment.n_classes, self.assignment.n_repetitions
        firsts_R = np.arange(R) * _padded_width(self.assignment.n_buckets)
        return np.ascontiguousarray((self.assignment.buckets(np.arange(K)) + firsts_R[:, None]).T, np.int32)

    @cached_property
    def _rule(self) -> Rule:
        R, entry = self.assignment.n_repetitions, self._entry
        first, end = entry.ranks(R)
        # Where the best R - end values are left out, a class reaches a score only if one value more does.
        n_needed = 0 if (first, end) == (0, R) else R - end + 1
        return Rule(n_needed, first, end, *entry.affine(self.assignment.n_buckets), entry.largest)

    def _chunks(self, n_queries: int, first: int = 0) -> list[slice]:
        """Queries whose scores are transformed together, after the ``first`` ones in multiples of so many."""
        n = max(1, first, _CHUNK_VALUES // (self.assignment.n_repetitions * self.assignment.n_buckets))
        n -= n % max(first, 1)
        whole = [slice(0, first)] if first else []
        return whole + [slice(begin, begin + n) for begin in range(first, n_queries, n)]


def padded(probs_NRB: NDArray[Any], aggregate: str) -> NDArray[np.float32]:
    """`transform` with rows that end in -inf up to a multiple of ``lanes.BLOCK``."""
    N, R, B = probs_NRB.shape
    values_NRP = np.empty((N, R, _padded_width(B)), np.float32)
    values_NRP[:, :, B:] = -np.inf
    transform(probs_NRB, aggregate, values_NRP[:, :, :B])
    return values_NRP


def _padded_width(n_buckets: int) -> int:
    return -(-n_buckets // BLOCK) * BLOCK
