"""A worker process of this machine, seen from whoever started it, and the JSON messages between the two.

The starter is the pool of this machine, or an actor of a cluster. Nothing else passes between driver and worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mach.training.launch.nursery import Nursery

STOP_SECONDS = 60.0  # a worker saves its state within a step and a write
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
# glibc gives memory above this back when it is freed, rather than keep up to 32 MB of each kind for later
_FREEING = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**22))
FOR_MEMORY = (
    ", as the system ran out of memory: give more, or ask for less (fewer workers, fewer buckets or hidden units)"
)


def environment(threads: int) -> dict[str, str]:
    """That of workers; numbers of threads are read when libraries are imported."""
    return _FREEING | os.environ | dict.fromkeys(_THREAD_VARIABLES, str(threads))


def memory_kills() -> int:
    """Processes that the system has killed since its start because memory ran out; 0 where it does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/vmstat").read_text().partition("\noom_kill ")[2].split()[0])
    return 0


class Channel:
    """One end of a driver-worker connection; a message is one JSON object."""

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; a peer that is gone is found out by `receive`."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any] | None:
        """Wait for a message; None when the other end is gone."""
        try:
            message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return None
        return message

    def has_message(self) -> bool:
        """Whether `receive` would return at once, be it with None."""
        return self._connection.poll()

    def close(self) -> None:
        self._connection.close()


class WorkerProcess:
    """Runs `mach.training.launch.worker`, as a copy of a nursery or from its first import.

    ``job`` has ``run``, ``store``, ``threads``, ``device`` and ``report_seconds``, as the worker reads them.
    """

    def __init__(self, job: dict[str, Any], nursery: Nursery | None = None, *, needs_torch: bool = True) -> None:
        ours, theirs = socket.socketpair()
        self._n_memory_kills = memory_kills()
        copy = nursery and nursery.worker(theirs.fileno(), needs_torch=needs_torch)
        self._process = copy or subprocess.Popen(
            # -P: a file of the current folder must not replace a module of the library
            [sys.executable, "-P", "-m", "mach.training.launch.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the driver, which asks the workers to save their state
            env=environment(job["threads"]),
        )
        theirs.close()
        self.channel = Channel(ours.detach())
        self.channel.send(job)

    def messages(self, name: str) -> list[dict[str, Any]]:
        """What the process has to tell, as soon as there is something; its end is told last, under a name."""
        messages = []
        while (message := self.channel.receive()) is not None:
            messages.append(message)
            if not self.channel.has_message():
                return messages
        ending = self._ending()
        is_memory = self._process.returncode == -signal.SIGKILL and memory_kills() > self._n_memory_kills
        cause = f"{name} {ending}{FOR_MEMORY if is_memory else ''}"
        return [*messages, {"kind": "lost", "cause": cause, "is_memory": is_memory}]

    def leave(self, deadline: float | None = None) -> None:
        """Wait for the process to save its state after an order to stop; kill it at the (monotonic) deadline."""
        deadline = time.monotonic() + STOP_SECONDS if deadline is None else deadline
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._ending()

    def _ending(self) -> str:
        code = self._process.wait()
        self.channel.close()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
