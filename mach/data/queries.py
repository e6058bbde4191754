"""Queries as people hold them (texts, sparse or dense matrices, stores) to batches as networks read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.data.batch import Batch, DenseBatch, SparseBatch, has_features
from mach.data.frames import arrow_of, is_stream, is_table, texts_of
from mach.data.store import Store
from mach.errors import DataError
from mach.files.arrays import ascends

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from mach.data.text import TextFeatures

    Queries: TypeAlias = str | Sequence[str] | csr_array | ArrayLike | Store

LOST = "a run of texts takes them while its folder `text` is there"


@dataclass(frozen=True)
class QueryReader:
    """What a model accepts."""

    n_features: int  # D
    dense_input: bool  # whether its networks read dense rows
    text_features: TextFeatures | None  # how texts become features; None where the model takes numbers
    text_columns: Sequence[str] | None = None  # of a table of queries; None: all

    def batches(self, queries: Queries, n_rows: int) -> Iterator[Batch]:
        """Consecutive batches of at most ``n_rows`` rows.

        Raises DataError when the queries are of another kind or width than the model, or hold NaN or infinity.
        """
        if isinstance(queries, Store):
            for begin in range(0, queries.n_rows, n_rows):
                yield self._batch(queries.features(begin, min(begin + n_rows, queries.n_rows)))
            return
        rows: Any = [queries] if isinstance(queries, str) else held(queries, self.text_columns)
        if hasattr(rows, "tocsr"):
            rows = _sound(rows.tocsr())
        elif _is_texts(rows):
            if self.text_features is None:
                raise DataError(
                    f"this model was trained on numbers, not on text: give features of shape (N, {self.n_features}); "
                    f"{LOST}"
                )
            texts = _texts(rows)
            for begin in range(0, len(texts), n_rows):
                yield SparseBatch(*self.text_features.transform(texts[begin : begin + n_rows]))
            return
        else:
            rows = np.atleast_2d(_numbers(rows))
        n_given = rows.shape[0] if rows.shape[1] else 0  # numpy makes a row of nothing from []
        if 0 < n_given <= n_rows:  # slices of sparse rows cost as much as a small network
            yield self._batch(rows)
            return
        for begin in range(0, n_given, n_rows):
            yield self._batch(rows[begin : begin + n_rows])

    def known(self, batch: Batch) -> NDArray[np.bool_]:
        """Whether rows have a feature that the model can know: a value that is not 0, of a term that it was fitted to.

        Shape (N,); it depends on the row alone.
        """
        if isinstance(batch, SparseBatch) and self.text_features is not None:
            is_known = self.text_features.is_known(batch.indices)
            batch = SparseBatch(batch.indptr, batch.indices, batch.values * is_known)
        return has_features(batch)

    def parse(self, line: str) -> Any:
        """A typed query: the text itself, or ``index:value`` pairs (sparse) or numbers (dense) as one row."""
        if self.text_features is not None:
            return line
        try:
            if self.dense_input:
                return np.array(line.replace(",", " ").split(), dtype=np.float32)
            row_D = np.zeros(self.n_features, np.float32)
            for pair in line.split():
                index, _, value = pair.partition(":")
                if not 0 <= int(index) < self.n_features or row_D[int(index)] != 0:
                    raise ValueError(f"feature {index} is out of range or repeated")
                row_D[int(index)] = float(value)
        except ValueError as error:
            form = "x x x" if self.dense_input else "index:value index:value"
            raise DataError(
                f"query {line!r:.60}: this model takes numbers, as {form} of {self.n_features} features ({error}); "
                f"{LOST}"
            ) from error
        return row_D

    def _batch(self, rows: Any) -> Batch:
        is_sparse = hasattr(rows, "tocsr")
        least = 0 if is_sparse and not self.dense_input else self.n_features
        if len(rows.shape) != 2 or not least <= rows.shape[1] <= self.n_features:
            raise DataError(
                f"queries have shape {tuple(rows.shape)}, the model takes (N, {self.n_features}): use the same features"
            )
        values = rows.data if is_sparse else rows
        if values.dtype.kind not in "biuf":
            raise DataError(f"queries are an array of {values.dtype}: give texts, or rows of real numbers")
        if not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise DataError("queries hold NaN or infinity, or values that float32 does not: replace such values first")
        if is_sparse:  # kernels trust that features are in range, each at most once a row
            least, most = (rows.indices.min(), rows.indices.max()) if rows.nnz else (0, 0)
            if least < 0 or most >= self.n_features:
                raise DataError(
                    f"queries hold features {least} to {most}, the model takes 0..{self.n_features - 1}: use the same "
                    "features"
                )
            rows = canonical(rows)
        if self.dense_input:
            return DenseBatch(np.ascontiguousarray(rows.toarray() if is_sparse else rows, dtype=np.float32))
        if not is_sparse:  # without scipy.sparse, which takes as long to import as a hundred queries
            features, indptr = np.nonzero(rows), np.concatenate([[0], np.cumsum(np.count_nonzero(rows, axis=1))])
            return SparseBatch(indptr, features[1].astype(np.int32), rows[features].astype(np.float32))
        return SparseBatch(rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data.astype(np.float32))


def canonical(rows: Any) -> Any:
    """Sparse rows whose features ascend and are there once; the caller's own are left as they are."""
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


def is_single(queries: Any) -> bool:
    """Whether queries are one text or one row of numbers, so that answers lose their first axis."""
    if isinstance(queries, str):
        return True
    if isinstance(queries, Store) or hasattr(queries, "tocsr") or is_stream(queries) or is_table(queries):
        return False
    rows = held(queries)
    return not _is_texts(rows) and np.ndim(rows) == 1


def held(queries: Any, text_columns: Sequence[str] | None = None) -> Any:
    """The list or array in a column or table (`mach.data.frames`); anything else as it is."""
    queries = arrow_of(queries)
    if is_table(queries):
        texts = texts_of(queries, "queries", text_columns)
        return np.asarray(queries) if texts is None else texts
    if hasattr(queries, "to_pylist"):
        return queries.to_pylist()
    return queries.to_numpy() if hasattr(queries, "to_numpy") else queries


def _sound(rows: Any) -> Any:
    """Sparse rows whose row pointers lead through their entries in order: slices and kernels trust them."""
    starts, n = rows.indptr, min(len(rows.indices), len(rows.data))
    if len(starts) != rows.shape[0] + 1 or starts[-1] > n or not ascends(starts, starts[-1]):
        raise DataError(f"queries are no sound CSR matrix: its indptr must ascend from 0 to at most {n} entries")
    return rows


def _is_texts(queries: Any) -> bool:
    """Whether there is a text, or a gap where a text may be, rather than numbers."""
    if isinstance(queries, np.ndarray):
        return queries.dtype.kind in "OUT" and queries.ndim == 1 and queries.size > 0
    return isinstance(queries, Sequence) and len(queries) > 0 and any(isinstance(query, str) for query in queries)


def _texts(queries: Sequence[Any]) -> list[str]:
    for n, query in enumerate(queries):
        if not isinstance(query, str):
            raise DataError(f"query {n} is {query!r:.40} ({type(query).__name__}), others are texts: give a text each")
    return list(queries)


def _numbers(queries: Any) -> NDArray[np.float32]:
    try:
        given = np.asarray(queries)
    except (TypeError, ValueError) as error:
        raise DataError("queries are neither texts nor rows of numbers of equal length: give one of both") from error
    if given.dtype.kind == "O" and given.size and all(isinstance(value, Real) for value in given.flat):
        with suppress(OverflowError):  # an integer beyond all floating point
            given = given.astype(np.float64)
    if given.dtype.kind not in "biuf":
        if given.shape == (0,):
            raise DataError("there are no queries: give at least one")
        told = f"an array of {given.dtype}" if given.ndim else f"{queries!r:.40} ({type(queries).__name__})"
        raise DataError(f"queries are {told}: give texts, or rows of real numbers")
    with np.errstate(over="ignore"):  # infinity is refused later
        return given.astype(np.float32, copy=False)
