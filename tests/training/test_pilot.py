"""Pilots teach an order of candidates: what they see, what becomes of them, and how the order answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from click.testing import CliRunner

from mach.cli import main
from mach.config import Config, LaunchConfig, load_config, to_toml
from mach.data.batch import SparseBatch
from mach.data.prepare import prepare
from mach.errors import ConfigError, IncompleteRunError, StorageError
from mach.files.records import read_json
from mach.files.tensors import map_tensors, write_tensors
from mach.model.accuracy import evaluate
from mach.model.loading import load
from mach.model.model import MachModel
from mach.reranking.candidates import widened
from mach.reranking.fitting import RerankerTraining
from mach.reranking.order import OTHERS, TAUGHT, LearnedOrder
from mach.reranking.record import Record
from mach.reranking.settings import FitSettings
from mach.reranking.signals import SIGNALS
from mach.reranking.signals.contract import Shortlist
from mach.reranking.signals.networks import Aggregate
from mach.reranking.signals.prior import NO_ROWS, Prior
from mach.training import pilot
from mach.training.conductor import train_reranker
from mach.training.launch.launchers import Crew
from mach.training.pilot import fold
from mach.training.setup import set_up
from tests.conftest import N_CLASSES, write_repository
from tests.reranking.oracles import columns_of, ordered

HERE = Crew(LaunchConfig())  # so little work is done by this process


@pytest.fixture(autouse=True, scope="module")
def few_steps() -> Iterator[None]:
    """Orders of so few candidates are learned in a quarter of the steps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mach.reranking.order.LEAST_STEPS", 500)
        yield


@pytest.fixture(scope="module")
def piloted(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Rows of one class; which of two neighbours it is a feature tells in 70 % of them, and networks cannot at all."""
    folder = tmp_path_factory.mktemp("piloted")
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(4000):
        k = int(generator.integers(N_CLASSES))
        features = {k // 2: 1.0, 100 + int(generator.integers(40)): 0.5}
        if generator.random() < 0.7:
            features[150 + k] = 0.4
        lines.append(f"{k} " + " ".join(f"{j}:{v}" for j, v in sorted(features.items())))
    buckets_RJ = np.stack([generator.permutation(N_CLASSES // 2) % 32 for _ in range(2)])
    np.save(folder / "table.npy", np.repeat(buckets_RJ, 2, axis=1))
    data = {
        "train": str(write_repository(folder / "train.txt", lines[:3500])),
        "test": str(write_repository(folder / "test.txt", lines[3500:])),
        "validation_fraction": 0.1,
    }
    reranking = {"candidates": 20, "pilots": 2, "pairs": 0}
    sections = {
        "data": config.data.model_copy(update=data),
        "hashing": config.hashing.model_copy(update={"repetitions": 2, "table": str(folder / "table.npy")}),
        "training": config.training.model_copy(update={"epochs": 3}),
        "reranking": config.reranking.model_copy(update=reranking),
    }
    return config.model_copy(update=sections)


@pytest.fixture(scope="module")
def taught(piloted: Config, few_steps: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "taught"
    run, store = set_up(piloted, path)  # step by step: nothing is calibrated, no prior is chosen
    HERE.train(run, store)
    train_reranker(run, store, HERE)
    return path


def rows_to_judge(model: MachModel):
    config = model.run.config
    assert config.data.test is not None
    return prepare(config.data, config.text, config.data.test, like=model.run.reference())


def test_folds_share_the_rows_among_them():
    rows = np.arange(3, 104)
    folds = [fold(rows, number, seed=4) for number in range(5)]
    assert sorted(np.concatenate([taught for _, taught in folds]).tolist()) == rows.tolist()
    for learned, taught in folds:
        assert sorted([*learned.tolist(), *taught.tolist()]) == rows.tolist()
        assert (np.diff(taught) > 0).all()
    assert not np.array_equal(folds[0][1], fold(rows, 0, seed=5)[1])


def test_an_order_is_learned_and_pilots_leave_nothing(taught: Path):
    model = load(taught)
    done = read_json(model.run.reranked, Record)
    assert done.learned
    assert done.n_bytes == sum(array.nbytes for array in map_tensors(taught / "reranker.safetensors")[0].values())
    assert not (taught / "pilots").exists()
    assert [path.name for path in (taught / "reranking").iterdir()] == ["lock"]
    rows = rows_to_judge(model)
    plain, found = (row["P@1"] for row in evaluate(model, rows, curve=False))
    assert plain < 0.6
    assert found > 0.8  # 0.85 at best: 0.7 are told, and half of the others by chance
    model.verify()


def test_answers_are_the_candidates_in_the_order_of_the_network(taught: Path):
    model = load(taught)
    reranker, queries = model.reranker, rows_to_judge(model).features(0, 60)
    assert reranker is not None
    assert reranker.order is not None
    found, plain = model.search(queries, 5), model.search(queries, 20, rerank=False)
    (batch, probs_NRB, columns), *none = model.ensemble.answered(queries)
    assert not none
    assert isinstance(batch, SparseBatch)
    more_NP, n_listed = reranker.proposed(batch, lifts=False), plain.ids_Nk.shape[1]
    top = widened(plain, more_NP, partial(model.ensemble.score, probs_NRB, columns))
    assert (top.ids_Nk[:, n_listed:] >= 0).any()  # rules find what networks do not list
    shortlist = Shortlist(batch, top.ids_Nk, top.scores_Nk, probs_NRB)
    inputs_NCI = reranker.inputs(shortlist)
    oracles = np.concatenate([columns_of(signal, shortlist) for signal in reranker.signals], axis=2)
    np.testing.assert_allclose(inputs_NCI, oracles, rtol=1e-4, atol=1e-3)
    scores_NC = ordered(reranker.order, top.scores_Nk, inputs_NCI)
    np.testing.assert_allclose(found.scores_Nk, -np.sort(-scores_NC, axis=1)[:, :5], atol=1e-4)
    np.testing.assert_array_equal(model.score(queries, found.ids_Nk), found.scores_Nk)
    one, _ = model.topk(queries[[3]], 5)
    np.testing.assert_array_equal(one.reshape(-1), found.ids_Nk[3])
    certain_N = found.scores_Nk[:, -1] >= found.bound_N
    everything = model.search(queries, N_CLASSES)
    np.testing.assert_array_equal(found.ids_Nk[certain_N], everything.ids_Nk[certain_N, :5])
    allowed = np.zeros(N_CLASSES, bool)
    allowed[[4, 7]] = True
    assert set(np.unique(model.topk(queries, 3, allowed=allowed)[0])) == {-1, 4, 7}
    assert load(taught, repetitions=[1]).topk(queries, 5)[0].shape == (60, 5)


def test_examples_are_of_rows_that_the_pilot_has_not_seen(piloted: Config, tmp_path: Path, monkeypatch):
    run, store = set_up(piloted, tmp_path / "run")
    HERE.train(run, store)
    training, seen = RerankerTraining(run, store), []
    training.begin()
    asked = FitSettings(cost=2.0, keeps_inputs=True)

    def train_pilot(config, path):
        other, rows = set_up(config, path)
        seen.append((other, rows))
        HERE.train(other, rows)
        train_reranker(other, rows, HERE, settings=asked)
        assert read_json(other.reranked, Record).settings["cost"] == 2
        assert RerankerTraining(other, rows).missing_pilots() == []  # it has none of its own
        return other

    pilot.teach(training, train_pilot, lambda text: None)
    assert training.missing_pilots() == []
    for number, (other, rows) in enumerate(seen):
        learned, taught = fold(training.rows, number, run.config.training.seed)
        assert rows.n_rows == len(learned)
        assert not np.intersect1d(taught, training.validation_rows).size
        arrays, _ = map_tensors(tmp_path / "run" / "reranking" / f"examples{number}.safetensors")
        assert arrays["inputs"].shape == (len(taught), TAUGHT + OTHERS, 18)
        assert 0.5 < arrays["right"].any(axis=1).mean() <= 1
        assert other.config.data.validation_fraction == piloted.data.validation_fraction


def test_a_pilot_has_half_of_the_repetitions_and_one_that_was_begun_with_all_goes_on(piloted: Config, tmp_path: Path):
    run, store = set_up(piloted, tmp_path / "run")
    training = cast(RerankerTraining, SimpleNamespace(run=run, store=store))
    half = pilot._config(training, Path(piloted.data.train), tmp_path / "pilot")
    assert (piloted.hashing.repetitions, half.hashing.repetitions) == (2, 1)
    set_up(half.changed(hashing={"repetitions": 2}), tmp_path / "pilot")
    again = pilot._config(training, Path(piloted.data.train), tmp_path / "pilot")
    assert set_up(again, tmp_path / "pilot")[0].config.hashing.repetitions == 2


def test_a_run_that_is_killed_while_a_pilot_trains_goes_on_to_the_same_bits(
    piloted: Config, taught: Path, tmp_path: Path, monkeypatch
):
    run, store = set_up(piloted, tmp_path / "run")
    HERE.train(run, store)
    real = RerankerTraining.examine

    def examine(self, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        real(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RerankerTraining, "examine", examine)
        with pytest.raises(IncompleteRunError, match="run the same command again"):
            train_reranker(run, store, HERE)
    assert (tmp_path / "run" / "pilots" / "1" / "RERANKED").exists()
    assert not (tmp_path / "run" / "RERANKED").exists()
    status = CliRunner().invoke(main, ["status", str(tmp_path / "run")]).output
    assert "re-ranker not trained yet, 1 of 2 pilots have taught" in status
    train_reranker(run, store, HERE)
    digests = [read_json(path / "RERANKED", Record).digest for path in (taught, tmp_path / "run")]
    assert digests[0] == digests[1]


def test_examples_of_earlier_versions_tell_classes_without_rows_apart_as_the_signal_does(monkeypatch):
    assert SIGNALS[:2] == (Aggregate, Prior)
    inputs = np.zeros((1, 2, 5), np.float32)
    inputs[0, 1, 3] = 0.7
    examples = {"inputs": inputs, "scores": inputs[:, :, 0], "right": np.ones((1, 2), np.uint8)}
    training = SimpleNamespace(likens=False, config=SimpleNamespace(pilots=1))
    training.folder = SimpleNamespace(map=lambda name: (examples, {}))
    training.run = SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(seed=0)))
    monkeypatch.setattr(LearnedOrder, "learn", lambda inputs_NCI, *rest: inputs_NCI)
    seen_NCI = cast(np.ndarray, RerankerTraining._order(cast(RerankerTraining, training)))
    np.testing.assert_array_equal(seen_NCI[0, :, 3], np.array([NO_ROWS, 0.7], np.float32))
    assert not np.delete(seen_NCI, 3, axis=2).any()


def test_examples_of_two_versions_teach_together(monkeypatch):
    """Earlier ones hold other numbers of candidates of a row, the best first."""
    some = [
        {"inputs": np.full((3, n, 5), n, np.float32), "scores": np.zeros((3, n)), "right": np.ones((3, n))}
        for n in (4, 2)
    ]
    training = SimpleNamespace(likens=False, config=SimpleNamespace(pilots=2))
    training.folder = SimpleNamespace(map=lambda name: (some["1" in name], {}))
    training.run = SimpleNamespace(config=SimpleNamespace(training=SimpleNamespace(seed=0)))
    monkeypatch.setattr(LearnedOrder, "learn", lambda *arrays: [array.shape for array in arrays[:3]])
    shapes: object = RerankerTraining._order(cast(RerankerTraining, training))
    assert shapes == [(6, 2, 5), (6, 2), (6, 2)]


def test_an_order_that_held_out_rows_find_worse_leaves_nothing_but_the_blend(
    taught: Path, piloted: Config, tmp_path: Path, monkeypatch
):
    shutil.copytree(taught, tmp_path / "run")
    (tmp_path / "run" / "RERANKED").unlink()
    good = load(taught).reranker
    assert good is not None
    assert good.order is not None
    bad = LearnedOrder(good.order.arrays | {"w_G1": -good.order.arrays["w_G1"]})
    monkeypatch.setattr("mach.training.conductor.teach", lambda *nothing: None)
    monkeypatch.setattr(RerankerTraining, "_order", lambda self: bad)
    run, store = set_up(piloted, tmp_path / "run")
    train_reranker(run, store, HERE)
    model = load(tmp_path / "run")
    assert model.reranker is not None
    assert not read_json(run.reranked, Record).learned
    assert model.reranker.order is None
    names = {name for name in map_tensors(run.reranker_file)[0] if not name.startswith("rules.")}  # type: ignore[arg-type]
    assert names <= {"offsets", "gaps", "codes", "scales", "biases", "priors", "repeats"}  # rules propose all the same
    assert evaluate(model, rows_to_judge(model), curve=False)[-1]["P@1"] > 0.8


def test_the_command_says_what_it_does(piloted: Config, tmp_path: Path):
    settings = piloted.reranking.model_copy(update={"pilots": 1})
    (tmp_path / "run.toml").write_text(to_toml(piloted.model_copy(update={"reranking": settings}), brief=True))
    done = CliRunner().invoke(main, ["train", str(tmp_path / "run.toml"), str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "re-ranker: pilot 1 of 1, on 80% of the rows" in done.output
    assert "order learned by a network" in done.output
    assert load_config(tmp_path / "run" / "config.toml").reranking.pilots == 1


def test_damaged_orders_are_refused(taught: Path, tmp_path: Path):
    shutil.copytree(taught, tmp_path / "run")
    file = tmp_path / "run" / "reranker.safetensors"
    arrays, metadata = map_tensors(taught / "reranker.safetensors")
    arrays = {name: np.array(array) for name, array in arrays.items()}
    for changes, notes in (
        ({"stacker.w_IH": arrays["stacker.w_IH"][:-1]}, {}),
        ({"stacker.b_1": None}, {}),
        ({"rules.supports": arrays["rules.supports"][:-1]}, {}),
        ({"log_rows": None}, {}),
        ({name: None for name in arrays if name.startswith("rules.")}, {}),
        ({"stacker.means": arrays["stacker.means"][:-1]}, {}),
        ({}, {"views": "bold"}),
    ):
        changed = {name: array for name, array in (arrays | changes).items() if array is not None}
        with file.open("wb") as out:
            write_tensors(out, changed, metadata | notes)
        with pytest.raises(StorageError, match="train it again"):
            load(tmp_path / "run")


def test_configurations_that_cannot_be_are_refused(piloted: Config):
    tree = piloted.model_dump(exclude_none=True)
    for section, keys, message in (
        ("decoding", {"aggregate": "min"}, "pilots = 2 with decoding.aggregate = 'min'"),
        ("training", {"start": "there"}, "pilots = 2 with training.start"),
        ("reranking", {"pilots": 6}, "pilots"),
    ):
        from mach.config import parse_config

        with pytest.raises(ConfigError, match=message):
            parse_config(tree | {section: tree[section] | keys}, "test")
