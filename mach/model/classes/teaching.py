"""How classes are learned from examples without training: their buckets, a scale for their scores, and lifts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch, has_features
from mach.data.occurrences import unknown_words
from mach.data.text import TextFeatures
from mach.errors import OmissionWarning
from mach.model.ask import Ask
from mach.model.classes.answerer import Answerer
from mach.model.classes.edits import Edits, Exemplars
from mach.model.classes.memory import NEAR_FROM, PLAIN, RERANKED, lifts_of
from mach.runs.ensemble import BucketScores
from mach.sketch.tables import TableAssignment
from mach.sketch.terms import reorder

MARGIN = 0.05  # of the scale between the tenth and the best class: how far lifts put a class above others
SAME_COSINE = 0.999  # exemplars of different classes that are the same row cannot both be first
ROUNDS = 3  # of lifting, as lifts change what others have to exceed
MAX_ANCHORED = 512  # examples that the scale is measured on
LOOKED_AT = 10  # best classes
MOST_WORDS = 5  # that a warning shows


def anchored(answerer: Answerer, edits: Edits, scores: BucketScores) -> Edits:
    """Edits with the scale of scores after some more examples: a running mean."""
    rows = np.linspace(0, len(scores.batch) - 1, min(len(scores.batch), MAX_ANCHORED)).astype(np.int64)
    part = scores.rows(rows)
    anchors_22 = np.zeros((2, 2))
    for mode in (PLAIN, RERANKED) if answerer.reranker is not None else (PLAIN,):
        top = answerer.topk_trained(part, LOOKED_AT, Ask(rerank=mode == RERANKED))
        finite_Nk = np.where(np.isfinite(top.scores_Nk), top.scores_Nk, np.nan)
        anchors_22[mode:] = np.nanmean(np.nanmin(finite_Nk, axis=1)), np.nanmean(finite_Nk[:, 0])
    share = len(rows) / (min(edits.n_anchored, MAX_ANCHORED) + len(rows))
    mixed = (1 - share) * edits.anchors_22 + share * np.nan_to_num(anchors_22)
    return replace(edits, anchors_22=mixed.astype(np.float32), n_anchored=edits.n_anchored + len(rows))


def lifted(answerer: Answerer, edits: Edits, exemplars: Exemplars, rank: int, scores: BucketScores) -> Edits:
    """Edits with exemplars whose lifts bring each one's class among the best ``rank`` of its own row, in both modes.

    Classes that were shown the same row cannot all be first: they do not have to exceed each other. The edits know the
    classes of the exemplars, which have no lifts yet; scores are those of their rows, and perhaps of further rows
    without features.
    """
    is_kept = has_features(scores.batch)
    if not is_kept.all():
        scores = scores.rows(np.flatnonzero(is_kept))
    own, K, M = exemplars.classes_M, edits.n_classes, len(exemplars)
    known = exemplars.and_also(edits.exemplars)
    known = replace(known, lifts_M2=known.lifts_M2.copy())
    pairs = known.resembling(scores.batch, NEAR_FROM)
    is_same = pairs.cosines >= SAME_COSINE
    same = np.unique(pairs.rows[is_same] * K + known.classes_M[pairs.exemplars[is_same]])
    lifts_M2 = np.zeros((M, 2), np.float32)
    draft = answerer.with_edits(replace(edits, exemplars=replace(known, lifts_M2=np.zeros_like(known.lifts_M2))))
    memory, k, rows = draft.memory, LOOKED_AT + rank, np.arange(M)
    shown = memory.resemblance(scores.batch, PLAIN)
    for mode in (PLAIN, RERANKED) if answerer.reranker is not None else (PLAIN,):
        ask = Ask(draft.catalogue.everything, rerank=mode == RERANKED)
        trained = draft.topk_trained(scores, k, ask)
        keys, lifts = lifts_of(known, pairs, K, mode)
        resemblance = shown._replace(lift_keys=keys, lifts=lifts)
        candidates = draft.candidates(trained, scores, k, ask, resemblance)
        scores_M = draft.unlifted(scores, own[:, None], ask, resemblance)[:, 0]
        low, high = edits.anchors_22[mode]
        margin = MARGIN * max(float(high - low), 1e-3)
        for _ in range(ROUNDS):
            resemblance = shown._replace(lift_keys=keys, lifts=lifts_of(known, pairs, K, mode)[1])
            top = reorder(candidates, memory.lifted(resemblance, candidates.ids_Nk, candidates.scores_Nk), k)
            is_rival = (top.ids_Nk >= 0) & ~np.isin(rows[:, None] * K + top.ids_Nk, same)
            place = np.argmax(np.cumsum(is_rival, axis=1) >= rank, axis=1)
            rivals_M = np.where(is_rival.sum(axis=1) >= rank, top.scores_Nk[rows, place], -np.inf)
            needed_M = np.where(np.isfinite(scores_M), rivals_M + margin - scores_M, 0)
            if (needed_M <= lifts_M2[:, mode] + margin / 2).all():
                break
            lifts_M2[:, mode] = np.maximum(lifts_M2[:, mode], needed_M)
            known.lifts_M2[:M, mode] = lifts_M2[:, mode]
    if answerer.reranker is None:
        lifts_M2[:, RERANKED] = lifts_M2[:, PLAIN]
    return replace(edits, exemplars=edits.exemplars.and_also(replace(exemplars, lifts_M2=lifts_M2)))


def warn_of_empty(batch: Batch, what: str, names: Sequence[str] | None = None) -> None:
    """Warn of examples that teach nothing, as they have no feature; ``names`` are those of their classes."""
    left_out = np.flatnonzero(~has_features(batch))
    if len(left_out):
        of = "" if names is None else f", of {abridged(list(dict.fromkeys(names[n] for n in left_out.tolist())))}"
        told = f"{len(left_out)} of {len(batch)} {what} have no known feature and are left out{of}"
        warnings.warn(told, OmissionWarning, stacklevel=4)


def warn_of_unknown(features: TextFeatures, texts: Sequence[str]) -> None:
    """Warn of words that no row of the training had: a class is not found by them."""
    if features.config.characters is None and (features.config.words or [1])[0] > 1:
        return  # a feature is never a single word
    unknown, n = unknown_words(features, texts)
    if unknown:
        shown = ", ".join(f"{word:.40}" for word in unknown[:MOST_WORDS]) + (", ..." if unknown[MOST_WORDS:] else "")
        told = f"words of the examples and texts that the run does not know count for nothing: {shown}"
        warnings.warn(f"{told} ({len(unknown):,} of {n:,})", OmissionWarning, stacklevel=4)


def abridged(names: Sequence[str]) -> str:
    """Names of classes for a line: at most three."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{len(names)} classes: {shown}, ..."


def loads(answerer: Answerer) -> NDArray[np.int64]:
    """Classes a bucket of every hash function, shape (R J, B); universal hashing has equally many in all."""
    edits, assignment = answerer.edits, answerer.ensemble.assignment
    loads_RB = np.zeros((assignment.n_repetitions, assignment.n_buckets), np.int64)
    if isinstance(assignment, TableAssignment):
        loads_RB += np.diff(assignment.index.firsts_RB1, axis=1)
    is_kept = ~edits.is_removed(np.arange(edits.n_trained, edits.n_classes))
    for r, buckets_A in enumerate(answerer.memory.table_RA[:, is_kept]):
        loads_RB[r] += np.bincount(buckets_A, minlength=loads_RB.shape[1])
    return loads_RB


def best_buckets(
    probs_MRB: NDArray[np.float32], owners_M: NDArray[np.int64], n_classes: int, loads_RB: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Buckets of classes by the bucket scores of their examples, shape (R, A): that which is the best of most of them.

    Of equal ones it is that of the largest summed score, and then that with the fewest classes.

    Examples
    --------
    >>> probs = np.float32([[[0.1, 0.9, 0.2]], [[0.3, 0.8, 0.7]], [[0.1, 0.2, 0.9]]])
    >>> best_buckets(probs, np.array([0, 0, 0]), 1, np.zeros((1, 3), int)).tolist()
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
