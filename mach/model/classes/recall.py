"""Scores of classes by what they were shown: how `mach.model.classes.edits` becomes answers.

An added class k is scored by three things: its aggregate, as every class; the cosine c of the query and the mean of the
class's examples; and how many other added classes resemble the query more, as few of them can be right. On a scale on
which the tenth and the best trained class of a query score 0 and 1 on average, with v the aggregate on that scale::

    u = OFFSETS + AGGREGATE v + COSINE log c - RIVALS log(1 + more),      and + NEAR near(c),

where v below LEAST_AGGREGATE, and the first sum above TOP, count by SLOPE: unless a query is nearly one of its
examples, an added class stays below what the networks are sure of. Beside that every exemplar lifts its class, added
or trained, by its own lift times `near` of the cosine, which is 1 for the exemplar itself. The constants were chosen
on gnd-core with classes held out of its training rows (docs/living.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch
from mach.model.classes.edits import Edits, Exemplars, Pairs
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
MOST_ADDED = 1024  # added classes that are scored without resembling a query, where a tail can put any first
PLAIN, RERANKED = 0, 1  # columns of lifts and rows of anchors

Score = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]  # of rows and trained classes


class Resemblance(NamedTuple):
    """What a batch of queries resembles, as pairs of query and class, ascending and unique by ``keys``, row K + class.

    ``cosines`` are to the mean of an added class's examples, ``n_more`` the number of those that resemble more, of
    ``n_close_N`` in all; ``lifts`` is what exemplars add.
    """

    keys: NDArray[np.int64]
    cosines: NDArray[np.float32]
    n_more: NDArray[np.int64]
    n_close_N: NDArray[np.int64]
    lift_keys: NDArray[np.int64]
    lifts: NDArray[np.float32]


class Candidates(NamedTuple):
    """Pairs of query and class that can be among the best, with their scores without lifts."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    trained: TopK
    n_scored_N: NDArray[np.int64]
    resemblance: Resemblance


def near(cosines: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much of its lift an exemplar gives to a query, by their cosine: 0 up to 0.4, 1 from 0.9 on.

    Examples
    --------
    >>> near(np.float32([0.3, 0.65, 0.9])).round(2).tolist()
    [0.0, 0.25, 1.0]
    """
    return np.square(np.clip((cosines - np.float32(NEAR_FROM)) / np.float32(NEAR_TO - NEAR_FROM), 0, 1))


class Recall:
    """Everything prepared once to score by one version of the classes; safe to share between threads.

    Parameters
    ----------
    edits : Edits
    ensemble : Ensemble
    """

    def __init__(self, edits: Edits, ensemble: Ensemble) -> None:
        self.edits, self.ensemble = edits, ensemble
        functions = ensemble.run.functions(ensemble.repetitions)
        self.table_RA = edits.buckets(functions, ensemble.n_buckets)
        self._decoder = lru_cache(maxsize=64)(self._make_decoder)

    @cached_property
    def _centroids(self) -> Exemplars | None:
        exemplars = self.edits.exemplars
        if exemplars is None or not (is_added_M := exemplars.classes_M >= self.edits.n_trained).any():
            return None
        return exemplars.where(is_added_M).centroids()

    @cached_property
    def _lifting(self) -> Exemplars | None:
        exemplars = self.edits.exemplars
        if exemplars is None or not (is_lifting_M := np.any(exemplars.lifts_M2 > 0, axis=1)).any():
            return None
        return exemplars.where(np.asarray(is_lifting_M))

    def resemblance(self, batch: Batch, mode: int) -> Resemblance:
        """What the queries of a batch resemble."""
        none = np.empty(0, np.int64)
        shown = Resemblance(none, none.astype(np.float32), none, np.zeros(len(batch), np.int64), none, none)  # type: ignore[arg-type]
        if self._centroids is not None:
            rows, owners, cosines = self._centroids.resembling(batch, LEAST_COSINE, MOST_RIVALS)
            n_close_N = np.bincount(rows, minlength=len(batch))
            best_first = np.lexsort((owners, -cosines, rows))
            n_more = np.empty(len(rows), np.int64)
            n_more[best_first] = np.arange(len(rows)) - np.repeat(np.cumsum(n_close_N) - n_close_N, n_close_N)
            keys = rows * self.edits.n_classes + self._centroids.classes_M[owners]
            order = np.argsort(keys)
            shown = Resemblance(keys[order], cosines[order], n_more[order], n_close_N, none, none)  # type: ignore[arg-type]
        if self._lifting is None:
            return shown
        keys, lifts = lifts_of(self._lifting, self._lifting.resembling(batch, NEAR_FROM), self.edits.n_classes, mode)
        return shown._replace(lift_keys=keys, lifts=lifts)

    def score_added(
        self,
        resemblance: Resemblance,
        scores: BucketScores,
        rows: NDArray[np.int64],
        ids: NDArray[np.int64],
        mode: int,
    ) -> NDArray[np.float32]:
        """Scores of pairs of query and added class, without lifts."""
        functions, aggregate = self.ensemble.functions(scores.columns), self.ensemble.aggregate
        buckets_RP = self.table_RA[functions][:, ids - self.edits.n_trained]
        values_NRB = transform(scores.probs_NRB, aggregate)
        values_RP = values_NRB[rows, np.arange(len(functions))[:, None], buckets_RP]
        aggregates = reduce(values_RP, aggregate, self.ensemble.n_buckets)
        cosines, n_more = np.full(len(rows), LEAST_COSINE, np.float32), resemblance.n_close_N[rows]
        at, is_shown = _places(resemblance.keys, rows * self.edits.n_classes + ids)
        cosines[is_shown], n_more[is_shown] = resemblance.cosines[at[is_shown]], resemblance.n_more[at[is_shown]]
        return self.scale(aggregates, cosines, n_more, mode)

    def scale(
        self, aggregates: NDArray[np.float32], cosines: NDArray[np.float32], n_more: NDArray[np.int64], mode: int
    ) -> NDArray[np.float32]:
        """The formula of this module, in plain numpy."""
        low, high = self.edits.anchors_22.astype(np.float64).T
        width = np.maximum(high - low, 1e-3)
        v = (aggregates - low[PLAIN]) / width[PLAIN]
        u = AGGREGATE * np.maximum(v, LEAST_AGGREGATE + SLOPE * (v - LEAST_AGGREGATE))
        u += OFFSETS[mode] + COSINE * np.log(cosines) - RIVALS * np.log1p(n_more)
        u = np.minimum(u, TOP + SLOPE * (u - TOP)) + NEAR * near(cosines)
        return (low[mode] + width[mode] * u).astype(np.float32)

    def candidates(
        self,
        trained: TopK,
        scores: BucketScores,
        k: int,
        mode: int,
        score_trained: Score,
        resemblance: Resemblance,
        allowed_K: NDArray[np.bool_] | None = None,
        terms_K: NDArray[np.float32] | None = None,
    ) -> Candidates:
        """The best k trained classes, and all others that can be above them; without lifts.

        Parameters
        ----------
        trained : TopK
            Best k trained classes that are allowed, by their scores without lifts.
        scores : BucketScores
        k, mode : int
        score_trained : callable
            Their scores without lifts, of given rows and ids.
        resemblance : Resemblance
            Of the batch.
        allowed_K : bool array of shape (K0 + A,), optional
        terms_K : float32 array of shape (K0 + A,), optional
            Added to the scores of added classes.
        """
        edits, K, N = self.edits, self.edits.n_classes, len(scores.batch)
        keys = np.union1d(resemblance.keys, resemblance.lift_keys)
        rows, ids = np.divmod(keys, K)
        if allowed_K is not None:
            is_in = allowed_K[ids]
            keys, rows, ids = keys[is_in], rows[is_in], ids[is_in]
        values = np.empty(len(keys), np.float32)
        is_added = ids >= edits.n_trained
        if not is_added.all():
            values[~is_added] = score_trained(rows[~is_added], ids[~is_added])
        values[is_added] = self.score_added(resemblance, scores, rows[is_added], ids[is_added], mode)
        others = [(trained.ids_Nk, trained.scores_Nk)]
        n_scored_N = trained.n_scored_N + np.bincount(rows, minlength=N)
        if edits.n_added:
            n = min(k if terms_K is None else max(k, MOST_ADDED), edits.n_added)  # terms may favour any of them
            allowed_A = None if allowed_K is None else allowed_K[edits.n_trained :]
            top = self._decoder(scores.columns).topk(scores.probs_NRB, n, allowed_K=allowed_A)
            if terms_K is not None and n < edits.n_added:
                trained = replace(trained, exact_N=np.zeros_like(trained.exact_N))
            is_none_Nk = top.ids_Nk < 0
            least, n_close_Nk = np.full(is_none_Nk.shape, LEAST_COSINE, np.float32), resemblance.n_close_N[:, None]
            plain_Nk = self.scale(np.where(is_none_Nk, 0, top.scores_Nk), least, n_close_Nk, mode)
            others.append((np.where(is_none_Nk, -1, top.ids_Nk + edits.n_trained), plain_Nk))
            n_scored_N = n_scored_N + top.n_scored_N
        parts = [(rows, ids, values)]
        for ids_Nk, scores_Nk in others:
            at, places = np.nonzero(ids_Nk >= 0)
            is_new = ~_places(keys, at * K + ids_Nk[at, places])[1]
            at, places = at[is_new], places[is_new]
            parts.append((at, ids_Nk[at, places], scores_Nk[at, places]))
        rows, ids, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        if terms_K is not None:
            values = np.where(ids >= edits.n_trained, values + terms_K[ids], values)
        return Candidates(rows, ids, values, trained, n_scored_N, resemblance)

    def best(self, candidates: Candidates, k: int) -> TopK:
        """The best k of the candidates."""
        rows, ids, scores, trained, n_scored_N, resemblance = candidates
        scores, N = self.lifted(resemblance, rows, ids, scores), len(n_scored_N)
        order = np.lexsort((ids, -scores, rows))
        counts_N = np.bincount(rows, minlength=N)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
        order, places = order[places < k], places[places < k]
        ids_Nk, scores_Nk = np.full((N, k), -1, np.int64), np.full((N, k), -np.inf, np.float32)
        ids_Nk[rows[order], places], scores_Nk[rows[order], places] = ids[order], scores[order]
        bound_N = np.maximum(trained.bound_N, scores_Nk[:, -1])
        return TopK(ids_Nk, scores_Nk, trained.exact_N, n_scored_N, trained.n_opened_N, bound_N)

    def lifted(
        self, resemblance: Resemblance, rows: NDArray[np.int64], ids: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores with the lifts of their classes."""
        if not len(resemblance.lift_keys):
            return scores
        at, is_lifted = _places(resemblance.lift_keys, rows * self.edits.n_classes + ids)
        return np.where(is_lifted, scores + resemblance.lifts[at], scores).astype(np.float32)

    def _make_decoder(self, columns: tuple[int, ...]) -> Decoder:
        table_RA = self.table_RA[self.ensemble.functions(columns)]
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


def _places(keys: NDArray[np.int64], others: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where further keys stand among ascending ones, and whether they do."""
    if not len(keys):
        return np.zeros(len(others), np.int64), np.zeros(len(others), np.bool_)
    at = np.minimum(np.searchsorted(keys, others), len(keys) - 1)
    return at, keys[at] == others
