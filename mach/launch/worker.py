"""A worker process: trains what the driver hands it, one shard after another.

Started as ``python -m mach.launch.worker FD`` with one end of a socket pair. Messages are JSON lines: first the
job, then orders, ``{"train": [r, ...], "exclusive": true}``, ``{"pause": true}``, ``{"stop": true}``; the worker
says ``ready`` and answers with ``progress``, ``finished``, ``paused`` or ``failed``. A job with ``parts`` is one of
`mach.launch.parts`: numbers are parts of a re-ranker. ``trunk`` and ``path`` are of `mach.trunk.for_workers`. When the
other end dies, the worker saves its state and goes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from mach.errors import ConfigError, MachError
from mach.launch.channel import Channel
from mach.trunk import find_as

if TYPE_CHECKING:
    from mach.repetition import RepetitionFiles
    from mach.trainer import Progress


def main(descriptor: int) -> None:
    """Serve the driver on an inherited socket until it says stop or goes away."""
    told_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told_to_stop.set())  # a whole group may be told at once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears it and asks us
    channel = Channel(socket.socket(fileno=descriptor))
    job = channel.receive()
    if job is None:
        return
    find_as(job.get("path", []))
    if "parts" in job:
        from mach.launch.parts import serve

        serve(channel, job, told_to_stop.is_set)
        return
    from mach.traffic import PeerTraffic
    from mach.trainer import TrainingError, TrainingStoppedError
    from mach.training import ShardJob, train_shard

    traffic = PeerTraffic()  # one for the process's life: what a failed attempt exchanged still counts
    report = _Reporter(channel, job.get("report_seconds", 0.0))
    channel.send({"kind": "ready", "where": job["where"]})
    while True:
        order = channel.receive()
        if order is None or "stop" in order:
            return
        if "pause" in order:  # it crossed our last message
            continue
        repetitions = tuple(order["train"])
        files = _log_of(job["run"], repetitions[0])
        shard = ShardJob(
            job["run"],
            job["store"],
            repetitions,
            job["threads"],
            order["exclusive"],
            job["device"],
            host_memory=job.get("host_memory"),
            trunk=job.get("trunk"),
        )
        try:
            train_shard(
                shard,
                report=report,
                # an order to stop or pause, or the end of a dead driver's socket
                should_stop=lambda: told_to_stop.is_set() or channel.has_message(),
                traffic=traffic,
            )
            channel.send({"kind": "finished"})
        except TrainingStoppedError:
            order = None if told_to_stop.is_set() else channel.receive()
            if order is None or "pause" not in order:
                return
            channel.send({"kind": "paused"})
        except Exception as error:
            with contextlib.suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
                sys.stderr.flush()
            files.keep_log()
            cause = str(error) if isinstance(error, MachError) else f"{type(error).__name__}: {error}"
            hopeless = isinstance(error, TrainingError | ConfigError)
            channel.send({"kind": "failed", "cause": (cause.splitlines() or [""])[0], "hopeless": hopeless})


class _Reporter:
    """Sends progress, at most once in so many seconds beside the ends of epochs."""

    def __init__(self, channel: Channel, seconds: float) -> None:
        self._channel, self._seconds, self._told = channel, seconds, 0.0

    def __call__(self, progress: Progress) -> None:
        ends_epoch = progress.step * progress.n_epochs == progress.epoch * progress.n_steps
        if ends_epoch or time.monotonic() - self._told >= self._seconds:
            self._told = time.monotonic()
            self._channel.send({"kind": "progress", **vars(progress)})


def _log_of(run: str, repetition: int) -> RepetitionFiles:
    """Send standard error, and what compiled code prints there, to the repetition's log."""
    from mach.places import place
    from mach.storage import Run

    files = Run(place(run)).repetition(repetition)
    with contextlib.suppress(OSError):
        files.local_log.parent.mkdir(parents=True, exist_ok=True)
        with files.local_log.open("a") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
    return files


if __name__ == "__main__":
    main(int(sys.argv[1]))
