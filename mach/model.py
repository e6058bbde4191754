"""A trained run as a model: exact top-k classes of queries, from any subset of its repetitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.calibration import Calibration, Curve, fingerprint
from mach.decoding import Decoder, TopK
from mach.errors import ConfigError, DataError
from mach.hashing import Assignment
from mach.networks.batch import Batch, SparseBatch, largest_features
from mach.ordering import prior_terms, tail_terms, topk_with_terms
from mach.queries import QueryReader, is_single
from mach.repetition import read_json
from mach.reranker import Reranked, Reranker, verify
from mach.scoring import Scorer, shapes_of
from mach.storage import Run

if TYPE_CHECKING:
    from mach.queries import Queries

CHUNK_SCORES = 2**23  # bucket scores held at once: 32 MB


@dataclass(frozen=True)
class Answer(TopK):
    """The best k classes of every query, as `TopK`, and which repetitions they come from.

    Attributes
    ----------
    answered_NR : bool array of shape (N, R)
        Whether a repetition's scores went into the answer; only one kept in another process can be missing.
    """

    answered_NR: NDArray[np.bool_]

    @property
    def is_degraded(self) -> bool:
        """Whether a repetition was missing for some query; its answer is exact for those that were there."""
        return not self.answered_NR.all()


class MachModel:
    """Exact top-k classes by R independent networks over hashed buckets; a context manager that closes it.

    Parameters
    ----------
    run : Run
    repetitions : list of int
        Finished repetitions to use. Build it with `mach.load`.
    scorer : Scorer
        Keeps their weights.

    Attributes
    ----------
    n_classes, n_features, n_buckets, n_repetitions, n_heads : int
        K, D, B, R as far as used, and J: the hash functions of a repetition.
    reranker : Reranker or None
        Linear classifiers that order the best classes anew, where the run has them.
    prior : float
        Strength of ``log(1 + training rows)`` of a class in scores without re-ranking, see `mach.ordering.prior_terms`.
    calibration : Calibration or None
        What turns scores into probabilities, where the run has it.
    """

    def __init__(self, run: Run, repetitions: list[int], scorer: Scorer) -> None:
        self.run = run
        self.repetitions = repetitions
        manifest = run.manifest
        self.n_classes, self.n_features = manifest.n_classes, manifest.n_features
        self.n_heads = run.config.hashing.heads
        self.assignment = run.trained_assignment(repetitions)
        self.n_buckets, self.n_repetitions = self.assignment.n_buckets, len(repetitions)
        self.aggregate = "log-mean" if run.config.decoding.aggregate == "auto" else run.config.decoding.aggregate
        layers = [max(shape) for name, shape in shapes_of(run).items() if not name.startswith("input.")]
        self._widest = max(layers, default=0)  # a linear network over sparse rows has none
        self._scorer = scorer
        self.reranker = Reranker.load(run)
        self.calibration = Calibration.load(run)
        chosen = self.calibration.prior if self.calibration else 0.0
        self.prior = chosen if run.config.decoding.prior is None else run.config.decoding.prior
        self._decoder = lru_cache(maxsize=64)(self._make_decoder)  # one for every set of repetitions that answered
        self._terms = lru_cache(maxsize=4)(self._make_terms)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors that keep the weights; nothing to do for a model of this process."""
        self._scorer.close()

    def topk(
        self,
        queries: Queries,
        k: int = 10,
        *,
        allowed: NDArray[np.bool_] | None = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        probabilities: bool = False,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best classes of every query, best first; equal scores break to the smaller id.

        Parameters
        ----------
        queries : text, sequence of texts, CSR matrix or array of shape (N, D)
            Texts only where the model was trained on text. A text or a 1-D array is a single query.
        k : int
            Ids beyond the number of (allowed) classes are -1 with score -inf.
        allowed : bool array of shape (K,), optional
            Classes that may be returned.
        budget : int, optional
            Most classes to score a query; then the answer may be approximate, see `search`.
        rerank : bool
            Whether the model's linear classifiers, if it has any, put the C best classes in their order (see `search`).
        tail : float
            Favours rare classes by ``-tail * log(propensity)``: 0.5 to 1 suit PSP@k (see `mach.ordering.tail_terms`).
        probabilities : bool
            Return calibrated probabilities that each class is right in place of scores, see `probabilities`.

        Returns
        -------
        ids, scores : int64 and float32 arrays of shape (N, k), or (k,) for a single query

        Raises
        ------
        ConfigError
            When probabilities are wanted and the run has no calibration for them.
        DataError
            When queries do not fit the model.
        """
        if probabilities:
            self.curve(rerank=rerank)  # missing, it is missed before the work
        found = self.search(queries, k, allowed=allowed, budget=budget, rerank=rerank, tail=tail)
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
        terms_K = self._terms(0.0, tail)
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
        allowed: NDArray[np.bool_] | None = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
    ) -> Answer:
        """As `topk`, with the certificate: whether each answer is exact, and the bound on everything left out.

        With a prior or tail, ``exact_N`` says that no class is better by aggregate and these together.

        Re-ranked, ``exact_N`` says that the candidates are the C (at least k) best classes of the repetitions, and the
        k returned are the best *of these* by aggregate and classifier together. They are certainly the best of all
        classes by both where no score exceeds theirs elsewhere: ``scores_Nk[:, -1] >= bound_N``.
        """
        parts = list(self.search_in_parts(queries, k, allowed=allowed, budget=budget, rerank=rerank, tail=tail))
        if not parts:
            raise DataError("there are no queries: give at least one")
        return parts[0] if len(parts) == 1 else Answer.concatenate(parts)

    def search_in_parts(
        self,
        queries: Queries,
        k: int = 10,
        *,
        allowed: NDArray[np.bool_] | None = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
    ) -> Iterator[Answer]:
        """As `search`, a few queries at a time: any number of them in bounded memory."""
        for batch, probs_NRB, columns in self.answered(queries):
            top = self.decode(batch, probs_NRB, columns, k, allowed=allowed, budget=budget, rerank=rerank, tail=tail)
            answered_NR = np.zeros((len(probs_NRB), self.n_repetitions), np.bool_)
            answered_NR[:, list(columns)] = True
            yield Answer(**vars(top), answered_NR=answered_NR)

    def decode(
        self,
        batch: Batch,
        probs_NRB: NDArray[np.float32],
        columns: tuple[int, ...],
        k: int,
        *,
        allowed: NDArray[np.bool_] | None = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
    ) -> TopK:
        """Best k classes by bucket probabilities (n, R' J, B) of a batch, from `answered`."""
        search = partial(self._decoder(columns).topk, allowed_K=allowed, budget=budget)
        reranker = self.reranker if rerank else None
        terms_K = self._terms(0.0 if reranker else self.prior, tail)
        if k < 1 or (reranker is None and terms_K is None):  # the decoder refuses a k below 1
            return search(probs_NRB, k)
        if reranker is not None:
            top = search(probs_NRB, max(k, min(reranker.candidates, self.n_classes)))
            return reranker.rerank(_sparse(batch), top, k, terms_K)
        assert terms_K is not None
        return topk_with_terms(search, probs_NRB, k, terms_K, self.run.config.decoding.candidates)

    def score(self, queries: Queries, ids: ArrayLike, *, rerank: bool = True, tail: float = 0.0) -> NDArray[np.float32]:
        """Scores of given classes: ids of shape (C,) for all queries or (N, C); returns (N, C), or (C,) for one.

        They are those that `topk` would give them; ``rerank`` and ``tail`` as there.

        Raises
        ------
        DataError
            When an id is not a class.
        """
        candidates = np.asarray(ids)
        terms_K = self._terms(0.0 if rerank and self.reranker else self.prior, tail)
        scores, begin = [], 0
        for batch, probs_NRB, columns in self.answered(queries):
            n = len(probs_NRB)
            rows = candidates[begin : begin + n] if candidates.ndim == 2 else np.tile(candidates, (n, 1))
            scores.append(self._decoder(columns).score(probs_NRB, rows))
            if self.reranker is not None and rerank:
                scores[-1] = self.reranker.rescore(_sparse(batch), rows.astype(np.int64), scores[-1])
            if terms_K is not None:
                scores[-1] += terms_K[rows]
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

    def names(self, ids: ArrayLike) -> list[Any]:
        """Names of classes, in the shape of ``ids`` as nested lists; padding (-1) gives None.

        Raises
        ------
        DataError
            When the model's data had no class names.
        """
        names = self.run.class_names
        if names is None:
            raise DataError(f"{self.run.path} has no class names: set data.class_names when training, or use ids")
        outside = [int(k) for k in np.ravel(ids) if not -1 <= k < self.n_classes]
        if outside:
            raise DataError(f"class {outside[0]} is none of the {self.n_classes} classes 0..{self.n_classes - 1}")
        nested: list[Any] = _nested(np.asarray(ids), lambda k: names[k] if k >= 0 else None)
        return nested

    def name_function(self) -> Callable[[ArrayLike], list[Any]] | None:
        """`names`, or None where the model has none."""
        return None if self.run.class_names is None else self.names

    def info(self) -> dict[str, Any]:
        """What the model is: counts, aggregate, bytes on disk, and what its training reported."""
        manifest = self.run.manifest
        done = [self.run.repetition(r).summary() for r in self.repetitions]
        return {
            "path": str(self.run.path),
            "n_classes": self.n_classes,
            "n_features": self.n_features,
            "n_buckets": self.n_buckets,
            "n_repetitions": self.n_repetitions,
            "n_heads": self.n_heads,
            "assignment": "table" if self.run.config.hashing.table else self.run.config.hashing.assignment,
            "repetitions": self.repetitions,
            "n_rows": manifest.n_rows,
            "loss": manifest.loss,
            "precision": manifest.precision,
            "aggregate": self.aggregate,
            "prior": self.prior,
            "calibrated_rows": self.calibration.n_rows if self.calibration else 0,
            "has_class_names": self.run.class_names is not None,
            "takes_text": self.run.text_features is not None,
            **self._scorer.sizes(),
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
        self._scorer.verify()
        verify(self.run)

    def parse(self, line: str) -> Any:
        """A query as typed in a shell: a text, or numbers where the model takes them."""
        return self._reader.parse(line)

    @cached_property
    def _reader(self) -> QueryReader:
        return QueryReader(self.n_features, self.run.manifest.dense_input, self.run.text_features)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.run, self.repetitions)

    def _make_terms(self, prior: float, tail: float) -> NDArray[np.float32] | None:
        """What is added to the aggregate of every class; None where that is nothing."""
        if not (prior or tail):
            return None
        counts_K = self.run.class_counts_K()
        terms_K = prior_terms(counts_K, prior)
        return terms_K + tail_terms(counts_K, self.run.manifest.n_rows, tail) if tail else terms_K

    def _make_decoder(self, columns: tuple[int, ...]) -> Decoder:
        is_all = len(columns) == self.n_repetitions
        return Decoder(self.assignment if is_all else self.assignment_of(columns), self.aggregate)

    def assignment_of(self, columns: Sequence[int]) -> Assignment:
        """Assignment by the hash functions of the repetitions at these positions."""
        return self.assignment.select(self.run.functions(columns))

    def answered(self, queries: Queries) -> Iterator[tuple[Batch, NDArray[np.float32], tuple[int, ...]]]:
        """Consecutive chunks of queries and their bucket probabilities (n, R' J, B), so that memory stays bounded.

        With each chunk the positions (in `repetitions`) of those that answered it: all R, unless some are kept in
        another process and have been lost.
        """
        n_rows = max(1, CHUNK_SCORES // max(self.assignment.n_repetitions * self.n_buckets, self._widest))
        for read in self._reader.batches(queries, n_rows):
            batch = largest_features(read, self.run.manifest.row_features)
            yield batch, *self._scorer.probabilities(batch)


def _sparse(batch: Batch) -> SparseBatch:
    assert isinstance(batch, SparseBatch), "runs with dense input are refused a re-ranker"
    return batch


def _nested(ids: NDArray[Any], name: Any) -> Any:
    return name(int(ids)) if ids.ndim == 0 else [_nested(part, name) for part in ids]
