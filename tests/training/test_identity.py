"""One bucket a class, ``hashing.table = "identity"``: trained on samples of the classes, resumed, decoded, served."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from mach.config import Config, parse_config
from mach.data.prepare import prepare
from mach.errors import ConfigError, TrainingStoppedError
from mach.model.accuracy import evaluate
from mach.model.loading import load
from mach.networks import steps
from mach.runs.run import Run
from mach.sketch.decoder import Decoder, topk_oracle
from mach.training.conductor import train
from mach.training.recipe import Shape, fill
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard
from tests.conftest import N_CLASSES
from tests.training.test_finetuning import with_keys
from tests.training.test_local import weights


def of_identity(config: Config, **training: object) -> Config:
    hashing = {"repetitions": 1, "buckets": None, "table": "identity"}
    return with_keys(config, hashing=hashing, training={"epochs": 12} | training)


@pytest.fixture
def few_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted sets are small: steps compute a quarter of their classes, at least."""
    monkeypatch.setattr(steps, "MANY_BUCKETS", 100)
    monkeypatch.setattr(steps, "CLASSES_SAMPLED", 0.25)


@pytest.mark.usefixtures("few_sampled")
def test_it_learns_the_planted_classes_is_resumed_and_answers_exactly(config: Config, planted: Path, tmp_path: Path):
    changed, n_steps = of_identity(config), 0
    run, store = set_up(changed, tmp_path / "stopped")

    def should_stop() -> bool:
        nonlocal n_steps
        n_steps += 1
        return n_steps % 150 == 0

    job = ShardJob(str(run.path), str(store.path), (0,))
    n_stops = 0
    while not run.finished():
        try:
            train_shard(job, should_stop=should_stop)
        except TrainingStoppedError:
            n_stops += 1
    assert n_stops >= 2
    train(changed, tmp_path / "whole", launcher="here")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    model = load(tmp_path / "whole")
    np.testing.assert_array_equal(model.assignment.buckets(range(N_CLASSES)), [np.arange(N_CLASSES)])
    test = prepare(config.data, config.text, str(planted / "test.txt"))
    assert evaluate(model, test, ks=(1,), curve=False)[-1]["P@1"] > 0.9
    probs_NRB = np.random.default_rng(0).random((7, 1, N_CLASSES), np.float32)
    found = Decoder(model.assignment).topk(probs_NRB, 5)
    np.testing.assert_array_equal(found.ids_Nk, topk_oracle(probs_NRB, model.assignment, 5, "log-mean")[0])
    np.testing.assert_array_equal(found.ids_Nk, np.argsort(-probs_NRB[:, 0], axis=1, kind="stable")[:, :5])


@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_workers_give_the_bits_of_this_process_on_samples_of_many_classes(
    launcher: Literal["local", "ray"], tmp_path: Path
):
    """4,200 classes are as many as are sampled in fact; a row of class k has feature k."""
    n_classes, generator = 4200, np.random.default_rng(0)
    lines = [f"{k},{(k + 1) % n_classes} {k}:1" for k in generator.permutation(n_classes)[:640]]
    (tmp_path / "rows.txt").write_text(f"{len(lines)} {n_classes} {n_classes}\n" + "\n".join(lines) + "\n")
    config = parse_config(
        {
            "data": {"train": str(tmp_path / "rows.txt"), "cache": str(tmp_path / "cache"), "validation_fraction": 0.0},
            "hashing": {"repetitions": 2, "table": "identity"},
            "network": {"hidden": [16]},
            "reranking": {"candidates": 0},
            "training": {"epochs": 2, "batch": 64, "rate": 0.02, "precision": "float32", "effort": "fast"},
        },
        "test",
    )
    train(config, tmp_path / "here", launcher="here")
    train(config, tmp_path / "there", launcher=launcher, workers=2)
    assert weights(tmp_path / "here") == weights(tmp_path / "there")
    assert weights(tmp_path / "here")[0] != weights(tmp_path / "here")[1]


def test_the_recipe_gives_one_head_and_all_buckets_and_others_are_refused(config: Config, tmp_path: Path):
    filled = fill(
        Config.model_validate({"data": {"train": "x"}, "hashing": {"table": "identity"}}),
        Shape(n_rows=41_902, n_features=77_412, n_classes=26_296),
    )
    assert (filled.hashing.buckets, filled.hashing.heads) == (26_296, 1)
    for keys in ({"buckets": 32}, {"buckets": N_CLASSES, "heads": 2}):
        with pytest.raises(ConfigError, match=r'"identity" with (32|120) buckets and [12] heads: .*leave hashing'):
            set_up(with_keys(of_identity(config), hashing=keys), tmp_path / "refused")


def test_repetitions_are_raised_and_the_assignment_stays(config: Config, tmp_path: Path):
    set_up(of_identity(config), tmp_path / "run")
    run, _ = set_up(with_keys(of_identity(config), hashing={"repetitions": 3}), tmp_path / "run")
    np.testing.assert_array_equal(Run.open(tmp_path / "run").assignment().buckets([7, 9]), [[7, 9]] * 3)
    assert run.config.hashing.repetitions == 3
