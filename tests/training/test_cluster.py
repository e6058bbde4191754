"""The Ray launcher on a real cluster, several raylets of this machine: the same bits as here, whatever dies."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mach.config import Config, LaunchConfig
from mach.errors import IncompleteRunError
from mach.runs.run import Run
from mach.training.conductor import train, train_reranker
from mach.training.launch import cluster as cluster_module
from mach.training.launch.launchers import Crew
from mach.training.setup import set_up
from tests.training.test_local import LONGER, run_with, saved_steps, weights

cluster_utils = pytest.importorskip("ray.cluster_utils")

RAY = LaunchConfig(launcher="ray")
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head and a node of one processor each; this process is connected to it."""
    import ray

    cluster = cluster_utils.Cluster(initialize_head=True, connect=False, head_node_args=NODE)
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, namespace="mach", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def longer(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[bytes]]:
    """A run of some seconds and the bits of its weights."""
    changed = run_with(config, training=LONGER["training"] | {"epochs": 90}, hashing=LONGER["hashing"])
    path = tmp_path_factory.mktemp("longer") / "run"
    train(changed, path, launcher="here")
    return changed, weights(path)


class Training(threading.Thread):
    """`train` in the background, so that a test can do harm meanwhile."""

    def __init__(self, config: Config, path: Path, launch: LaunchConfig = RAY) -> None:
        super().__init__(daemon=True)
        self.run_, self.store = set_up(config, path)
        self.launch, self.told = launch, StringIO()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            Crew(self.launch, console=Console(file=self.told, width=200)).train(self.run_, self.store)
        except Exception as error:
            self.error = error

    def wait_until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 300
        while not (found := condition()):
            assert self.is_alive(), f"ended too early: {self.error} {self.told.getvalue()}"
            assert time.monotonic() < deadline, self.told.getvalue()
            time.sleep(0.02)
        return found

    def finish(self) -> str:
        self.join(600)
        assert not self.is_alive(), self.told.getvalue()
        if self.error is not None:
            raise self.error
        return self.told.getvalue()


def processes(run: Path) -> dict[int, str]:
    """Training processes of this machine that log to a run, and the repetition of each."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                log = os.readlink(folder / "fd/2")
            except OSError:
                continue
            if log.startswith(str(run)):
                found[int(folder.name)] = Path(log).parent.name
    return found


def states(run: Path) -> list[Path]:
    return list(run.glob("repetitions/*/state.safetensors"))


def held(training: Training, run: Path, n: int) -> list[int]:
    """The first `n` processes that save a state, stopped there: one may be done before another begins."""
    stopped: list[int] = []

    def stop() -> bool:
        for pid, repetition in processes(run).items():
            state = run / "repetitions" / repetition / "state.safetensors"
            if len(stopped) < n and pid not in stopped and state.exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
        return len(stopped) == n

    training.wait_until(stop)
    return stopped


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def tcp_sockets(pid: int) -> int:
    """How many TCP sockets a process holds, whoever opened them."""
    inodes = set()
    for family in ("tcp", "tcp6"):
        inodes |= {line.split()[9] for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]}
    targets = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(target.removeprefix("socket:[").removesuffix("]") in inodes for target in targets)


def test_ray_gives_the_bits_of_local_processes_without_a_byte_between_them(
    nodes: Any, longer: tuple[Config, list[bytes]], tmp_path: Path
):
    config, bits = longer
    training = Training(config, tmp_path / "run")
    pids = held(training, tmp_path / "run", 2)
    assert [tcp_sockets(pid) for pid in pids] == [0, 0]
    assert len({parent(pid) for pid in pids}) == 2, "one on each node"
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    told = training.finish()
    assert len(re.findall(r"finished by .+/.+ cpu", told)) == 2, told
    assert weights(tmp_path / "run") == bits
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_ray_makes_the_bits_of_a_local_reranker(nodes: Any, config: Config, trained: Path, tmp_path: Path):
    reranking = config.reranking.model_copy(update={"candidates": 20})
    files = []
    for name, launch in (("local", LaunchConfig()), ("ray", RAY)):
        path = Path(shutil.copytree(trained, tmp_path / name))
        run, store = set_up(config.model_copy(update={"reranking": reranking}), path)
        train_reranker(run, store, Crew(launch))
        files.append((path / "reranker.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.slow  # a lost node is one in less time, and local workers are killed in `tests.training.test_local`
@pytest.mark.parametrize("victim", ["process", "actor"])
def test_a_killed_worker_changes_no_bit(nodes: Any, longer: tuple[Config, list[bytes]], tmp_path: Path, victim: str):
    config, bits = longer
    training = Training(config, tmp_path / "run")
    training.wait_until(lambda: states(tmp_path / "run"))
    pid = next(iter(processes(tmp_path / "run")))
    os.kill(pid if victim == "process" else parent(pid), signal.SIGKILL)
    told = training.finish()
    assert "again: " in told
    assert "1 worker lost" in told
    assert weights(tmp_path / "run") == bits


def test_a_node_that_is_lost_and_one_that_joins(nodes: Any, longer: tuple[Config, list[bytes]], tmp_path: Path):
    """The first node takes work away with it, the second is given work within one shard."""
    config, bits = longer
    doomed = nodes.add_node(**NODE, resources={"here": 1})
    training = Training(config, tmp_path / "run", RAY.model_copy(update={"resources": {"here": 0.5}}))
    training.wait_until(lambda: states(tmp_path / "run"))
    nodes.remove_node(doomed, allow_graceful=False)
    training.wait_until(lambda: "again: " in training.told.getvalue())
    joined = nodes.add_node(**NODE, resources={"here": 1})
    told = training.finish()
    nodes.remove_node(joined, allow_graceful=False)
    assert weights(tmp_path / "run") == bits
    assert f"/{joined.node_id[:4]} cpu" in told


def test_a_driver_killed_and_resumed(nodes: Any, longer: tuple[Config, list[bytes]], tmp_path: Path):
    config, bits = longer
    path = tmp_path / "run"
    set_up(config, path)
    command = [sys.executable, "-m", "mach.cli", "train", str(path), "--launcher", "ray"]
    command += ["--address", nodes.address]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not states(path):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 300
    while processes(path):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.05)
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert weights(path) == bits


@pytest.mark.slow  # `tests.training.test_simulation` has the same driver overtake hung workers
def test_a_hung_worker_is_overtaken(nodes: Any, longer: tuple[Config, list[bytes]], tmp_path: Path):
    """One of two stops dead without dying; the other ends its shard and then begins a second copy of the first."""
    config, bits = longer
    training = Training(config, tmp_path / "run")
    [pid] = held(training, tmp_path / "run", 1)
    training.wait_until(lambda: len(Run.open(tmp_path / "run").finished()) == 2)
    os.kill(pid, signal.SIGCONT)
    by = re.findall(r"finished by (.+/.+) cpu", training.finish())
    assert len(by) == 2
    assert len(set(by)) == 1  # the one that was not stopped
    assert weights(tmp_path / "run") == bits
    assert not states(tmp_path / "run")


class Throttle(threading.Thread):
    """Lets a process run a third of the time, until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.start()

    def run(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(self.pid, signal.SIGSTOP)
                time.sleep(0.08)
                os.kill(self.pid, signal.SIGCONT)
                time.sleep(0.04)


@pytest.mark.slow
def test_a_worker_three_times_slower_is_given_less(nodes: Any, longer: tuple[Config, list[bytes]], tmp_path: Path):
    config, bits = longer
    training = Training(run_with(config, hashing={"repetitions": 5}), tmp_path / "run")
    pids = training.wait_until(lambda: (found := processes(tmp_path / "run")) and len(found) == 2 and list(found))
    slow = Throttle(pids[0])
    where = {pid: set[str]() for pid in pids}
    while training.is_alive():
        for pid, repetition in processes(tmp_path / "run").items():
            where[pid].add(repetition)
        time.sleep(0.02)
    training.finish()
    slow.join(10)
    assert weights(tmp_path / "run")[:2] == bits
    assert len(where[pids[0]]) < len(where[pids[1]])


@pytest.mark.slow
def test_ten_random_kills_of_workers_and_nodes(nodes: Any, longer: tuple[Config, list[bytes]], tmp_path: Path):
    """The bits stay, and no kill costs more than the steps since the last checkpoint or the one under way."""
    config, _ = longer
    config = run_with(config, training={"epochs": 240, "checkpoint_seconds": 0.2})
    train(config, tmp_path / "reference", launcher="here")
    path, chance = tmp_path / "run", random.Random(7)
    doomed = nodes.add_node(**NODE, resources={"here": 1})
    training = Training(config, path, RAY.model_copy(update={"resources": {"here": 0.5}, "workers": 2}))
    saved = 0
    for n_struck in range(10):
        saved = training.wait_until(lambda: (now := saved_steps(path)) > saved + 200 and now)  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.2))
        if n_struck % 3 == 0:
            nodes.remove_node(doomed, allow_graceful=False)
            doomed = nodes.add_node(**NODE, resources={"here": 1})
        else:
            pid = chance.choice(training.wait_until(lambda: list(processes(path))))
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice([pid, parent(pid)]), signal.SIGKILL)
    told = training.finish()
    nodes.remove_node(doomed, allow_graceful=False)
    assert weights(path) == weights(tmp_path / "reference")
    [lost] = re.findall(r"([\d,]+) workers? lost, ([\d,]+) steps?", told.replace("\n", " "))
    n_deaths, n_steps = (int(number.replace(",", "")) for number in lost)
    assert n_deaths >= 10
    steps_per_second = max(row["rows_per_second"] for row in training.run_.repetition(0).read_metrics()) / 64
    longest = 0.2 + 0.5 + 0.5  # seconds between checkpoints, between reports, and a write on a busy machine
    assert n_steps <= n_deaths * longest * steps_per_second, told


@pytest.mark.slow
def test_two_repetitions_that_always_fail(nodes: Any, config: Config, trained: Path, tmp_path: Path):
    run, store = set_up(config, tmp_path / "run")
    for repetition in (0, 2):
        run.repetition(repetition).folder.mkdir(parents=True)
        (run.repetition(repetition).folder / "state.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(IncompleteRunError, match=r"2 of 3 repetitions failed, 1 are finished; repetition 0: .*damaged"):
        Crew(RAY).train(run, store)
    assert run.finished() == [1]
    for state in states(tmp_path / "run"):
        state.unlink()
    Crew(RAY).train(run, store)
    assert weights(tmp_path / "run") == weights(trained)


def test_a_run_behind_a_url_needs_no_other_path(
    nodes: Any, config: Config, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, store = set_up(config, f"local://{tmp_path}/run")
    monkeypatch.setattr(store, "path", tmp_path / "nowhere")
    Crew(RAY).train(run, store)
    assert weights(tmp_path / "run") == weights(trained)


def test_a_store_that_nodes_do_not_see_is_sent_to_them(
    nodes: Any, config: Config, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, store = set_up(config, tmp_path / "run")
    absolute = cluster_module._absolute
    monkeypatch.setattr(
        cluster_module, "_absolute", lambda place: "/nowhere" if place == store.path else absolute(place)
    )
    Crew(RAY).train(run, store)
    assert weights(tmp_path / "run") == weights(trained)


def test_a_cluster_that_cannot_be_reached(config: Config, tmp_path: Path):
    command = [sys.executable, "-m", "mach.cli", "train", str(tmp_path / "config.toml"), "--launcher", "ray"]
    from mach.config import to_toml

    (tmp_path / "config.toml").write_text(to_toml(config))
    command += [str(tmp_path / "run"), "--address", "127.0.0.1:1"]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 3
    assert "cannot connect to the Ray cluster at 127.0.0.1:1" in process.stderr.splitlines()[-1]
