"""Running out of memory: said on one line, seen before where it can be, and never tried again."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from mach import cli
from mach.cli import main
from mach.config import Config, LaunchConfig, to_toml
from mach.errors import ConfigError, IncompleteRunError, StorageError, is_out_of_memory, out_of_memory
from mach.training.launch import capacity, process, worker
from mach.training.launch.display import Display
from mach.training.launch.driver import Driver, Message
from mach.training.launch.process import Channel
from mach.training.launch.schedule import Schedule
from mach.training.setup import set_up


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("Allocation failed (probably too large)."), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_what_lack_of_memory_is(error: BaseException, expected: bool):
    assert is_out_of_memory(error) == expected
    assert len(out_of_memory(error).splitlines()) == 1


def test_torch_and_numpy_say_so():
    import numpy as np
    import torch

    for allocate in (lambda: torch.empty(2**58), lambda: np.empty(2**58)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert is_out_of_memory(caught.value)


def test_it_is_seen_before_training(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capacity, "machine_bytes", lambda: 10**8)
    said = r"a worker takes about 0\.\d GB for D = \d+ and K = 120, this machine has 0.1 GB of memory: set fewer"
    with pytest.raises(ConfigError, match=said):
        set_up(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run.toml").write_text(to_toml(config))
    result = CliRunner().invoke(main, ["train", str(tmp_path / "run.toml"), str(tmp_path / "run"), "--dry-run"])
    assert result.exit_code == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("mach: ")]  # behind the configuration
    assert "this machine has 0.1 GB" in line
    capacity.refuse_too_large(
        capacity.plan_of(config, set_up_store(config, tmp_path, monkeypatch)), LaunchConfig(launcher="ray")
    )


def set_up_store(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    return set_up(config, tmp_path / "other")[1]


class Greedy:
    """Work that asks for more memory than there is, at once or when it is done."""

    hopeless = ()

    def __init__(self, job: Message) -> None:
        if job["at_once"]:
            raise MemoryError("Unable to allocate 8 EiB")

    def files(self, number: int) -> Greedy:
        return self

    def keep_log(self) -> None: ...

    def note(self, text: str) -> None: ...

    def do(self, *arguments: object) -> bool:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_worker_without_memory_says_that_another_attempt_is_in_vain(
    at_once: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(worker, "_Repetitions", Greedy)
    monkeypatch.setattr(worker, "_log_into", lambda files: None)
    monkeypatch.setattr("mach.training.launch.worker.signal.signal", lambda *arguments: None)
    ours, theirs = socket.socketpair()
    channel = Channel(ours.detach())
    for message in ({"at_once": at_once, "where": "here"}, {"train": [0], "exclusive": True}, {"stop": True}):
        channel.send(message)
    worker.main(theirs.detach())
    told = channel.receive()
    if not at_once:
        assert told == {"kind": "ready", "where": "here"}
        told = channel.receive()
    assert told is not None
    assert (told["kind"], told["hopeless"]) == ("failed", True)
    assert told["cause"].startswith("out of memory (")


def test_a_worker_that_cannot_begin_says_why(monkeypatch: pytest.MonkeyPatch):
    """As one whose repetition's folder is gone: what is known is a line, and no traceback five times."""

    def gone(job: Message) -> None:
        raise StorageError("cannot read r000/DONE: No such file or directory")

    monkeypatch.setattr(worker, "work_of", gone)
    monkeypatch.setattr("mach.training.launch.worker.signal.signal", lambda *arguments: None)
    ours, theirs = socket.socketpair()
    channel = Channel(ours.detach())
    channel.send({"where": "here"})
    worker.main(theirs.detach())
    told = channel.receive()
    assert told == {"kind": "failed", "cause": "cannot read r000/DONE: No such file or directory", "hopeless": True}


class Silent:
    """A pool of a worker that has no memory to begin with."""

    def __init__(self) -> None:
        self.n_started = 0

    def start(self, worker: int) -> None:
        self.n_started += 1

    def send(self, worker: int, order: Message) -> None: ...

    def receive(self, timeout_seconds: float) -> list[tuple[int, Message]]:
        return [(0, {"kind": "failed", "cause": "out of memory", "hopeless": True})]

    def now(self) -> float:
        return 0.0

    def stop(self) -> None: ...


def test_a_worker_that_cannot_begin_for_lack_of_memory_ends_the_run():
    pool = Silent()
    driver = Driver(Schedule([(0,)]), pool, Display(Console(quiet=True), [0], []), 1)
    with pytest.raises(IncompleteRunError, match="worker 0 could not begin: out of memory"):
        driver.drive()
    assert pool.n_started == 1


class Killed(Silent):
    """A pool whose workers are killed for want of memory, before or after they took their shard."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.kinds = kinds

    def receive(self, timeout_seconds: float) -> list[tuple[int, Message]]:
        lost = {"kind": "lost", "cause": "worker 0 was killed by SIGKILL, as memory ran out", "is_memory": True}
        return [(0, {"kind": kind, "where": "here"} if kind == "ready" else dict(lost)) for kind in self.kinds]


def test_a_shard_whose_worker_is_killed_for_memory_is_tried_once_more():
    pool = Killed(["ready", "lost"])
    driver = Driver(Schedule([(0,), (1,)]), pool, Display(Console(quiet=True), [0, 1], []), 1)
    driver.drive()
    assert driver.schedule.given_up.keys() == {(0,), (1,)}
    assert "memory" in driver.schedule.given_up[(0,)]
    assert pool.n_started == driver.schedule.n_deaths == 4
    pool = Killed(["lost"])
    with pytest.raises(IncompleteRunError, match="memory ran out before it could take work, as 1 before it"):
        Driver(Schedule([(0,)]), pool, Display(Console(quiet=True), [0], []), 1).drive()
    assert pool.n_started == 2


@pytest.mark.parametrize(("number", "n_kills"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGTERM, 1)])
def test_a_kill_for_memory_is_told_from_others(number: signal.Signals, n_kills: int, monkeypatch: pytest.MonkeyPatch):
    counts = iter((5, 5 + n_kills))
    monkeypatch.setattr(process, "memory_kills", lambda: next(counts))
    monkeypatch.setattr(f"{process.__name__}.subprocess.Popen", partial(sleeping, subprocess.Popen))
    started = process.WorkerProcess({"threads": 1})
    os.kill(started._process.pid, number)
    [told] = started.messages("worker 0")
    assert told["is_memory"] == (number == signal.SIGKILL and n_kills > 0)
    assert told["cause"].startswith(f"worker 0 was killed by {number.name}")
    assert ("ran out of memory" in told["cause"]) == told["is_memory"]


def sleeping(popen: Any, command: list[str], **options: Any) -> Any:
    return popen(["sleep", "60"], **options)


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 8 EiB\nfor an array"), RuntimeError("can't allocate memory")]
)
def test_the_command_line_says_one_line(error: BaseException, monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cli.runs.prepare, "callback", fails)
    result = CliRunner().invoke(main, ["prepare", "a", "b"])
    assert result.exit_code == 2
    assert result.stderr.startswith("mach: out of memory (")
    assert len(result.stderr.splitlines()) == 1
