"""Runs behind URLs: the bits of a local run whatever storage does, two trainers at once, the URL says all."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mach.cli import main
from mach.config import Config, to_toml
from mach.errors import ConfigError, DataError, IncompleteRunError, StorageError, TrainingError, TrainingStoppedError
from mach.files import places
from mach.files.places import is_there, names_in, place, read_bytes
from mach.model.loading import load
from mach.runs.repetition import SILENCE_SECONDS, SignOfLife
from mach.runs.run import Run
from mach.runs.status import outlook, status
from mach.training.setup import drop_store, set_up, shared_store
from mach.training.shard import ShardJob, train_shard
from tests.flaky import FlakyFileSystem
from tests.model.test_model import train_text_model
from tests.training.test_training import EARLY, stop_after


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test: as if each ran on a new machine."""
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


def changed(config: Config, **sections: dict) -> Config:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def began(config: Config, url: str, *repetitions: int, exclusive: bool = True) -> tuple[Run, ShardJob]:
    trunk = config.network.trunk
    run, store = set_up(config, url, trunk=trunk)
    return run, ShardJob(str(run.path), shared_store(run, store), repetitions, exclusive=exclusive, trunk=trunk)


def weights(path: str | Path, *repetitions: int) -> list[bytes]:
    run = Run.open(path)
    return [read_bytes(run.repetition(r).weights) for r in repetitions or run.finished()]


def files_of(run: Run, repetition: int) -> list[str]:
    """Names of a repetition's files, but for those that any trainer leaves."""
    return sorted(set(names_in(run.repetition(repetition).folder)) - {"lock", "log.txt"})


FINISHED = ["DONE", "metrics.jsonl", "weights.safetensors"]


@pytest.mark.parametrize("scheme", ["memory://{name}/run", "local://{path}/run", "flaky://{path}/run"])
def test_a_run_behind_a_url_has_the_bits_of_a_local_one(config: Config, trained: Path, tmp_path: Path, scheme: str):
    url = scheme.format(name=tmp_path.name, path=tmp_path)
    run, job = began(config, url, 0, 1, 2)
    assert job.store == f"{url}/store"
    train_shard(job)
    assert weights(url) == weights(trained)
    assert all(files_of(run, r) == FINISHED for r in range(3))
    rows = np.eye(400, dtype=np.float32)[:5]
    ours, theirs = load(url), load(trained)
    for mine, other in zip(ours.topk(rows), theirs.topk(rows), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert ours.names([0, 7]) == theirs.names([0, 7])
    assert ours.info()["weight_bytes"] == theirs.info()["weight_bytes"]
    ours.verify()
    drop_store(run)
    assert not is_there(run.path / "store")


def test_stops_and_another_machine_change_nothing(
    config: Config, trained: Path, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first driver's data are out of reach of the second, which takes those that the run took along."""
    shutil.copy(planted / "train.txt", tmp_path / "train.txt")
    shutil.copy(planted / "names.txt", tmp_path / "names.txt")
    data = {"train": str(tmp_path / "train.txt"), "classes": str(tmp_path / "names.txt"), "cache": None}
    url = f"local://{tmp_path}/run"
    run, job = began(changed(config, data=data), url, 0, 1, 2)
    with pytest.raises(TrainingStoppedError):
        train_shard(job, should_stop=stop_after(100))
    assert files_of(run, 0) == ["metrics.jsonl", "progress.json", "state.safetensors"]
    (tmp_path / "train.txt").unlink()
    for n_steps in (30, 333):
        monkeypatch.setenv("MACH_CACHE", str(tmp_path / f"cache-{n_steps}"))
        again = Run.open(url)
        _, job = began(again.config, url, 0, 1, 2)
        with pytest.raises(TrainingStoppedError):
            train_shard(job, should_stop=stop_after(n_steps))
    train_shard(job)
    assert weights(url) == weights(trained)
    drop_store(run)
    with pytest.raises(DataError, match=r"cannot read .*train\.txt"):
        set_up(run.config, url)


def random_trouble(seed: int):
    chance = random.Random(seed)
    kinds = {"put": ["fail", "lose", "cut", "wait"], "get": ["fail", "cut"], "info": ["fail"]}
    shares = {"put": 0.3, "get": 0.3, "info": 0.02}  # listing a folder asks for each of its files

    def trouble(operation: str, path: str) -> str:
        return chance.choice(kinds[operation]) if chance.random() < shares[operation] else ""

    return staticmethod(trouble)


def test_flaky_storage_ends_in_the_same_bits(
    config: Config, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FlakyFileSystem, "trouble", random_trouble(seed=3))
    monkeypatch.setattr(places, "PAUSES_SECONDS", (0.0,) * 12)
    url, finished = f"flaky://{tmp_path}/run", []
    run, job = began(changed(config, training={"checkpoint_seconds": 0.0}), url, 0, 1, 2)
    for n_steps in [60] * 40:
        try:
            train_shard(job, should_stop=stop_after(n_steps), report=lambda p: finished.append(p.repetition))
            break
        except TrainingStoppedError:
            assert all(r >= max(run.finished(), default=0) for r in finished[-1:])  # nothing finished is redone
    assert weights(url) == weights(trained)
    assert all(files_of(run, r) == FINISHED for r in range(3))
    assert load(url).repetitions == [0, 1, 2]


def test_storage_that_takes_nothing_stops_the_run_and_loses_nothing(
    config: Config, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = f"flaky://{tmp_path}/run"
    run, job = began(changed(config, training={"checkpoint_seconds": 0.0}), url, 0, 1, 2)
    down = staticmethod(lambda operation, path: "fail" if operation == "put" and "/r001/" in path else "")
    monkeypatch.setattr(FlakyFileSystem, "trouble", down)
    with pytest.raises(
        StorageError, match="cannot write flaky://.*weights.safetensors: the network is down; "
    ) as caught:
        train_shard(job)
    assert "\n" not in str(caught.value)
    assert run.finished() == [0]
    assert "the network is down" in run.repetition(1).local_log.read_text()
    before = run.repetition(0).summary()
    monkeypatch.setattr(FlakyFileSystem, "trouble", staticmethod(lambda operation, path: ""))
    train_shard(job)
    assert weights(url) == weights(trained)
    assert run.repetition(0).summary() == before
    assert b"the network is down" in read_bytes(run.repetition(1).log)


TRAIN = """
import sys
import time
from mach.training.shard import ShardJob, train_shard
run, store = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
train_shard(ShardJob(run, store, (0,), exclusive=False))
"""


@pytest.mark.parametrize(
    ("scheme", "early"),
    [
        ("", False),
        ("local://", True),
        pytest.param("", True, marks=pytest.mark.slow),
        pytest.param("local://", False, marks=pytest.mark.slow),
    ],
)
def test_two_trainers_of_one_repetition_end_in_the_same_bits(config: Config, tmp_path: Path, scheme: str, early: bool):
    sections = EARLY if early else {"training": {"epochs": 12}}
    sections = sections | {"training": {**sections["training"], "checkpoint_seconds": 0.0}}
    reference, job = began(changed(config, **sections), str(tmp_path / "reference"), 0)
    train_shard(job)
    run, job = began(changed(config, **sections), f"{scheme}{tmp_path}/run", 0)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, job.run, job.store], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout
        process.stdout.readline()
    for process in processes:
        process.communicate("go\n")
        assert process.returncode == 0
    assert weights(job.run) == weights(str(reference.path))
    assert files_of(run, 0) == FINISHED
    done, expected = run.repetition(0).summary(), reference.repetition(0).summary()
    assert (done.weights_digest, done.best_epoch) == (expected.weights_digest, expected.best_epoch)
    assert len(run.repetition(0).read_metrics()) == done.epochs
    load(job.run).verify()


@pytest.mark.parametrize("scheme", ["", "local://"])
@pytest.mark.parametrize("when", ["at the end of an epoch", "before a stop", "during a checkpoint"])
def test_a_trainer_that_finds_done_stops_quietly(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, when: str
):
    run, job = began(config, f"{scheme}{tmp_path}/run", 0, exclusive=False)
    files, rival = run.repetition(0), ShardJob(job.run, job.store, (0,), exclusive=False)
    steps: list[int] = []

    def finish_elsewhere() -> None:
        monkeypatch.undo()
        monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
        train_shard(rival)

    def should_stop() -> bool:
        steps.append(1)
        if len(steps) == 5 and when != "during a checkpoint":
            finish_elsewhere()
        return len(steps) == 5 and when != "at the end of an epoch"

    if when == "during a checkpoint":
        save = type(files).save

        def save_late(self, where, *arguments):
            finish_elsewhere()
            return save(self, where, *arguments)

        monkeypatch.setattr(type(files), "save", save_late)
    train_shard(job, should_stop=should_stop)
    assert len(steps) <= 47
    assert files_of(run, 0) == FINISHED
    assert len(files.read_metrics()) == files.summary().epochs


def test_storage_may_open_sockets_and_training_may_not(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FlakyFileSystem, "trouble", staticmethod(lambda operation, path: "talk"))
    url = f"flaky://{tmp_path}/run"
    run, job = began(changed(config, training={"epochs": 2, "checkpoint_seconds": 0.0}), url, 0)
    train_shard(job)
    assert run.repetition(0).is_done
    network = {"trunk": "tests.training.test_training:TalkingTrunk"}
    run, job = began(changed(config, training={"epochs": 1}, network=network), f"{url}-talking", 0)
    monkeypatch.setattr("tests.training.test_training.TalkingTrunk.sockets", [])
    with pytest.raises(TrainingError, match="repetition 0 opened a socket"):
        train_shard(job)


def sign(**changes: object) -> SignOfLife:
    fields: dict = {"pid": 1, "step": 40, "n_steps": 376, "epoch": 1, "n_epochs": 8, "loss": 0.5}
    fields |= {"bucket_precision": 0.25, "rows_per_second": 1e4, "seconds_left": 84.0, "saved_step": 30}
    return SignOfLife(**(fields | {"unix_seconds": time.time()} | changes))


def test_status_is_told_by_files_alone(config: Config, trained: Path, tmp_path: Path):
    run, _ = began(config, f"local://{tmp_path}/run", 0)
    assert [status(run, r)["state"] for r in range(3)] == ["waiting"] * 3
    run.repetition(0).write_progress(sign(host="node-7"))
    run.repetition(1).write_progress(sign(unix_seconds=time.time() - SILENCE_SECONDS - 60))
    rows = [status(run, r) for r in range(3)]
    assert [row["state"] for row in rows] == ["training", "stopped", "waiting"]
    assert (rows[0]["host"], rows[0]["step"], rows[0]["n_steps"], rows[0]["seconds_left"]) == ("node-7", 40, 376, 84.0)
    assert rows[0]["heard_seconds_ago"] < 60 < SILENCE_SECONDS < rows[1]["heard_seconds_ago"]
    # 336 steps in 84 s: 4 a second; 336 + 336 + 376 steps are left
    assert outlook(rows) == "0 of 3 repetitions finished, 1 trained now: about 4 min left"
    shown = CliRunner().invoke(main, ["status", str(run.path)]).stdout
    assert "node-7" in shown
    assert shown.endswith("about 4 min left\n")
    finished = Run.open(trained)
    assert outlook([status(finished, r) for r in range(3)]) == "3 of 3 repetitions finished"
    run.repetition(0).sign.write_bytes(b"{")
    assert status(run, 0)["state"] == "waiting"


def test_a_local_lock_is_the_truth(config: Config, tmp_path: Path):
    run, _ = began(config, str(tmp_path / "run"), 0)
    run.repetition(0).folder.mkdir(parents=True)
    run.repetition(0).write_progress(sign())
    assert status(run, 0)["state"] == "stopped"
    with run.repetition(0).locked():
        assert status(run, 0)["state"] == "training"


def test_damaged_weights_are_found_out_and_not_kept(
    config: Config, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    url = f"flaky://{tmp_path}/run"
    _, job = began(changed(config, training={"epochs": 1}), url, 0)
    train_shard(job)
    for trouble, complaint in (("spoil", "has digest .* copy it anew"), ("cut", "bytes arrived")):
        spoilt = staticmethod(lambda operation, path, t=trouble: t if operation == "get" and "weights" in path else "")
        monkeypatch.setattr(FlakyFileSystem, "trouble", spoilt)
        with pytest.raises(StorageError, match=complaint):
            load(url)
        assert not list((cache / "weights").glob("*.safetensors"))
    monkeypatch.setattr(FlakyFileSystem, "trouble", staticmethod(lambda operation, path: ""))
    load(url).verify()
    monkeypatch.setattr(FlakyFileSystem, "n_operations", {})
    load(url)
    assert "get" not in FlakyFileSystem.n_operations  # all is here already


def test_text_answers_from_a_url_alone(config: Config, tmp_path: Path):
    train_text_model(config, tmp_path, f"memory://{tmp_path.name}/run")
    (tmp_path / "train.csv").unlink()
    model = load(f"memory://{tmp_path.name}/run")
    ids, _ = model.topk("something old, and BLUE", k=2)
    assert sorted(model.names(ids)) == ["blue", "old"]


def test_buckets_from_a_table_behind_a_url(config: Config, tmp_path: Path):
    table = np.random.default_rng(0).integers(0, 32, (3, 120))
    np.save(tmp_path / "table.npy", table)
    url = f"local://{tmp_path}/run"
    settings = changed(config, hashing={"table": f"local://{tmp_path}/table.npy"}, training={"epochs": 1})
    run, job = began(settings, url, 0, 1, 2)
    (tmp_path / "table.npy").unlink()
    set_up(run.config, url)  # the run has it
    train_shard(job)
    np.testing.assert_array_equal(load(url).assignment.buckets(range(120)), table)


def test_two_creators_write_the_same_and_another_is_refused(config: Config, planted: Path, tmp_path: Path):
    url = f"memory://{tmp_path.name}/run"
    run, store = set_up(config, url)
    before = {name: read_bytes(run.path / name) for name in ("manifest.json", "config.toml", "class_counts.npy")}
    Run.create(url, run.config, run.manifest, store, run.assignment())
    assert {name: read_bytes(run.path / name) for name in before} == before
    with pytest.raises(ConfigError, match="another configuration: training.rate"):
        set_up(changed(config, training={"rate": 0.5}), url)
    with pytest.raises(ConfigError, match="was trained on other rows .* --from"):
        set_up(changed(config, data={"train": str(planted / "test.txt")}), url)
    (place(f"memory://{tmp_path.name}/thesis") / "thesis.txt").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="exists and is no run"):
        set_up(config, f"memory://{tmp_path.name}/thesis")
    with pytest.raises(IncompleteRunError, match="no repetition is finished yet"):
        load(url)


def mach(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_line_from_source_to_answer(config: Config, planted: Path, trained: Path, tmp_path: Path):
    """Everything behind URLs that worker processes see too; the run's own URL is enough to go on."""
    url = f"local://{tmp_path}/far"
    names = ["--set", f"data.classes={planted / 'names.txt'}", "--set", "data.row_features=0"]
    result = mach("prepare", f"local://{planted}/train.txt", f"{url}/train", "--json", *names)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["path"] == f"{url}/train"
    result = mach("prepare", planted / "test.txt", f"{url}/test", "--like", f"{url}/train")
    assert result.exit_code == 0, result.stderr
    data = {"train": f"{url}/train", "test": f"{url}/test", "classes": None, "cache": None}
    (tmp_path / "config.toml").write_text(to_toml(changed(config, data=data, launch={"workers": 1})))
    result = mach("train", f"local://{tmp_path}/config.toml", f"{url}/run", "--repetitions", "0")
    assert result.exit_code == 0, result.stderr
    assert "store" not in names_in(place(f"{url}/run"))  # its data are a store behind a URL already
    (tmp_path / "config.toml").unlink()
    result = mach("train", f"{url}/run")
    assert result.exit_code == 0, result.stderr
    assert "3 of 3 repetitions finished" in result.stderr
    assert weights(f"{url}/run") == weights(trained)
    assert mach("status", f"{url}/run").stdout.endswith("3 of 3 repetitions finished\n")
    curve = json.loads(mach("evaluate", f"{url}/run", f"{url}/test", "--json", "--at", "1").stdout)
    assert curve[-1]["P@1"] > 90
    answer = json.loads(mach("query", f"{url}/run", "0:0.5 1:0.5", "--json", "-k", "1").stdout)
    assert answer["names"] == ["class number 0"]
    assert mach("info", f"{url}/run", "--verify").exit_code == 0
    assert mach("predict", f"{url}/run", f"{url}/test", "-o", f"{url}/out.jsonl").exit_code == 0
    assert read_bytes(place(f"{url}/out.jsonl")).count(b"\n") == 400


def test_a_run_takes_its_data_along_until_it_is_finished(config: Config, tmp_path: Path):
    (tmp_path / "config.toml").write_text(to_toml(changed(config, training={"epochs": 1}), brief=True))
    url = f"local://{tmp_path}/run"
    assert mach("train", tmp_path / "config.toml", url, "--repetitions", "0,2").exit_code == 0
    assert is_there(place(url) / "store" / "meta.json")
    assert mach("train", url, "--launcher", "here").exit_code == 0
    assert not is_there(place(url) / "store")
    result = mach("query", "nowhere://run", "1:1")
    assert result.exit_code == 2
    assert result.stderr.startswith("mach: nowhere://run cannot be used")
