"""The driver of workers: takes whichever message comes first and hands the next shard to whoever is free.

It is the same for processes of this machine, actors of a cluster and simulated workers: a `Pool` carries the
messages. Weights never pass through it; a worker reads and writes the run directory itself.
"""

from __future__ import annotations

from typing import Any, Protocol

from mach.errors import IncompleteRunError
from mach.training.launch.display import Display
from mach.training.launch.schedule import Schedule, Shard
from mach.training.progress import Progress

MAX_EARLY_DEATHS = 5  # workers that die before they can take work mean a broken installation, not bad luck
TICK_SECONDS = 0.5  # how often idle workers are offered a straggler's shard

Message = dict[str, Any]


class Pool(Protocol):
    """Workers, numbered from 0, and the messages between them and the driver.

    A worker says ``ready`` with ``where`` it is once it lives. Orders to it are ``{"train": [r, ...], "exclusive":
    bool}`` and ``{"pause": true}``: save the shard and be free. It answers with ``progress``, ``finished``, ``paused``
    or ``failed``, and what a person should know is ``said``, a ``text``; of kernels it tells that they were
    ``compiled``, ``n_kernels`` in so many ``seconds``. When it is gone, the pool itself says ``lost`` with the
    ``cause``, and ``is_memory`` where that was a want of memory.
    """

    def start(self, worker: int) -> None:
        """Ask for a worker of this number; nobody waits for it."""

    def send(self, worker: int, order: Message) -> None:
        """Give an order; one that is gone is found out by `receive`."""

    def receive(self, timeout_seconds: float) -> list[tuple[int, Message]]:
        """Messages in the order in which they came: as soon as there is one, or none after the timeout."""

    def now(self) -> float:
        """Seconds on the pool's clock."""

    def stop(self) -> None:
        """Let all workers save their state and leave; returns when they have."""


class Driver:
    """Brings a schedule to its end on the workers of a pool, through their deaths; it asks for ``n_workers``."""

    def __init__(self, schedule: Schedule, pool: Pool, display: Display, n_workers: int) -> None:
        self.schedule, self.pool, self.display = schedule, pool, display
        self.n_workers = n_workers
        self.n_early_deaths = 0
        self._asked: set[int] = set()  # workers that live or are on their way
        self._leaving: set[int] = set()  # those of them that still have to do with what `take_up` left behind
        self._where: dict[int, str] = {}  # live workers
        self._shard: dict[int, Shard] = {}  # what each was told to train

    def drive(self) -> None:
        """Hand out shards and take messages, whichever comes first, until nothing is left."""
        for worker in range(self.n_workers):
            if worker not in self._asked:
                self._start(worker)
        offered = self.pool.now()
        while not self.schedule.is_over:
            for worker, message in self.pool.receive(TICK_SECONDS):
                self._handle(worker, message)
            now = self.pool.now()
            if now - offered >= TICK_SECONDS:
                offered = now
                for worker in self.schedule.idle():
                    self._offer(worker)

    def take_up(self, schedule: Schedule, display: Display, n_workers: int) -> None:
        """Go on with other work, for which `drive` is called again, on the same workers.

        Those that still make copies of what is done are told to leave off, and join when they have.
        """
        self._leaving |= set(self._shard)
        for worker in self._shard:
            self.pool.send(worker, {"pause": True})
        self._shard.clear()
        self.schedule, self.display, self.n_workers = schedule, display, n_workers
        free = [worker for worker in self._where if worker not in self._leaving]
        for worker in free:
            schedule.joined(worker)
        for worker in free:
            self._offer(worker)

    def _start(self, worker: int) -> None:
        self._asked.add(worker)
        self.pool.start(worker)

    def _handle(self, worker: int, message: Message) -> None:
        kind, now = message.pop("kind"), self.pool.now()
        if kind == "lost":
            self._bury(worker, message["cause"], is_memory=message.get("is_memory", False))
            return
        self.n_early_deaths = 0  # somebody lives
        if kind == "said":
            self.display.note(message["text"])
            return
        if kind == "compiled":
            self.display.compiles(worker, message["n_kernels"], message["seconds"])
            return
        if worker in self._leaving:
            if kind != "progress":
                self._leaving.discard(worker)
                self.schedule.joined(worker)
                self._offer(worker)
            return
        if kind == "progress":
            progress = Progress(**message)
            self._progressed(worker, now, progress)
            self.display.progressed(progress)
            if self.schedule.should_yield(worker, now):
                self.pool.send(worker, {"pause": True})
            return
        shard = self._shard.pop(worker, ())
        if kind == "ready":
            self.schedule.joined(worker)
            self._where[worker] = message["where"]
        elif kind == "finished":
            for rival in self.schedule.finished_by(worker):
                self.pool.send(rival, {"pause": True})
            self._show(shard, "finished", self._where[worker])
        elif kind == "paused":
            self.schedule.yielded_by(worker)
            self._show(shard, "waiting")
        elif kind == "failed":
            if worker not in self._where:
                raise IncompleteRunError(
                    f"worker {worker} could not begin: {message['cause']}; run the same command again to go on"
                )
            self.schedule.failed_on(worker, message["cause"], hopeless=message["hopeless"])
            self._show_loss(shard, message["cause"])
        self._offer(worker)

    def _progressed(self, worker: int, now: float, progress: Progress) -> None:
        """Count the steps of a shard through all its repetitions, trained together or one after the other."""
        shard = self._shard[worker]
        times = len(shard) if progress.n_together > 1 else 1
        before = 0 if times > 1 else shard.index(progress.repetition) * progress.n_steps
        saved_step = before + times * progress.saved_step
        self.schedule.progressed(worker, now, before + times * progress.step, len(shard) * progress.n_steps, saved_step)

    def _offer(self, worker: int) -> None:
        """Give a free worker something to do, if there is anything."""
        order = self.schedule.next_for(worker, self.pool.now())
        if order is None:
            return
        self._shard[worker] = order.shard
        self.pool.send(worker, {"train": list(order.shard), "exclusive": order.exclusive})
        self._show(order.shard, self._where[worker] + ("" if order.exclusive else ", a second copy"))

    def _bury(self, worker: int, cause: str, *, is_memory: bool) -> None:
        """A worker is gone: its shard goes back to the queue, and a new worker takes its place."""
        self.schedule.died(worker, cause, is_memory=is_memory)
        self._show_loss(self._shard.pop(worker, ()), cause)
        if self._where.pop(worker, None) is None:
            self.n_early_deaths += 1
            if self.n_early_deaths >= (2 if is_memory else max(MAX_EARLY_DEATHS, self.n_workers + 1)):
                raise IncompleteRunError(f"{cause} before it could take work, as {self.n_early_deaths - 1} before it")
        self._asked.discard(worker)
        self._leaving.discard(worker)
        if self.schedule.n_waiting:
            self._start(worker)

    def _show_loss(self, shard: Shard, cause: str) -> None:
        for repetition in shard:
            is_over = shard in self.schedule.given_up
            self.display.event(repetition, f"{'given up' if is_over else 'again'}: {cause}")

    def _show(self, shard: Shard, status: str, by: str = "") -> None:
        if status == "finished" or shard not in self.schedule.finished:  # a second copy may end after the first
            for repetition in shard:
                self.display.set(repetition, status, by)
