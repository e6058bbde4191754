"""The scheduler of shards: a queue that hands the next one to whichever worker is free.

It holds no clock, process or socket, only what was asked and what happened, so every launcher and the simulation
drive the same object. There is no fixed plan, so unequal workers, losses and an R that the workers do not divide
cost nothing but the tail; there, with fewer shards waiting than workers, three rules keep all of them busy:

- the shard with the most steps left goes first, and a slow worker leaves it to others when it would end last;
- a worker gives its shard back (its state is saved, nothing is lost) when one that waits lags far behind it, or
  when it is so slow that it would hold up the run. This is the level algorithm, optimal for shards that may move
  between workers of unequal speed (Horvath, Lam and Sethi 1977), in steps of an eighth of a shard;
- an idle worker begins a second copy of a straggler's shard from its last checkpoint; the first to finish counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

Shard = tuple[int, ...]  # the repetitions that a worker trains together

ATTEMPTS = 3  # failures without progress after which a shard is given up: one may be bad luck, three are not
FAILURE_WEIGHT = 5  # deaths that weigh as much as one failure
SLOW = 0.8  # of the median speed: below it a worker counts as slow, and a copy must promise to end so much earlier
LAG = 1 / 8  # of a shard: what a waiting one must lag behind before a running one makes room for it
CHUNK = 1 / 16  # of a shard: how often a worker is asked whether it should make room
MOVE_SECONDS = 5.0  # what must be gained at least: to move a shard costs some


def shards_of(repetitions: list[int], size: int | None) -> list[Shard]:
    """Consecutive repetitions in shards of at most ``size``, or alone."""
    size = size or 1
    return [tuple(repetitions[begin : begin + size]) for begin in range(0, len(repetitions), size)]


class Order(NamedTuple):
    """What a worker is to do; not ``exclusive`` where it makes a second copy of what another one still trains."""

    shard: Shard
    exclusive: bool = True


@dataclass(eq=False)
class _Item:
    shard: Shard
    step: int = 0  # the largest ever reported
    saved_step: int = 0  # the same of checkpoints: where the next worker would begin
    steps_at_loss: tuple[int, int] | None = None
    n_memory: int = 0  # deaths for want of memory
    fruitless: int = 0  # weight of failures and deaths in a row without getting further than before
    is_finished: bool = False
    holders: set[int] = field(default_factory=set)
    failed_on: set[int] = field(default_factory=set)

    @property
    def is_settled(self) -> bool:
        """Whether it needs no worker: finished, or trained by another one."""
        return self.is_finished or bool(self.holders)


@dataclass
class _Worker:
    item: _Item | None = None
    since: float = 0.0  # its first report of its shard, or when it took it
    first_step: int | None = None  # at that report
    step: int = 0
    checked_step: int = 0
    speed: float | None = None  # steps a second, of the shard at hand or the last one
    n_failures: int = 0  # in a row

    def n_measured(self, now: float) -> int:
        """Steps of its shard that tell how fast it is: those since its first report."""
        if self.item is None or self.first_step is None or now <= self.since:
            return 0
        return self.step - self.first_step

    def speed_now(self, now: float) -> float | None:
        """Steps a second since its first report of its shard; who has gone silent gets slower by the moment."""
        n_steps = self.n_measured(now)
        return n_steps / (now - self.since) if n_steps else self.speed


class Schedule:
    """Which shard goes where next, and when to give one up.

    Shards are handed out in the order given. One that fails ``attempts`` times in a row without getting further is
    given up. Losses that follow progress are free: a run survives any number of kills as long as it moves between them.
    ``now`` is any clock in seconds. A call costs O(workers + waiting shards) at most. A worker's speed counts from its
    first report of a shard on: who compiles or reads for long before is not slow.
    """

    def __init__(self, shards: Iterable[Shard], attempts: int = ATTEMPTS) -> None:
        self._items = {shard: _Item(shard) for shard in shards}
        self._waiting = deque(self._items.values())
        self._workers: dict[int, _Worker] = {}
        self._n_steps = 0  # of a shard; 0: nobody has said yet
        self.attempts = attempts
        self.finished: list[Shard] = []
        self.given_up: dict[Shard, str] = {}
        self.n_deaths = 0
        self.n_lost_steps = 0  # that were trained and must be trained again

    @property
    def is_over(self) -> bool:
        return self.n_unfinished == 0

    @property
    def n_unfinished(self) -> int:
        return len(self._items) - len(self.finished) - len(self.given_up)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def idle(self) -> list[int]:
        """Workers without a shard, the fastest first."""
        free = [number for number, worker in self._workers.items() if worker.item is None]
        return sorted(free, key=lambda number: -(self._workers[number].speed or 0.0))

    def joined(self, worker: int) -> None:
        """A worker lives and is free."""
        self._workers[worker] = _Worker()

    def next_for(self, worker: int, now: float) -> Order | None:
        """What a free worker does next, or None when nothing it could do is of use now."""
        free = self._workers[worker]
        if free.item is not None:
            raise ValueError(f"worker {worker} still holds {free.item.shard}")
        if self._is_suspect(free):
            return None
        item = self._first_waiting(worker)
        is_waiting = item is not None
        if item is None:
            item = self._straggler_for(worker, now)
        elif self._would_end_last(item.saved_step, free, now):
            return None
        else:
            self._waiting.remove(item)
        if item is None:
            return None
        item.holders.add(worker)
        free.item, free.since, free.first_step = item, now, None
        free.step = free.checked_step = item.saved_step
        return Order(item.shard, exclusive=is_waiting)

    def progressed(self, worker: int, now: float, step: int, n_steps: int, saved_step: int) -> None:
        """A worker reported its step and that of its last checkpoint: further in either is progress."""
        at = self._workers[worker]
        if at.item is None:
            return
        if at.first_step is None:
            at.first_step, at.since = step, now
        at.step, at.item.step = step, max(step, at.item.step)
        at.item.saved_step = max(saved_step, at.item.saved_step)
        at.speed = at.speed_now(now)
        self._n_steps = n_steps

    def should_yield(self, worker: int, now: float) -> bool:
        """Whether a worker should save its shard and take another one, see the rules above."""
        at = self._workers[worker]
        if at.item is None or len(at.item.holders) > 1 or at.step - at.checked_step < CHUNK * self._n_steps:
            return False
        at.checked_step = at.step
        if self._is_slow(at):
            return self._would_end_last(at.step, at, now) and self._somebody_is_ahead(at)
        if not 0 < len(self._waiting) < len(self._workers):
            return False
        laggard = self._first_waiting(worker)
        lead = 0 if laggard is None else at.step - laggard.saved_step
        return lead > LAG * self._n_steps and lead > MOVE_SECONDS * (at.speed or 0.0)

    def finished_by(self, worker: int) -> list[int]:
        """A worker finished its shard; returns the other workers that still train it, in vain."""
        at = self._workers[worker]
        item, at.n_failures = self._take_from(at, worker), 0
        if item is None or item.is_finished:
            return []
        item.is_finished = True
        self.finished.append(item.shard)
        self.given_up.pop(item.shard, None)
        if item in self._waiting:
            self._waiting.remove(item)
        return sorted(item.holders)

    def yielded_by(self, worker: int) -> None:
        """A worker saved its shard on request and is free; unless another has finished it, it waits."""
        at = self._workers[worker]
        item = self._take_from(at, worker)
        if item is not None and not item.is_settled:
            item.saved_step = max(at.step, item.saved_step)
            self._waiting.append(item)

    def failed_on(self, worker: int, cause: str, *, hopeless: bool = False) -> None:
        """A worker's shard failed: put it back, or give it up. A ``hopeless`` failure would come again."""
        at = self._workers[worker]
        item, at.n_failures = self._take_from(at, worker), at.n_failures + 1
        if item is not None:
            item.failed_on.add(worker)
            self._put_back(item, cause, FAILURE_WEIGHT, hopeless=hopeless)

    def died(self, worker: int, cause: str, *, is_memory: bool = False) -> None:
        """A worker is gone: put its shard back, if it had one.

        It was mostly killed from outside, perhaps before it could begin, so a death weighs a fifth of a failure. One
        for want of memory may be another program's fault once; a second one would come again.
        """
        at = self._workers.pop(worker, None)
        item = self._take_from(at, worker) if at else None
        self.n_deaths += 1
        if at is not None and item is not None:
            self.n_lost_steps += max(0, at.step - item.saved_step)
            item.n_memory += is_memory
            self._put_back(item, cause, 1, hopeless=item.n_memory > 1)

    def seconds_left(self, now: float) -> float | None:
        """Time that all steps left would take the busy workers together; None while their speed is unknown."""
        speeds = [speed for at in self._workers.values() if at.item and (speed := at.speed_now(now))]
        if not speeds or not self._n_steps:
            return None
        n_done = sum(item.saved_step for item in self._waiting)
        n_done += sum(max(self._workers[number].step for number in item.holders) for item in self._held())
        return (self.n_unfinished * self._n_steps - n_done) / sum(speeds)

    def _held(self) -> list[_Item]:
        """What is being trained, and not finished by another one."""
        return list(dict.fromkeys(at.item for at in self._workers.values() if at.item and not at.item.is_finished))

    def _first_waiting(self, worker: int) -> _Item | None:
        """In the queue's order, but the one with the most steps left in the tail.

        A worker does not get what failed on it before, as long as there is somebody who has not tried.
        """
        able = {n for n, at in self._workers.items() if at.item is None or not at.item.is_finished}
        fit = [item for item in self._waiting if worker not in item.failed_on or item.failed_on >= able]
        if len(self._waiting) < len(self._workers):
            return min(fit, key=lambda item: item.saved_step, default=None)
        return fit[0] if fit else None

    def _is_suspect(self, at: _Worker) -> bool:
        """A worker that fails whatever it is given, while others do not: its machine may be at fault."""
        return at.n_failures >= self.attempts and any(other.n_failures == 0 for other in self._workers.values())

    def _median_speed(self) -> float:
        return median([at.speed for at in self._workers.values() if at.speed] or [0.0])

    def _is_slow(self, at: _Worker) -> bool:
        return at.speed is not None and at.speed < SLOW * self._median_speed()

    def _would_end_last(self, step: int, at: _Worker, now: float) -> bool:
        """Whether a slow worker would end a shard later than others could who do everything else first."""
        everything = self.seconds_left(now)
        if everything is None or not at.speed or not self._is_slow(at):
            return False
        n_left = self._n_steps - step
        return n_left / at.speed > everything + LAG * n_left / self._median_speed() + MOVE_SECONDS

    def _somebody_is_ahead(self, slow: _Worker) -> bool:
        """A faster worker that could swap shards, or is idle."""
        return any(
            not self._is_slow(at) and (at.item is None or at.step - slow.step > LAG * self._n_steps)
            for at in self._workers.values()
        )

    def _straggler_for(self, worker: int, now: float) -> _Item | None:
        """The shard that will take its worker longest, if a copy here would end clearly earlier."""
        speed = self._workers[worker].speed or self._median_speed()
        if not speed:
            return None
        slowest, longest = None, 0.0
        for item in self._held():
            if worker in item.failed_on:
                continue
            here = (self._n_steps - item.saved_step) / speed
            there = min(self._seconds_for(self._workers[holder], now, here) for holder in item.holders)
            if here < min(SLOW * there, there - MOVE_SECONDS) and there > longest:
                slowest, longest = item, there
        return slowest

    def _seconds_for(self, at: _Worker, now: float, here: float) -> float:
        """Until a worker ends its shard; one whose speed cannot be told yet has as long as it would take here."""
        n_steps = at.n_measured(now)
        if not n_steps:
            return 0.0 if now - at.since < here + MOVE_SECONDS else float("inf")
        return (self._n_steps - at.step) * (now - at.since) / n_steps

    def _put_back(self, item: _Item, cause: str, weight: int, *, hopeless: bool = False) -> None:
        steps = (item.step, item.saved_step)
        got_further = item.steps_at_loss is not None and steps != item.steps_at_loss
        item.fruitless = (0 if got_further else item.fruitless) + weight
        item.steps_at_loss = steps
        if not item.is_settled:
            if hopeless or item.fruitless >= FAILURE_WEIGHT * self.attempts:
                self.given_up[item.shard] = cause
            else:
                self._waiting.appendleft(item)  # it has a head start: finish it first

    @staticmethod
    def _take_from(at: _Worker, number: int) -> _Item | None:
        item, at.item = at.item, None
        if item is not None:
            item.holders.discard(number)
        return item
