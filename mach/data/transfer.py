"""Stores and source files between this machine and a URL: fetched once a machine, into the cache."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from pydantic import BaseModel

from mach.data.limits import BLOCK_BYTES, ROW_BYTES, refuse_irregular
from mach.data.matrices import pair_of
from mach.data.sources import STDIN, source_errors
from mach.data.store import Store
from mach.data.writer import storage_errors
from mach.errors import DataError, StorageError
from mach.files import places
from mach.files.caches import cache_folder
from mach.files.names import named
from mach.files.places import Place, is_there, kept, place
from mach.files.records import Digest, read_json

META = "meta.json"  # a store's, written last


class _Meta(BaseModel):
    fingerprint: Digest


def is_store(where: Place) -> bool:
    """Whether a store is there."""
    return is_there(where / META)


def fetch_store(where: str | Place, cache: str | None = None) -> Store:
    """Open a store; one behind a URL is fetched into the cache, once a machine, and verified; raises StorageError."""
    where = place(where)
    if isinstance(where, Path):
        return Store.open(where)
    fingerprint = read_json(where / META, _Meta).fingerprint

    def get(folder: Path) -> None:
        places.fetch_folder(where, folder)
        if Store.open(folder).compute_fingerprint() != fingerprint:
            raise StorageError(f"store {where} is damaged: its content has another fingerprint than its meta.json says")

    return Store.open(kept(named(cache_folder(cache), f"store-{fingerprint}"), get))


def upload_store(store: Store, where: Place) -> None:
    """Copy a store to a URL, where it exists once its meta.json does; an equal one there is left alone.

    Raises StorageError when it cannot be written, or there is another store.
    """
    with storage_errors(where):
        if is_store(where):
            if read_json(where / META, _Meta).fingerprint != store.fingerprint:
                raise StorageError(f"{where} is a store of other data: choose another destination, or remove it")
            return
        places.upload_folder(store.path, where, last=META)


def fetch_source(where: str | Place, cache: str | None = None) -> Path:
    """A source as a file of this machine; one behind a URL is fetched, with the file of classes beside it.

    The cache holds a copy of every state that the URL was found in. Raises OSError when the source is missing, and
    DataError when it is a pipe or device, which may never end.
    """
    where = place(where)
    if isinstance(where, Path):
        with suppress(OSError):  # an embedded set has no file, and whoever opens a missing one says so
            refuse_irregular(where)
        return where
    beside = [where.with_suffix(f".classes{ending}") for ending in (".npy", ".npz") if where.suffix == ".npy"]
    beside += [file for file in [pair_of(where)] if file and where.suffix in (".npy", ".npz")]
    files = [where, *(file for file in beside if is_there(file))]
    states = repr([(str(file), places.state_of(file)) for file in files])
    key = hashlib.blake2b(states.encode(), digest_size=16).hexdigest()

    def get(folder: Path) -> None:
        folder.mkdir()
        for file in files:
            if file.fs.info(file.path).get("type", "file") != "file":
                raise DataError(f"{file} is no regular file, and may never end: copy its rows into a file")
            places.fetch(file, folder / file.name)

    return kept(cache_folder(cache) / "sources" / key, get) / where.name


@contextmanager
def source_file(source: str, cache: str | None = None) -> Iterator[Path]:
    """The source's file; for standard input a temporary copy, since its key is made of all its content."""
    if source != "-":
        with source_errors(source):
            file = fetch_source(source, cache)
        yield file
        return
    with ExitStack() as stack:
        with source_errors(STDIN):
            copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="mach-"))
            if sys.stdin is not None:  # None: it was closed before Python began
                _copy_lines(sys.stdin.buffer, copy)
            copy.flush()
        yield Path(copy.name)


def _copy_lines(source: BinaryIO, copy: IO[bytes]) -> None:
    """Copy text; DataError once a line of it does not end."""
    n_begun = n_lines = 0
    while block := source.read(BLOCK_BYTES):
        n_begun = len(block) - block.rfind(b"\n") - 1 + (0 if b"\n" in block else n_begun)
        n_lines += block.count(b"\n")
        if n_begun > ROW_BYTES:
            raise DataError(f"{STDIN} line {n_lines + 1} has more than {ROW_BYTES:,} bytes: check that its lines end")
        copy.write(block)


def stamp(where: Place) -> tuple[str, int, int] | tuple[str, str]:
    """What tells one state of a file from the next."""
    with source_errors(where):
        if not isinstance(where, Path):
            return str(where), places.state_of(where)
        status = where.stat()
        return str(where.resolve()), status.st_size, status.st_mtime_ns
