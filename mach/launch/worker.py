"""A worker process: trains what the driver hands it, one repetition after another.

Started as ``python -m mach.launch.worker FD`` with one end of a socket pair. Messages are JSON lines: the driver
sends ``{"train": r}``, ``{"stop": true}``; the worker answers with ``progress``, ``finished`` or ``failed``. When the
driver dies, the socket ends, and the worker saves its state and goes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path

from mach.errors import ConfigError, MachError
from mach.launch.channel import Channel


def main(descriptor: int) -> None:
    """Serve the driver on an inherited socket until it says stop or goes away."""
    told_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told_to_stop.set())  # a whole group may be told at once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears it and asks us
    channel = Channel(socket.socket(fileno=descriptor))
    order = channel.receive()
    if order is None:
        return
    run, store, threads = order["run"], order["store"], order["threads"]
    from mach.traffic import PeerTraffic
    from mach.training import ShardJob, TrainingError, TrainingStoppedError, train_shard

    traffic = PeerTraffic()  # one for the process's life: what a failed attempt exchanged still counts
    channel.send({"kind": "ready"})
    while True:
        order = channel.receive()
        if order is None or "stop" in order:
            return
        repetition = order["train"]
        _log_to(run, repetition)
        try:
            train_shard(
                ShardJob(run, store, (repetition,), threads),
                report=lambda progress: channel.send({"kind": "progress", **asdict(progress)}),
                # an order to stop, or the end of a dead driver's socket
                should_stop=lambda: told_to_stop.is_set() or channel.has_message(),
                traffic=traffic,
            )
            channel.send({"kind": "finished"})
        except TrainingStoppedError:
            return
        except Exception as error:
            with contextlib.suppress(OSError):  # the log's disk may be full
                traceback.print_exc()
                sys.stderr.flush()
            cause = str(error) if isinstance(error, MachError) else f"{type(error).__name__}: {error}"
            hopeless = isinstance(error, TrainingError | ConfigError)
            channel.send({"kind": "failed", "cause": (cause.splitlines() or [""])[0], "hopeless": hopeless})


def _log_to(run: str, repetition: int) -> None:
    """Send standard error, and what compiled code prints there, to the repetition's log."""
    from mach.storage import Run

    log = Run(Path(run)).repetition(repetition).log
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())


if __name__ == "__main__":
    main(int(sys.argv[1]))
