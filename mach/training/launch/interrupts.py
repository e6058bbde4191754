"""Ctrl-C while this process trains: the step at hand is ended and saved before the call is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any


@contextmanager
def interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT came, or SIGTERM or SIGHUP where they do the same as it; a second one acts as ever.

    What they do is done at once, as a line may be said, but for the KeyboardInterrupt.

    Signals are for the main thread: in another one nothing is noted, and nothing changes.
    """
    came = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    of_interrupt = signal.getsignal(signal.SIGINT)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before: dict[signal.Signals, Any] = {
        number: of_interrupt
        for number in numbers
        if callable(of_interrupt) and signal.getsignal(number) == of_interrupt
    }

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        is_first, came = not came, True
        with suppress(KeyboardInterrupt) if is_first else nullcontext():
            before[signal.Signals(number)](number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
