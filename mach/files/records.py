"""JSON records, written atomically and read strictly, and locks on folders of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from mach.errors import MachError, StorageError
from mach.files.names import digest
from mach.files.places import Place, atomic_file, is_there, read_bytes, refuse_outside
from mach.files.regular import create

Digest = Annotated[str, AfterValidator(digest)]  # a field of a record
Content = TypeVar("Content", bound=BaseModel)
MOST = 2**63  # no integer of a file is as large: sums and floats of some of them stay exact enough, or at least finite
DEEPEST = 32  # levels of a file


@contextlib.contextmanager
def locked(folder: Path, root: Path | None = None) -> Iterator[bool]:
    """Try to lock a folder of this machine, made if it is not there; yields whether it is ours.

    Raises StorageError when it cannot be written, or a link leads it out of the ``root`` that it belongs to.
    """
    if root is not None:
        refuse_outside(root, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = create(folder / "lock")
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
        return kind.model_validate(parse_json(read_bytes(where), where))
    except OSError as error:
        raise StorageError(f"cannot read {where}: {error.strerror or 'it is missing'}") from error
    except ValidationError as error:
        raise StorageError(f"{where} is damaged: {first_of(error)}") from error


def first_of(error: ValidationError) -> str:
    """The first field that is wrong, its value, and why."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    value = "" if first["type"] in {"missing", "value_error"} else f" is {shortened(first['input'])}"
    reason = first["msg"].removeprefix("Value error, ").splitlines()[0]
    return f"{name or 'it'}{value}: {reason}" if name or value else reason


def shortened(value: object) -> str:
    """A value of a file in a message: never long, whatever it is."""
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"  # which may be deep or large
    return f"{str(value)[:60]!r}" if isinstance(value, str) else f"{value!r:.60}"


def whole(told: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """The entry of a dotted name's last part, an integer of least to most; else a ValueError, as validators raise."""
    found = told.get(name.rpartition(".")[2])
    if type(found) is not int or not least <= found <= most:
        raise ValueError(f"{name} is {shortened(found)}: need {least} to {most}")
    return found


def parse_json(content: bytes, where: object, *, may_be_wild: bool = False) -> Any:
    """What JSON holds; a StorageError where it is none, or holds what `refuse_wild` refuses and the caller may not."""
    try:
        value = json.loads(content.decode(), parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{where} is damaged (it is no JSON: {error!s:.80}): copy it anew") from error
    if not may_be_wild:
        refuse_wild(value, where)
    return value


def refuse_wild(tree: Any, where: object, kind: type[MachError] = StorageError, *, finite: bool = True) -> None:
    """Raise an error that names the place where parsed JSON or TOML holds what no program should meet.

    That are integers of 64 bits and more, NaN and infinity (unless not ``finite``), halves of UTF-16 characters, and
    more than 32 levels.
    """
    left: list[tuple[Any, tuple[Any, ...]]] = [([tree], ())]
    while left:
        node, path = left.pop()
        for key, value in node.items() if type(node) is dict else enumerate(node):
            wrong, is_inner = _no_text(key) if type(key) is str else "", type(value) in (dict, list)
            if is_inner and len(path) >= DEEPEST:
                wrong = f"nests deeper than {DEEPEST} levels"
            elif is_inner:
                left.append((value, (*path, key)))
            elif type(value) is str:
                wrong = wrong or _no_text(value)
            elif type(value) is int and not -MOST <= value < MOST:
                wrong = "is an integer of more than 64 bits"
            elif type(value) is float and finite and not math.isfinite(value):
                wrong = f"is {value}, no finite number"
            if wrong:
                name = ".".join(ascii(str(part))[1:-1] for part in (*path, key)[1:])
                raise kind(f"{where} is damaged: {name[:80] or 'it'} {wrong}")


def is_text(text: str) -> bool:
    """Whether it holds no half of a UTF-16 character, which no file and no terminal takes."""
    return text.isascii() or text.encode("utf-8", "ignore").decode() == text


def _no_text(text: str) -> str:
    return "" if is_text(text) else f"is no text ({text!a:.40})"


def _integer(text: str) -> int:
    return int(text) if len(text) <= 20 else 10**20 * (-1 if text.startswith("-") else 1)  # both are refused


def find_json(where: Place, kind: type[Content]) -> Content | None:
    """As `read_json`; None where there is no file."""
    return read_json(where, kind) if is_there(where) else None
