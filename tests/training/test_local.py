"""The local launcher: the same bits however it is interrupted, and clear words when it cannot go on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mach.config import Config, LaunchConfig, to_toml
from mach.errors import ConfigError, IncompleteRunError
from mach.files.tensors import map_tensors
from mach.model.loading import load
from mach.runs.run import Run
from mach.training.conductor import train
from mach.training.launch.launchers import Crew
from mach.training.setup import set_up


def run_with(config: Config, **sections: dict) -> Config:
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def weights(path: Path) -> list[bytes]:
    run = Run.open(path)
    return [run.repetition(r).weights.read_bytes() for r in run.finished()]


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def test_worker_processes_give_the_bits_of_this_process(config: Config, trained: Path, tmp_path: Path):
    train(config, tmp_path / "run", workers=2)
    assert weights(tmp_path / "run") == weights(trained)


def test_raising_the_repetitions_appends(config: Config, trained: Path, tmp_path: Path):
    fewer = run_with(config, hashing={"repetitions": 1})
    train(fewer, tmp_path / "run", launcher="here")
    first = (tmp_path / "run/repetitions/r000/weights.safetensors").stat().st_mtime_ns
    train(config, tmp_path / "run", launcher="here")
    assert (tmp_path / "run/repetitions/r000/weights.safetensors").stat().st_mtime_ns == first
    assert weights(tmp_path / "run") == weights(trained)
    with pytest.raises(ConfigError, match=r"hashing.repetitions: 1 here, 3 there \(it can only be raised\)"):
        set_up(fewer, tmp_path / "run")


def test_another_configuration_is_refused_by_its_keys(config: Config, tmp_path: Path):
    set_up(config, tmp_path / "run")
    other = run_with(config, training={"rate": 0.5}, hashing={"buckets": 16}, launch={"workers": 1})
    with pytest.raises(ConfigError) as caught:
        set_up(other, tmp_path / "run")
    assert "hashing.buckets: 16 here, 32 there; training.rate: 0.5 here, 0.02 there" in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(config: Config, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists and is no run"):
        set_up(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_repetition_that_always_fails_is_reported_while_the_others_finish(config: Config, tmp_path: Path):
    run, store = set_up(run_with(config, training={"epochs": 1}), tmp_path / "run")
    run.repetition(1).folder.mkdir(parents=True)
    run.repetition(1).state.write_bytes(b"\xff" * 64)  # a damaged checkpoint fails every attempt
    with pytest.raises(IncompleteRunError) as caught:
        Crew(LaunchConfig(workers=1)).train(run, store)
    message = str(caught.value)
    assert "1 of 3 repetitions failed" in message
    assert "repetition 1: " in message
    assert "damaged" in message
    assert str(run.repetition(1).log) in message
    assert run.finished() == [0, 2]
    assert run.repetition(1).log.read_text().count("Traceback") == 3


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(config: Config, folder: Path, run: Path, workers: int = 2) -> subprocess.Popen[str]:
    (folder / "config.toml").write_text(to_toml(config))
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", "mach.cli", "train", str(folder / "config.toml"), str(run), "--workers", str(workers)],
        stderr=subprocess.PIPE,
        text=True,
    )


def saved_steps(run: Path) -> int:
    """Steps of all repetitions that are safe on disk."""
    states = [map_tensors(path)[0] for path in run.glob("repetitions/*/state.safetensors")]
    return sum(int(state["n_steps"][0]) for state in states) + 10**6 * len(list(run.glob("repetitions/*/DONE")))


def wait_for_training(run: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not list(run.glob("repetitions/*/state.safetensors")):
        time.sleep(0.02)


LONGER: dict[str, dict] = {"training": {"epochs": 45, "checkpoint_seconds": 0.05}, "hashing": {"repetitions": 2}}


@pytest.fixture(scope="module")
def longer(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run of some seconds, undisturbed: the reference."""
    path = tmp_path_factory.mktemp("longer") / "run"
    changed = run_with(config, **LONGER)
    train(changed, path, launcher="here")
    return changed, path


@pytest.mark.parametrize(("n_kills", "epochs"), [(3, 45), pytest.param(20, 180, marks=pytest.mark.slow)])
def test_random_kills_end_in_the_same_bits(config: Config, tmp_path: Path, n_kills: int, epochs: int):
    """SIGKILL to workers, and every fourth to the driver, at random moments, each after the run has got further."""
    config = run_with(config, training=LONGER["training"] | {"epochs": epochs}, hashing=LONGER["hashing"])
    train(config, tmp_path / "reference", launcher="here")
    chance = random.Random(5)
    n_struck = 0
    run = tmp_path / "run"
    process = start(config, tmp_path, run)
    saved = saved_steps(run)
    while (code := process.poll()) != 0:
        if code is not None:
            assert code == -signal.SIGKILL, process.communicate()[1]
            process = start(config, tmp_path, run)
        time.sleep(0.01)
        workers, now = children(process.pid), saved_steps(run)
        if n_struck == n_kills or not workers or now <= saved:
            continue  # strike only those who have got further since the last blow
        time.sleep(chance.uniform(0.0, 0.1))
        is_driver = n_struck % 4 == 2
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(process.pid if is_driver else chance.choice(workers), signal.SIGKILL)
            n_struck, saved = n_struck + 1, now
    assert n_struck == n_kills
    assert weights(run) == weights(tmp_path / "reference")
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize(
    "signal_number",
    [signal.SIGHUP, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGTERM))],
)
def test_a_polite_stop_leaves_a_run_that_resumes(longer: tuple[Config, Path], tmp_path: Path, signal_number: int):
    config, reference = longer
    process = start(config, tmp_path, tmp_path / "run", workers=1)
    wait_for_training(tmp_path / "run", process)
    process.send_signal(signal_number)
    _, errors = process.communicate()
    assert process.returncode == 3
    assert "run the same command again to go on" in errors
    assert "Traceback" not in errors
    train(config, tmp_path / "run", launcher="here")
    assert weights(tmp_path / "run") == weights(reference)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_workers_that_are_told_to_end_lose_nothing(longer: tuple[Config, Path], tmp_path: Path, signal_number: int):
    """They lead process groups of their own, which a closing terminal or a service manager may signal."""
    config, reference = longer
    process = start(config, tmp_path, tmp_path / "run")
    wait_for_training(tmp_path / "run", process)
    for worker in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker, signal_number)
    process.communicate()
    if process.returncode:
        again = start(config, tmp_path, tmp_path / "run")
        again.communicate()
        assert again.returncode == 0
    assert weights(tmp_path / "run") == weights(reference)


@pytest.mark.slow
def test_stopped_and_continued_workers_end_in_the_same_bits(longer: tuple[Config, Path], tmp_path: Path):
    config, reference = longer
    process = start(config, tmp_path, tmp_path / "run")
    wait_for_training(tmp_path / "run", process)
    workers = children(process.pid)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for worker in [process.pid, *workers]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)
        time.sleep(1)
    process.communicate()
    assert process.returncode == 0
    assert weights(tmp_path / "run") == weights(reference)


def test_workers_follow_a_dead_driver(longer: tuple[Config, Path], tmp_path: Path):
    config, _ = longer
    process = start(config, tmp_path, tmp_path / "run", workers=1)
    wait_for_training(tmp_path / "run", process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert workers
    deadline = time.monotonic() + 300
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.05)


def test_two_drivers_of_one_run_share_it(config: Config, trained: Path, tmp_path: Path):
    first, second = (start(config, tmp_path, tmp_path / "run", workers=1) for _ in range(2))
    assert [process.communicate() and process.returncode for process in (first, second)] == [0, 0]
    assert weights(tmp_path / "run") == weights(trained)


def test_a_start_that_dies_leaves_nothing_in_the_way(config: Config, tmp_path: Path):
    (tmp_path / "config.toml").write_text(to_toml(config))
    set_up(config, tmp_path / "other")  # the data is prepared
    train = f"exec {sys.executable} -m mach.cli train {tmp_path / 'config.toml'} {tmp_path / 'run'}"
    process = subprocess.run(["bash", "-c", f"ulimit -f 0; {train}"], stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 2
    assert "cannot write" in process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "other"]


def test_the_current_folder_can_become_a_run(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    set_up(config, ".")
    assert (tmp_path / "empty/manifest.json").exists()


def test_a_hopeless_failure_is_not_tried_again(config: Config, tmp_path: Path):
    run, store = set_up(run_with(config, training={"rate": 1e30}), tmp_path / "run")
    with pytest.raises(IncompleteRunError, match="diverged: its loss is .* lower training.rate"):
        Crew(LaunchConfig()).train(run, store, [0])
    assert run.repetition(0).log.read_text().count("Traceback") == 1


def test_raising_the_repetitions_never_moves_a_class(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    set_up(run_with(config, hashing={"repetitions": 1}), tmp_path / "run")
    monkeypatch.setattr("mach.sketch.hashing.N_CANDIDATES", 1)
    monkeypatch.setattr("mach.sketch.hashing._least_common", lambda candidates, *rest: (sum(candidates) % 113 + 1, {}))
    with pytest.raises(ConfigError, match="would place classes in other buckets"):
        set_up(config, tmp_path / "run")


def test_buckets_from_a_table(config: Config, tmp_path: Path):
    table = np.random.default_rng(0).integers(0, 32, (3, 120))
    np.save(tmp_path / "table.npy", table)
    changed = run_with(config, hashing={"table": str(tmp_path / "table.npy")}, training={"epochs": 1})
    train(changed, tmp_path / "run", launcher="here", repetitions=[0, 2])
    (tmp_path / "table.npy").unlink()
    np.testing.assert_array_equal(load(tmp_path / "run").assignment.buckets(range(120)), table[[0, 2]])
    np.save(tmp_path / "table.npy", table[:, :7])
    with pytest.raises(ConfigError, match=r"table.npy' is int64 of shape \(3, 7\)"):
        set_up(changed, tmp_path / "another")


def test_a_full_disk_stops_with_one_line_and_loses_nothing(config: Config, trained: Path, tmp_path: Path):
    """A file-size limit below the size of the weights stands in for the full disk."""
    changed = run_with(config, training={"checkpoint_seconds": 0.0})
    (tmp_path / "config.toml").write_text(to_toml(changed))
    set_up(changed, tmp_path / "run")
    command = f"exec {sys.executable} -m mach.cli train {tmp_path / 'config.toml'} {tmp_path / 'run'} --workers 1"
    process = subprocess.run(["bash", "-c", f"ulimit -f 8; {command}"], stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 3, process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert "cannot write" in last
    assert "File too large" in last
    assert not list((tmp_path / "run").rglob("*.tmp"))
    train(config, tmp_path / "run", launcher="here")
    assert weights(tmp_path / "run") == weights(trained)


def test_shards_of_several_repetitions(config: Config, trained: Path, tmp_path: Path):
    run, store = set_up(config, tmp_path / "run")
    Crew(LaunchConfig(shard=2)).train(run, store)
    assert weights(tmp_path / "run") == weights(trained)
