"""Workers that are copies of a process are children of whoever asked, whatever becomes of that process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mach.training.launch import nursery as module
from mach.training.launch.nursery import Nursery
from mach.training.launch.process import Channel, WorkerProcess, environment


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with closing(Nursery(environment(1))) as made:
        yield made


def test_a_copy_is_a_child_that_works_and_ends(nursery: Nursery):
    ours, theirs = socket.socketpair()
    copy = nursery.worker(theirs.fileno(), needs_torch=False)
    assert copy is not None
    theirs.close()
    assert int(Path(f"/proc/{copy.pid}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    assert os.getpgid(copy.pid) == copy.pid  # Ctrl-C is for the driver
    with pytest.raises(subprocess.TimeoutExpired):
        copy.wait(0.01)
    Channel(ours.detach()).close()  # nobody has a job for it
    assert copy.wait(60) == 0


def test_the_end_of_a_copy_is_told_like_that_of_a_process(nursery: Nursery):
    worker = WorkerProcess({"threads": 1, "run": "none", "store": "none"}, nursery, needs_torch=False)
    os.kill(worker._process.pid, signal.SIGKILL)
    assert worker.messages("worker 0")[-1]["cause"].startswith("worker 0 was killed by SIGKILL")


def test_a_nursery_that_was_killed_is_begun_anew(nursery: Nursery):
    assert nursery._process is not None
    os.kill(nursery._process.pid, signal.SIGKILL)
    worker = WorkerProcess({"threads": 1}, nursery, needs_torch=False)
    assert isinstance(worker._process, module.Copy)
    worker._process.kill()
    worker.leave()


def test_where_orphans_stay_orphans_workers_begin_by_themselves(nursery: Nursery, monkeypatch: pytest.MonkeyPatch):
    def refuse(*given: object) -> None:
        raise OSError("this system gives a process no orphans")

    monkeypatch.setattr(module, "_adopting", refuse)
    worker = WorkerProcess({"threads": 1}, nursery, needs_torch=False)
    assert isinstance(worker._process, subprocess.Popen)
    worker._process.kill()
    worker.leave()
