"""JSON records, written atomically and read strictly, and locks on folders of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mach.errors import StorageError
from mach.files.places import Place, atomic_file, is_there, read_bytes

Content = TypeVar("Content", bound=BaseModel)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Try to lock a folder of this machine, made if it is not there; yields whether it is ours.

    Raises StorageError when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise StorageError(f"cannot lock {folder}: {error.strerror}") from error
    with file:
        is_ours = False
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        yield is_ours


def write_json(where: Place, value: Any) -> None:
    """Write JSON atomically."""
    with atomic_file(where) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(where: Place, kind: type[Content]) -> Content:
    """Read JSON of a known shape; a missing or damaged file is a StorageError."""
    try:
        return kind.model_validate_json(read_bytes(where))
    except OSError as error:
        raise StorageError(f"cannot read {where}: {error.strerror or 'it is missing'}") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise StorageError(f"{where} is damaged: {name or 'it'}: {first['msg'].splitlines()[0]}") from error


def find_json(where: Place, kind: type[Content]) -> Content | None:
    """As `read_json`; None where there is no file."""
    return read_json(where, kind) if is_there(where) else None
