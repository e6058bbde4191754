"""Numpy's files: npz pairs of sparse matrices and dense npy matrices, as chunks of rows.

=== =============================================================================================================
npz CSR arrays ``X_data X_indices X_indptr X_shape`` and ``Y_indices Y_indptr Y_shape``: every stored entry of Y is
    a class of its row, ``Y_data`` is not read
npy dense matrix ``NAME.npy`` of any number type, beside ``NAME.classes.npy`` (integers: one class a row) or
    ``NAME.classes.npz`` (the Y arrays as above)
=== =============================================================================================================

The classes of queries may be missing: the Y arrays all together, or the file beside ``NAME.npy``.

Rows in messages count from 0. Only the indptr arrays are held whole; nothing is unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from mach.data.sources import BLOCK_BYTES, LIMIT, Numbers, Shape, source_errors
from mach.data.store import Chunk
from mach.errors import DataError

_INFINITE = "feature value {} is not finite in float32: replace it"
_NEEDED = "X_data, X_indices, X_indptr, X_shape and Y_indices, Y_indptr, Y_shape"


class _Array:
    """An npy file, or a member of an npz file, read from its beginning."""

    def __init__(self, stack: ExitStack, path: Path, name: str | None = None, kinds: str = "iu") -> None:
        self.place = f"{path}: {name}" if name else str(path)
        self._path = path
        with source_errors(path):
            try:
                if name is None:
                    self._file: IO[bytes] = stack.enter_context(path.open("rb"))
                else:
                    archive = stack.enter_context(zipfile.ZipFile(path))
                    self._file = stack.enter_context(archive.open(f"{name}.npy"))
                is_first = npy_format.read_magic(self._file) == (1, 0)
                read_header = npy_format.read_array_header_1_0 if is_first else npy_format.read_array_header_2_0
                self.shape, _, self._dtype = read_header(self._file)
            except KeyError as error:
                raise DataError(f"{path} has no array {name}: it needs {_NEEDED}") from error
            except ValueError as error:
                raise DataError(f"{self.place} is no array of numpy's ({error}): write it with numpy.save") from error
        if self._dtype.kind not in kinds or len(self.shape) != 1:
            needed = "integers" if kinds == "iu" else "numbers"
            raise DataError(
                f"{self.place} has type {self._dtype} and shape {self.shape}: it needs {needed} in one axis"
            )

    def refuse_length(self, n: int) -> None:
        if self.shape[0] != n:
            raise DataError(f"{self.place} has {self.shape[0]} entries, its indptr ends at {n}: save it again")

    def read(self, n: int | None = None) -> NDArray[Any]:
        """The next n elements, all by default."""
        n = self.shape[0] if n is None else int(n)
        with source_errors(self._path):
            data = self._file.read(n * self._dtype.itemsize)
        if len(data) < n * self._dtype.itemsize:
            raise DataError(f"{self.place} is cut short: write it again")
        return np.frombuffer(data, dtype=self._dtype)


class _Classes:
    """The classes of a file: one integer a row, the Y arrays of an npz file, or (without a path) none at all."""

    def __init__(self, stack: ExitStack, path: Path | None, n_rows: int) -> None:
        self.path = path
        self.n_classes: int | None = None
        if path is None:
            self.indptr = np.zeros(n_rows + 1, dtype=np.int64)
        elif path.suffix == ".npy":
            self._ids = _Array(stack, path)
            self.indptr = np.arange(self._ids.shape[0] + 1, dtype=np.int64)
        else:
            self.indptr, self.n_classes = _indptr(stack, path, "Y")
            self._ids = _Array(stack, path, "Y_indices")
            self._ids.refuse_length(self.indptr[-1])
        if len(self.indptr) - 1 != n_rows:
            raise DataError(
                f"{path} has classes of {len(self.indptr) - 1} rows, the features are those of {n_rows}: "
                "they must be of the same rows"
            )

    def read(self, begin: int, end: int, limit: int | None) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sorted and merged classes of the next rows, ``begin..end-1``, as a CSR pair."""
        indptr = self.indptr[begin : end + 1]
        if self.path is None:
            return indptr, np.empty(0, dtype=np.int32)
        ids = self._ids.read(indptr[-1] - indptr[0])
        _refuse_outside(self.path, "class", begin, indptr, ids, limit)
        keys = np.unique(_keys(indptr, ids))
        lengths = np.bincount(keys >> 32, minlength=end - begin)
        return np.concatenate(([0], np.cumsum(lengths))), (keys & 0xFFFFFFFF).astype(np.int32)


class Npz(Numbers):
    """Pairs of sparse matrices."""

    is_packed = True

    def shape(self, path: Path, classes_optional: bool = False) -> Shape:
        with ExitStack() as stack:
            indptr, n_features = _indptr(stack, path, "X")
            n_rows = len(indptr) - 1
            classes = self._classes(stack, path, n_rows, classes_optional)
            return Shape(n_rows, n_features, classes.n_classes)

    def chunks(
        self, path: Path, shape: Shape, block_bytes: int = BLOCK_BYTES, classes_optional: bool = False
    ) -> Iterator[Chunk]:
        with ExitStack() as stack:
            indptr, _ = _indptr(stack, path, "X")
            n_rows = len(indptr) - 1
            classes = self._classes(stack, path, n_rows, classes_optional)
            indices, data = _Array(stack, path, "X_indices"), _Array(stack, path, "X_data", "iufb")
            indices.refuse_length(indptr[-1])
            data.refuse_length(indptr[-1])
            for begin, end in _row_blocks(indptr + classes.indptr, block_bytes // 8):
                rows = indptr[begin : end + 1]
                ids = indices.read(rows[-1] - rows[0])
                _refuse_outside(path, "feature index", begin, rows, ids, shape.n_features)
                is_unordered = np.diff(_keys(rows, ids), prepend=-1) <= 0
                why = "feature index {} does not ascend: call X.sum_duplicates() before saving"
                _refuse(is_unordered, path, begin, rows, ids, why)
                with np.errstate(over="ignore"):
                    values = data.read(rows[-1] - rows[0]).astype(np.float32)
                _refuse(~np.isfinite(values), path, begin, rows, values, _INFINITE)
                features = rows - rows[0], ids.astype(np.int32), values
                yield Chunk(*classes.read(begin, end, shape.n_classes), features, end / n_rows)

    @staticmethod
    def _classes(stack: ExitStack, path: Path, n_rows: int, classes_optional: bool) -> _Classes:
        with source_errors(path), zipfile.ZipFile(path) as archive:
            has_classes = any(name.startswith("Y_") for name in archive.namelist())
        return _Classes(stack, path if has_classes or not classes_optional else None, n_rows)


class Npy(Numbers):
    """Dense matrices beside their classes."""

    is_dense = True
    is_packed = True

    def shape(self, path: Path, classes_optional: bool = False) -> Shape:
        with ExitStack() as stack:
            n_rows, n_features = _dense(path).shape
            n_classes = self._classes(stack, path, n_rows, classes_optional).n_classes
            return Shape(n_rows, n_features, n_classes)

    def chunks(
        self, path: Path, shape: Shape, block_bytes: int = BLOCK_BYTES, classes_optional: bool = False
    ) -> Iterator[Chunk]:
        with ExitStack() as stack:
            dense = _dense(path)
            n_rows, width = dense.shape
            classes = self._classes(stack, path, n_rows, classes_optional)
            for begin, end in _row_blocks(np.arange(n_rows + 1) * (width + 1), block_bytes // 4):
                with np.errstate(over="ignore"):
                    values = np.ascontiguousarray(dense[begin:end], dtype=np.float32)
                _refuse(
                    ~np.isfinite(values).ravel(), path, begin, np.arange(end - begin + 1) * width, values, _INFINITE
                )
                yield Chunk(*classes.read(begin, end, shape.n_classes), values, end / n_rows)

    def beside(self, path: Path, classes_optional: bool) -> list[Path]:
        candidates = [path.with_suffix(".classes.npy"), path.with_suffix(".classes.npz")]
        there = [candidate for candidate in candidates if candidate.exists()][:1]
        if not there and not classes_optional:
            names = " or ".join(candidate.name for candidate in candidates)
            raise DataError(f"{path} has no classes beside it: save them as {names}")
        return there

    def _classes(self, stack: ExitStack, path: Path, n_rows: int, classes_optional: bool) -> _Classes:
        return _Classes(stack, next(iter(self.beside(path, classes_optional)), None), n_rows)


def _dense(path: Path) -> NDArray[Any]:
    with source_errors(path):
        try:
            dense: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path} is no array of numpy's ({error}): write it with numpy.save") from error
    if not isinstance(dense, np.ndarray) or dense.ndim != 2 or dense.dtype.kind not in "iufb":
        raise DataError(f"{path} is no matrix of numbers with the axes (rows, features): reshape or convert it")
    return dense


def _indptr(stack: ExitStack, path: Path, matrix: str) -> tuple[NDArray[np.int64], int]:
    """The checked row offsets and the number of columns of an npz file's X or Y."""
    indptr = _Array(stack, path, f"{matrix}_indptr").read().astype(np.int64)
    shape = _Array(stack, path, f"{matrix}_shape").read().tolist()
    if len(shape) != 2 or len(indptr) != shape[0] + 1 or indptr[0] != 0 or np.any(np.diff(indptr) < 0):
        raise DataError(f"{path}: {matrix}_indptr and {matrix}_shape = {shape} are not those of a CSR matrix")
    return indptr, shape[1]


def _row_blocks(offsets: NDArray[np.int64], n_entries: int) -> Iterator[tuple[int, int]]:
    """Consecutive rows that hold about ``n_entries`` together, at least one row at a time."""
    begin, n_rows = 0, len(offsets) - 1
    while begin < n_rows:
        end = int(np.searchsorted(offsets, offsets[begin] + n_entries, side="right")) - 1
        end = min(max(end, begin + 1), begin + 2**20, n_rows)
        yield begin, end
        begin = end


def _keys(indptr: NDArray[np.int64], ids: NDArray[Any]) -> NDArray[np.int64]:
    """Row within the block and id of every entry as one number, which orders them so."""
    rows: NDArray[np.int64] = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return rows << 32 | ids.astype(np.int64)


def _refuse_outside(
    path: Path, what: str, begin: int, indptr: NDArray[np.int64], ids: NDArray[Any], limit: int | None
) -> None:
    last = (LIMIT if limit is None else limit) - 1
    _refuse((ids < 0) | (ids > last), path, begin, indptr, ids, f"{what} {{}} is outside 0..{last}: correct it")


def _refuse(
    is_bad: NDArray[np.bool_], path: Path, begin: int, indptr: NDArray[np.int64], entries: NDArray[Any], why: str
) -> None:
    """DataError that names the first bad entry of a block of rows, and the row."""
    if is_bad.any():
        first = int(np.argmax(is_bad))
        row = begin + int(np.searchsorted(indptr - indptr[0], first, side="right")) - 1
        raise DataError(f"{path} row {row}: {why.format(entries.flat[first])}")
