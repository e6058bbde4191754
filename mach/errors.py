"""Every error that mach raises on purpose: one root, one class a cause, one line a message.

A message names the place (file, row, key), the offending value, the limit and the repair. The command
line prints it alone, without a traceback, and leaves with the class's exit code.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 2000  # characters of a message: whatever a file or a user gave may be in it
# What ends a line, moves a terminal, or is no character.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class MachError(Exception):
    """Root of all errors raised on purpose; anything else that escapes is a bug. Its message is one line, always."""

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        line = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(message))
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[6 - LONGEST // 2 :]}")


class ConfigError(MachError):
    """A configuration, option or argument that cannot work."""


class DataError(MachError):
    """Input data that is malformed, inconsistent or does not fit the model."""


class StorageError(MachError):
    """A store or run directory that is missing, damaged, locked or of another format."""


class IncompleteRunError(MachError):
    """A run that stopped before every repetition was trained; the same command resumes it."""

    exit_code = 3


class TrainingError(MachError):
    """Training that cannot end well however often it is tried."""


class TrainingStoppedError(MachError):
    """Training stopped on request; its state is on disk."""

    exit_code = 3


class DegradedWarning(UserWarning):
    """Answers by fewer repetitions than the run has: some are not there, or kept by actors that are lost or late."""


class OmissionWarning(UserWarning):
    """Something given is not used: classes that are not known, rows without a class, rows without a feature."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The one of some words that a mistyped one was to be, as part of a message; nothing where none is near.

    >>> did_you_mean("epoch", ["epochs", "batch"])
    ': did you mean epochs?'
    >>> did_you_mean("x", ["epochs"])
    ''
    """
    spelt = {known.lower(): known for known in words}
    near = get_close_matches(word.lower(), spelt, n=1)
    return f": did you mean {spelt[near[0]]}?" if near else ""


def counted(n: float, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "class"), counted(1200, "class"), counted(0, "row"), counted(1.5, "minute")
    ('1 class', '1,200 classes', '0 rows', '1.5 minutes')
    """
    shown = f"{n:,}" if isinstance(n, int) else f"{n:g}"
    return f"{shown} {noun}" if n == 1 else f"{shown} {noun}{'es' if noun.endswith('s') else 's'}"


def one_line(error: BaseException, most: int = 200) -> str:
    r"""What another library's error says, as one short line; its kind where it says nothing.

    >>> one_line(ValueError("no header\nof that kind"))
    'no header'
    """
    said = (str(getattr(error, "strerror", None) or error).strip().splitlines() or [""])[0]
    return said[:most].strip() or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by Python, numpy, numba and pyarrow (MemoryError), the system, or torch.

    Torch has a class for it on a GPU, and on processors a RuntimeError of this text.

    >>> is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"))
    True
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def out_of_memory(error: BaseException) -> str:
    """What a person is told of it, on one line."""
    return (
        f"out of memory ({one_line(error)}): give more, or ask for less (fewer workers, a smaller batch, fewer buckets "
        "or hidden units, fewer features)"
    )
