"""What all readers share: the contract of a file format, plain and compressed files, and what goes wrong with them."""

from __future__ import annotations

import gzip
import lzma
import zipfile
import zlib
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

from mach.data.limits import BLOCK_BYTES, ROW_BYTES, refuse_irregular
from mach.data.store import Chunk
from mach.data.unpacking import PACKED, unpacked
from mach.errors import DataError, MachError, is_out_of_memory, one_line

STDIN = "standard input"  # its name in messages
LIMIT = 2**31 - 1  # of D and K: indices are int32
COMPRESSED = tuple(PACKED)


class Shape(NamedTuple):
    """N, D and K where a source states them; None: known after reading."""

    n_rows: int | None
    n_features: int | None
    n_classes: int | None


@dataclass(frozen=True)
class Format:
    """How files of one kind are read: an entry of `mach.data.formats.FORMATS`."""

    name: str  # as data.format calls it
    endings: tuple[str, ...] = ()  # of such files
    is_dense: ClassVar[bool] = False
    is_packed: ClassVar[bool] = False  # another compression (.gz, .bz2, .xz) makes no sense


class Numbers(Format, ABC):
    """A format whose rows are features and class ids; its methods raise a DataError of one line.

    With ``classes_optional`` a file may have no classes at all: rows of queries.
    """

    @abstractmethod
    def shape(self, path: Path, classes_optional: bool = False) -> Shape:
        """What a file states about its size, without reading its rows."""

    @abstractmethod
    def chunks(
        self, path: Path, shape: Shape, block_bytes: int = BLOCK_BYTES, classes_optional: bool = False
    ) -> Iterator[Chunk]:
        """Rows in chunks of about ``block_bytes``; what is beyond ``shape`` is an error, None there is no limit."""

    def beside(self, path: Path, classes_optional: bool) -> list[Path]:
        """Other files that are read with this one."""
        return []


class SourceFile:
    """A file, read once in blocks or lines; decompressed when it ends in .gz, .bz2 or .xz, without a byte order mark.

    Raises DataError, which calls it by its name or else its path, when it cannot be read, is damaged or cut short, or
    meets a limit of `mach.data.limits`.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)
        self.share: float | None = None  # of the rows that are read, where a reader knows better than by the bytes
        self.n_lines = 0  # before the next block, as the reader of blocks says

    def __enter__(self) -> SourceFile:
        with source_errors(self.name):
            refuse_irregular(self.path, self.name)
            self._raw = self.path.open("rb")
            self._n_bytes = max(1, self.path.stat().st_size)
            self.file: IO[bytes] = unpacked(self._raw, self.path, self.name, self._n_bytes)
            try:
                if self.file.peek(len(BOM_UTF8)).startswith(BOM_UTF8):  # type: ignore[attr-defined]  # all have it
                    self.file.read(len(BOM_UTF8))
            except BaseException:
                self._raw.close()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self._raw.close()

    @property
    def fraction(self) -> float:
        """Share that has been read, of the (compressed) bytes."""
        return min(1.0, self._raw.tell() / self._n_bytes) if self.share is None else self.share

    def blocks(self, n_bytes: int) -> Iterator[bytes]:
        """Whole lines in blocks of about ``n_bytes``; each ends in a newline, added to the last line if need be."""
        with source_errors(self.name):
            while block := self.file.read(n_bytes):
                if not block.endswith(b"\n"):
                    n_begun = len(block) - block.rfind(b"\n") - 1
                    rest = self.file.readline(max(0, ROW_BYTES - n_begun) + 1)
                    if n_begun + len(rest) > ROW_BYTES:
                        raise self._too_long(self.n_lines + block.count(b"\n") + 1)
                    block += rest
                yield block if block.endswith(b"\n") else block + b"\n"

    def lines(self) -> Iterator[str]:
        """Decoded lines with their ends."""
        with source_errors(self.name):
            for number in count(1):
                line = self.file.readline(ROW_BYTES + 1)
                if not line:
                    return
                if len(line) > ROW_BYTES:
                    raise self._too_long(number)
                try:
                    yield line.decode("utf-8")
                except UnicodeDecodeError as error:
                    bad = line[error.start : error.start + 1].hex()
                    raise DataError(
                        f"{self.name} line {number}: byte 0x{bad} is not UTF-8: convert the file to UTF-8"
                    ) from error

    def _too_long(self, line: int) -> DataError:
        return DataError(
            f"{self.name} line {line} has more than {ROW_BYTES:,} bytes: check that its lines end, or shorten the row"
        )


@contextmanager
def source_errors(name: object) -> Iterator[None]:
    """Turn what reading a file can raise into a `DataError` of one line, which calls it ``name``."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is damaged or cut short ({one_line(error)}): fetch it again") from error
    except OSError as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{name}: {one_line(error)}") from error
        if error.errno is None:  # a library's word of what it has read, not the system's
            raise DataError(f"{name} is damaged or cut short ({one_line(error)}): fetch it again") from error
        raise DataError(f"cannot read {name}: {one_line(error)}") from error


@contextmanager
def library_errors(path: Path, problem: str, repair: str) -> Iterator[None]:
    """As `source_errors`, and what a library raises for a damaged file, a dozen kinds, is a `DataError` as well."""
    try:
        with source_errors(path):
            yield
    except (MachError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"{problem} ({one_line(error)}): {repair}") from error
