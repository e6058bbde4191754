"""A batch of queries: rows of a CSR matrix, or a dense block, whichever the data set holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from mach.data.store import Store
from mach.errors import DataError
from mach.sketch.hashing import Assignment

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False)
class SparseBatch:
    """N rows as a CSR triple: indptr (N+1,) int64, indices (nnz,) int32, values (nnz,) float32."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def matrix(self, n_features: int) -> csr_array:
        """The same rows as a matrix (N, D); nothing is copied."""
        from scipy.sparse import csr_array

        return csr_array((self.values, self.indices, self.indptr), shape=(len(self), n_features))


@dataclass(frozen=True, eq=False)
class DenseBatch:
    """N rows as one float32 array of shape (N, D)."""

    values_ND: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.values_ND)


Batch = SparseBatch | DenseBatch


@dataclass(frozen=True, eq=False)
class Targets:
    """Which outputs of a batch's rows are on: output ``outputs[i]`` of row ``rows[i]``, no pair twice.

    Output j B + b is bucket b of the network's hash function j, of ``n_heads``.
    """

    rows: NDArray[np.int64]
    outputs: NDArray[np.int64]
    n_heads: int = 1


def read_batch(store: Store, rows: NDArray[np.int64]) -> Batch:
    """Rows of the store, in the given order, copied out of the memory map."""
    if store.is_dense:
        return DenseBatch(store.dense_ND[rows])
    return rows_of(SparseBatch(store.feature_indptr, store.feature_indices, store.feature_values), rows)


def unit_rows(batch: Batch) -> Batch:
    """Rows of length 1, those of only zeros as they are."""
    if isinstance(batch, DenseBatch):
        lengths_N = np.linalg.norm(batch.values_ND, axis=1)
        return DenseBatch((batch.values_ND / np.maximum(lengths_N, 1e-30)[:, None]).astype(np.float32))
    counts_N = np.diff(batch.indptr)
    squares = np.bincount(np.repeat(np.arange(len(batch)), counts_N), batch.values.astype(np.float64) ** 2, len(batch))
    lengths = np.repeat(np.maximum(np.sqrt(squares), 1e-30), counts_N)
    return SparseBatch(batch.indptr, batch.indices, (batch.values / lengths).astype(np.float32))


def has_features(batch: Batch) -> NDArray[np.bool_]:
    """Whether rows hold anything but zeros."""
    if isinstance(batch, DenseBatch):
        return np.asarray(batch.values_ND.any(axis=1))
    is_there, begins, ends = np.zeros(len(batch.values) + 1, np.bool_), batch.indptr[:-1], batch.indptr[1:]
    np.not_equal(batch.values, 0, out=is_there[:-1])  # one more, where empty rows at the end begin
    return np.asarray(np.logical_or.reduceat(is_there, begins) & (begins < ends))


@overload
def rows_of(batch: SparseBatch, rows: NDArray[np.int64]) -> SparseBatch: ...
@overload
def rows_of(batch: DenseBatch, rows: NDArray[np.int64]) -> DenseBatch: ...
def rows_of(batch: Batch, rows: NDArray[np.int64]) -> Batch:
    """Some rows of a batch, in the given order."""
    if isinstance(batch, DenseBatch):
        return DenseBatch(batch.values_ND[rows])
    from mach.data.kernels.batch import gather_rows

    return SparseBatch(*gather_rows(batch.indptr, batch.indices, batch.values, rows))


def concatenated(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, all of one kind; DataError when there is none."""
    if not batches:
        raise DataError("there are no rows: give at least one")
    parts: list[Any] = list(batches)
    if isinstance(parts[0], DenseBatch):
        return DenseBatch(np.concatenate([part.values_ND for part in parts]))
    counts = np.concatenate([np.diff(part.indptr) for part in parts])
    arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("indices", "values"))
    return SparseBatch(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), *arrays)


def read_classes(store: Store, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Classes of the rows, concatenated, and how many each row has."""
    begins = store.class_indptr[rows]
    counts = store.class_indptr[rows + 1] - begins
    return store.class_ids[ranges(begins, counts)], counts


def right_of(store: Store, rows: NDArray[np.int64], ids_NC: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of the given classes, ids of shape (N, C), is one of its row's own."""
    classes, counts = read_classes(store, rows)
    own = np.repeat(np.arange(len(rows)), counts) * store.n_classes + classes
    right_NC: NDArray[np.bool_] = np.isin(np.arange(len(rows))[:, None] * store.n_classes + ids_NC, own)
    return right_NC & (ids_NC >= 0) & (ids_NC < store.n_classes)  # added classes are beyond those of the store


def read_targets(store: Store, rows: NDArray[np.int64], assignment: Assignment) -> Targets:
    """The union of every row's classes' buckets, by each of the assignment's hash functions."""
    from mach.data.kernels.batch import batch_targets

    classes, counts = read_classes(store, rows)
    found = batch_targets(counts, assignment.buckets(classes), assignment.n_buckets)
    return Targets(*found, n_heads=assignment.n_repetitions)


def ranges(begins: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenation of ``arange(begin, begin + count)``."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts - begins, counts)
