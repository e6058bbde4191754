"""A worker process: does what the driver hands it, one order after another.

Started as ``python -m mach.training.launch.worker FD`` with one end of a socket pair. Messages are JSON
objects: the job, then orders, ``{"train": [r, ...], "exclusive": true}``, ``{"pause": true}``, ``{"stop": true}``. The
worker says ``ready`` and answers with ``progress``, ``finished``, ``paused`` or ``failed``; what a person should
know is ``said``. The numbers of an order are repetitions; in a job with ``parts`` they are parts of a re-ranker.
``trunk`` and ``path`` are of `mach.networks.trunk.for_workers`. When the other end dies, the worker saves its state and
goes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from mach.errors import (
    ConfigError,
    MachError,
    TrainingError,
    TrainingStoppedError,
    is_out_of_memory,
    out_of_memory,
)
from mach.files.compiled import hear, timed
from mach.files.places import place
from mach.networks.trunk import find_as
from mach.runs.run import Run
from mach.training.launch.process import Channel

if TYPE_CHECKING:
    from mach.runs.repetition import RepetitionFiles
    from mach.training.progress import Progress


class Work(Protocol):
    """What the numbers of an order mean, and how they are done."""

    hopeless: tuple[type[Exception], ...]  # another attempt would meet these again

    def files(self, number: int) -> RepetitionFiles:
        """Where a log of a number is kept."""

    def do(self, order: dict[str, Any], report: Callable[[Progress], None], should_stop: Callable[[], bool]) -> bool:
        """Do all of an order; False when told to stop before that, with what is done saved."""


class _Repetitions:
    """The training of repetitions; the numbers of an order are theirs."""

    hopeless: tuple[type[Exception], ...] = (ConfigError, TrainingError)

    def __init__(self, job: dict[str, Any]) -> None:
        self._job, self._run = job, Run(place(job["run"]))

    def files(self, number: int) -> RepetitionFiles:
        return self._run.repetition(number)

    def do(self, order: dict[str, Any], report: Callable[[Progress], None], should_stop: Callable[[], bool]) -> bool:
        from mach.training.shard import ShardJob, train_shard

        job = self._job
        shard = ShardJob(
            job["run"],
            job["store"],
            tuple(order["train"]),
            job["threads"],
            order["exclusive"],
            job["device"],
            host_memory=job.get("host_memory"),
            trunk=job.get("trunk"),
        )
        try:
            train_shard(shard, report=report, should_stop=should_stop, is_alone=job.get("is_alone", True))
        except TrainingStoppedError:
            return False
        return True


class _Parts:
    """The making of a re-ranker's parts, of any stage; torch is not imported, so it begins in half a second."""

    hopeless: tuple[type[Exception], ...] = (ConfigError,)

    def __init__(self, job: dict[str, Any]) -> None:
        from mach.data.transfer import fetch_store
        from mach.reranking.fitting import RerankerTraining

        self._training = RerankerTraining(Run.open(job["run"], job.get("trunk")), fetch_store(job["store"]))

    def files(self, number: int) -> RepetitionFiles:
        return self._training.files

    def do(self, order: dict[str, Any], report: Callable[[Progress], None], should_stop: Callable[[], bool]) -> bool:
        return all(self._training.make(number, should_stop) for number in order["train"])


def main(descriptor: int) -> None:
    """Serve the driver on an inherited socket until it says stop or goes away."""
    told_to_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP):  # a whole group may be told at once
        signal.signal(number, lambda number, frame: told_to_stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears it and asks us
    channel = Channel(descriptor)
    job = channel.receive()
    if job is None:
        return
    find_as(job.get("path", []))
    hear(lambda text: channel.send({"kind": "said", "text": text}))
    with timed(lambda n, seconds: channel.send({"kind": "compiled", "n_kernels": n, "seconds": seconds})):
        _serve(channel, job, told_to_stop)


def _serve(channel: Channel, job: dict[str, Any], told_to_stop: threading.Event) -> None:
    """Do orders until one says stop, or the driver goes away."""
    try:
        work = work_of(job)
    except Exception as error:
        if not is_out_of_memory(error) and not isinstance(error, MachError):
            raise
        cause = out_of_memory(error) if is_out_of_memory(error) else str(error)
        channel.send({"kind": "failed", "cause": cause, "hopeless": True})
        return
    report = _reporter(channel, job.get("report_seconds", 0.0))
    channel.send({"kind": "ready", "where": job["where"]})
    while True:
        order = channel.receive()
        if order is None or "stop" in order:
            return
        if "pause" in order:  # it crossed our last message
            continue
        _log_into(work.files(order["train"][0]))
        # told to stop: by an order to stop or pause, or by the end of a dead driver's socket
        ending = answer(work, order, report, lambda: told_to_stop.is_set() or channel.has_message())
        if ending is not None:
            channel.send(ending)
            continue
        order = None if told_to_stop.is_set() else channel.receive()
        if order is None or "pause" not in order:
            return
        channel.send({"kind": "paused"})


def work_of(job: dict[str, Any]) -> Work:
    """The work that a job is about."""
    return _Parts(job) if "parts" in job else _Repetitions(job)


def answer(
    work: Work, order: dict[str, Any], report: Callable[[Progress], None], should_stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """Do an order; returns the message that tells how it ended, or None when told to stop. What failed is logged."""
    try:
        return {"kind": "finished"} if work.do(order, report, should_stop) else None
    except Exception as error:
        files = work.files(order["train"][0])
        files.note(traceback.format_exc())
        files.keep_log()
        cause = str(error) if isinstance(error, MachError) else f"{type(error).__name__}: {error}"
        hopeless = isinstance(error, work.hopeless)
        if is_out_of_memory(error):  # and would be again: an attempt more only takes longer
            cause, hopeless = out_of_memory(error), True
        return {"kind": "failed", "cause": (cause.splitlines() or [""])[0], "hopeless": hopeless}


def _reporter(channel: Channel, seconds: float) -> Callable[[Progress], None]:
    """Sends progress, at most once in so many seconds beside the ends of epochs."""
    told = 0.0

    def report(progress: Progress) -> None:
        nonlocal told
        if progress.ends_epoch or time.monotonic() - told >= seconds:
            told = time.monotonic()
            channel.send({"kind": "progress", **vars(progress)})

    return report


def _log_into(files: RepetitionFiles) -> None:
    """Send standard error, and what compiled code prints there, to the log of a repetition or the re-ranker."""
    with contextlib.suppress(OSError):
        files.local_log.parent.mkdir(parents=True, exist_ok=True)
        with files.local_log.open("a") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    main(int(sys.argv[1]))
    gc.freeze()  # what is left is not looked through
