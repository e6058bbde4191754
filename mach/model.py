"""A trained run as a model: exact top-k classes of queries, from any subset of its repetitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.calibration import Calibration, Curve, fingerprint
from mach.decoding import Subset, TopK, transform
from mach.errors import ConfigError, DataError
from mach.living.edits import Edits
from mach.living.live import Allowed, Live
from mach.living.recall import PLAIN, RERANKED, Candidates, Found
from mach.living.verbs import Living
from mach.networks.batch import Batch, SparseBatch, rows_of
from mach.ordering import prior_terms, reorder, tail_terms, topk_with_terms
from mach.queries import is_single
from mach.repetition import read_json
from mach.reranker import Reranked, Reranker, verify
from mach.runs.ensemble import BucketScores, Ensemble
from mach.scoring import Scorer
from mach.storage import Run

if TYPE_CHECKING:
    from mach.queries import Queries


@dataclass(frozen=True)
class Answer(TopK):
    """The best k classes of every query, as `TopK`, and which repetitions they come from.

    Attributes
    ----------
    answered_NR : bool array of shape (N, R)
        Whether a repetition's scores went into the answer; only one kept in another process can be missing. Where the
        first so many repetitions were asked for, R is their number.
    """

    answered_NR: NDArray[np.bool_]

    @property
    def is_degraded(self) -> bool:
        """Whether a repetition was missing for some query; its answer is exact for those that were there."""
        return not self.answered_NR.all()


class MachModel(Living):
    """Exact top-k classes by R independent networks over hashed buckets; a context manager that closes it.

    Parameters
    ----------
    run : Run
    repetitions : list of int
        Finished repetitions to use. Build it with `mach.load`.
    scorer : Scorer, optional
        Keeps their weights; by default they are mapped into this process.
    edits : Edits, optional
        What was changed about the classes; by default they are as trained.

    Attributes
    ----------
    n_classes, n_features, n_buckets, n_repetitions, n_heads : int
        K (trained and added), D, B, R as far as used, and J: the hash functions of a repetition.
    reranker : Reranker or None
        Linear classifiers that order the best classes anew, where the run has them.
    prior : float
        Strength of ``log(1 + training rows)`` of a class in scores without re-ranking, see `mach.ordering.prior_terms`.
    calibration : Calibration or None
        What turns scores into probabilities, where the run has it.
    """

    def __init__(
        self, run: Run, repetitions: list[int], scorer: Scorer | None = None, edits: Edits | None = None
    ) -> None:
        self.run, self.repetitions = run, repetitions
        self.ensemble = ensemble = Ensemble(run, repetitions, scorer)
        manifest = run.manifest
        self.n_features, self.n_heads = manifest.n_features, ensemble.n_heads
        self.assignment, self.n_buckets = ensemble.assignment, ensemble.n_buckets
        self.n_repetitions, self.aggregate = ensemble.n_repetitions, ensemble.aggregate
        self.reranker = Reranker.load(run)
        self.calibration = Calibration.load(run)
        chosen = self.calibration.prior if self.calibration else 0.0
        self.prior = chosen if run.config.decoding.prior is None else run.config.decoding.prior
        self._terms_of = lru_cache(maxsize=4)(self._make_terms)
        self._use(Edits(manifest.n_classes) if edits is None else edits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors that keep the weights; nothing to do for a model of this process."""
        self.ensemble.close()

    def topk(
        self,
        queries: Queries,
        k: int = 10,
        *,
        allowed: Allowed = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        probabilities: bool = False,
        repetitions: int | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best classes of every query, best first; equal scores break to the smaller id.

        Parameters
        ----------
        queries : text, sequence of texts, CSR matrix or array of shape (N, D)
            Texts only where the model was trained on text. A text or a 1-D array is a single query.
        k : int
            Ids beyond the number of (allowed) classes are -1 with score -inf.
        allowed : optional
            Classes that may be returned: ids or names, a bool array of shape (K,), the name of a stored subset, or what
            `subset` prepared of these.
        budget : int, optional
            Most trained classes to score a query; then the answer may be approximate, see `search`.
        rerank : bool
            Whether the model's linear classifiers, if it has any, put the C best classes in their order (see `search`).
        tail : float
            Favours rare classes by ``-tail * log(propensity)``: 0.5 to 1 suit PSP@k (see `mach.ordering.tail_terms`).
        probabilities : bool
            Return calibrated probabilities that each class is right in place of scores, see `probabilities`.
        repetitions : int, optional
            Use the first so many of the model's repetitions only: less work a query, less accuracy, as
            `accuracy_curve` tells.

        Returns
        -------
        ids, scores : int64 and float32 arrays of shape (N, k), or (k,) for a single query

        Raises
        ------
        ConfigError
            When probabilities are wanted and the run has no calibration for them, or they are not of all repetitions.
        DataError
            When queries do not fit the model.
        """
        if probabilities:
            self.curve(rerank=rerank)  # missing, it is missed before the work
            if repetitions not in (None, self.n_repetitions):
                raise ConfigError(
                    f"the calibration is for all {self.n_repetitions} repetitions, not the first {repetitions}: leave "
                    "repetitions out, or ask for scores"
                )
        how: dict[str, Any] = {"allowed": allowed, "budget": budget, "rerank": rerank, "tail": tail}
        found = self.search(queries, k, **how, repetitions=repetitions)
        values_Nk = found.scores_Nk
        if probabilities:
            values_Nk = self.probabilities(found.ids_Nk, values_Nk, rerank=rerank, tail=tail)
        return (found.ids_Nk[0], values_Nk[0]) if is_single(queries) else (found.ids_Nk, values_Nk)

    def probabilities(
        self, ids: NDArray[np.int64], scores: NDArray[np.float32], *, rerank: bool = True, tail: float = 0.0
    ) -> NDArray[np.float32]:
        """Calibrated probabilities that classes are right, by their scores from `topk`, `search` or `score`.

        They never order classes otherwise than scores without a tail do, and hold for the best 10 of all classes.

        Raises
        ------
        ConfigError
            When the run has no calibration, or one for other weights or settings.
        """
        terms_K = self._terms(self._live, 0.0, tail)
        return self.curve(rerank=rerank)(scores if terms_K is None else scores - terms_K[ids])

    def curve(self, *, rerank: bool = True) -> Curve:
        """The curve of probabilities, of re-ranked scores where the model has them; errors as `probabilities`."""
        path, found = self.run.path, self.calibration
        repair = f"make one by `mach calibrate {path} DATA`, rows that the run was not trained on"
        if found is None:
            raise ConfigError(f"{path} has no calibration, which probabilities need: {repair}")
        is_plain = not rerank or self.reranker is None
        curve = found.plain if is_plain else found.reranked
        if curve is None or found.fingerprint != self._fingerprint or (is_plain and found.prior != self.prior):
            raise ConfigError(f"the calibration of {path} is for other repetitions, weights or settings: {repair}")
        return curve

    def search(
        self,
        queries: Queries,
        k: int = 10,
        *,
        allowed: Allowed = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        repetitions: int | None = None,
    ) -> Answer:
        """As `topk`, with the certificate: whether each answer is exact, and the bound on everything left out.

        With a prior or tail, ``exact_N`` says that no class is better by aggregate and these together.

        Re-ranked, ``exact_N`` says that the candidates are the C (at least k) best classes of the repetitions, and the
        k returned are the best *of these* by aggregate and classifier together. They are certainly the best of all
        classes by both where no score exceeds theirs elsewhere: ``scores_Nk[:, -1] >= bound_N``.
        """
        how: dict[str, Any] = {"allowed": allowed, "budget": budget, "rerank": rerank, "tail": tail}
        parts = list(self.search_in_parts(queries, k, **how, repetitions=repetitions))
        if not parts:
            raise DataError("there are no queries: give at least one")
        return parts[0] if len(parts) == 1 else Answer.concatenate(parts)

    def search_in_parts(
        self,
        queries: Queries,
        k: int = 10,
        *,
        allowed: Allowed = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        repetitions: int | None = None,
    ) -> Iterator[Answer]:
        """As `search`, a few queries at a time: any number of them in bounded memory."""
        live = self._live
        subset = live.subset(allowed)
        how: dict[str, Any] = {"allowed": subset, "budget": budget, "rerank": rerank, "tail": tail, "live": live}
        for batch, probs_NRB, columns in self.answered(queries, repetitions):
            top = self.decode(batch, probs_NRB, columns, k, **how)
            answered_NR = np.zeros((len(probs_NRB), repetitions or self.n_repetitions), np.bool_)
            answered_NR[:, list(columns)] = True
            yield Answer(**vars(top), answered_NR=answered_NR)

    def decode(
        self,
        batch: Batch,
        probs_NRB: NDArray[np.float32],
        columns: tuple[int, ...],
        k: int,
        *,
        allowed: Allowed = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        live: Live | None = None,
    ) -> TopK:
        """Best k classes by bucket probabilities (n, R' J, B) of a batch, from `answered`."""
        live = live or self._live
        subset = live.subset(allowed)
        how: dict[str, Any] = {"allowed": subset, "rerank": rerank, "tail": tail, "live": live}
        top = self.decode_trained(batch, probs_NRB, columns, k, **how, budget=budget)
        if live.recall.is_idle:
            return top
        return live.recall.best(self.candidates(top, batch, probs_NRB, columns, k, **how), k)

    def decode_trained(
        self,
        batch: Batch,
        probs_NRB: NDArray[np.float32],
        columns: tuple[int, ...],
        k: int,
        *,
        allowed: Subset | None = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        live: Live | None = None,
    ) -> TopK:
        """Best k of the trained classes that are allowed, as if nothing had been taught about them."""
        live = live or self._live
        search = partial(self._best, columns, live.parts(allowed)[0], budget)
        reranker = self.reranker if rerank else None
        terms_K = self._trained_terms(live, rerank, tail)
        if k < 1 or (reranker is None and terms_K is None):  # the decoder refuses a k below 1
            return search(probs_NRB, k)
        if reranker is not None:
            top = search(probs_NRB, max(k, min(reranker.candidates, live.edits.n_trained)))
            return reranker.rerank(_sparse(batch), top, k, probs_NRB, terms_K)
        assert terms_K is not None
        return topk_with_terms(search, probs_NRB, k, terms_K, self.run.config.decoding.candidates)

    def _best(
        self,
        columns: tuple[int, ...],
        allowed: Subset | None,
        budget: int | None,
        probs_NRB: NDArray[np.float32],
        k: int,
    ) -> TopK:
        return self.ensemble.topk(probs_NRB, columns, k, allowed, budget)

    def first_and_reordered(
        self, batch: Batch, probs_NRB: NDArray[np.float32], columns: tuple[int, ...], k: int, live: Live
    ) -> Iterator[TopK]:
        """Best k trained classes by plain and, where there is a re-ranker, by re-ranked scores: from one search.

        Both are the best of the best C by aggregate; plain ones have no certificate for more than that.
        """
        reranker, subset = self.reranker, live.parts(live.everything)[0]
        n_candidates = reranker.candidates if reranker else self.run.config.decoding.candidates
        best = self.ensemble.topk(probs_NRB, columns, max(k, min(n_candidates, live.edits.n_trained)), subset)
        terms_K = self._trained_terms(live, rerank=False, tail=0.0)
        yield reorder(best, best.scores_Nk if terms_K is None else best.scores_Nk + terms_K[best.ids_Nk], k)
        if reranker is not None:
            yield reranker.rerank(_sparse(batch), best, k, probs_NRB)

    def candidates(
        self,
        trained: TopK,
        batch: Batch,
        probs_NRB: NDArray[np.float32],
        columns: tuple[int, ...],
        k: int,
        *,
        allowed: Subset | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        live: Live,
        found: Found | None = None,
    ) -> Candidates:
        """The best k trained classes with all others that can be above them: added ones, and those that were taught."""
        terms_K = self._trained_terms(live, rerank, tail)

        def score_trained(rows: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.float32]:
            used, owners = np.unique(rows, return_inverse=True)
            places = np.arange(len(rows)) - np.searchsorted(rows, used)[owners]
            ids_NC = np.full((len(used), places.max(initial=-1) + 1), -1, np.int64)
            ids_NC[owners, places] = ids
            scores_NC = self._score_trained(rows_of(batch, used), probs_NRB[used], columns, ids_NC, rerank, terms_K)
            return scores_NC[owners, places]

        return live.recall.candidates(
            trained,
            batch,
            probs_NRB,
            self.run.functions(columns),
            k,
            RERANKED if rerank and self.reranker is not None else PLAIN,
            score_trained,
            allowed_K=live.parts(allowed)[1],
            terms_K=self._terms(live, 0.0, tail),
            found=found,
        )

    def _trained_terms(self, live: Live, rerank: bool, tail: float) -> NDArray[np.float32] | None:
        reranks = rerank and self.reranker is not None
        terms_K = self._terms(live, 0.0 if reranks else self.prior, tail)
        return None if terms_K is None else terms_K[: live.edits.n_trained]

    def _score_trained(
        self,
        batch: Batch,
        probs_NRB: NDArray[np.float32],
        columns: tuple[int, ...],
        ids_NC: NDArray[np.int64],
        rerank: bool,
        terms_K: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        """Scores of given trained classes, -inf for an id of -1."""
        scores_NC = self.ensemble.score(probs_NRB, columns, ids_NC)
        if self.reranker is not None and rerank:
            scores_NC = self.reranker.rescore(_sparse(batch), ids_NC, scores_NC, probs_NRB)
        return scores_NC if terms_K is None else scores_NC + terms_K[ids_NC]

    def _score_batch(
        self,
        batch: Batch,
        probs_NRB: NDArray[np.float32],
        columns: tuple[int, ...],
        ids_NC: NDArray[np.int64],
        *,
        rerank: bool = True,
        tail: float = 0.0,
        live: Live,
        found: Found | None = None,
    ) -> NDArray[np.float32]:
        """Scores of given classes, shape (N, C); -inf for removed ones and -1."""
        edits, recall = live.edits, live.recall
        trained_NC = np.where(ids_NC < edits.n_trained, ids_NC, -1)
        terms_K = self._trained_terms(live, rerank, tail)
        scores_NC = self._score_trained(batch, probs_NRB, columns, trained_NC, rerank, terms_K)
        if not recall.is_idle:
            mode = RERANKED if rerank and self.reranker is not None else PLAIN
            added_terms_K = self._terms(live, 0.0, tail)
            found = recall.find(batch, mode) if found is None else found
            rows, at = np.nonzero(ids_NC >= edits.n_trained)
            ids = ids_NC[rows, at]
            values_NRB = transform(probs_NRB, self.aggregate)
            added = recall.score_added(found, values_NRB, self.run.functions(columns), rows, ids, mode)
            scores_NC[rows, at] = added if added_terms_K is None else added + added_terms_K[ids]
            all_rows = np.repeat(np.arange(len(ids_NC)), ids_NC.shape[1])
            scores_NC = recall.lifted(found, all_rows, ids_NC.ravel(), scores_NC.ravel()).reshape(ids_NC.shape)
        if len(edits.removed):
            scores_NC[edits.is_removed(ids_NC)] = -np.inf
        return scores_NC

    def score(self, queries: Queries, ids: ArrayLike, *, rerank: bool = True, tail: float = 0.0) -> NDArray[np.float32]:
        """Scores of given classes: ids of shape (C,) for all queries or (N, C); returns (N, C), or (C,) for one.

        They are those that `topk` would give them, -inf for removed classes; ``rerank`` and ``tail`` as there.

        Raises
        ------
        DataError
            When an id is not a class.
        """
        candidates, live, K = np.asarray(ids), self._live, self.n_classes
        if not candidates.size:
            candidates = candidates.astype(np.int64)
        if candidates.dtype.kind not in "iu":
            raise DataError(f"ids are {candidates.dtype}: need integers 0..{K - 1}; `ids_of` gives those of names")
        outside = candidates[(candidates < -1) | (candidates >= K)]
        if len(outside):
            raise DataError(f"candidate {outside[0]} is no class: need 0..{K - 1}, or -1 for none")
        scores, begin = [], 0
        for batch, probs_NRB, columns in self.answered(queries):
            n = len(probs_NRB)
            rows = candidates[begin : begin + n] if candidates.ndim == 2 else np.tile(candidates, (n, 1))
            scores.append(self._score_batch(batch, probs_NRB, columns, rows, rerank=rerank, tail=tail, live=live))
            begin += n
        if candidates.ndim == 2 and len(candidates) != begin:
            raise DataError(f"ids of shape {candidates.shape} for {begin} queries: give a row a query, or one for all")
        scores_NC = np.concatenate(scores)
        return scores_NC[0] if is_single(queries) and candidates.ndim == 1 else scores_NC

    def bucket_scores(self, queries: Queries) -> NDArray[np.float32]:
        """Bucket probabilities of shape (N, R J, B), float32: what the aggregate turns into class scores.

        Those of repetitions that do not answer are NaN.
        """
        parts = [np.empty((0, self.assignment.n_repetitions, self.n_buckets), np.float32)]
        for _, probs_NRB, columns in self.answered(queries):
            parts.append(np.full((len(probs_NRB), *parts[0].shape[1:]), np.nan, np.float32))
            parts[-1][:, self.run.functions(columns)] = probs_NRB
        return np.concatenate(parts)

    def info(self) -> dict[str, Any]:
        """What the model is: counts, aggregate, bytes on disk, and what its training reported."""
        manifest = self.run.manifest
        done = [self.run.repetition(r).summary() for r in self.repetitions]
        return {
            "path": str(self.run.path),
            "n_classes": self.n_classes,
            "n_added": self.edits.n_added,
            "n_removed": len(self.edits.removed),
            "classes_version": self.version,
            "n_features": self.n_features,
            "n_buckets": self.n_buckets,
            "n_repetitions": self.n_repetitions,
            "n_heads": self.n_heads,
            "assignment": "learned table" if self.run.has_learned_tables else manifest.assignment["family"],
            "repetitions": self.repetitions,
            "n_rows": manifest.n_rows,
            "loss": manifest.loss,
            "precision": manifest.precision,
            "aggregate": self.aggregate,
            "prior": self.prior,
            "calibrated_rows": self.calibration.n_rows if self.calibration else 0,
            "has_class_names": self.run.class_names is not None,
            "takes_text": self.run.text_features is not None,
            **self.ensemble.sizes(),
            "worker_seconds": round(sum(summary.worker_seconds for summary in done), 1),
            "peak_worker_bytes": max(summary.peak_memory_bytes for summary in done),
            "peer_bytes": sum(summary.peer_bytes for summary in done),
            "peer_sockets": sum(summary.peer_sockets for summary in done),
            **self._reranking(),
            "mach_version": manifest.mach_version,
        }

    def _reranking(self) -> dict[str, Any]:
        """What the re-ranker is; its bytes grow with K, unlike all others."""
        if self.reranker is None:
            return {"reranker_bytes": 0}
        done = read_json(self.run.reranked, Reranked)
        return {
            "reranker_bytes": self.reranker.n_bytes,
            "reranker_weights": done.n_weights,
            "reranker_candidates": self.reranker.candidates,
            **{f"reranker_{name}": value for name, value in self.reranker.blend.model_dump().items()},
            "reranker_learned": self.reranker.stacker is not None,
            "reranker_cpu_seconds": done.cpu_seconds,
            "reranker_repetitions": done.repetitions,
        }

    def verify(self) -> None:
        """Read all weights and compare them with the digests that training recorded; cost of reading the files.

        Raises
        ------
        StorageError
            When a file has changed since.
        """
        self.ensemble.verify()
        verify(self.run)

    def parse(self, line: str) -> Any:
        """A query as typed in a shell: a text, or numbers where the model takes them."""
        return self.ensemble.reader.parse(line)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.run, self.repetitions)

    def _terms(self, live: Live, prior: float, tail: float) -> NDArray[np.float32] | None:
        return self._terms_of(live.edits, prior, tail) if prior or tail else None

    def _make_terms(self, edits: Edits, prior: float, tail: float) -> NDArray[np.float32]:
        """What is added to the score of every class; a prior only to those of trained ones."""
        counts_K = self.run.class_counts_K()
        terms_K = np.pad(prior_terms(counts_K, prior), (0, edits.n_added))
        all_counts_K = np.concatenate([counts_K, edits.counts_A])
        return terms_K + tail_terms(all_counts_K, self.run.manifest.n_rows, tail) if tail else terms_K

    def answered(self, queries: Queries, repetitions: int | None = None) -> Iterator[BucketScores]:
        """As `mach.runs.ensemble.Ensemble.answered`."""
        return self.ensemble.answered(queries, repetitions)


def _sparse(batch: Batch) -> SparseBatch:
    assert isinstance(batch, SparseBatch), "runs with dense input are refused a re-ranker"
    return batch
