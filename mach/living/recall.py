"""Scores of classes by what they were shown: how `mach.living.edits` becomes answers.

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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mach.decoding import Decoder, TopK, reduce, transform
from mach.hashing import TableAssignment
from mach.living.edits import Edits, Exemplars, Pairs
from mach.networks.batch import Batch

OFFSETS = (0.93, 1.0)  # of plain and of re-ranked scores
AGGREGATE, COSINE, RIVALS = 0.3, 0.4, 0.1
LEAST_AGGREGATE, TOP, SLOPE, NEAR = -2.0, 0.5, 0.05, 1.0
LEAST_COSINE, MOST_RIVALS = 0.04, 64  # a query resembles the closest classes, from this cosine on
NEAR_FROM, NEAR_TO = 0.4, 0.9
MOST_ADDED = 1024  # added classes that are scored without resembling a query, where a tail can put any first
PLAIN, RERANKED = 0, 1  # columns of lifts and rows of anchors

Score = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]  # of rows and trained classes


class Found(NamedTuple):
    """What a batch of queries resembles, as pairs of query and class, ascending and unique by ``keys``, row K + class.

    ``cosines`` are to the mean of an added class's examples, ``n_more`` the number of those that resemble more;
    ``lifts`` is what exemplars add.
    """

    keys: NDArray[np.int64]
    cosines: NDArray[np.float32]
    n_more: NDArray[np.int64]
    n_found_N: NDArray[np.int64]
    lift_keys: NDArray[np.int64]
    lifts: NDArray[np.float32]


class Candidates(NamedTuple):
    """Pairs of query and class that can be among the best, with their scores without lifts."""

    rows: NDArray[np.int64]
    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    trained: TopK
    n_scored_N: NDArray[np.int64]
    found: Found


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
    table_RA : uint32 array of shape (R J, A)
        Buckets of the added classes by the hash functions of the model.
    n_buckets : int
        B.
    aggregate : str
    """

    def __init__(self, edits: Edits, table_RA: NDArray[np.uint32], n_buckets: int, aggregate: str) -> None:
        self.edits, self.table_RA = edits, table_RA
        self.n_buckets, self.aggregate = n_buckets, aggregate
        self._decoder = lru_cache(maxsize=64)(self._make_decoder)

    @property
    def is_idle(self) -> bool:
        """Whether answers are those of the trained classes as they are."""
        return self.edits.n_added == 0 and self.edits.exemplars is None

    @cached_property
    def _centroids(self) -> Any:
        exemplars = self.edits.exemplars
        if exemplars is None:
            return None
        added = exemplars.where(exemplars.classes_M >= self.edits.n_trained)
        return added.centroids()[1] if len(added) else None

    @cached_property
    def _lifting(self) -> Any:
        exemplars = self.edits.exemplars
        if exemplars is None:
            return None
        lifting = exemplars.where(np.asarray((exemplars.lifts_M2 > 0).any(axis=1)))
        return lifting if len(lifting) else None

    def find(self, batch: Batch, mode: int) -> Found:
        """What the queries of a batch resemble."""
        found = self._shown(batch)
        if self._lifting is None:
            return found
        keys, lifts = lifts_of(self._lifting, self._lifting.resembling(batch, NEAR_FROM), self.edits.n_classes, mode)
        return found._replace(lift_keys=keys, lifts=lifts)

    def _shown(self, batch: Batch) -> Found:
        none = np.empty(0, np.int64)
        if self._centroids is None:
            return Found(none, none.astype(np.float32), none, np.zeros(len(batch), np.int64), none, none)  # type: ignore[arg-type]
        rows, owners, cosines = self._centroids.resembling(batch, LEAST_COSINE, MOST_RIVALS)
        n_found_N = np.bincount(rows, minlength=len(batch))
        best_first = np.lexsort((owners, -cosines, rows))
        n_more = np.empty(len(rows), np.int64)
        n_more[best_first] = np.arange(len(rows)) - np.repeat(np.cumsum(n_found_N) - n_found_N, n_found_N)
        keys = rows * self.edits.n_classes + self._centroids.classes_M[owners]
        order = np.argsort(keys)
        return Found(keys[order], cosines[order], n_more[order], n_found_N, none, none)  # type: ignore[arg-type]

    def score_added(
        self,
        found: Found,
        values_NRB: NDArray[np.float32],
        functions: list[int],
        rows: NDArray[np.int64],
        ids: NDArray[np.int64],
        mode: int,
    ) -> NDArray[np.float32]:
        """Scores of pairs of query and added class, without lifts."""
        buckets_RP = self.table_RA[functions][:, ids - self.edits.n_trained]
        values_RP = values_NRB[rows, np.arange(len(functions))[:, None], buckets_RP]
        aggregates = reduce(values_RP, self.aggregate, self.n_buckets)
        cosines, n_more = np.full(len(rows), LEAST_COSINE, np.float32), found.n_found_N[rows]
        at, is_shown = _places(found.keys, rows * self.edits.n_classes + ids)
        cosines[is_shown], n_more[is_shown] = found.cosines[at[is_shown]], found.n_more[at[is_shown]]
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
        batch: Batch,
        probs_NRB: NDArray[np.float32],
        functions: list[int],
        k: int,
        mode: int,
        score_trained: Score,
        *,
        allowed_K: NDArray[np.bool_] | None = None,
        terms_K: NDArray[np.float32] | None = None,
        found: Found | None = None,
    ) -> Candidates:
        """The best k trained classes, and all others that can be above them; without lifts.

        Parameters
        ----------
        trained : TopK
            Best k trained classes that are allowed, by their scores without lifts.
        batch, probs_NRB
            The queries, and their bucket probabilities by the hash functions named ``functions``.
        k, mode : int
        score_trained : callable
            Their scores without lifts, of given rows and ids.
        allowed_K : bool array of shape (K0 + A,), optional
        terms_K : float32 array of shape (K0 + A,), optional
            Added to the scores of added classes.
        found : Found, optional
            What the batch resembles, where it is known.
        """
        edits, K, N = self.edits, self.edits.n_classes, len(batch)
        found = self.find(batch, mode) if found is None else found
        values_NRB = transform(probs_NRB, self.aggregate)
        is_new = ~_places(found.keys, found.lift_keys)[1]
        keys = np.sort(np.concatenate([found.keys, found.lift_keys[is_new]])) if is_new.any() else found.keys
        rows, ids = np.divmod(keys, K)
        if allowed_K is not None:
            is_in = allowed_K[ids]
            keys, rows, ids = keys[is_in], rows[is_in], ids[is_in]
        scores = np.empty(len(keys), np.float32)
        is_added = ids >= edits.n_trained
        if not is_added.all():
            scores[~is_added] = score_trained(rows[~is_added], ids[~is_added])
        scores[is_added] = self.score_added(found, values_NRB, functions, rows[is_added], ids[is_added], mode)
        others = [(trained.ids_Nk, trained.scores_Nk)]
        n_scored_N = trained.n_scored_N + np.bincount(rows, minlength=N)
        if edits.n_added:
            decoder = self._decoder(tuple(functions))
            allowed_A = None if allowed_K is None else allowed_K[edits.n_trained :]
            n = min(k if terms_K is None else max(k, MOST_ADDED), edits.n_added)  # terms may favour any of them
            top = decoder.topk(probs_NRB, n, allowed_K=allowed_A)
            if terms_K is not None and n < edits.n_added:
                trained = replace(trained, exact_N=np.zeros_like(trained.exact_N))
            ids_Nk = np.where(top.ids_Nk < 0, -1, top.ids_Nk + edits.n_trained)
            least = np.full(ids_Nk.shape, LEAST_COSINE, np.float32)
            finite_Nk = np.where(ids_Nk < 0, 0, top.scores_Nk)
            plain_Nk = self.scale(finite_Nk, least, found.n_found_N[:, None] + np.zeros_like(ids_Nk), mode)
            others.append((ids_Nk, np.where(ids_Nk < 0, -np.inf, plain_Nk).astype(np.float32)))
            n_scored_N = n_scored_N + top.n_scored_N
        all_rows, all_ids, all_scores = [rows], [ids], [scores]
        for ids_Nk, scores_Nk in others:
            at, _ = np.nonzero(ids_Nk >= 0)
            flat, values = ids_Nk[ids_Nk >= 0], scores_Nk[ids_Nk >= 0]
            is_new = ~_places(keys, at * K + flat)[1]
            all_rows.append(at[is_new])
            all_ids.append(flat[is_new])
            all_scores.append(values[is_new])
        rows, ids, scores = np.concatenate(all_rows), np.concatenate(all_ids), np.concatenate(all_scores)
        if terms_K is not None:
            scores = np.where(ids >= edits.n_trained, scores + terms_K[ids], scores)
        return Candidates(rows, ids, scores, trained, n_scored_N, found)

    def best(self, candidates: Candidates, k: int, lifts: NDArray[np.float32] | None = None) -> TopK:
        """The best k of the candidates; with other lifts than were found, where they are given."""
        rows, ids, scores, trained, n_scored_N, found = candidates
        if lifts is not None:
            found = found._replace(lifts=lifts)
        scores, N = self.lifted(found, rows, ids, scores), len(n_scored_N)
        order = np.lexsort((ids, -scores, rows))
        counts_N = np.bincount(rows, minlength=N)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
        order, places = order[places < k], places[places < k]
        ids_Nk, scores_Nk = np.full((N, k), -1, np.int64), np.full((N, k), -np.inf, np.float32)
        ids_Nk[rows[order], places], scores_Nk[rows[order], places] = ids[order], scores[order]
        bound_N = np.maximum(trained.bound_N, scores_Nk[:, -1])
        return TopK(ids_Nk, scores_Nk, trained.exact_N, n_scored_N, trained.n_opened_N, bound_N)

    def lifted(
        self, found: Found, rows: NDArray[np.int64], ids: NDArray[np.int64], scores: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores with the lifts of their classes."""
        if not len(found.lift_keys):
            return scores
        at, is_lifted = _places(found.lift_keys, rows * self.edits.n_classes + ids)
        return np.where(is_lifted, scores + found.lifts[at], scores).astype(np.float32)

    def _make_decoder(self, functions: tuple[int, ...]) -> Decoder:
        return Decoder(TableAssignment.from_table(self.table_RA[list(functions)], self.n_buckets), self.aggregate)


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


def _places(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where wanted keys stand among ascending ones, and whether they do."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
