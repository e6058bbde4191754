"""Training one shard: interruption never changes a bit, schedules, early stopping, sockets."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import socket
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from mach.config import Config
from mach.data.batch import read_batch, read_classes
from mach.data.store import Store
from mach.errors import ConfigError, StorageError, TrainingError, TrainingStoppedError
from mach.files.places import HOST
from mach.files.tensors import digest_of, map_tensors, write_tensors
from mach.networks.figures import StepFigures
from mach.networks.steps import Steps
from mach.runs.repetition import RepetitionFiles
from mach.runs.run import Run
from mach.runs.status import status
from mach.training.progress import Progress
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard
from mach.training.trainer import Trainer


def job_of(config: Config, path: Path, *repetitions: int, **sections: dict) -> tuple[Run, ShardJob]:
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    trunk = sections.get("network", {}).get("trunk")
    run, store = set_up(config.model_copy(update=changed), path, trunk=trunk)
    return run, ShardJob(str(run.path), str(store.path), repetitions, trunk=trunk)


def stop_after(n_steps: int):
    calls = iter(range(10**9))
    return lambda: next(calls) >= n_steps - 1


def weight_bytes(path: Path, repetition: int) -> bytes:
    return Run.open(path).repetition(repetition).weights.read_bytes()


def test_a_repetition_learns_the_planted_classes(trained: Path):
    metrics = Run.open(trained).repetition(0).read_metrics()
    assert [row["epoch"] for row in metrics] == list(range(1, 9))
    assert metrics[-1]["loss"] < 0.2 * metrics[0]["loss"]
    assert metrics[-1]["bucket_precision"] > 0.97


@pytest.mark.parametrize("interval", [1, 7, 47, 100])
def test_any_interruptions_end_in_the_same_bits(config: Config, trained: Path, tmp_path: Path, interval: int):
    """47 steps are an epoch, so stops fall on its border, within it, and after every single step."""
    n_epochs = 1 if interval == 1 else 8
    run, job = job_of(config, tmp_path / "run", 1, training={"epochs": n_epochs})
    reference = trained
    if interval == 1:
        reference = tmp_path / "whole"
        train_shard(job_of(config, reference, 1, training={"epochs": 1})[1])
    n_stops = 0
    while not run.repetition(1).is_done:
        try:
            train_shard(job, should_stop=stop_after(interval))
        except TrainingStoppedError:
            n_stops += 1
    assert n_stops >= n_epochs * 47 // interval - 1
    assert weight_bytes(tmp_path / "run", 1) == weight_bytes(reference, 1)
    ours, theirs = (Run.open(path).repetition(1).read_metrics() for path in (tmp_path / "run", reference))
    drop = {"rows_per_second"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in ours] == [
        {k: v for k, v in row.items() if k not in drop} for row in theirs
    ]


def test_a_stopped_repetition_gives_its_memory_back_at_once(config: Config, tmp_path: Path):
    """A worker that pauses one repetition and takes another up would hold both until Python looks for cycles."""
    job = job_of(config, tmp_path / "run", 0)[1]
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(TrainingStoppedError):
            train_shard(job, should_stop=stop_after(3))
        assert not any(type(each) is Trainer for each in gc.get_objects())
    finally:
        gc.enable()


def test_a_finished_repetition_is_left_alone(config: Config, tmp_path: Path):
    run, job = job_of(config, tmp_path / "run", 0, training={"epochs": 1})
    train_shard(job)
    before = run.repetition(0).weights.stat().st_mtime_ns
    train_shard(job, report=lambda progress: pytest.fail("trained again"))
    assert run.repetition(0).weights.stat().st_mtime_ns == before
    assert not run.repetition(0).state.exists()


def test_progress_counts_up_to_the_end(config: Config, tmp_path: Path):
    seen: list[Progress] = []
    train_shard(job_of(config, tmp_path / "run", 0, training={"epochs": 2})[1], report=seen.append)
    assert [p.step for p in seen] == sorted(p.step for p in seen)
    assert (seen[-1].step, seen[-1].n_steps, seen[-1].epoch, seen[-1].n_epochs) == (94, 94, 2, 2)
    assert seen[-1].seconds_left == 0


def test_a_trainer_waits_for_another_of_the_same_repetition(config: Config, tmp_path: Path):
    run, job = job_of(config, tmp_path / "run", 0)
    with run.repetition(0).locked() as is_ours:
        assert is_ours
        assert status(run, 0)["state"] == "training"
        with pytest.raises(TrainingStoppedError, match="while another process trained"):
            train_shard(job, should_stop=stop_after(3))
    assert status(run, 0)["state"] == "waiting"


def test_status_writes_nothing(config: Config, tmp_path: Path):
    run, _ = job_of(config, tmp_path / "run", 0)
    before = sorted(tmp_path.rglob("*"))
    assert status(run, 0)["state"] == "waiting"
    assert sorted(tmp_path.rglob("*")) == before


EARLY: dict[str, dict] = {
    "data": {"validation_fraction": 0.2},
    "training": {"epochs": 30, "rate": 0.5},
}


def early_job_of(config: Config, path: Path) -> tuple[Run, ShardJob]:
    """A run of an earlier version, which has a key that is gone: to stop after two epochs without a better figure."""
    run, job = job_of(config, path, 0, **EARLY)
    file = run.path / "config.toml"
    file.write_text(file.read_text().replace("[training]\n", "[training]\npatience = 2\n"))
    return Run.open(run.path), job


def test_an_older_run_that_stops_early_keeps_the_best_epoch(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At a rate that throws the weights about, the best epoch is not the last; a failure at the very end repeats."""
    monkeypatch.setattr("mach.training.trainer.SHORT_SECONDS", 0.0)
    run, job = early_job_of(config, tmp_path / "run")
    train_shard(job)
    done = run.repetition(0).summary()
    metrics = run.repetition(0).read_metrics()
    figures = [row["validation_bucket_precision"] for row in metrics]
    assert len(figures) == done.epochs < 30
    assert done.best_epoch == int(np.argmax(figures)) + 1 == done.epochs - 2
    assert done.weights_digest == digest_of(map_tensors(run.repetition(0).weights_file())[0])
    again, job = early_job_of(config, tmp_path / "again")
    finish = RepetitionFiles.finish
    monkeypatch.setattr(RepetitionFiles, "finish", lambda *arguments: (_ for _ in ()).throw(StorageError("full")))
    with pytest.raises(StorageError, match="full"):
        train_shard(job)
    monkeypatch.setattr(RepetitionFiles, "finish", finish)
    files = again.repetition(0)
    files.metrics.unlink()
    with pytest.raises(TrainingStoppedError):
        train_shard(job, should_stop=lambda: len(files.read_metrics()) > 1)
    state = files.state
    whole, (arrays, metadata) = state.read_bytes(), map_tensors(Path(str(state)))
    arrays = {name: np.array(array) for name, array in arrays.items()}
    for wrong in ({"best.output.bias": arrays["best.output.bias"][1:]}, {"best.extra": arrays["best.output.bias"]}):
        with state.open("wb") as file:
            write_tensors(file, {**arrays, **wrong}, metadata)
        with pytest.raises(StorageError, match="the file is of another run"):
            train_shard(job)
        state.write_bytes(whole)
    train_shard(job)
    assert again.repetition(0).summary().weights_digest == done.weights_digest
    assert weight_bytes(tmp_path / "again", 0) == weight_bytes(tmp_path / "run", 0)


def test_validation_rows_are_not_trained_on(config: Config, tmp_path: Path):
    run, job = job_of(config, tmp_path / "run", 0, data={"validation_fraction": 0.25}, training={"epochs": 1})
    seen: list[Progress] = []
    train_shard(job, report=seen.append)
    assert seen[-1].n_steps == -(-2250 // 64)
    assert 0 <= run.repetition(0).read_metrics()[0]["validation_bucket_precision"] <= 1


class TalkingTrunk(nn.Module):
    """A trunk that opens a connection to somebody, which no repetition may do."""

    sockets: ClassVar[list[socket.socket]] = []

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.out_features = in_features

    def forward(self, x):
        if not self.sockets:
            self.sockets.extend(socket.socketpair())
            self.sockets[0].send(b"gradient")
        return x


def test_a_repetition_that_communicates_is_refused(config: Config, tmp_path: Path):
    network = {"trunk": "tests.training.test_training:TalkingTrunk"}
    run, job = job_of(config, tmp_path / "run", 0, network=network, training={"epochs": 1})
    for _ in range(2):
        with pytest.raises(TrainingError, match="repetition 0 opened a socket: repetitions must not communicate"):
            train_shard(job)
    assert not TalkingTrunk.sockets
    socket.socket().close()  # outside of training everybody may
    assert not run.repetition(0).is_done


def test_every_epoch_has_figures_however_few_its_steps(config: Config, tmp_path: Path):
    run, job = job_of(config, tmp_path / "run", 0, training={"batch": 1000, "epochs": 7})
    train_shard(job)
    assert all(np.isfinite(row["loss"]) for row in run.repetition(0).read_metrics())


@pytest.mark.parametrize(("seconds", "n_written"), [(0.0, 8), (math.inf, 1)])
def test_epochs_that_are_short_write_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, n_written: int
):
    written: list[int] = []
    monkeypatch.setattr("mach.training.trainer.SHORT_SECONDS", seconds)
    monkeypatch.setattr(RepetitionFiles, "write_metrics", lambda files, rows: written.append(len(rows)))
    run, store = set_up(config, tmp_path / "run")
    train_shard(ShardJob(str(run.path), str(store.path), (0,)))
    assert (len(written), written[-1]) == (n_written, 8)


def test_what_killed_writers_left_is_swept(config: Config, tmp_path: Path):
    run, job = job_of(config, tmp_path / "run", 0, training={"epochs": 1})
    run.repetition(0).folder.mkdir(parents=True)
    process = subprocess.Popen(["true"])
    process.wait()
    written_by = {
        "dead": f"{HOST}-{process.pid}",
        "alive": f"{HOST}-{os.getppid()}",
        "elsewhere": "other-1",
        "old": "other-2",
    }
    leftovers = {name: run.repetition(0).folder / f".state.{who}.tmp" for name, who in written_by.items()}
    for leftover in leftovers.values():
        leftover.write_bytes(b"half")
    os.utime(str(leftovers["old"]), (1, 1))
    train_shard(job)
    assert [name for name, leftover in leftovers.items() if leftover.exists()] == ["alive", "elsewhere"]


def test_batches_hold_the_rows_asked_for(config: Config, tmp_path: Path):
    _, store = set_up(config, tmp_path / "run")
    rows = np.array([5, 2999, 0, 5])
    batch = read_batch(store, rows)
    classes, counts = read_classes(store, rows)
    assert len(batch) == 4
    ends = np.cumsum(counts)
    for i, row in enumerate(rows):
        expected = store.class_ids[store.class_indptr[row] : store.class_indptr[row + 1]]
        np.testing.assert_array_equal(classes[ends[i] - counts[i] : ends[i]], expected)


def test_a_store_of_other_data_is_found_out(config: Config, tmp_path: Path, planted: Path):
    _, store = set_up(config, tmp_path / "run")
    assert isinstance(store, Store)
    other = config.model_copy(update={"data": config.data.model_copy(update={"train": str(planted / "test.txt")})})
    with pytest.raises(ConfigError, match="data.train: .* was trained on other rows .* --from"):
        set_up(other, tmp_path / "run")


class PlainTrunk(nn.Linear):
    """A user's trunk."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 16)


class TestTogether:
    """A shard as one batched network, here on the processor: the whole path of a GPU but its kernels."""

    @pytest.fixture(autouse=True)
    def plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Steps are compared with those of a processor, which would dither."""
        monkeypatch.setattr(Steps, "of", lambda *_, **__: Steps())

    def run_of(self, config: Config, path: Path, *repetitions: int, host_memory: Any = "none", **sections: dict):
        run, job = job_of(config, path, *repetitions, **sections)
        return run, dataclasses.replace(job, together=True, host_memory=host_memory)

    def test_it_learns_what_repetitions_learn_alone(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Together each becomes what it would alone on the rows of the first."""
        sections: dict[str, dict] = {
            "hashing": {"repetitions": 3, "heads": 2},
            "data": {"validation_fraction": 0.1},
            "network": {"power": 0.5},
            "training": {"epochs": 3},
        }
        run, job = self.run_of(config, tmp_path / "run", 0, 1, 2, **sections)
        seen: list[Progress] = []
        train_shard(job, report=seen.append)
        assert {progress.n_together for progress in seen} == {3}
        alone, job = job_of(config, tmp_path / "alone", 0, 1, 2, **sections)
        begin = Trainer.begin
        monkeypatch.setattr(Trainer, "begin", lambda trainer, order_of: begin(trainer, order_of=0))
        train_shard(job)
        for r in range(3):
            ours, theirs = (each.repetition(r) for each in (run, alone))
            for mine, other in zip(ours.read_metrics(), theirs.read_metrics(), strict=True):
                assert mine.keys() == other.keys()
                exact = {name: other[name] for name in mine if name != "rows_per_second"}
                assert {name: mine[name] for name in exact} == pytest.approx(exact, rel=0.02)
            first, same = (map_tensors(each.weights_file())[0] for each in (ours, theirs))
            np.testing.assert_allclose(first["output.bias"], same["output.bias"], rtol=1e-2, atol=1e-2)
            assert ours.is_done
            assert not ours.is_begun

    @pytest.mark.parametrize("host_memory", ["none", "input", "all"])
    def test_interruptions_change_nothing(self, config: Config, tmp_path: Path, host_memory: str):
        """Stopped within epochs and on their borders, with a repetition lost to the shard on the way."""
        sections: dict[str, dict] = {"training": {"epochs": 2}}
        train_shard(self.run_of(config, tmp_path / "whole", 0, 1, **sections)[1])
        run, job = self.run_of(config, tmp_path / "run", 0, 1, host_memory=host_memory, **sections)
        n_stops = 0
        while not all(run.repetition(r).is_done for r in (0, 1)):
            try:
                train_shard(job, should_stop=stop_after(47 if n_stops == 0 else 20))
            except TrainingStoppedError:
                n_stops += 1
        assert n_stops == 3
        for r in (0, 1):
            assert weight_bytes(tmp_path / "run", r) == weight_bytes(tmp_path / "whole", r)

    def test_from_a_gpu_to_the_processor_and_back(self, config: Config, tmp_path: Path):
        """A checkpoint says whose row order it follows, so rows come in the same order everywhere."""
        sections: dict[str, dict] = {"training": {"epochs": 2}}
        whole = self.run_of(config, tmp_path / "whole", 0, 1, **sections)[0]
        train_shard(self.run_of(config, tmp_path / "whole", 0, 1, **sections)[1])
        run, job = self.run_of(config, tmp_path / "run", 0, 1, **sections)
        with pytest.raises(TrainingStoppedError):
            train_shard(job, should_stop=stop_after(20))
        alone = dataclasses.replace(job, repetitions=(1,), together=False)
        with pytest.raises(TrainingStoppedError):
            train_shard(alone, should_stop=stop_after(30))
        assert [status(run, r)["state"] for r in (0, 1)] != ["finished"] * 2
        train_shard(job)  # the two are at different steps now, and trained one after the other
        for r in (0, 1):
            metrics = [each.repetition(r).read_metrics() for each in (run, whole)]
            assert [row["loss"] for row in metrics[0]] == pytest.approx([row["loss"] for row in metrics[1]], rel=1e-3)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("host_memory", ["none", "input", "all"])
    def test_on_a_gpu_as_on_the_processor(self, config: Config, tmp_path: Path, host_memory: str):
        """Begun on the GPU, gone on on the processor, ended on the GPU: the same losses as on the processor alone."""
        sections: dict[str, dict] = {"training": {"epochs": 3}}
        whole, job = self.run_of(config, tmp_path / "whole", 0, 1, **sections)
        train_shard(job)
        run, job = self.run_of(config, tmp_path / "run", 0, 1, host_memory=host_memory, **sections)
        for device, n_steps in (("cuda:0", 40), ("cpu", 40), ("cuda:0", 10**6)):
            with contextlib.suppress(TrainingStoppedError):
                train_shard(dataclasses.replace(job, device=device), should_stop=stop_after(n_steps))
        for r in (0, 1):
            metrics = [each.repetition(r).read_metrics() for each in (run, whole)]
            assert [row["loss"] for row in metrics[0]] == pytest.approx([row["loss"] for row in metrics[1]], rel=1e-2)

    def test_a_repetition_that_fails_leaves_the_others_alone(
        self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        run, job = self.run_of(config, tmp_path / "run", 0, 1, training={"epochs": 1})
        end_epoch = Trainer._end_epoch

        def diverge(trainer: Trainer, epoch: int, speed: float, *, writes: bool) -> None:
            if trainer.repetition == 0:
                trainer.figures.append(StepFigures(float("nan"), 0.0))
            end_epoch(trainer, epoch, speed, writes=writes)

        monkeypatch.setattr(Trainer, "_end_epoch", diverge)
        with pytest.raises(TrainingError, match="repetition 0 diverged"):
            train_shard(job)
        assert not run.repetition(0).is_done
        assert run.repetition(1).is_done

    def test_what_cannot_be_together_goes_one_by_one(self, config: Config, tmp_path: Path):
        seen: list[Progress] = []
        _, job = self.run_of(
            config, tmp_path / "run", 0, 1, network={"trunk": f"{__name__}:PlainTrunk"}, training={"epochs": 1}
        )
        train_shard(job, report=seen.append)
        assert [(p.repetition, p.n_together) for p in seen if p.step == 47] == [(0, 1), (1, 1)]
