"""The repetitions of a run as one classifier: queries to bucket scores, and these to the best trained classes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch, rows_of
from mach.data.queries import QueryReader
from mach.data.rows import RowView
from mach.errors import ConfigError
from mach.runs.run import Run
from mach.runs.scorer import LocalScorer, Scorer, shapes_of
from mach.sketch.answers import Subset, TopK
from mach.sketch.decoder import Decoder

if TYPE_CHECKING:
    from mach.data.queries import Queries

CHUNK_SCORES = 2**23  # bucket scores held at once: 32 MB


class BucketScores(NamedTuple):
    """A batch of queries and what the repetitions say of it.

    Attributes
    ----------
    batch : Batch
        N rows as the networks read them.
    probs_NRB : float32 array of shape (N, R' J, B)
        Bucket probabilities of the R' repetitions that answered, each with its J hash functions.
    columns : tuple of int
        Positions of these repetitions among those of the ensemble, ascending.
    """

    batch: Batch
    probs_NRB: NDArray[np.float32]
    columns: tuple[int, ...]

    def rows(self, rows: NDArray[np.int64]) -> BucketScores:
        """Those of some of the queries."""
        return BucketScores(rows_of(self.batch, rows), self.probs_NRB[rows], self.columns)

    def first(self, n_repetitions: int) -> BucketScores:
        """Those of the first so many of the repetitions that answered."""
        n_functions = self.probs_NRB.shape[1] // len(self.columns) * n_repetitions
        columns = self.columns[:n_repetitions]
        return BucketScores(self.batch, np.ascontiguousarray(self.probs_NRB[:, :n_functions]), columns)


class Ensemble:
    """R repetitions of a run; a context manager that gives back what is kept elsewhere. Safe to share between threads.

    Parameters
    ----------
    run : Run
    repetitions : list of int
        Finished ones.
    scorer : Scorer, optional
        Keeps their weights; by default they are mapped into this process.

    Attributes
    ----------
    assignment : Assignment
        Of the trained classes, by the hash functions of these repetitions.
    aggregate : str
        How bucket scores become class scores, see `mach.sketch.decoder`.
    n_buckets, n_heads, n_repetitions : int
        B, J and R.

    Examples
    --------
    >>> ensemble = Ensemble(run, run.finished())  # doctest: +SKIP
    >>> for batch, probs_NRB, columns in ensemble.answered(queries):  # doctest: +SKIP
    ...     top = ensemble.topk(probs_NRB, columns, k=10)
    """

    def __init__(self, run: Run, repetitions: list[int], scorer: Scorer | None = None) -> None:
        self.run, self.repetitions = run, repetitions
        self.scorer = LocalScorer(run, repetitions) if scorer is None else scorer
        self.assignment = run.trained_assignment(repetitions)
        self.aggregate = "log-mean" if run.config.decoding.aggregate == "auto" else run.config.decoding.aggregate
        self.n_heads, self.n_buckets = run.config.hashing.heads, self.assignment.n_buckets
        self.n_repetitions = len(repetitions)
        self._decoder = lru_cache(maxsize=64)(self._make_decoder)  # one for every set of repetitions that answered

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors that keep the weights; nothing to do where this process does."""
        self.scorer.close()

    @cached_property
    def reader(self) -> QueryReader:
        """What queries may be."""
        manifest = self.run.manifest
        text = self.run.text_features
        columns = self.run.config.data.text_columns if text else None
        return QueryReader(manifest.n_features, manifest.dense_input, text, columns)

    def read(self, queries: Queries, n_rows: int = 2**20) -> Iterator[Batch]:
        """Batches of at most ``n_rows`` queries as the networks read them."""
        view = RowView(most=self.run.manifest.row_features)
        return (view.batch(batch) for batch in self.reader.batches(queries, n_rows))

    def answered(self, queries: Queries, n_repetitions: int | None = None) -> Iterator[BucketScores]:
        """Bucket scores of consecutive chunks of queries, so that memory stays bounded.

        They are of all R repetitions or of the first so many, unless some are kept in another process and are lost.
        ConfigError when that number is none of 1 to R, DataError when queries do not fit the networks.
        """
        if n_repetitions is not None and not 1 <= n_repetitions <= self.n_repetitions:
            raise ConfigError(f"repetitions {n_repetitions}: need 1 to {self.n_repetitions}, as many as the model has")
        asked = None if n_repetitions == self.n_repetitions else n_repetitions
        n_rows = max(1, CHUNK_SCORES // max(self.assignment.n_repetitions * self.n_buckets, self._widest))
        for batch in self.read(queries, n_rows):
            yield self.scored(batch, asked)

    def scored(self, batch: Batch, n_repetitions: int | None = None) -> BucketScores:
        """Bucket scores of one batch from `read`."""
        return BucketScores(batch, *self.scorer.probabilities(batch, n_repetitions))

    def topk(
        self,
        probs_NRB: NDArray[np.float32],
        columns: tuple[int, ...],
        k: int,
        allowed: Subset | None = None,
        budget: int | None = None,
    ) -> TopK:
        """Best k trained classes by aggregate, among the allowed ones; see `mach.sketch.decoder.Decoder.topk`.

        ``probs_NRB`` and ``columns`` are from `answered`; at most ``budget`` classes are scored a query.
        """
        return self._decoder(columns).topk(probs_NRB, k, allowed_K=allowed, budget=budget)

    def score(
        self, probs_NRB: NDArray[np.float32], columns: tuple[int, ...], ids_NC: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Aggregates of given trained classes, shape (N, C); -inf for an id of -1."""
        return self._decoder(columns).score(probs_NRB, ids_NC)

    def search(self, queries: Queries, k: int) -> Iterator[TopK]:
        """Best k trained classes of consecutive chunks of queries."""
        for _, probs_NRB, columns in self.answered(queries):
            yield self.topk(probs_NRB, columns, k)

    def _make_decoder(self, columns: tuple[int, ...]) -> Decoder:
        is_all = len(columns) == self.n_repetitions
        assignment = self.assignment if is_all else self.assignment.select(self.run.functions(columns))
        return Decoder(assignment, self.aggregate)

    @cached_property
    def _widest(self) -> int:
        """Numbers of the widest layer that a row passes; a linear network over sparse rows has none."""
        return max((max(s) for name, s in shapes_of(self.run).items() if not name.startswith("input.")), default=0)
