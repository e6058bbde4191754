"""Readers of numeric text, repository and svmlight, as chunks of rows; and the files that all readers share.

========== ======================================================================================================
repository header ``N D K``, then a line a row: ``k1,k2 f:v f:v``, all from 0; a line may begin with a blank
           (no class)
svmlight   ``k1,k2 qid:.. f:v f:v # comment``; indices and classes are taken as they stand (a file that counts
           features from 1 leaves column 0 empty); classes are non-negative, ``1.0`` is 1; blank lines are skipped
========== ======================================================================================================

Files may be compressed (.gz, .bz2, .xz). Standard input holds the rows of repository text without a header, format
``rows``; every line of it is a row. Feature indices must ascend; classes of a row are sorted, and equal ones
merged. Memory is bounded by the block, whatever the file's size.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mach.data.store import Chunk
from mach.errors import DataError

BLOCK_BYTES = 2**23
STDIN = "standard input"  # its name in messages
LIMIT = 2**31 - 1  # of D and K: indices are int32
_TOKEN = re.compile(rb"[^\s#]*")
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Shape(NamedTuple):
    """N, D and K where a source states them; None: known after reading."""

    n_rows: int | None
    n_features: int | None
    n_classes: int | None


class SourceFile:
    """A plain or compressed file, read once from its beginning in blocks or lines.

    Parameters
    ----------
    path : Path
        Decompressed when it ends in .gz, .bz2 or .xz.
    name : str, optional
        What messages call it; by default its path.

    Raises
    ------
    DataError
        When it cannot be read, or its compressed data are damaged or cut short.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)

    def __enter__(self) -> SourceFile:
        with source_errors(self.name):
            self._raw = self.path.open("rb")
            self._n_bytes = max(1, self.path.stat().st_size)
            opener = COMPRESSED.get(self.path.suffix.lower())
            self.file: IO[bytes] = opener(self._raw) if opener else self._raw
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self._raw.close()

    @property
    def fraction(self) -> float:
        """Share of the (compressed) bytes that have been read."""
        return min(1.0, self._raw.tell() / self._n_bytes)

    def blocks(self, n_bytes: int) -> Iterator[bytes]:
        """Whole lines in blocks of about ``n_bytes``; each ends in a newline, added to the last line if need be."""
        pending: list[bytes] = []
        with source_errors(self.name):
            while block := self.file.read(n_bytes):
                end = block.rfind(b"\n") + 1
                if end:
                    yield b"".join([*pending, block[:end]])
                    pending = []
                pending.append(block[end:])
        if rest := b"".join(pending):
            yield rest + b"\n"

    def lines(self) -> Iterator[str]:
        """Decoded lines with their ends; a byte order mark at the beginning is dropped."""
        with source_errors(self.name):
            for number, line in enumerate(self.file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    bad = line[error.start : error.start + 1].hex()
                    raise DataError(
                        f"{self.name} line {number}: byte 0x{bad} is not UTF-8: convert the file to UTF-8"
                    ) from error


@contextmanager
def source_errors(name: object) -> Iterator[None]:
    """Turn what reading a file can raise into a `DataError` of one line, which calls it ``name``."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is damaged or cut short ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from error


def read_shape(path: Path, kind: str, classes_optional: bool = False) -> Shape:
    """What a file of format ``kind`` states about its size, without reading its rows.

    Raises
    ------
    DataError
        When it has no features, or no classes although they are not optional.
    """
    shape, place = Shape(None, None, None), str(path)
    if kind in ("npz", "npy"):
        from mach.data.matrices import matrix_shape

        shape = matrix_shape(path, kind, classes_optional)
    elif kind == "repository":
        shape, place = _header(path), f"{path} line 1"
    if shape.n_features == 0:
        raise DataError(f"{place}: D = 0: rows need at least one feature: correct it")
    if shape.n_classes == 0 and not classes_optional:
        raise DataError(f"{place}: K = 0: rows need at least one class: correct it")
    return shape


def read_chunks(
    path: Path, kind: str, shape: Shape, block_bytes: int = BLOCK_BYTES, classes_optional: bool = False
) -> Iterator[Chunk]:
    """Rows of a file of format ``kind``.

    Parameters
    ----------
    path : Path
        The file.
    kind : str
        ``repository``, ``rows``, ``svmlight``, ``npz`` or ``npy``.
    shape : Shape
        From `read_shape`; features and classes beyond it are errors, None is no limit.
    block_bytes : int
        Text, or numbers, that make a chunk.
    classes_optional : bool
        Whether the class arrays of ``npz`` and ``npy`` may be missing: rows without classes.

    Raises
    ------
    DataError
        One line that names the file, the line or row, the value and what to do.
    """
    if kind in ("repository", "rows", "svmlight"):
        return _text_chunks(SourceFile(path, STDIN if kind == "rows" else None), kind, shape, block_bytes)
    from mach.data.matrices import matrix_chunks

    return matrix_chunks(path, kind, shape, block_bytes, classes_optional)


def _header(path: Path) -> Shape:
    with SourceFile(path) as source, source_errors(path):
        header = source.file.readline(200)
    if not header:
        raise DataError(f"{path} is empty: the first line must be N D K")
    tokens = header.split()
    if len(tokens) != 3 or not all(token.isdigit() for token in tokens):
        raise DataError(
            f"{path} line 1: {_quoted(header)} is no header of three numbers N D K (rows, features, classes): add it"
        )
    n_rows, n_features, n_classes = map(int, tokens)
    if max(n_features, n_classes) > LIMIT:
        raise DataError(f"{path} line 1: D = {n_features} and K = {n_classes} must be at most {LIMIT}")
    return Shape(n_rows, n_features, n_classes)


def _text_chunks(source: SourceFile, kind: str, shape: Shape, block_bytes: int) -> Iterator[Chunk]:
    n_features, n_classes = (LIMIT if given is None else given for given in shape[1:])
    n_rows, n_lines = 0, 0
    with source:
        if kind == "repository":
            with source_errors(source.name):
                source.file.readline()
            n_lines = 1
        for block in source.blocks(block_bytes):
            rows_left = -1 if shape.n_rows is None else shape.n_rows - n_rows
            try:
                chunk = _parse(block, kind == "svmlight", rows_left, (n_features, n_classes), source.fraction)
            except _TokenError as error:
                line = n_lines + 1 + block.count(b"\n", 0, error.position)
                raise DataError(f"{source.name} line {line}: {error}") from error
            n_rows += len(chunk.class_indptr) - 1
            n_lines += block.count(b"\n")
            yield chunk
    if shape.n_rows is not None and n_rows < shape.n_rows:
        raise DataError(
            f"{source.name} ends at line {n_lines} with {n_rows} rows, its header says N = {shape.n_rows}: "
            "correct the header or fetch the file again"
        )


class _TokenError(Exception):
    """A token that cannot be parsed, and its position in the block."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


def _parse(block: bytes, svmlight: bool, rows_left: int, limits: tuple[int, int], fraction: float) -> Chunk:
    from mach.kernels import parse

    # the shortest row, class and feature are "\n", "1," and " 1:1"; pages that stay untouched cost no memory
    n_rows, n_ids, n_entries = block.count(b"\n"), len(block) // 2 + 1, len(block) // 4 + 1
    class_indptr, feature_indptr = np.empty(n_rows + 1, np.int64), np.empty(n_rows + 1, np.int64)
    class_ids, indices = np.empty(n_ids, np.int32), np.empty(n_entries, np.int32)
    values, unsettled = np.empty(n_entries, np.float32), np.empty((n_entries, 2), np.int64)
    text = np.frombuffer(block, dtype=np.uint8)
    outputs: Any = (class_indptr, class_ids, feature_indptr, indices, values, unsettled)
    code, position, n_rows, n_unsettled = parse.parse_rows(text, svmlight, rows_left, *limits, parse.POWERS, *outputs)
    for entry, start in unsettled[:n_unsettled].tolist():
        with np.errstate(over="ignore"):
            values[entry] = np.float32(float(_token(block, start).partition(b":")[2]))
        if np.isinf(values[entry]):
            code, position = parse.BAD_VALUE, start
            break
    if code != parse.DONE:
        token = _token(block, position)
        raise _TokenError(position, _complaint(code, token, limits))
    n_ids, n_entries = int(class_indptr[n_rows]), int(feature_indptr[n_rows])
    features = feature_indptr[: n_rows + 1], indices[:n_entries], values[:n_entries]
    return Chunk(class_indptr[: n_rows + 1], class_ids[:n_ids], features, fraction)


def _token(block: bytes, position: int) -> bytes:
    return _TOKEN.match(block, position)[0]  # type: ignore[index]  # a token starts there


def _complaint(code: int, token: bytes, limits: tuple[int, int]) -> str:
    from mach.kernels import parse

    n_features, n_classes = limits
    one_class, index = _quoted(token.partition(b",")[0]), _quoted(token.partition(b":")[0])
    return {
        parse.BAD_CLASS: f"class {one_class} is no integer from 0: write k1,k2 and number the classes from 0",
        parse.CLASS_RANGE: f"class {one_class} is outside 0..{n_classes - 1}: raise K = {n_classes} or correct it",
        parse.BAD_FEATURE: f"feature {_quoted(token)} is not of the form index:value with an index from 0: correct it",
        parse.FEATURE_RANGE: f"feature index {index} is outside 0..{n_features - 1}: "
        f"raise D = {n_features} or correct it",
        parse.FEATURE_ORDER: f"feature index {index} does not ascend: sort each row by index and merge equal indices",
        parse.BAD_VALUE: f"feature {_quoted(token)} has no finite float32 value: correct or remove it",
        parse.EXTRA_ROW: f"{_quoted(token)} begins a row beyond the N of the header: correct the header",
    }[code]


def _quoted(token: bytes) -> str:
    text = repr(token.strip().decode("utf-8", "backslashreplace"))
    return text if len(text) <= 60 else text[:57] + "..."
