"""A cluster under a simulated clock: the real driver and scheduler, without the training.

It answers what no small machine can measure: how a run of so many repetitions behaves on so many workers, of which
some are slow and some die, for any distribution of their speeds and lives.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from rich.console import Console

from mach.training.launch.display import Display
from mach.training.launch.driver import Driver, Message
from mach.training.launch.schedule import Schedule
from mach.training.progress import Progress

N_STEPS = 1000  # of a simulated shard


@dataclass
class _Life:
    """A worker from its start to its death, and what it trains."""

    n_lives: int = 0
    repetition: int | None = None
    since: float = 0.0
    done_at_begin: float = 0.0  # share of the shard
    saved_at: float = 0.0
    is_hung: bool = False


@dataclass
class SimulatedPool:
    """Workers that exist in simulated time only; a `mach.training.launch.driver.Pool`.

    Parameters
    ----------
    speeds : sequence of float
        Of every worker; 1: a shard takes its time.
    shard_seconds : sequence of float
        Work in every repetition, at speed 1.
    start_seconds, save_seconds : float
        From asking for a worker until it takes work; for writing a state or weights.
    checkpoint_seconds, report_seconds : float
        Between checkpoints, and between progress messages.
    seconds_between_deaths : float
        Mean life of a worker, exponentially distributed.
    seed : int
    failing : frozenset of int
        Workers that fail whatever they are given, after ``report_seconds``.
    hang_at : dict
        Seconds on the clock after which a worker lives and says nothing more.
    """

    speeds: Sequence[float]
    shard_seconds: Sequence[float]
    start_seconds: float = 3.0
    save_seconds: float = 1.0
    checkpoint_seconds: float = 30.0
    report_seconds: float = 5.0
    seconds_between_deaths: float = math.inf
    seed: int = 0
    failing: frozenset[int] = frozenset()
    hang_at: Mapping[int, float] = field(default_factory=dict)
    n_deaths: int = 0
    trained_seconds: float = 0.0  # work done, in seconds at speed 1; what was lost or done twice included
    _now: float = 0.0
    _saved: dict[int, float] = field(default_factory=dict)  # shares of the shards
    _events: list[tuple[float, int, str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._order = count()
        self._lives = [_Life() for _ in self.speeds]

    def start(self, worker: int) -> None:
        self._lives[worker].n_lives += 1
        self._plan(self.start_seconds, "ready", worker)
        if math.isfinite(self.seconds_between_deaths):
            self._plan(self.start_seconds + self._random.exponential(self.seconds_between_deaths), "die", worker)
        if worker in self.hang_at:
            self._plan(max(0.0, self.hang_at[worker] - self._now), "hang", worker)

    def send(self, worker: int, order: Message) -> None:
        life = self._lives[worker]
        if life.is_hung:
            return
        if "train" in order:
            (life.repetition,) = order["train"]
            life.done_at_begin = self._saved.get(life.repetition, 0.0)
            life.since = life.saved_at = self._now
            self._plan(min(self.report_seconds, self._seconds_left(worker)), "report", worker)
        elif life.repetition is not None:  # pause: the state is saved
            self._save(worker)
            self._put_down(worker)
            self._plan(self.save_seconds, "paused", worker)

    def receive(self, timeout_seconds: float) -> list[tuple[int, Message]]:
        deadline = self._now + timeout_seconds
        if self._events:  # nothing happens before: turns in which nobody says anything are left out
            deadline = max(deadline, self._events[0][0])
        while self._events and self._events[0][0] <= deadline:
            self._now, _, kind, worker, n_lives = heapq.heappop(self._events)
            if n_lives == self._lives[worker].n_lives:  # it was not told by one who has died since
                message = self._happen(kind, worker)
                if message is not None:
                    return [(worker, message)]
        self._now = deadline
        return []

    def now(self) -> float:
        return self._now

    def stop(self) -> None:
        self._events.clear()

    def _happen(self, kind: str, worker: int) -> Message | None:
        life = self._lives[worker]
        if life.is_hung and kind != "die":
            return None
        if kind == "ready":
            return {"kind": "ready", "where": f"worker {worker}"}
        if kind == "paused":
            return {"kind": "paused"}
        if kind == "die":
            self.n_deaths += 1
            self._put_down(worker)
            life.n_lives += 1
            life.is_hung = False
            return {"kind": "lost", "cause": f"worker {worker} died"}
        if kind == "hang":
            self._put_down(worker)
            life.is_hung = True
        if life.repetition is None:
            return None
        if worker in self.failing:
            self._put_down(worker)
            return {"kind": "failed", "cause": f"worker {worker} fails", "hopeless": False}
        if self._seconds_left(worker) <= 1e-6:
            self._put_down(worker)
            return {"kind": "finished"}
        if self._now - life.saved_at >= self.checkpoint_seconds:
            self._save(worker)
        self._plan(min(self.report_seconds, self._seconds_left(worker)), "report", worker)
        return self._progress(worker, life.repetition)

    def _progress(self, worker: int, repetition: int) -> Message:
        step = int(N_STEPS * self._done(worker))
        saved_step = int(N_STEPS * self._saved.get(repetition, 0.0))
        progress = Progress(repetition, step, N_STEPS, 1, 1, 0.0, 0.0, 0.0, self._seconds_left(worker), saved_step)
        return {"kind": "progress", **vars(progress)}

    def _put_down(self, worker: int) -> None:
        life = self._lives[worker]
        if life.repetition is not None:
            self.trained_seconds += (self._now - life.since) * self.speeds[worker]
        life.repetition = None

    def _done(self, worker: int) -> float:
        life = self._lives[worker]
        assert life.repetition is not None
        rate = self.speeds[worker] / self.shard_seconds[life.repetition]
        return life.done_at_begin + (self._now - life.since) * rate

    def _seconds_left(self, worker: int) -> float:
        life = self._lives[worker]
        assert life.repetition is not None
        return (1.0 - self._done(worker)) * self.shard_seconds[life.repetition] / self.speeds[worker]

    def _save(self, worker: int) -> None:
        life = self._lives[worker]
        assert life.repetition is not None
        self._saved[life.repetition] = max(self._saved.get(life.repetition, 0.0), self._done(worker))
        life.saved_at = self._now

    def _plan(self, seconds: float, kind: str, worker: int) -> None:
        event = (self._now + seconds, next(self._order), kind, worker, self._lives[worker].n_lives)
        heapq.heappush(self._events, event)


def makespan(pool: SimulatedPool, attempts: int = 3) -> float:
    """Seconds from the first order to the end of the last shard, under the real driver and scheduler."""
    repetitions = list(range(len(pool.shard_seconds)))
    schedule = Schedule([(r,) for r in repetitions], attempts)
    display = Display(Console(quiet=True), repetitions, [])
    Driver(schedule, pool, display, min(len(pool.speeds), len(repetitions))).drive()
    return pool.now()


def least_makespan(pool: SimulatedPool) -> float:
    """What no scheduler can beat: all work over all speed, or the longest shard on the fastest worker."""
    return max(sum(pool.shard_seconds) / sum(pool.speeds), max(pool.shard_seconds) / max(pool.speeds))


def static_makespan(pool: SimulatedPool) -> float:
    """What a fixed plan takes, which gives every worker the same number of shards in advance."""
    n_workers = len(pool.speeds)
    loads = [sum(pool.shard_seconds[w::n_workers]) / speed for w, speed in enumerate(pool.speeds)]
    return max(loads)
