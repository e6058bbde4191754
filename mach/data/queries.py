"""Queries as people hold them (texts, sparse or dense matrices, stores) to batches as networks read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.data.batch import Batch, DenseBatch, SparseBatch
from mach.data.store import Store
from mach.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from mach.data.text import TextFeatures

    Queries: TypeAlias = str | Sequence[str] | csr_array | ArrayLike | Store


@dataclass(frozen=True)
class QueryReader:
    """What a model accepts."""

    n_features: int  # D
    dense_input: bool  # whether its networks read dense rows
    text_features: TextFeatures | None  # how texts become features; None where the model takes numbers

    def batches(self, queries: Queries, n_rows: int) -> Iterator[Batch]:
        """Consecutive batches of at most ``n_rows`` rows.

        Raises DataError when the queries are of another kind or width than the model, or hold NaN or infinity.
        """
        if isinstance(queries, Store):
            for begin in range(0, queries.n_rows, n_rows):
                yield self._batch(queries.features(begin, min(begin + n_rows, queries.n_rows)))
            return
        rows: Any = [queries] if isinstance(queries, str) else queries
        if _is_texts(rows):
            rows = rows if isinstance(rows, list) else list(rows)
            if self.text_features is None:
                raise DataError(
                    f"this model was trained on numbers, not on text: give features of shape (N, {self.n_features})"
                )
            for begin in range(0, len(rows), n_rows):
                yield SparseBatch(*self.text_features.transform(rows[begin : begin + n_rows]))
            return
        rows = rows.tocsr() if hasattr(rows, "tocsr") else np.atleast_2d(_numbers(rows))
        for begin in range(0, rows.shape[0], n_rows):
            yield self._batch(rows[begin : begin + n_rows])

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
                f"query {line!r:.60}: this model takes numbers, as {form} of {self.n_features} features ({error})"
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
        if values.dtype.kind == "c" or not (np.abs(values) <= np.finfo(np.float32).max).all():
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
        if not is_sparse:
            from scipy.sparse import csr_array

            rows = csr_array(rows)
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
    if isinstance(queries, Store) or hasattr(queries, "tocsr") or _is_texts(queries):
        return False
    return np.ndim(queries) == 1


def _is_texts(queries: Any) -> bool:
    if isinstance(queries, np.ndarray):
        return queries.dtype.kind in "OU"
    return isinstance(queries, Sequence) and all(isinstance(query, str) for query in queries[:1]) and len(queries) > 0


def _numbers(queries: Any) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # infinity is refused later
            return np.asarray(queries, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"queries are neither texts nor rows of numbers of equal length: {error}") from error
