"""Scores of classes by the exemplars that they were given: how `mach.model.classes.edits` becomes answers.

An added class is scored by three things: its aggregate, as every class; the cosine c of the query and the mean of its
examples; and the number of other added classes that resemble the query more, as few of them can be right. The scale is
one on which the tenth and the best trained class of a query score 0 and 1 on average. With v the aggregate on it::

    u = OFFSETS + AGGREGATE v + COSINE log c - RIVALS log(1 + more),      and + NEAR near(c),

where v below LEAST_AGGREGATE, and the first sum above TOP, count by SLOPE. So an added class stays below what the
networks are sure of, unless a query is nearly one of its examples. Beside that, every exemplar lifts its class, added
or trained, by its own lift times `near` of the cosine, which is 1 for the exemplar itself. The constants were chosen
on gnd-core with classes held out of its training rows (docs/living.md).

An added class whose name or text a query speaks of also has the score that a trained class without rows would have
(`mach.reranking.model.Reranker.and_also`); of both the larger one counts. As long as no class was given an
example there is no scale, and that score stands alone, or the aggregate where nothing is re-ranked.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch, SparseBatch, ranges
from mach.data.class_texts import ClassTexts
from mach.model.classes.edits import Edits, Exemplars, Pairs
from mach.reranking.model import Reranker
from mach.reranking.signals.contract import Newcomers, Shortlist
from mach.runs.ensemble import BucketScores, Ensemble
from mach.sketch.aggregates import reduce, transform
from mach.sketch.answers import TopK
from mach.sketch.decoder import Decoder
from mach.sketch.tables import TableAssignment

OFFSETS = (0.93, 1.0)  # of plain and of re-ranked scores
AGGREGATE, COSINE, RIVALS = 0.3, 0.4, 0.1
LEAST_AGGREGATE, TOP, SLOPE, NEAR = -2.0, 0.5, 0.05, 1.0
LEAST_COSINE, MOST_RIVALS = 0.04, 64  # a query resembles the closest classes, from this cosine on
NEAR_FROM, NEAR_TO = 0.4, 0.9
PLAIN, RERANKED = 0, 1  # columns of lifts and rows of anchors


class Resemblance(NamedTuple):
    """What a batch of queries resembles, as pairs of query and class, ascending and unique by key: row K + class."""

    keys: NDArray[np.int64]
    cosines: NDArray[np.float32]  # to the mean of an added class's examples
    n_more: NDArray[np.int64]  # added classes that the query resembles more
    n_close_N: NDArray[np.int64]  # added classes that it resembles
    lift_keys: NDArray[np.int64]
    lifts: NDArray[np.float32]  # what exemplars add
    named_NP: NDArray[np.int64]  # added classes that the re-ranker proposes by their texts, -1 for none


def near(cosines: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much of its lift an exemplar gives to a query, by their cosine: 0 up to 0.4, 1 from 0.9 on.

    Examples
    --------
    >>> near(np.float32([0.3, 0.65, 0.9])).round(2).tolist()
    [0.0, 0.25, 1.0]
    """
    return np.square(np.clip((cosines - np.float32(NEAR_FROM)) / np.float32(NEAR_TO - NEAR_FROM), 0, 1))


class ExemplarMemory:
    """The exemplars of one version of the classes, prepared to score queries; safe to share between threads."""

    def __init__(self, edits: Edits, ensemble: Ensemble, reranker: Reranker | None = None) -> None:
        self.edits, self.ensemble, self.reranker = edits, ensemble, reranker
        functions = ensemble.run.functions(ensemble.repetitions)
        self.table_RA = edits.buckets(functions, ensemble.n_buckets)
        self._decoder = lru_cache(maxsize=64)(self._make_decoder)

    @cached_property
    def reads_names(self) -> bool:
        """Whether the re-ranker knows classes by their names."""
        return self.reranker is not None and any(one.is_young and one.has_columns for one in self.reranker.signals)

    @property
    def has_scale(self) -> bool:
        """Whether examples have told the scale of scores."""
        return self.edits.n_anchored > 0

    @cached_property
    def named(self) -> Reranker | None:
        """The re-ranker over added classes as well; None where examples alone tell of these."""
        edits, run = self.edits, self.ensemble.run
        if self.reranker is None or not edits.n_added or (self.has_scale and not self.reads_names):
            return None
        columns = {name: list(column) for name, column in vars(edits.texts or ClassTexts.of(edits.names)).items()}
        for a in (edits.removed[edits.removed >= edits.n_trained] - edits.n_trained).tolist():
            columns["names"][a], columns["alternatives"][a], columns["texts"][a] = "", (), ""
        rarest, n_rows = int(run.class_counts_K().argmin()), run.manifest.n_rows
        return self.reranker.and_also(Newcomers(ClassTexts(**columns), run.text_features, n_rows, rarest))

    @cached_property
    def _centroids(self) -> Exemplars:
        exemplars = self.edits.exemplars
        added = exemplars.where(exemplars.classes_M >= self.edits.n_trained)
        return added.centroids() if len(added) else added

    @cached_property
    def _lifting(self) -> Exemplars:
        return self.edits.exemplars.where(self.edits.exemplars.lifts_M2.max(axis=1, initial=0) > 0)

    def resemblance(self, batch: Batch, mode: int) -> Resemblance:
        """What the queries of a batch resemble."""
        K = self.edits.n_classes
        rows, owners, cosines = self._centroids.resembling(batch, LEAST_COSINE, MOST_RIVALS)
        n_close_N = np.bincount(rows, minlength=len(batch))
        n_more = np.empty(len(rows), np.int64)
        n_more[np.lexsort((owners, -cosines, rows))] = ranges(np.zeros_like(n_close_N), n_close_N)
        keys = rows * K + self._centroids.classes_M[owners]
        order = np.argsort(keys)
        lifts = lifts_of(self._lifting, self._lifting.resembling(batch, NEAR_FROM), K, mode)
        named_NP = np.empty((len(batch), 0), np.int64)
        if mode == RERANKED and self.named is not None and isinstance(batch, SparseBatch):
            named_NP = self.named.proposed(batch)
            named_NP = np.where(named_NP >= self.edits.n_trained, named_NP, -1)
        return Resemblance(keys[order], cosines[order], n_more[order], n_close_N, *lifts, named_NP)

    def score_added(
        self,
        resemblance: Resemblance,
        scores: BucketScores,
        rows: NDArray[np.int64],
        ids: NDArray[np.int64],
        mode: int,
    ) -> NDArray[np.float32]:
        """Scores of pairs of query and added class, without lifts: the formula of this module, in plain numpy."""
        aggregates = self.aggregates(scores, rows, ids)
        if not self.has_scale:
            return aggregates if mode == PLAIN or self.named is None else self.by_texts(resemblance, scores, rows, ids)
        cosines, n_more = np.full(len(rows), LEAST_COSINE, np.float32), resemblance.n_close_N[rows]
        at, is_close = _positions(resemblance.keys, rows * self.edits.n_classes + ids)
        cosines[is_close], n_more[is_close] = resemblance.cosines[at[is_close]], resemblance.n_more[at[is_close]]
        low, high = self.edits.anchors_22.astype(np.float64).T
        width = np.maximum(high - low, 1e-3)
        v = (aggregates - low[PLAIN]) / width[PLAIN]
        u = AGGREGATE * np.maximum(v, LEAST_AGGREGATE + SLOPE * (v - LEAST_AGGREGATE))
        u += OFFSETS[mode] + COSINE * np.log(cosines) - RIVALS * np.log1p(n_more)
        u = np.minimum(u, TOP + SLOPE * (u - TOP)) + NEAR * near(cosines)
        found = (low[mode] + width[mode] * u).astype(np.float32)
        if mode == RERANKED and self.named is not None:
            is_named = (resemblance.named_NP[rows] == ids[:, None]).any(axis=1)
            by_texts = self.by_texts(resemblance, scores, rows[is_named], ids[is_named])
            found[is_named] = np.maximum(found[is_named], by_texts)
        return found

    def by_texts(
        self, resemblance: Resemblance, scores: BucketScores, rows: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Scores of pairs of query and added class, rows ascending, as of a trained class that no row has."""
        if not len(rows):
            return np.empty(0, np.float32)
        asked, row_of, counts = np.unique(rows, return_inverse=True, return_counts=True)
        place = ranges(np.zeros_like(counts), counts)
        ids_NC = np.full((len(asked), counts.max(initial=0)), -1, np.int64)
        aggregates_NC = np.full(ids_NC.shape, -np.inf, np.float32)
        ids_NC[row_of, place], aggregates_NC[row_of, place] = ids, self.aggregates(scores, rows, ids)
        part = scores.rows(asked)
        assert self.named is not None
        assert isinstance(part.batch, SparseBatch)
        shortlist = Shortlist(part.batch, ids_NC, aggregates_NC, part.probs_NRB, resemblance.named_NP[asked])
        return np.asarray(self.named.rescore(shortlist)[row_of, place])

    def aggregates(self, scores: BucketScores, rows: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Aggregates of pairs of query and added class."""
        functions, aggregate = self.ensemble.run.functions(scores.columns), self.ensemble.aggregate
        buckets_RP = self.table_RA[functions][:, ids - self.edits.n_trained]
        values_NRB = transform(scores.probs_NRB, aggregate)
        values_RP = values_NRB[rows, np.arange(len(functions))[:, None], buckets_RP]
        return np.asarray(reduce(values_RP, aggregate, self.ensemble.n_buckets))

    def candidates(
        self,
        trained: TopK,
        scores: BucketScores,
        n_added: int,
        resemblance: Resemblance,
        allowed_K: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Classes that can be above the best trained ones, beside these, how many were scored, the best aggregate left.

        They are all that a query resembles or speaks of, and the ``n_added`` added ones of best aggregate: ids of shape
        (N, C), -1 for none.
        """
        K0, K, N = self.edits.n_trained, self.edits.n_classes, len(scores.batch)
        keys = np.union1d(np.union1d(resemblance.keys, resemblance.lift_keys), _keys(resemblance.named_NP, K))
        if allowed_K is not None:
            keys = keys[allowed_K[keys % K]]
        n_scored_N, bound_N = np.bincount(keys // K, minlength=N), np.full(N, -np.inf, np.float32)
        if n_added:
            allowed_A = None if allowed_K is None else allowed_K[K0:]
            added = self._decoder(scores.columns).topk(scores.probs_NRB, n_added, allowed_K=allowed_A)
            n_scored_N, bound_N = n_scored_N + added.n_scored_N, added.bound_N
            keys = np.union1d(keys, _keys(np.where(added.ids_Nk < 0, -1, added.ids_Nk + K0), K))
        rows, ids = np.divmod(np.setdiff1d(keys, _keys(trained.ids_Nk, K), assume_unique=True), K)
        counts_N = np.bincount(rows, minlength=N)
        ids_NC = np.full((N, counts_N.max(initial=0)), -1, np.int64)
        ids_NC[rows, ranges(np.zeros_like(counts_N), counts_N)] = ids
        return ids_NC, n_scored_N, bound_N

    def lifted(
        self, resemblance: Resemblance, ids_NC: NDArray[np.int64], scores_NC: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores with the lifts of their classes."""
        at, is_lifted = _positions(
            resemblance.lift_keys, np.arange(len(ids_NC))[:, None] * self.edits.n_classes + ids_NC
        )
        if not is_lifted.any():
            return scores_NC
        return np.where(is_lifted, scores_NC + resemblance.lifts[at], scores_NC).astype(np.float32)

    def _make_decoder(self, columns: tuple[int, ...]) -> Decoder:
        table_RA = self.table_RA[self.ensemble.run.functions(columns)]
        return Decoder(TableAssignment.from_table(table_RA, self.ensemble.n_buckets), self.ensemble.aggregate)


def lifts_of(
    exemplars: Exemplars, pairs: Pairs, n_classes: int, mode: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Keys of the pairs of query and class that are lifted, ascending, and by how much."""
    rows, owners, cosines = pairs
    keys = rows * n_classes + exemplars.classes_M[owners]
    lifts = exemplars.lifts_M2[owners, mode] * near(cosines)
    order = np.lexsort((-lifts, keys))
    unique, first = np.unique(keys[order], return_index=True)
    return unique, lifts[order][first]


def _keys(ids_NC: NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    """Keys of the pairs of query and class, without those of -1."""
    rows, columns = np.nonzero(ids_NC >= 0)
    return rows * n_classes + ids_NC[rows, columns]


def _positions(keys: NDArray[np.int64], others: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where further keys stand among ascending ones, and whether they do."""
    if not len(keys):
        return np.zeros(others.shape, np.int64), np.zeros(others.shape, np.bool_)
    at = np.minimum(np.searchsorted(keys, others), len(keys) - 1)
    return at, keys[at] == others
