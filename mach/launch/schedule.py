"""The scheduler of repetitions: a queue that hands the next item to whichever worker is free.

It holds no clock, process or socket, only what was asked and what happened, so every launcher (and a simulation)
drives the same object. There is no fixed plan: unequal workers, losses and an R that the workers do not divide
cost nothing but the tail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

FAILURE_WEIGHT = 5  # deaths that weigh as much as one failure


@dataclass
class _Item:
    repetition: int
    furthest: tuple[int, int] = (0, 0)  # step and checkpointed step, the largest of each ever reported
    furthest_at_loss: tuple[int, int] | None = None
    fruitless: int = 0  # weight of failures and deaths in a row without getting further than before


class Schedule:
    """Which repetition goes where next, and when to give one up.

    Parameters
    ----------
    repetitions : iterable of int
        Those to train, in the order in which they are handed out.
    attempts : int
        A repetition that fails so many times in a row without getting further is given up. Losses that follow
        progress are free: a run survives any number of kills as long as it moves between them.
    """

    def __init__(self, repetitions: Iterable[int], attempts: int) -> None:
        self._items = {r: _Item(r) for r in repetitions}
        self._waiting = deque(self._items)
        self._running: dict[int, int] = {}
        self.attempts = attempts
        self.finished: list[int] = []
        self.given_up: dict[int, str] = {}

    @property
    def is_over(self) -> bool:
        return not self._waiting and not self._running

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def next_for(self, worker: int) -> int | None:
        """The next repetition for a free worker, or None when nothing waits."""
        if worker in self._running:
            raise ValueError(f"worker {worker} still holds repetition {self._running[worker]}")
        if not self._waiting:
            return None
        repetition = self._waiting.popleft()
        self._running[worker] = repetition
        return repetition

    def progressed(self, repetition: int, step: int, saved_step: int) -> None:
        """A repetition reported its step and that of its last checkpoint: further in either is progress."""
        item = self._items[repetition]
        item.furthest = (max(item.furthest[0], step), max(item.furthest[1], saved_step))

    def done(self, worker: int) -> int:
        """A worker finished its repetition; returns it."""
        repetition = self._running.pop(worker)
        self.finished.append(repetition)
        return repetition

    def lost(self, worker: int, cause: str, *, hopeless: bool = False, died: bool = False) -> int | None:
        """A worker died or its repetition failed: put it back, or give it up; returns the repetition, if any.

        A ``hopeless`` failure would come again, so it is not tried again. A worker that ``died`` was mostly killed from
        outside, perhaps before it could begin, so a death weighs a fifth of a failure.
        """
        repetition = self._running.pop(worker, None)
        if repetition is None:
            return None
        item = self._items[repetition]
        got_further = item.furthest_at_loss is not None and item.furthest != item.furthest_at_loss
        item.fruitless = (0 if got_further else item.fruitless) + (1 if died else FAILURE_WEIGHT)
        item.furthest_at_loss = item.furthest
        if hopeless or item.fruitless >= FAILURE_WEIGHT * self.attempts:
            self.given_up[repetition] = cause
        else:
            self._waiting.appendleft(repetition)  # it has a head start: finish it first
        return repetition
