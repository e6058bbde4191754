"""How a model learns from examples without training: buckets for new classes, a scale for their scores, and lifts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.hashing import Assignment, TableAssignment
from mach.living.edits import Edits, Exemplars
from mach.living.live import Live
from mach.living.recall import NEAR_FROM, PLAIN, RERANKED, Recall, lifts_of
from mach.networks.batch import Batch, has_features, rows_of
from mach.storage import Run

if TYPE_CHECKING:
    from mach.decoding import TopK
    from mach.living.recall import Candidates

MARGIN = 0.05  # of the scale between the tenth and the best class: how far lifts put a class above others
SAME_COSINE = 0.999  # exemplars of different classes that are the same row cannot both be first
ROUNDS = 3  # of lifting, as lifts change what others have to exceed
MAX_ANCHORED = 512  # examples that the scale is measured on
LOOKED_AT = 10  # best classes


class Teaching:
    """What `mach.living.verbs.Living` needs of a model, and what it finds out by it."""

    run: Run
    repetitions: list[int]
    assignment: Assignment
    aggregate: str
    reranker: Any
    ensemble: Any
    _live: Live
    decode_trained: Callable[..., TopK]
    candidates: Callable[..., Candidates]
    first_and_reordered: Callable[..., Iterator[TopK]]
    _score_batch: Callable[..., NDArray[np.float32]]

    @property
    def edits(self) -> Edits:
        """What was changed since the run was trained."""
        return self._live.edits

    @property
    def version(self) -> int:
        """Number of the version of the classes: 0 as trained."""
        return self._live.edits.version

    @property
    def n_classes(self) -> int:
        """K: all ids ever given, those of removed classes among them."""
        return self._live.edits.n_classes

    def _prepared(self, edits: Edits) -> Live:
        n_buckets = self.assignment.n_buckets
        table_RA = edits.buckets(self.run.functions(self.repetitions), n_buckets)
        recall = Recall(edits, table_RA, n_buckets, self.aggregate)
        return Live(edits, recall, self.run.class_names, lambda: self._trained_ids)

    @cached_property
    def _trained_ids(self) -> dict[str, int]:
        """Classes by their names as trained, the first of equal ones."""
        names = self.run.class_names or ()
        return {names[k]: k for k in range(len(names) - 1, -1, -1)}

    def _loads(self) -> NDArray[np.int64]:
        """Classes a bucket of every hash function, shape (R J, B); universal hashing has equally many in all."""
        loads_RB = np.zeros((self.assignment.n_repetitions, self.assignment.n_buckets), np.int64)
        if isinstance(self.assignment, TableAssignment):
            loads_RB += np.diff(self.assignment.inverse[0], axis=1)
        is_kept = ~self.edits.is_removed(np.arange(self.edits.n_trained, self.n_classes))
        for r, buckets_A in enumerate(self._live.recall.table_RA[:, is_kept]):
            loads_RB[r] += np.bincount(buckets_A, minlength=loads_RB.shape[1])
        return loads_RB

    def _anchored(
        self, edits: Edits, batch: Batch, probs_MRB: NDArray[np.float32], columns: tuple[int, ...]
    ) -> tuple[NDArray[np.float32], int]:
        """The scale of scores after some more examples: a running mean."""
        rows = np.linspace(0, len(batch) - 1, min(len(batch), MAX_ANCHORED)).astype(np.int64)
        part, probs = rows_of(batch, rows), probs_MRB[rows]
        anchors_22 = np.zeros((2, 2))
        for mode in (PLAIN, RERANKED) if self.reranker is not None else (PLAIN,):
            top = self.decode_trained(part, probs, columns, LOOKED_AT, rerank=mode == RERANKED)
            finite_Nk = np.where(np.isfinite(top.scores_Nk), top.scores_Nk, np.nan)
            anchors_22[mode:] = np.nanmean(np.nanmin(finite_Nk, axis=1)), np.nanmean(finite_Nk[:, 0])
        n_before = min(edits.n_anchored, MAX_ANCHORED)
        share = len(rows) / (n_before + len(rows))
        mixed = (1 - share) * edits.anchors_22 + share * np.nan_to_num(anchors_22)
        return mixed.astype(np.float32), edits.n_anchored + len(rows)

    def _lift(
        self,
        edits: Edits,
        exemplars: Exemplars,
        rank: int,
        scored: tuple[Batch, NDArray[np.float32], tuple[int, ...]],
    ) -> Exemplars:
        """Exemplars with the lifts that bring each one's class among the best ``rank`` of its own row, in both modes.

        Classes that were shown the same row cannot all be first: they do not have to exceed each other.
        """
        batch, probs_MRB, columns = scored
        is_kept = has_features(batch)
        if not is_kept.all():
            batch, probs_MRB = rows_of(batch, np.flatnonzero(is_kept)), probs_MRB[is_kept]
        before, own, K, M = edits.exemplars, exemplars.classes_M, edits.n_classes, len(exemplars)
        known = exemplars if before is None else exemplars.and_also(before)
        known = replace(known, lifts_M2=known.lifts_M2.copy())
        pairs = known.resembling(batch, NEAR_FROM)
        is_same = pairs.cosines >= SAME_COSINE
        same = np.unique(pairs.rows[is_same] * K + known.classes_M[pairs.exemplars[is_same]])
        lifts_M2 = np.zeros((M, 2), np.float32)
        live = self._prepared(replace(edits, exemplars=replace(known, lifts_M2=np.zeros_like(known.lifts_M2))))
        recall, k, rows = live.recall, LOOKED_AT + rank, np.arange(M)
        shown = recall.find(batch, PLAIN)
        for mode, trained in enumerate(self.first_and_reordered(batch, probs_MRB, columns, k, live)):
            how: dict[str, Any] = {"rerank": mode == RERANKED, "live": live}
            keys, lifts = lifts_of(known, pairs, K, mode)
            found = shown._replace(lift_keys=keys, lifts=np.zeros_like(lifts))
            allowed = live.everything
            candidates = self.candidates(trained, batch, probs_MRB, columns, k, **how, allowed=allowed, found=found)
            scores_M = self._score_batch(batch, probs_MRB, columns, own[:, None], **how, found=found)[:, 0]
            low, high = edits.anchors_22[mode]
            margin = MARGIN * max(float(high - low), 1e-3)
            for _ in range(ROUNDS):
                top = recall.best(candidates, k, lifts_of(known, pairs, K, mode)[1])
                is_rival = (top.ids_Nk >= 0) & ~np.isin(rows[:, None] * K + top.ids_Nk, same)
                place = np.argmax(np.cumsum(is_rival, axis=1) >= rank, axis=1)
                rivals_M = np.where(is_rival.sum(axis=1) >= rank, top.scores_Nk[rows, place], -np.inf)
                needed_M = np.where(np.isfinite(scores_M), rivals_M + margin - scores_M, 0)
                if (needed_M <= lifts_M2[:, mode] + margin / 2).all():
                    break
                lifts_M2[:, mode] = np.maximum(lifts_M2[:, mode], needed_M)
                known.lifts_M2[:M, mode] = lifts_M2[:, mode]
        if self.reranker is None:
            lifts_M2[:, RERANKED] = lifts_M2[:, PLAIN]
        return replace(exemplars, lifts_M2=lifts_M2)


def place(
    probs_MRB: NDArray[np.float32], owners_M: NDArray[np.int64], n_classes: int, loads_RB: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Buckets of classes by the bucket scores of their examples, shape (R, A).

    For every hash function a class goes to the bucket that is the best of most of its examples; of those to the one of
    the largest summed score, and then to the one with the fewest classes.

    Examples
    --------
    >>> probs = np.float32([[[0.1, 0.9, 0.2]], [[0.3, 0.8, 0.7]], [[0.1, 0.2, 0.9]]])
    >>> place(probs, np.array([0, 0, 0]), 1, np.zeros((1, 3), int)).tolist()
    [[1]]
    """
    B = probs_MRB.shape[2]
    table_RA = np.empty((probs_MRB.shape[1], n_classes), np.uint32)
    for r, buckets_A in enumerate(table_RA):
        best_M = probs_MRB[:, r].argmax(axis=1)
        keys, inverse, counts = np.unique(owners_M * B + best_M, return_inverse=True, return_counts=True)
        scores = np.bincount(inverse, probs_MRB[np.arange(len(best_M)), r, best_M])
        owners, buckets = np.divmod(keys, B)
        order = np.lexsort((loads_RB[r, buckets], -scores, -counts, owners))
        known, first = np.unique(owners[order], return_index=True)
        buckets_A[known] = buckets[order][first]
    return table_RA
