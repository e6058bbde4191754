"""Numpy's files: npz pairs of sparse matrices and dense npy matrices, as chunks of rows.

=== =============================================================================================================
npz CSR arrays ``X_data X_indices X_indptr X_shape`` and ``Y_indices Y_indptr Y_shape``: the stored entries of Y are
    the classes of their rows, but for those that ``Y_data``, where it is there, says are 0 or NaN
    Or ``X.NAME.npz`` beside ``Y.NAME.npz``, each as ``scipy.sparse.save_npz`` writes a CSR matrix (PECOS has such)
npy dense matrix ``NAME.npy`` of any number type, beside ``NAME.classes.npy`` (one class a row, NaN: none) or
    ``NAME.classes.npz`` (the Y arrays as above)
=== =============================================================================================================

The classes of queries may be missing: the Y arrays all together, or the file beside ``NAME.npy`` or ``X.NAME.npz``.

Rows in messages count from 0. All arrays are read in blocks (`mach.data.limits`); nothing is unpickled.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from mach.data.limits import BLOCK_BYTES, ROW_ENTRIES, refuse_expansion, refuse_irregular, refuse_twice
from mach.data.sources import LIMIT, Numbers, Shape, library_errors, source_errors
from mach.data.store import Chunk
from mach.errors import DataError
from mach.files.places import Place

BLOCK_ROWS = 2**20
AnyPath = TypeVar("AnyPath", bound=Place)
_INFINITE = "feature value {} is not finite in float32: replace it"
_NEEDED = "X_data, X_indices, X_indptr, X_shape and Y_indices, Y_indptr, Y_shape"
_SCIPY = ("data", "indices", "indptr", "shape", "format")  # of the one matrix that scipy.sparse.save_npz writes


class _Array:
    """An npy file, or a member of an npz file, read from its beginning."""

    def __init__(self, stack: ExitStack, path: Path, name: str | None = None, kinds: str = "iu") -> None:
        self.place = f"{path}: {name}" if name else str(path)
        self._path = path
        archive = None if name is None else _archive(stack, path)
        if archive is not None and f"{name}.npy" not in archive.namelist():
            raise DataError(f"{path} has no array {name}: it needs {_NEEDED}")
        with _array_errors(path, self.place):
            if archive is None:
                refuse_irregular(path)
                self._file: IO[bytes] = stack.enter_context(path.open("rb"))
                n_bytes = path.stat().st_size
            else:
                self._file = stack.enter_context(archive.open(f"{name}.npy"))
                n_bytes = archive.getinfo(f"{name}.npy").file_size
            is_first = npy_format.read_magic(self._file) == (1, 0)
            read_header = npy_format.read_array_header_1_0 if is_first else npy_format.read_array_header_2_0
            self.shape, _, self._dtype = read_header(self._file)
            n_bytes -= self._file.tell()
        if self._dtype.kind not in kinds or len(self.shape) != 1 or self.shape[0] < 0:
            needed = "integers" if kinds == "iu" else "numbers"
            raise DataError(
                f"{self.place} has type {self._dtype} and shape {self.shape}: it needs {needed} in one axis"
            )
        if self.shape[0] * self._dtype.itemsize > n_bytes:
            raise DataError(
                f"{self.place} is cut short: its header says {self.shape[0]} entries, {max(0, n_bytes)} bytes follow: "
                "write it again"
            )

    def __len__(self) -> int:
        return int(self.shape[0])

    def refuse_length(self, n: int) -> None:
        if len(self) != n:
            raise DataError(f"{self.place} has {len(self)} entries, its indptr ends at {n}: save it again")

    def read(self, n: int) -> NDArray[Any]:
        """The next n elements."""
        with _array_errors(self._path, self.place):
            data = self._file.read(n * self._dtype.itemsize)
        if len(data) < n * self._dtype.itemsize:
            raise DataError(f"{self.place} is cut short: write it again")
        return np.frombuffer(data, dtype=self._dtype)


class _Matrix:
    """The row offsets of an npz file's X or Y, read some rows at a time, and the arrays that they point into."""

    def __init__(self, stack: ExitStack, path: Path, name: str) -> None:
        self.path, self.name, prefix = path, name, _prefix(stack, path, name)
        self._indptr, shape = _Array(stack, path, f"{prefix}indptr"), _Array(stack, path, f"{prefix}shape")
        self.shape = shape.read(min(len(shape), 3)).tolist()
        if len(self.shape) != 2 or min(self.shape) < 0 or len(self._indptr) != self.shape[0] + 1:
            raise self._wrong()
        self.n_rows, self.n_columns = self.shape
        if self.n_columns > LIMIT:
            axis = "D" if name == "X" else "K"
            raise DataError(f"{path}: {name}_shape: {axis} = {self.n_columns} must be at most {LIMIT}: correct it")
        self._last = self._indptr.read(1).astype(np.int64)
        if self._last[0] != 0:
            raise self._wrong()
        self.row = 0
        self.arrays: list[_Array] = []

    def read(self, n_rows: int) -> NDArray[np.int64]:
        """Offsets of the next rows, one more than these."""
        offsets = np.concatenate([self._last, self._indptr.read(n_rows).astype(np.int64)])
        lengths = np.diff(offsets)
        if np.any(lengths < 0):
            raise self._wrong()
        if np.any(lengths > ROW_ENTRIES):
            n = int(np.argmax(lengths > ROW_ENTRIES))
            raise DataError(
                f"{self.path} row {self.row + n}: {lengths[n]} entries of {self.name}, a row may have {ROW_ENTRIES}: "
                "leave out the smallest"
            )
        self._last, self.row = offsets[-1:], self.row + n_rows
        for array in self.arrays:
            if self.row == self.n_rows or len(array) < offsets[-1]:
                array.refuse_length(int(offsets[-1]))
        return offsets

    def _wrong(self) -> DataError:
        return DataError(
            f"{self.path}: {self.name}_indptr and {self.name}_shape = {self.shape} are not those of a CSR matrix: save "
            "it again"
        )


class _Classes:
    """The classes of a file: one integer a row, the Y arrays of an npz file, or (without a path) none at all."""

    def __init__(self, stack: ExitStack, path: Path | None, n_rows: int) -> None:
        self.path = path
        self.n_classes: int | None = None
        self._matrix: _Matrix | None = None
        self._data: _Array | None = None
        n = n_rows
        if path is not None and path.suffix == ".npy":
            self._ids = _Array(stack, path, kinds="iuf")
            n = len(self._ids)
        elif path is not None:
            self._matrix = _Matrix(stack, path, "Y")
            prefix = _prefix(stack, path, "Y")
            self._ids = _Array(stack, path, f"{prefix}indices")
            self._matrix.arrays.append(self._ids)
            if f"{prefix}data.npy" in _archive(stack, path).namelist():
                self._data = _Array(stack, path, f"{prefix}data", "iufb")
                self._matrix.arrays.append(self._data)
            n, self.n_classes = self._matrix.n_rows, self._matrix.n_columns
        if n != n_rows:
            raise DataError(
                f"{path} has classes of {n} rows, the features are those of {n_rows}: they must be of the same rows"
            )

    def offsets(self, n: int) -> NDArray[np.int64]:
        """Those of the entries of the next n rows."""
        if self._matrix is not None:
            return self._matrix.read(n)
        return np.arange(n + 1) if self.path is not None else np.zeros(n + 1, np.int64)

    def read(
        self, begin: int, indptr: NDArray[np.int64], limit: int | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sorted and merged classes of the next rows, from row ``begin`` on, whose `offsets` are given; a CSR pair."""
        indptr = indptr - indptr[0]
        if self.path is None:
            return indptr, np.empty(0, dtype=np.int32)
        ids = self._ids.read(int(indptr[-1]))
        is_there = np.ones(len(ids), np.bool_)
        if self._data is not None:
            data = self._data.read(len(ids))
            is_there = (data != 0) & ~np.isnan(data)
        elif ids.dtype.kind == "f":
            is_there = ~np.isnan(ids)
            _refuse(
                is_there & (ids != np.floor(ids)), self.path, begin, indptr, ids, "class {} is no integer: round it"
            )
        _refuse_outside(self.path, "class", begin, indptr, ids, limit, is_there)
        keys = np.unique(_keys(indptr, np.where(is_there, ids, 0))[is_there])
        lengths = np.bincount(keys >> 32, minlength=len(indptr) - 1)
        return np.concatenate(([0], np.cumsum(lengths))), (keys & 0xFFFFFFFF).astype(np.int32)


class Npz(Numbers):
    """Pairs of sparse matrices."""

    is_packed = True

    def shape(self, path: Path, classes_optional: bool = False) -> Shape:
        with ExitStack() as stack:
            matrix = _Matrix(stack, path, "X")
            classes = self._classes(stack, path, matrix.n_rows, classes_optional)
            return Shape(matrix.n_rows, matrix.n_columns, classes.n_classes)

    def chunks(
        self, path: Path, shape: Shape, block_bytes: int = BLOCK_BYTES, classes_optional: bool = False
    ) -> Iterator[Chunk]:
        with ExitStack() as stack:
            matrix = _Matrix(stack, path, "X")
            classes = self._classes(stack, path, matrix.n_rows, classes_optional)
            prefix = _prefix(stack, path, "X")
            indices, data = _Array(stack, path, f"{prefix}indices"), _Array(stack, path, f"{prefix}data", "iufb")
            matrix.arrays += [indices, data]
            while matrix.row < matrix.n_rows:
                first, n = matrix.row, min(BLOCK_ROWS, matrix.n_rows - matrix.row)
                offsets, class_offsets = matrix.read(n), classes.offsets(n)
                for begin, end in _row_blocks(offsets + class_offsets, block_bytes // 8):
                    rows, row = offsets[begin : end + 1], first + begin
                    ids = indices.read(int(rows[-1] - rows[0]))
                    _refuse_outside(path, "feature index", row, rows, ids, shape.n_features)
                    is_unordered = np.diff(_keys(rows, ids), prepend=-1) <= 0
                    why = "feature index {} does not ascend: call X.sum_duplicates() before saving"
                    _refuse(is_unordered, path, row, rows, ids, why)
                    with np.errstate(over="ignore"):
                        values = data.read(len(ids)).astype(np.float32)
                    _refuse(~np.isfinite(values), path, row, rows, values, _INFINITE)
                    features = rows - rows[0], ids.astype(np.int32), values
                    found = classes.read(row, class_offsets[begin : end + 1], shape.n_classes)
                    yield Chunk(*found, features, (first + end) / matrix.n_rows)

    def beside(self, path: Path, classes_optional: bool) -> list[Path]:
        with ExitStack() as stack:
            if _prefix(stack, path, "X"):
                return []
        pair = pair_of(path)
        there = [pair] if pair is not None and pair.exists() else []
        if not there and not classes_optional:
            beside = f"save them as {pair.name}" if pair else "call it X.npz, and its classes Y.npz"
            raise DataError(f"{path} is one sparse matrix and has no classes beside it: {beside}")
        return there

    def _classes(self, stack: ExitStack, path: Path, n_rows: int, classes_optional: bool) -> _Classes:
        if not _prefix(stack, path, "X"):
            return _Classes(stack, next(iter(self.beside(path, classes_optional)), None), n_rows)
        has_classes = any(name.startswith("Y_") for name in _archive(stack, path).namelist())
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
            step = min(max(1, block_bytes // 4 // (width + 1)), BLOCK_ROWS)
            for begin in range(0, n_rows, step):
                end = min(begin + step, n_rows)
                with np.errstate(over="ignore"), source_errors(path):
                    values = np.ascontiguousarray(dense[begin:end], dtype=np.float32)
                _refuse(
                    ~np.isfinite(values).ravel(), path, begin, np.arange(end - begin + 1) * width, values, _INFINITE
                )
                found = classes.read(begin, classes.offsets(end - begin), shape.n_classes)
                yield Chunk(*found, values, end / n_rows)

    def beside(self, path: Path, classes_optional: bool) -> list[Path]:
        pair = pair_of(path)
        candidates = [path.with_suffix(".classes.npy"), path.with_suffix(".classes.npz")]
        candidates += [pair.with_suffix(".npz")] if pair else []
        there = [candidate for candidate in candidates if candidate.exists()][:1]
        if not there and not classes_optional:
            names = " or ".join(candidate.name for candidate in candidates)
            raise DataError(f"{path} has no classes beside it: save them as {names}")
        return there

    def _classes(self, stack: ExitStack, path: Path, n_rows: int, classes_optional: bool) -> _Classes:
        return _Classes(stack, next(iter(self.beside(path, classes_optional)), None), n_rows)


def pair_of(path: AnyPath) -> AnyPath | None:
    """The file of the classes of rows, where their features' name says that it is one of a pair.

    >>> pair_of(Path("set/X.trn.npz")).name
    'Y.trn.npz'
    """
    beside: Any = path.with_name(f"Y{path.name[1:]}")
    return beside if re.match(r"X\b|X_", path.name) else None


def _prefix(stack: ExitStack, path: Path, name: str) -> str:
    """What the arrays of a matrix are called by: none where the file is the one matrix that scipy writes."""
    members = {member.removesuffix(".npy") for member in _archive(stack, path).namelist()}
    if not members.issuperset(_SCIPY) or f"{name}_indptr" in members:
        return f"{name}_"
    with _array_errors(path, f"{path}: format"):
        form = np.load(path, allow_pickle=False)["format"]
    if form.shape != () or form.item() != b"csr":
        raise DataError(f"{path} is a matrix of format {form!s:.20}: save it as CSR, by scipy.sparse.csr_array")
    return ""


def _dense(path: Path) -> NDArray[Any]:
    with source_errors(path):
        refuse_irregular(path)
    with _array_errors(path, str(path)):
        dense: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(dense, np.ndarray) or dense.ndim != 2 or dense.dtype.kind not in "iufb":
        raise DataError(f"{path} is no matrix of numbers with the axes (rows, features): reshape or convert it")
    if dense.shape[1] > ROW_ENTRIES:
        raise DataError(
            f"{path} has D = {dense.shape[1]} dense features, at most {ROW_ENTRIES} are read: save it sparse"
        )
    return dense


def _archive(stack: ExitStack, path: Path) -> zipfile.ZipFile:
    """An open npz file of a stated size unpacked; DataError where an array is in it twice."""
    with _array_errors(path, str(path)):
        refuse_irregular(path)
        archive = stack.enter_context(zipfile.ZipFile(path))
        infos = [
            info
            for info in archive.infolist()
            if info.filename[:2] in ("X_", "Y_") or info.filename.removesuffix(".npy") in _SCIPY
        ]
    names = [info.filename.removesuffix(".npy") for info in infos]
    refuse_twice(str(path), names, what="array")
    refuse_expansion(path, sum(info.file_size for info in infos), path.stat().st_size)
    return archive


@contextmanager
def _array_errors(path: Path, place: str) -> Iterator[None]:
    """`library_errors` of numpy and zipfile, and no warnings of the parser of headers."""
    problem = f"{place} is no array of numpy's"
    with library_errors(path, problem, "write it with numpy.save"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
    path: Path,
    what: str,
    begin: int,
    indptr: NDArray[np.int64],
    ids: NDArray[Any],
    limit: int | None,
    is_there: NDArray[np.bool_] | bool = True,
) -> None:
    last = (LIMIT if limit is None else limit) - 1
    is_outside = ((ids < 0) | (ids > last)) & is_there
    _refuse(is_outside, path, begin, indptr, ids, f"{what} {{}} is outside 0..{last}: correct it")


def _refuse(
    is_bad: NDArray[np.bool_], path: Path, begin: int, indptr: NDArray[np.int64], entries: NDArray[Any], why: str
) -> None:
    """DataError that names the first bad entry of a block of rows, and the row."""
    if is_bad.any():
        first = int(np.argmax(is_bad))
        row = begin + int(np.searchsorted(indptr - indptr[0], first, side="right")) - 1
        raise DataError(f"{path} row {row}: {why.format(entries.flat[first])}")
