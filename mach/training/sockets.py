"""Repetitions never talk: while they are trained, their process cannot open a socket.

Python tells audit hooks of every socket before it is made (PEP 578). The channel to the driver is older and carries
commands and progress alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from mach.errors import TrainingError

_rules: list[str] = []  # whom the innermost block refuses sockets, "": nobody


@contextmanager
def refused(whom: str) -> Iterator[None]:
    """Let every socket that this process opens meanwhile fail with a `TrainingError` that names ``whom``."""
    _listen()
    _rules.append(whom)
    try:
        yield
    finally:
        _rules.pop()


@cache
def _listen() -> None:
    sys.addaudithook(_refuse)  # it can never be removed, so there is one a process


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.__new__" and _rules and _rules[-1]:
        raise TrainingError(
            f"{_rules[-1]} opened a socket: repetitions must not communicate: look for networking in the trunk"
        )
