"""How a store comes to a node of a cluster: it is seen there, fetched from a URL, or sent by the driver's node.

However many workers a node has, it gets one copy, which all of them map read-only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mach.data.store import Store
from mach.data.transfer import fetch_store
from mach.errors import StorageError
from mach.files.places import cache_folder, kept

BLOCK_BYTES = 2**24  # what the object store holds at a time for a node that fetches


class StoreServer:
    """Reads the files of a store where they lie; as an actor, its blocks travel through the object store.

    Parameters
    ----------
    path : str
        Directory of the store.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def files(self) -> dict[str, int]:
        """Bytes of every file, by its name below the directory."""
        files = (file for file in sorted(self._path.rglob("*")) if file.is_file())
        return {file.relative_to(self._path).as_posix(): file.stat().st_size for file in files}

    def read(self, name: str, begin: int) -> NDArray[np.uint8]:
        """The block of a file that begins at a byte."""
        return np.fromfile(self._path / name, np.uint8, BLOCK_BYTES, offset=begin)


class _Server(Protocol):
    def call(self, method: str, *arguments: Any) -> Any: ...


def deliver(path: str, fingerprint: str, url: str | None, server: _Server) -> Path:
    """A store with this fingerprint on this machine.

    Parameters
    ----------
    path : str
        Where the driver sees it.
    fingerprint : str
    url : str or None
        Where it lies for all machines.
    server : Actor
        A `StoreServer`, for want of both.

    Raises
    ------
    StorageError
        When it cannot be fetched, or is not what was asked for.
    """
    try:
        if Store.open(path).fingerprint == fingerprint:
            return Path(path)
    except StorageError:
        pass  # not seen from here
    if url is not None:
        return fetch_store(url).path

    def receive(folder: Path) -> None:
        for name, n_bytes in server.call("files").result().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                while file.tell() < n_bytes:
                    file.write(server.call("read", name, file.tell()).result())
        if Store.open(folder).compute_fingerprint() != fingerprint:
            raise StorageError(f"store {path} did not arrive whole in {folder}: run the same command again")

    return kept(cache_folder() / f"store-{fingerprint}", receive)
