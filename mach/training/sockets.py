"""Repetitions never talk: while they are trained, the thread that trains cannot open a socket.

Python tells audit hooks of every socket before it is made (PEP 578). The channel to the driver is older and carries
commands and progress alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from mach.errors import TrainingError

_refused: ContextVar[str] = ContextVar("_refused", default="")  # whom this thread refuses sockets; "": nobody


@contextmanager
def refused(whom: str) -> Iterator[None]:
    """Let every socket that this thread opens meanwhile fail with a `TrainingError` that names ``whom``."""
    _listen()
    before = _refused.set(whom)
    try:
        yield
    finally:
        _refused.reset(before)


@cache
def _listen() -> None:
    sys.addaudithook(_refuse)  # it can never be removed, so there is one a process


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.__new__" and (whom := _refused.get()):
        raise TrainingError(
            f"{whom} opened a socket: repetitions must not communicate: look for networking in the trunk"
        )
