"""A file system with the troubles of a network: puts that fail, arrive cut or not at all, or take their time."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from upath import UPath
from upath.registry import register_implementation


class BackendError(Exception):
    """What a backend raises that is no OSError, in more than one line."""


class FlakyFileSystem(LocalFileSystem):  # type: ignore[misc]
    protocol = "flaky"
    cachable = False
    trouble: ClassVar[Callable[[str, str], str]] = staticmethod(lambda operation, path: "")
    n_operations: ClassVar[dict[str, int]] = {}

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return os.fspath(path).removeprefix("flaky://").rstrip("/") or "/"

    def _ask(self, operation: str, path: str) -> str:
        self.n_operations[operation] = self.n_operations.get(operation, 0) + 1
        kind = type(self).trouble(operation, path)
        if kind == "fail":
            raise BackendError(f"the network is down\nfor {path}")
        if kind == "wait":
            time.sleep(0.02)
        if kind == "talk":
            for end in socket.socketpair():
                end.close()
        return kind

    def put_file(self, path1: str, path2: str, callback: Any = None, **options: Any) -> None:
        kind = self._ask("put", path2)
        if kind != "lose":
            super().put_file(path1, path2, **options)
        if kind == "cut":
            os.truncate(path2, Path(path2).stat().st_size // 2)

    def get_file(self, path1: str, path2: Any, callback: Any = None, **options: Any) -> None:
        kind = self._ask("get", path1)
        super().get_file(path1, path2, **options)
        if kind == "cut":
            os.truncate(path2, Path(path2).stat().st_size // 2)
        if kind == "spoil":
            with Path(path2).open("r+b") as file:
                file.seek(-1, 2)
                last = file.read(1)
                file.seek(-1, 2)
                file.write(bytes([last[0] ^ 1]))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._ask("info", path)
        return super().info(path, **options)


class FlakyPath(UPath):
    pass


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
register_implementation("flaky", FlakyPath, clobber=True)
