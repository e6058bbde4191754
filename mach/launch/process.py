"""A training process of this machine, seen from whoever started it: the local driver, or an actor of a cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from mach.launch.channel import Channel

STOP_SECONDS = 60.0  # a worker saves its state within a step and a write
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class WorkerProcess:
    """Runs `mach.launch.worker`; thread counts are set before its first import, as they must be.

    Parameters
    ----------
    job : dict
        ``run``, ``store``, ``threads``, ``device`` and ``report_seconds``, as the worker reads them.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            # -P: a file of the current folder must not replace a module of the library
            [sys.executable, "-P", "-m", "mach.launch.worker", str(theirs.fileno())],
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
