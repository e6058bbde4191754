"""The way of a query from bucket scores to its answer, by one version of the classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch, SparseBatch
from mach.model.ask import Answer, Ask
from mach.model.classes.catalogue import Catalogue, TrainedNames
from mach.model.classes.edits import Edits
from mach.model.classes.recall import PLAIN, RERANKED, Candidates, Recall, Resemblance
from mach.reranking.model import Reranker
from mach.runs.ensemble import BucketScores, Ensemble
from mach.sketch.answers import TopK
from mach.sketch.terms import CANDIDATES, prior_terms, reorder, tail_terms, topk_with_terms

if TYPE_CHECKING:
    from mach.data.queries import Queries

PLAINLY = Ask(rerank=False)


class Answerer:
    """Answers by one version of the classes. It never changes, so whoever holds one is not touched by later edits.

    Parameters
    ----------
    ensemble : Ensemble
    reranker : Reranker or None
        Orders the best classes anew, where the run has one.
    prior : float
        Strength of ``log(1 + training rows)`` of a class in scores without re-ranking, see
        `mach.sketch.terms.prior_terms`.
    edits : Edits
        The version.
    trained : TrainedNames, optional
        Names of the trained classes, where another answerer has them already.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        reranker: Reranker | None,
        prior: float,
        edits: Edits,
        trained: TrainedNames | None = None,
    ) -> None:
        self.ensemble, self.reranker, self.prior, self.edits = ensemble, reranker, prior, edits
        self.catalogue = Catalogue(edits, trained or TrainedNames(ensemble.run.class_names))
        self.recall = Recall(edits, ensemble)
        self._terms = lru_cache(maxsize=4)(self._make_terms)

    def with_edits(self, edits: Edits) -> Answerer:
        """The same by another version of the classes."""
        return Answerer(self.ensemble, self.reranker, self.prior, edits, self.catalogue.trained)

    def with_prior(self, prior: float) -> Answerer:
        """The same with another prior."""
        return Answerer(self.ensemble, self.reranker, prior, self.edits, self.catalogue.trained)

    def answers(self, queries: Queries, k: int, ask: Ask) -> Iterator[Answer]:
        """Answers to consecutive chunks of queries, so that memory stays bounded."""
        ask = replace(ask, allowed=self.catalogue.subset(ask.allowed))
        for scores in self.ensemble.answered(queries, ask.repetitions):
            top = self.topk(scores, k, ask)
            answered_NR = np.zeros((len(scores.batch), ask.repetitions or self.ensemble.n_repetitions), np.bool_)
            answered_NR[:, list(scores.columns)] = True
            yield Answer(**vars(top), answered_NR=answered_NR)

    def topk(self, scores: BucketScores, k: int, ask: Ask) -> TopK:
        """Best k classes of a batch."""
        ask = replace(ask, allowed=self.catalogue.subset(ask.allowed))
        top = self.topk_trained(scores, k, ask)
        if self.edits.is_trained_only:
            return top
        resemblance = self.recall.resemblance(scores.batch, self._mode(ask))
        return self.recall.best(self.candidates(top, scores, k, ask, resemblance), k)

    def topk_trained(self, scores: BucketScores, k: int, ask: Ask) -> TopK:
        """Best k of the trained classes that are allowed, as if nothing had been taught about them."""
        subset = self.catalogue.trained_of(ask.allowed)

        def shortlist(probs_NRB: NDArray[np.float32], n: int) -> TopK:
            return self.ensemble.topk(probs_NRB, scores.columns, n, subset, ask.budget)

        reranker, terms_K = self._reranker(ask), self._trained_terms(ask)
        if reranker is not None and k >= 1:  # the decoder refuses a k below 1
            top = shortlist(scores.probs_NRB, max(k, min(reranker.candidates, self.edits.n_trained)))
            return reranker.rerank(_sparse(scores.batch), top, k, scores.probs_NRB, terms_K)
        if terms_K is not None and k >= 1:
            return topk_with_terms(shortlist, scores.probs_NRB, k, terms_K, CANDIDATES)
        return shortlist(scores.probs_NRB, k)

    def topk_of_each_mode(self, scores: BucketScores, k: int) -> Iterator[TopK]:
        """Best k trained classes by plain and, where there is a re-ranker, by re-ranked scores: from one search.

        Both are the best of the best C by aggregate; plain ones have no certificate for more than that.
        """
        n = max(k, min(self.reranker.candidates if self.reranker else CANDIDATES, self.edits.n_trained))
        subset, terms_K = self.catalogue.trained_of(self.catalogue.everything), self._trained_terms(PLAINLY)
        top = self.ensemble.topk(scores.probs_NRB, scores.columns, n, subset)
        yield reorder(top, top.scores_Nk if terms_K is None else top.scores_Nk + terms_K[top.ids_Nk], k)
        if self.reranker is not None:
            yield self.reranker.rerank(_sparse(scores.batch), top, k, scores.probs_NRB)

    def candidates(self, trained: TopK, scores: BucketScores, k: int, ask: Ask, resemblance: Resemblance) -> Candidates:
        """The best k trained classes with all others that can be above them: added ones, and those that were taught."""

        def score_trained(rows: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.float32]:
            used, owners = np.unique(rows, return_inverse=True)
            places = np.arange(len(rows)) - np.searchsorted(rows, used)[owners]
            ids_NC = np.full((len(used), places.max(initial=-1) + 1), -1, np.int64)
            ids_NC[owners, places] = ids
            return self._score_trained(scores.rows(used), ids_NC, ask)[owners, places]

        allowed_K = None if ask.allowed is None else ask.allowed.mask_K
        terms_K = self._terms(0.0, ask.tail)
        mode = self._mode(ask)
        return self.recall.candidates(trained, scores, k, mode, score_trained, resemblance, allowed_K, terms_K)

    def score(
        self, scores: BucketScores, ids_NC: NDArray[np.int64], ask: Ask, resemblance: Resemblance | None = None
    ) -> NDArray[np.float32]:
        """Scores of given classes, shape (N, C); -inf for removed ones and -1."""
        edits, mode, tail_K = self.edits, self._mode(ask), self._terms(0.0, ask.tail)
        scores_NC = self._score_trained(scores, np.where(ids_NC < edits.n_trained, ids_NC, -1), ask)
        if not edits.is_trained_only:
            if resemblance is None:
                resemblance = self.recall.resemblance(scores.batch, mode)
            rows, at = np.nonzero(ids_NC >= edits.n_trained)
            ids = ids_NC[rows, at]
            added = self.recall.score_added(resemblance, scores, rows, ids, mode)
            scores_NC[rows, at] = added if tail_K is None else added + tail_K[ids]
            all_rows = np.repeat(np.arange(len(ids_NC)), ids_NC.shape[1])
            lifted = self.recall.lifted(resemblance, all_rows, ids_NC.ravel(), scores_NC.ravel())
            scores_NC = lifted.reshape(ids_NC.shape)
        if len(edits.removed):
            scores_NC[edits.is_removed(ids_NC)] = -np.inf
        return scores_NC

    def without_tail(self, ids: NDArray[np.int64], scores: NDArray[np.float32], tail: float) -> NDArray[np.float32]:
        """Scores of classes less what a tail added to them."""
        terms_K = self._terms(0.0, tail)
        return scores if terms_K is None else scores - terms_K[ids]

    def class_counts_K(self) -> NDArray[np.int64]:
        """Training rows of every trained class, and examples of every added one."""
        return np.concatenate([self.ensemble.run.class_counts_K(), self.edits.counts_A])

    def _mode(self, ask: Ask) -> int:
        return PLAIN if self._reranker(ask) is None else RERANKED

    def _reranker(self, ask: Ask) -> Reranker | None:
        return self.reranker if ask.rerank else None

    def _score_trained(self, scores: BucketScores, ids_NC: NDArray[np.int64], ask: Ask) -> NDArray[np.float32]:
        """Scores of given trained classes, -inf for an id of -1."""
        scores_NC = self.ensemble.score(scores.probs_NRB, scores.columns, ids_NC)
        if (reranker := self._reranker(ask)) is not None:
            scores_NC = reranker.rescore(_sparse(scores.batch), ids_NC, scores_NC, scores.probs_NRB)
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
