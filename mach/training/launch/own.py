"""A pool whose only worker is this process: for work that ends before another process has begun."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mach.config import LaunchConfig
from mach.data.store import Store
from mach.runs.run import Run
from mach.training.launch.driver import Message
from mach.training.launch.interrupts import interrupts_noted
from mach.training.launch.worker import answer, work_of
from mach.training.progress import Progress


class OwnPool:
    """A `mach.training.launch.driver.Pool` of one worker, which works while messages are waited for.

    How far it is, ``tell`` hears at once: the driver waits for messages meanwhile. Ctrl-C ends the wait by a
    KeyboardInterrupt, once the step at hand is made and saved.
    """

    def __init__(
        self, run: Run, store: Store, launch: LaunchConfig, tell: Callable[[Progress], None], **job: Any
    ) -> None:
        given: Message = {"run": str(run.path), "store": str(store.path), "threads": launch.threads, "device": "cpu"}
        self._tell = tell
        self._work = work_of(given | {"trunk": run.trunk, "is_alone": False} | job)
        self._messages: list[tuple[int, Message]] = []
        self._order: tuple[int, Message] | None = None

    def start(self, worker: int) -> None:
        self._messages.append((worker, {"kind": "ready", "where": "this process, cpu"}))

    def send(self, worker: int, order: Message) -> None:
        if "train" in order:
            self._order = worker, order

    def receive(self, timeout_seconds: float) -> list[tuple[int, Message]]:
        if self._order is not None and not self._messages:
            (worker, order), self._order = self._order, None
            with interrupts_noted() as is_interrupted:
                ending = answer(self._work, order, self._tell, is_interrupted)
            if ending is None:
                raise KeyboardInterrupt
            self._messages.append((worker, ending))
        messages, self._messages = self._messages, []
        return messages

    def now(self) -> float:
        return time.monotonic()

    def stop(self) -> None:
        pass
