"""The way of a query from bucket scores to its answer, by one version of the classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch, SparseBatch, rows_of
from mach.model.ask import Answer, Ask, n_best
from mach.model.classes.catalogue import Catalogue
from mach.model.classes.edits import Edits
from mach.model.classes.memory import PLAIN, RERANKED, ExemplarMemory, Resemblance
from mach.reranking.candidates import widened
from mach.reranking.model import Reranker
from mach.reranking.signals.contract import Shortlist
from mach.runs.ensemble import BucketScores, Ensemble
from mach.sketch.answers import TopK
from mach.sketch.terms import CANDIDATES, prior_terms, reorder, tail_terms, topk_with_terms

if TYPE_CHECKING:
    from mach.data.queries import Queries

MOST_ADDED = 1024  # added classes that are scored without resembling a query, where a tail can put any first


class Answerer:
    """Answers by one version of the classes. It never changes, so whoever holds one is not touched by later edits.

    ``prior`` is the strength of ``log(1 + training rows)`` of a class in scores without re-ranking, see
    `mach.sketch.terms.prior_terms`.
    """

    def __init__(self, ensemble: Ensemble, reranker: Reranker | None, prior: float, edits: Edits) -> None:
        self.ensemble, self.reranker, self.prior, self.edits = ensemble, reranker, prior, edits
        self.catalogue = Catalogue(edits, ensemble.run)
        self.memory = ExemplarMemory(edits, ensemble, reranker)
        self._terms = lru_cache(maxsize=4)(self._make_terms)

    def with_edits(self, edits: Edits) -> Answerer:
        """The same by another version of the classes."""
        return Answerer(self.ensemble, self.reranker, self.prior, edits)

    def answers(self, queries: Queries, k: int | None, ask: Ask) -> Iterator[Answer]:
        """Answers to consecutive chunks of queries, so that memory stays bounded.

        Raises
        ------
        ConfigError
            When k is no whole number of at least 1.
        """
        k = n_best(k, self.edits.n_classes)
        ask = self._prepared(ask)
        for scores in self.ensemble.answered(queries, ask.repetitions):
            yield self.answer(scores, k, ask)

    def answer(self, scores: BucketScores, k: int, ask: Ask) -> Answer:
        """The answer to a batch of which the bucket scores are there."""
        top = self.topk(scores, k, ask)
        answered_NR = np.empty((len(scores.batch), ask.repetitions or self.ensemble.n_repetitions), np.bool_)
        answered_NR[:] = [r in scores.columns for r in range(answered_NR.shape[1])]
        return Answer(**vars(top), answered_NR=answered_NR, known_N=self.known(scores, ask))

    def known(self, scores: BucketScores, ask: Ask) -> NDArray[np.bool_]:
        """Whether queries have a known feature, or a class's name or text has words of them, shape (N,)."""
        known_N = self.ensemble.reader.known(scores.batch)
        if (reranker := self._reranker(ask)) is not None and not known_N.all():
            rows = np.flatnonzero(~known_N)
            known_N[rows] = (reranker.proposed(_sparse(rows_of(scores.batch, rows))) >= 0).any(axis=1)
        return known_N

    @cached_property
    def shares_K(self) -> NDArray[np.float32]:
        """Share of the training rows that are of a class, of an added one by its examples: what is likely unasked."""
        shares_K = self.class_counts_K() / max(self.ensemble.run.manifest.n_rows, 1)
        return np.minimum(shares_K, 1).astype(np.float32)

    def topk(self, scores: BucketScores, k: int, ask: Ask) -> TopK:
        """Best k classes of a batch."""
        ask = self._prepared(ask)
        top = self.topk_trained(scores, k, ask)
        if self.edits.is_trained_only:
            return top
        resemblance = self.memory.resemblance(scores.batch, self._mode(ask))
        top = self.candidates(top, scores, k, ask, resemblance)
        return reorder(top, self.memory.lifted(resemblance, top.ids_Nk, top.scores_Nk), k)

    def topk_trained(self, scores: BucketScores, k: int, ask: Ask) -> TopK:
        """Best k of the trained classes that are allowed, as if nothing had been taught about them."""
        subset = self.catalogue.trained_of(ask.allowed)

        def shortlist(probs_NRB: NDArray[np.float32], n: int) -> TopK:
            return self.ensemble.topk(probs_NRB, scores.columns, n, subset, ask.budget)

        reranker, terms_K = self._reranker(ask), self._trained_terms(ask)
        if reranker is not None and k >= 1:  # the decoder refuses a k below 1
            batch = _sparse(scores.batch)
            top = shortlist(scores.probs_NRB, max(k, min(reranker.candidates, self.edits.n_trained)))
            aggregates = partial(self.ensemble.score, scores.probs_NRB, scores.columns)
            proposed_NP = reranker.proposed(batch)
            for more_NP in (reranker.proposed(batch, lifts=False), proposed_NP):
                top = widened(top, more_NP, aggregates, subset)
            return reranker.rerank(batch, top, proposed_NP, k, scores.probs_NRB, terms_K)
        if terms_K is not None and k >= 1:
            return topk_with_terms(shortlist, scores.probs_NRB, k, terms_K, CANDIDATES)
        return shortlist(scores.probs_NRB, k)

    def candidates(self, trained: TopK, scores: BucketScores, k: int, ask: Ask, resemblance: Resemblance) -> TopK:
        """The best k trained classes and beside them all others that can be above them, with scores without lifts."""
        allowed_K, n_added = None if ask.allowed is None else ask.allowed.mask_K, self.edits.n_added
        bounds = self._reranker(ask) if not self.memory.has_scale else None  # whose scores only their aggregates bound
        least = MOST_ADDED if ask.tail else bounds.candidates if bounds else k
        n = min(max(k, least), n_added)
        ids_NC, n_scored_N, bound_N = self.memory.candidates(trained, scores, n, resemblance, allowed_K)
        return replace(
            trained,
            bound_N=np.maximum(trained.bound_N, bound_N) if bounds else trained.bound_N,
            ids_Nk=np.hstack((trained.ids_Nk, ids_NC)),
            scores_Nk=np.hstack((trained.scores_Nk, self.unlifted(scores, ids_NC, ask, resemblance))),
            exact_N=trained.exact_N & (n == n_added or not ask.tail),
            n_scored_N=trained.n_scored_N + n_scored_N,
        )

    def score(self, scores: BucketScores, ids_NC: NDArray[np.int64], ask: Ask) -> NDArray[np.float32]:
        """Scores of given classes, shape (N, C); -inf for removed ones and -1."""
        if self.edits.is_trained_only:
            scores_NC = self._score_trained(scores, ids_NC, ask)
        else:
            resemblance = self.memory.resemblance(scores.batch, self._mode(ask))
            scores_NC = self.unlifted(scores, ids_NC, ask, resemblance)
            scores_NC = self.memory.lifted(resemblance, ids_NC, scores_NC)
        return np.where(self.edits.is_removed(ids_NC), np.float32(-np.inf), scores_NC)

    def unlifted(
        self, scores: BucketScores, ids_NC: NDArray[np.int64], ask: Ask, resemblance: Resemblance
    ) -> NDArray[np.float32]:
        """Scores of given classes without their lifts, shape (N, C); -inf for -1."""
        K0, scores_NC = self.edits.n_trained, np.full(ids_NC.shape, -np.inf, np.float32)
        trained_NC = np.where(ids_NC < K0, ids_NC, -1)
        rows = np.flatnonzero((trained_NC >= 0).any(axis=1))
        if len(rows):
            scores_NC[rows] = self._score_trained(scores.rows(rows), trained_NC[rows], ask)
        rows, columns = np.nonzero(ids_NC >= K0)
        if len(rows):
            ids, tail_K = ids_NC[rows, columns], self._terms(0.0, ask.tail)
            added = self.memory.score_added(resemblance, scores, rows, ids, self._mode(ask))
            scores_NC[rows, columns] = added if tail_K is None else added + tail_K[ids]
        return scores_NC

    def without_tail(self, ids: NDArray[np.int64], scores: NDArray[np.float32], tail: float) -> NDArray[np.float32]:
        """Scores of classes less what a tail added to them."""
        terms_K = self._terms(0.0, tail)
        return scores if terms_K is None else scores - terms_K[ids]

    def class_counts_K(self) -> NDArray[np.int64]:
        """Training rows of every trained class, and examples of every added one."""
        return np.concatenate([self.ensemble.run.class_counts_K(), self.edits.counts_A])

    def _prepared(self, ask: Ask) -> Ask:
        allowed = self.catalogue.subset(ask.allowed)
        return ask if allowed is ask.allowed else replace(ask, allowed=allowed)

    def _mode(self, ask: Ask) -> int:
        return PLAIN if self._reranker(ask) is None else RERANKED

    def _reranker(self, ask: Ask) -> Reranker | None:
        return self.reranker if ask.rerank else None

    def _score_trained(self, scores: BucketScores, ids_NC: NDArray[np.int64], ask: Ask) -> NDArray[np.float32]:
        """Scores of given trained classes, -inf for an id of -1."""
        scores_NC = self.ensemble.score(scores.probs_NRB, scores.columns, ids_NC)
        if (reranker := self._reranker(ask)) is not None:
            scores_NC = reranker.rescore(Shortlist(_sparse(scores.batch), ids_NC, scores_NC, scores.probs_NRB))
        terms_K = self._trained_terms(ask)
        return scores_NC if terms_K is None else scores_NC + terms_K[ids_NC]

    def _trained_terms(self, ask: Ask) -> NDArray[np.float32] | None:
        terms_K = self._terms(self.prior if self._reranker(ask) is None else 0.0, ask.tail)
        return None if terms_K is None else terms_K[: self.edits.n_trained]

    def _make_terms(self, prior: float, tail: float) -> NDArray[np.float32] | None:
        """What is added to the score of every class, a prior only to those of trained ones; None for nothing."""
        if not (prior or tail):
            return None
        counts_K, run = self.class_counts_K(), self.ensemble.run
        terms_K = np.pad(prior_terms(counts_K[: self.edits.n_trained], prior), (0, self.edits.n_added))
        return terms_K + tail_terms(counts_K, run.manifest.n_rows, tail) if tail else terms_K


def _sparse(batch: Batch) -> SparseBatch:
    assert isinstance(batch, SparseBatch), "runs with dense input are refused a re-ranker"
    return batch
