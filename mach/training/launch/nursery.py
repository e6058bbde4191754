"""A process that has imported what workers need, and has them begin as copies of itself: at once, and in shared memory.

Started as ``python -m mach.training.launch.nursery FD``. It never runs anything on more than one thread, uses no device
and reads no data, so that its copies begin clean. Where the system has a copy given to the process that asked for it
(Linux), that is its parent, as if it had started it; elsewhere there is no nursery.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator

GET_SUBREAPER, SET_SUBREAPER = 37, 36  # of prctl: whether orphans below a process become its children
MODULES = (
    "mach.training.shard",
    "mach.training.trainer",
    "mach.reranking.fitting",
    "mach.data.transfer",
    "scipy.sparse",
)
MESSAGE_BYTES = 2**16


class Nursery:
    """The nursery of this process: it begins when it is first asked, in an environment, and ends by `close`."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def worker(self, descriptor: int, *, needs_torch: bool) -> Copy | None:
        """Have a copy serve the socket `mach.training.launch.worker.main` is given; None where that cannot be had."""
        for _ in range(2):  # somebody may have killed it since
            with contextlib.suppress(OSError, ValueError), _adopting():
                if self._socket is None:
                    self._start()
                assert self._socket is not None
                modules = [*MODULES, *(["torch", "mach.networks.network"] if needs_torch else [])]
                socket.send_fds(self._socket, [json.dumps(modules).encode()], [descriptor])
                return Copy(int(self._socket.recv(MESSAGE_BYTES)))
            self.close()
        return None

    def close(self) -> None:
        """End it; its copies go on."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.wait()
        self._socket = self._process = None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
                env=self._environment,
            )


class Copy:
    """A child of this process that the nursery made, as `subprocess.Popen` would show it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)
        try:
            os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError:  # it is no child of ours
            self.kill()
            raise

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or less a signal's number; `subprocess.TimeoutExpired` where it goes on for longer."""
        if self.returncode is None:
            if not select.select([self._descriptor], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(__name__, timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._descriptor)
        return self.returncode

    def kill(self) -> None:
        """End it by force."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Meanwhile, this process becomes the parent of what is left below it without one; an OSError where none can."""
    libc, before = ctypes.CDLL(None, use_errno=True), ctypes.c_int()
    prctl = getattr(libc, "prctl", None)
    if prctl is None or prctl(GET_SUBREAPER, ctypes.byref(before), 0, 0, 0) or prctl(SET_SUBREAPER, 1, 0, 0, 0):
        raise OSError("this system gives a process no orphans")
    try:
        yield
    finally:
        prctl(SET_SUBREAPER, before.value, 0, 0, 0)


def main(descriptor: int) -> None:
    """Make a copy for each message, until the process that asked goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
        if not message:
            return
        for module in json.loads(message):
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # which keeps the copies' pages shared
        ours, theirs = os.pipe()
        between = os.fork()
        if not between:
            copy = os.fork()
            if copy:
                os.setpgid(copy, copy)  # Ctrl-C is for the driver
                os.write(theirs, str(copy).encode())
                os._exit(0)
            channel.close()
            _serve(descriptors[0])
        os.waitpid(between, 0)  # the copy's parent is gone: it is given to whoever asked
        channel.send(os.read(ours, MESSAGE_BYTES))
        for each in (ours, theirs, *descriptors):
            os.close(each)


def _serve(descriptor: int) -> None:
    """Be a worker, and go."""
    code = 1
    try:
        from mach.training.launch.worker import main as work

        work(descriptor)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
