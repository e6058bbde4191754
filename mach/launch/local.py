"""Train the repetitions of a run in processes of this machine, and bring the run to its end through their deaths."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Console

from mach.config import LaunchConfig
from mach.data.store import Store
from mach.errors import IncompleteRunError
from mach.launch.channel import Channel
from mach.launch.display import Display
from mach.launch.schedule import Schedule
from mach.storage import Run
from mach.training import Progress

MAX_IDLE_DEATHS = 5  # workers that die without work mean a broken installation, not bad luck
STOP_SECONDS = 60.0  # a worker saves its state within a step and a write


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    channel: Channel


def train_locally(
    run: Run,
    store: Store,
    launch: LaunchConfig,
    *,
    repetitions: list[int] | None = None,
    console: Console | None = None,
) -> None:
    """Train what lacks DONE, one process a worker; return when all wanted repetitions are finished.

    Parameters
    ----------
    run, store : Run, Store
        From `mach.launch.setup.set_up`.
    launch : LaunchConfig
        Workers, their threads, and how often a repetition may fail.
    repetitions : list of int, optional
        Some of them only; all by default.
    console : Console, optional
        Where progress goes; standard error by default.

    Raises
    ------
    IncompleteRunError
        When a repetition was given up, or on KeyboardInterrupt (the command line makes one of SIGTERM too);
        everything finished or checkpointed is kept.
    """
    wanted = list(range(run.config.hashing.repetitions)) if repetitions is None else repetitions
    finished = [r for r in wanted if run.repetition(r).is_done]
    missing = [r for r in wanted if r not in finished]
    if not missing:
        return
    width = n_workers(launch, len(missing))
    schedule = Schedule(missing, launch.attempts)
    display = Display(console or Console(stderr=True), wanted, finished, width)
    with display, _LocalPool(run, store, launch.threads) as pool:
        try:
            pool.drive(schedule, display, width)
        except KeyboardInterrupt:
            pool.stop()
            done = [r for r in wanted if run.repetition(r).is_done]
            saved = [r for r in wanted if r not in done and run.repetition(r).state.exists()]
            raise IncompleteRunError(
                f"stopped with {len(done)} of {len(wanted)} repetitions finished and {len(saved)} begun and saved in "
                f"{run.path}: run the same command again to go on"
            ) from None
    if schedule.given_up:
        repetition, cause = next(iter(schedule.given_up.items()))
        raise IncompleteRunError(
            f"{len(schedule.given_up)} of {len(wanted)} repetitions failed, {len(wanted) - len(schedule.given_up)} are "
            f"finished; repetition {repetition}: {cause} (log: {run.repetition(repetition).log}); run the same command "
            "again to retry"
        )


def n_workers(launch: LaunchConfig, n_repetitions: int) -> int:
    """Worker processes for so many repetitions: by default one for every ``threads`` cores that we may use."""
    return min(launch.workers or len(os.sched_getaffinity(0)) // launch.threads or 1, n_repetitions)


class _LocalPool:
    """Worker processes and the messages between them and the driver."""

    def __init__(self, run: Run, store: Store, threads: int) -> None:
        self.run, self.store, self.threads = run, store, threads
        self.workers: dict[int, _Worker] = {}
        self.selector = selectors.DefaultSelector()
        self.n_idle_deaths = 0

    def __enter__(self) -> _LocalPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self.selector.close()

    def drive(self, schedule: Schedule, display: Display, n_workers: int) -> None:
        """Hand out repetitions and take messages, whichever comes first, until nothing is left."""
        for number in range(n_workers):
            self._start(number)
        while not schedule.is_over:
            for key, _ in self.selector.select():
                self._listen(key.data, schedule, display)

    def stop(self) -> None:
        """Ask all workers to save their state and leave; kill those that do not."""
        for worker in self.workers.values():
            worker.channel.send({"stop": True})
        deadline = time.monotonic() + STOP_SECONDS
        for worker in list(self.workers.values()):
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
            self._remove(worker)

    def _listen(self, worker: _Worker, schedule: Schedule, display: Display) -> None:
        """Take all messages that a worker has sent; its end is one of them."""
        message = worker.channel.receive()
        while message is not None:
            self._handle(worker, message, schedule, display)
            if not worker.channel.has_message():
                return
            message = worker.channel.receive()
        self._bury(worker, schedule, display)

    def _handle(self, worker: _Worker, message: dict[str, Any], schedule: Schedule, display: Display) -> None:
        kind = message.pop("kind")
        self.n_idle_deaths = 0  # somebody lives
        if kind == "progress":
            progress = Progress(**{field.name: message[field.name] for field in fields(Progress)})
            schedule.progressed(progress.repetition, progress.step, progress.saved_step)
            display.progressed(progress)
            return
        if kind == "finished":
            display.finished(schedule.done(worker.number))
        elif kind == "failed":
            self._put_back(worker, message["cause"], schedule, display, hopeless=message["hopeless"])
        repetition = schedule.next_for(worker.number)
        if repetition is not None:
            worker.channel.send({"train": repetition})
            display.started(repetition, worker.number)

    def _put_back(
        self,
        worker: _Worker,
        cause: str,
        schedule: Schedule,
        display: Display,
        *,
        hopeless: bool = False,
        died: bool = False,
    ) -> bool:
        """Return a worker's repetition to the queue; False if it had none."""
        repetition = schedule.lost(worker.number, cause, hopeless=hopeless, died=died)
        if repetition is not None:
            display.event(repetition, f"given up: {cause}" if repetition in schedule.given_up else f"again: {cause}")
        return repetition is not None

    def _bury(self, worker: _Worker, schedule: Schedule, display: Display) -> None:
        """A worker's channel ended: its repetition goes back to the queue, and a new worker takes its place."""
        code = worker.process.wait()
        self._remove(worker)
        ending = f"worker {worker.number} {_ending(code)}"
        if not self._put_back(worker, ending, schedule, display, died=True):
            self.n_idle_deaths += 1
            if self.n_idle_deaths >= MAX_IDLE_DEATHS:
                raise IncompleteRunError(f"{ending} before it could take work, as {MAX_IDLE_DEATHS - 1} before it")
        if schedule.n_waiting:
            self._start(worker.number)

    def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        process = subprocess.Popen(
            # -P: a file of the current folder must not replace a module of the library
            [sys.executable, "-P", "-m", "mach.launch.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the driver, which asks the workers to save their state
            env=os.environ | dict.fromkeys(names, str(self.threads)),
        )
        theirs.close()
        worker = _Worker(number, process, Channel(ours))
        worker.channel.send({"run": str(self.run.path), "store": str(self.store.path), "threads": self.threads})
        self.workers[number] = worker
        self.selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _remove(self, worker: _Worker) -> None:
        self.selector.unregister(worker.channel)
        worker.channel.close()
        worker.process.wait()
        self.workers.pop(worker.number, None)


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"left with exit code {code}"
