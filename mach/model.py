"""A trained run as a model: exact top-k classes of queries, from any subset of its repetitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.decoding import Decoder, TopK
from mach.errors import DataError, IncompleteRunError, StorageError
from mach.networks.inference import bucket_logits, bucket_probabilities, weight_shapes
from mach.places import Place
from mach.queries import QueryReader, is_single
from mach.storage import Run
from mach.tensors import digest_of

if TYPE_CHECKING:
    from mach.queries import Queries

CHUNK_SCORES = 2**23  # bucket scores held at once: 32 MB


def load(path: str | Place, *, repetitions: Sequence[int] | None = None) -> MachModel:
    """Open a trained run as a model; weights are mapped, so it takes milliseconds and no memory of its own.

    Parameters
    ----------
    path : str, Path or UPath
        Run directory made by ``mach train``; unfinished repetitions are left out. Weights behind a URL are fetched into
        the cache, once a machine.
    repetitions : sequence of int, optional
        Use these only.

    Raises
    ------
    StorageError
        When the folder is no run or is damaged.
    IncompleteRunError
        When one of the wanted repetitions, or any at all, is not finished.

    Examples
    --------
    >>> import mach
    >>> model = mach.load("runs/characters")  # doctest: +SKIP
    >>> ids, scores = model.topk("black chess queen", k=5)  # doctest: +SKIP
    >>> model.names(ids)[0]  # doctest: +SKIP
    'BLACK CHESS QUEEN'
    """
    run = Run.open(path)
    finished = run.finished()
    chosen = finished if repetitions is None else list(dict.fromkeys(repetitions))
    missing = sorted(set(chosen) - set(finished))
    if missing:
        raise IncompleteRunError(
            f"{path}: repetitions {missing} are not finished, {finished} are: train on, or name those"
        )
    if not chosen:
        raise IncompleteRunError(f"{path}: no repetition is finished yet: train on with the same command")
    return MachModel(run, chosen)


class MachModel:
    """Exact top-k classes by R independent networks over hashed buckets.

    Parameters
    ----------
    run : Run
    repetitions : list of int
        Finished repetitions to use. Build it with `mach.load`.

    Attributes
    ----------
    n_classes, n_features, n_buckets, n_repetitions : int
        K, D, B, and R as far as used.
    """

    def __init__(self, run: Run, repetitions: list[int]) -> None:
        self.run = run
        self.repetitions = repetitions
        manifest = run.manifest
        self.n_classes, self.n_features = manifest.n_classes, manifest.n_features
        self.assignment = run.assignment().select(repetitions)
        self.n_buckets, self.n_repetitions = self.assignment.n_buckets, len(repetitions)
        self.aggregate = "log-mean" if run.config.decoding.aggregate == "auto" else run.config.decoding.aggregate
        shapes = weight_shapes(
            run.config.network,
            n_features=self.n_features,
            n_buckets=self.n_buckets,
            dense_input=manifest.dense_input,
        )
        self._widest = max(max(shape) for name, shape in shapes.items() if name != "input.weight")
        self._weights = [run.load_weights(r, shapes) for r in repetitions]

    def topk(
        self,
        queries: Queries,
        k: int = 10,
        *,
        allowed: NDArray[np.bool_] | None = None,
        budget: int | None = None,
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

        Returns
        -------
        ids, scores : int64 and float32 arrays of shape (N, k), or (k,) for a single query

        Raises
        ------
        DataError
            When queries do not fit the model.
        """
        found = self.search(queries, k, allowed=allowed, budget=budget)
        if is_single(queries):
            return found.ids_Nk[0], found.scores_Nk[0]
        return found.ids_Nk, found.scores_Nk

    def search(
        self,
        queries: Queries,
        k: int = 10,
        *,
        allowed: NDArray[np.bool_] | None = None,
        budget: int | None = None,
    ) -> TopK:
        """As `topk`, with the certificate: whether each answer is exact, and the bound on everything left out."""
        parts = list(self.search_in_parts(queries, k, allowed=allowed, budget=budget))
        if not parts:
            raise DataError("there are no queries: give at least one")
        return TopK.concatenate(parts)

    def search_in_parts(
        self,
        queries: Queries,
        k: int = 10,
        *,
        allowed: NDArray[np.bool_] | None = None,
        budget: int | None = None,
    ) -> Iterator[TopK]:
        """As `search`, a few queries at a time: any number of them in bounded memory."""
        for probs_NRB in self.probabilities(queries):
            yield self._decoder.topk(probs_NRB, k, allowed_K=allowed, budget=budget)

    def score(self, queries: Queries, ids: ArrayLike) -> NDArray[np.float32]:
        """Scores of given classes: ids of shape (C,) for all queries or (N, C); returns (N, C), or (C,) for one.

        Raises
        ------
        DataError
            When an id is not a class.
        """
        candidates = np.asarray(ids)
        scores, begin = [], 0
        for probs_NRB in self.probabilities(queries):
            n = len(probs_NRB)
            rows = candidates[begin : begin + n] if candidates.ndim == 2 else np.tile(candidates, (n, 1))
            scores.append(self._decoder.score(probs_NRB, rows))
            begin += n
        if candidates.ndim == 2 and len(candidates) != begin:
            raise DataError(f"ids of shape {candidates.shape} for {begin} queries: give a row a query, or one for all")
        scores_NC = np.concatenate(scores)
        return scores_NC[0] if is_single(queries) and candidates.ndim == 1 else scores_NC

    def bucket_scores(self, queries: Queries) -> NDArray[np.float32]:
        """Bucket probabilities of shape (N, R, B), float32: what the aggregate turns into class scores."""
        parts = list(self.probabilities(queries))
        return np.concatenate(parts) if parts else np.empty((0, self.n_repetitions, self.n_buckets), np.float32)

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
        files = [self.run.repetition(r).weights_file() for r in self.repetitions]
        return {
            "path": str(self.run.path),
            "n_classes": self.n_classes,
            "n_features": self.n_features,
            "n_buckets": self.n_buckets,
            "n_repetitions": self.n_repetitions,
            "repetitions": self.repetitions,
            "n_rows": manifest.n_rows,
            "loss": manifest.loss,
            "precision": manifest.precision,
            "aggregate": self.aggregate,
            "has_class_names": self.run.class_names is not None,
            "takes_text": self.run.text_features is not None,
            "weight_bytes": sum(file.stat().st_size for file in files),
            "n_parameters": sum(array.size for weights in self._weights for array in weights.values()),
            "worker_seconds": round(sum(summary.worker_seconds for summary in done), 1),
            "peak_worker_bytes": max(summary.peak_memory_bytes for summary in done),
            "peer_bytes": sum(summary.peer_bytes for summary in done),
            "peer_sockets": sum(summary.peer_sockets for summary in done),
            "mach_version": manifest.mach_version,
        }

    def verify(self) -> None:
        """Read all weights and compare them with the digests that training recorded; cost of reading the files.

        Raises
        ------
        StorageError
            When a file has changed since.
        """
        for repetition, weights in zip(self.repetitions, self._weights, strict=True):
            files = self.run.repetition(repetition)
            found, recorded = digest_of(weights), files.summary().weights_digest
            if found != recorded:
                raise StorageError(f"{files.weights} has digest {found}, training recorded {recorded}: copy it anew")

    def parse(self, line: str) -> Any:
        """A query as typed in a shell: a text, or numbers where the model takes them."""
        return self._reader.parse(line)

    @cached_property
    def _reader(self) -> QueryReader:
        return QueryReader(self.n_features, self.run.manifest.dense_input, self.run.text_features)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.assignment, self.aggregate)

    @cached_property
    def _dense_parts(self) -> list[Any]:
        network, manifest = self.run.config.network, self.run.manifest
        if network.trunk is None:
            return [None] * self.n_repetitions
        from mach.networks.trunks import load_dense_part

        return [
            load_dense_part(
                network,
                weights,
                n_features=self.n_features,
                n_buckets=self.n_buckets,
                dense_input=manifest.dense_input,
            )
            for weights in self._weights
        ]

    def probabilities(self, queries: Queries) -> Iterator[NDArray[np.float32]]:
        """Bucket probabilities (n, R, B) of consecutive chunks of queries, so that memory stays bounded."""
        n_rows = max(1, CHUNK_SCORES // max(self.n_repetitions * self.n_buckets, self._widest))
        for batch in self._reader.batches(queries, n_rows):
            probs_NRB = np.empty((len(batch), self.n_repetitions, self.n_buckets), np.float32)
            for r, (weights, dense) in enumerate(zip(self._weights, self._dense_parts, strict=True)):
                logits_NB = bucket_logits(weights, batch, dense)
                probs_NRB[:, r] = bucket_probabilities(logits_NB, self.run.manifest.loss)
            yield probs_NRB


def _nested(ids: NDArray[Any], name: Any) -> Any:
    return name(int(ids)) if ids.ndim == 0 else [_nested(part, name) for part in ids]
