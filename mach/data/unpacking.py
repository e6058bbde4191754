"""Bytes of files as they are or unpacked, with an end to what a small file can unpack to."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import IO, Any

from mach.data.limits import XZ_BYTES, refuse_expansion
from mach.errors import DataError

READ_BYTES = 2**16


class _Xz:
    """What an .xz or .lzma file unpacks to; unlike `lzma.open` within a limit of memory, and past padding."""

    def __init__(self, file: IO[bytes], name: object) -> None:
        self._file, self._name, self._unpacker = file, name, lzma.LZMADecompressor(memlimit=XZ_BYTES)

    def read(self, n: int) -> bytes:
        while True:
            packed = b""
            if self._unpacker.eof:
                packed = self._unpacker.unused_data.lstrip(b"\0")
                while not packed and (more := self._file.read(READ_BYTES)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return b""
                self._unpacker = lzma.LZMADecompressor(memlimit=XZ_BYTES)
            elif self._unpacker.needs_input and not (packed := self._file.read(READ_BYTES)):
                raise EOFError("the file ended before its end-of-stream marker")
            try:
                found = self._unpacker.decompress(packed, n)
            except lzma.LZMAError as error:
                if "limit" in str(error):
                    raise DataError(
                        f"{self._name} asks for more than {XZ_BYTES:,} bytes of memory to be unpacked: pack it with "
                        "xz -9 or less"
                    ) from error
                raise
            if found:
                return found

    def close(self) -> None:
        """Nothing is held."""


PACKED: dict[str, Any] = {
    ".gz": lambda file, name: gzip.GzipFile(fileobj=file),
    ".bz2": lambda file, name: bz2.BZ2File(file),
    ".xz": _Xz,
}


class _Unpacked(io.RawIOBase):
    """What a packed file unpacks to, counted."""

    def __init__(self, raw: IO[bytes], unpack: Any, name: object, n_packed: int) -> None:
        self._stream, self._name, self._n_packed, self._n_bytes = unpack(raw, name), name, n_packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._n_bytes += len(data)
        refuse_expansion(self._name, self._n_bytes, self._n_packed)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def unpacked(raw: IO[bytes], path: Path, name: object, n_packed: int) -> IO[bytes]:
    """An open file, unpacked where its name ends in .gz, .bz2 or .xz; DataError where it unpacks to too much."""
    unpack = PACKED.get(path.suffix.lower())
    return raw if unpack is None else io.BufferedReader(_Unpacked(raw, unpack, name, n_packed), READ_BYTES)
