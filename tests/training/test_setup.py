"""Setting up a run beside others that do the same."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mach.cli.report.diagnosis import bucket_load
from mach.config import Config, LaunchConfig
from mach.data.prepare import prepare as prepare_data
from mach.errors import ConfigError, StorageError
from mach.files.tensors import map_tensors, write_tensors
from mach.model.loading import load
from mach.runs.run import Run
from mach.sketch.hashing import UniversalAssignment
from mach.sketch.tables import extends
from mach.training import finetuning
from mach.training.launch import capacity
from mach.training.launch.capacity import USABLE, plan_of, repetitions_together
from mach.training.launch.driver import Driver
from mach.training.progress import Progress
from mach.training.setup import set_up
from tests.training.test_finetuning import with_keys


def test_a_run_that_appears_while_the_data_are_read_is_joined(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prepare = prepare_data

    def prepare_while_another_is_faster(*arguments, **options):
        monkeypatch.setattr(finetuning, "prepare", prepare)
        set_up(config, tmp_path / "run")
        return prepare(*arguments, **options)

    monkeypatch.setattr(finetuning, "prepare", prepare_while_another_is_faster)
    run, store = set_up(config, tmp_path / "run")
    assert run.manifest.data_fingerprint == store.fingerprint
    assert (tmp_path / "run/manifest.json").exists()


def test_a_run_made_before_some_keys_were_there_keeps_their_defaults(config: Config, tmp_path: Path):
    config = with_keys(config, network={"hidden": [8], "weights": "int4", "power": 1.0})
    config = with_keys(config, reranking={"candidates": 0, "pairs": 0})
    run, _ = set_up(config, tmp_path / "run")
    file, newer = tmp_path / "run/config.toml", ("power = ", "pairs = ")
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith(newer)))
    network = config.network.model_dump(include={"hidden", "weights"})
    left = config.model_dump(exclude={"network", "reranking"}, exclude_unset=True)
    sparse = Config.model_validate(left | {"network": network})
    again, _ = set_up(sparse, tmp_path / "run")
    assert again.config.network == run.config.network
    assert again.config.reranking == run.config.reranking


def give_retired(run: Path, hashing: str) -> None:
    """Make a run look as one of an earlier version that had other keys."""
    file = run / "config.toml"
    file.write_text(file.read_text().replace("[hashing]\n", f"[hashing]\n{hashing}\n"))


def test_a_run_with_a_seed_and_capacity_of_its_own_is_extended_by_them(config: Config, tmp_path: Path):
    run, _ = set_up(config, tmp_path / "run")
    drawn = UniversalAssignment.draw(n_classes=120, n_buckets=32, n_repetitions=3, seed=5, capacity=200)
    run.update(run.config, run.manifest.model_copy(update={"assignment": drawn.describe()}), drawn)
    give_retired(tmp_path / "run", "seed = 5\ncapacity = 200")
    for n in (4, 5):
        again, _ = set_up(with_keys(config, hashing={"repetitions": n}), tmp_path / "run")
        longer = again.assignment()
        assert (longer.n_repetitions, extends(longer, drawn)) == (n, True)
        assert again.retired == {"hashing.seed": 5, "hashing.capacity": 200}


@pytest.mark.parametrize("kind", ["balanced", "learned"])
def test_buckets_that_this_version_does_not_make_are_read_only(
    config: Config, trained: Path, tmp_path: Path, kind: str
):
    shutil.copytree(trained, tmp_path / "run")
    give_retired(tmp_path / "run", f'assignment = "{kind}"\nchoices = 2')
    assert set_up(config, tmp_path / "run")[0].retired == {"hashing.assignment": kind, "hashing.choices": 2}
    with pytest.raises(ConfigError, match=rf"run has {kind} buckets, which this version reads and does not make"):
        set_up(with_keys(config, hashing={"repetitions": 4}), tmp_path / "run")
    (tmp_path / "run/repetitions/r001/DONE").unlink()
    if kind == "learned":
        with pytest.raises(ConfigError, match="learned buckets"):
            set_up(config, tmp_path / "run")
    else:
        set_up(config, tmp_path / "run")


def test_learned_tables_beside_the_weights_are_those_that_answer(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    give_retired(tmp_path / "run", 'assignment = "learned"')
    run, tables = Run.open(tmp_path / "run"), np.random.default_rng(0).integers(0, 32, (3, 1, 120)).astype(np.uint8)

    def put(repetition: int, table_JK: np.ndarray) -> None:
        file = run.repetition(repetition).weights_file()
        arrays, metadata = map_tensors(file)
        changed = {name: np.array(array) for name, array in arrays.items()} | {"assignment": table_JK}
        with file.open("wb") as stream:
            write_tensors(stream, changed, metadata)

    for repetition, table_JK in enumerate(tables):
        put(repetition, table_JK)
    for repetitions in ([0, 1, 2], [2, 0]):
        model = load(run.path, repetitions=repetitions)
        np.testing.assert_array_equal(model.assignment.buckets(np.arange(120)), tables[repetitions, 0])
        assert model.topk(np.eye(1, 400), k=3)[0].shape == (1, 3)
    np.testing.assert_array_equal(bucket_load(run).classes_RB[1], np.bincount(tables[1, 0], minlength=32))
    wrong: list[tuple[np.ndarray, str]] = [
        (np.full((1, 120), 32, np.uint8), "bucket 32"),
        (np.zeros((1, 120), np.float32), r"assignment is float32 of shape \(1, 120\)"),
        (np.zeros((1, 119), np.uint8), r"assignment is uint8 of shape \(1, 119\)"),
    ]
    for table_JK, message in wrong:
        put(1, table_JK)
        with pytest.raises(StorageError, match=message):
            load(run.path)


def test_a_gpu_takes_as_many_repetitions_as_the_ledger_says(config: Config, tmp_path: Path):
    """Of three: all, two, one, one from main memory, or none and then a line that says so."""
    run, store = set_up(config, tmp_path / "run")
    ledger = plan_of(run.config, store)
    options: dict[str, Any] = {"n_rows": run.config.training.batch, "number_bytes": 4}
    needs = [ledger.device_bytes(n, **options) for n in range(4)]
    streamed = [ledger.device_bytes(n, host_memory="all", **options) - needs[0] for n in range(2)]
    gpu = LaunchConfig(gpus=0.5)
    for n in (1, 2, 3):
        n_bytes = round(needs[n] / 0.5 / USABLE) + 2
        assert repetitions_together(LaunchConfig(gpus=0.5, workers=1), run, store, n_bytes) == (n, "none")
        assert repetitions_together(gpu, run, store, n_bytes)[0] == min(
            n, 2
        )  # two workers share it: three are two and one
    assert repetitions_together(LaunchConfig(gpus=1.0, workers=3), run, store, 10**12)[0] == 1
    assert repetitions_together(LaunchConfig(shard=2), run, store, 10)[0] == 2
    assert repetitions_together(LaunchConfig(), run, store)[0] == 1
    with pytest.raises(
        ConfigError, match=r"3 repetitions together take about .* set launch.shard to at most 1, or a smaller"
    ):
        repetitions_together(LaunchConfig(gpus=1.0, shard=3), run, store, round(needs[1] / USABLE) + 2)
    assert streamed[1] > needs[1] - needs[0]  # of so small a network, moments in pieces take more than they spare
    with pytest.raises(ConfigError, match=r"a repetition takes about 1.5 GB of a GPU, 0.9 GB are ours: set a smaller"):
        repetitions_together(gpu, run, store, 2 * 10**9)


def test_where_a_repetition_is_larger_than_a_gpu(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, store = set_up(config, tmp_path / "run")
    large = dataclasses.replace(plan_of(run.config, store), n_features=10**8)
    monkeypatch.setattr(capacity, "plan_of", lambda config, store: large)
    gpu = LaunchConfig(gpus=1.0)
    assert repetitions_together(gpu, run, store, 8 * 10**9) == (3, "input")
    stated = LaunchConfig(gpus=1.0, shard=2)
    assert repetitions_together(stated, run, store, 8 * 10**9) == (2, "input")


@pytest.mark.parametrize(("n_together", "expected"), [(1, (110, 300, 105)), (3, (30, 300, 15))])
def test_steps_of_a_shard_count_for_all_that_take_them(n_together: int, expected: tuple[int, ...]):
    """Repetition 1 of three: after the first one is done, or beside it."""
    told: list[Any] = []
    schedule: Any = SimpleNamespace(progressed=lambda worker, now, *steps: told.append(steps))
    driver = Driver(schedule, SimpleNamespace(), SimpleNamespace(), 1)  # type: ignore[arg-type]
    driver._shard[0] = (0, 1, 2)
    driver._progressed(0, 0.0, Progress(1, 10, 100, 1, 1, 0.0, 0.0, 0.0, 0.0, 5, n_together))
    assert told == [expected]
