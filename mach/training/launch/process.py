"""A worker process of this machine, seen from whoever started it, and the JSON messages between the two.

The starter is the pool of this machine, or an actor of a cluster. Nothing else passes between driver and worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

STOP_SECONDS = 60.0  # a worker saves its state within a step and a write
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class Channel:
    """One end of a driver-worker connection; a message is one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; a peer that is gone is found out by `receive`."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Wait for a message; None when the other end is gone."""
        while b"\n" not in self._buffer:
            try:
                data = self._connection.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def has_message(self) -> bool:
        """Whether `receive` would return at once, be it with None."""
        return b"\n" in self._buffer or bool(select.select([self._connection], [], [], 0)[0])

    def close(self) -> None:
        self._connection.close()


class WorkerProcess:
    """Runs `mach.training.launch.worker`; thread counts are set before its first import, as they must be.

    Parameters
    ----------
    job : dict
        ``run``, ``store``, ``threads``, ``device`` and ``report_seconds``, as the worker reads them.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            # -P: a file of the current folder must not replace a module of the library
            [sys.executable, "-P", "-m", "mach.training.launch.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for the driver, which asks the workers to save their state
            env=os.environ | dict.fromkeys(_THREAD_VARIABLES, str(job["threads"])),
        )
        theirs.close()
        self.pid = self._process.pid
        self.channel = Channel(ours)
        self.channel.send(job)

    def leave(self, deadline: float | None = None) -> None:
        """Wait for the process to save its state after an order to stop; kill it at the (monotonic) deadline."""
        deadline = time.monotonic() + STOP_SECONDS if deadline is None else deadline
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.ending()

    def ending(self) -> str:
        """Wait for the process and say how it ended."""
        code = self._process.wait()
        self.channel.close()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
