"""Explicit assignments: laws of balance, moves to top buckets only, drawn at set-up or learned, and resumed."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach import assignments
from mach.assignments import CHOICES, DRAWN, balanced, draw_table, mean_features, relearned, top_buckets
from mach.config import Config, parse_config
from mach.data.prepare import prepare
from mach.data.store import split_rows
from mach.errors import ConfigError, StorageError
from mach.evaluation import evaluate
from mach.hashing import TableAssignment
from mach.launch.local import train_locally
from mach.launch.setup import plan_of, set_up
from mach.loading import load
from mach.networks.batch import read_classes
from mach.storage import Run
from mach.tensors import map_tensors, write_tensors
from mach.trainer import TrainingStoppedError
from mach.training import train_shard
from tests.test_training import job_of, stop_after, weight_bytes

LEARNED: dict = {"assignment": "learned", "heads": 2, "choices": 3, "relearn_epochs": [1, 3]}


@given(K=st.integers(1, 80), B=st.integers(2, 12), C=st.integers(1, 12), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_every_class_takes_the_least_loaded_of_its_choices(K: int, B: int, C: int, seed: int):
    generator = np.random.default_rng(seed)
    choices_KC = generator.integers(0, B, (K, C), np.int32)
    counts_K = generator.integers(0, 9, K)
    buckets_K = balanced(choices_KC, counts_K, B)
    assert np.array_equal(balanced(choices_KC.astype(np.uint8), counts_K, B), buckets_K)
    loads_B = np.zeros(B, int)
    for k in np.argsort(-counts_K, kind="stable"):
        assert buckets_K[k] == min(choices_KC[k], key=lambda b: loads_B[b])  # the first of equal ones
        loads_B[buckets_K[k]] += max(1, counts_K[k])


@given(K=st.integers(1, 200), B=st.integers(2, 12), seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_with_all_buckets_to_choose_from_loads_differ_by_one_class_at_most(K: int, B: int, seed: int):
    counts_K = np.random.default_rng(seed).integers(1, 50, K)
    loads_B = np.bincount(balanced(np.tile(np.arange(B), (K, 1)), counts_K, B), counts_K, B)
    assert loads_B.max() - loads_B.min() <= counts_K.max()


def test_top_buckets_are_the_largest_first_and_ties_fall_to_the_smaller():
    affinities = np.random.default_rng(0).integers(0, 5, (50, 9)).astype(np.float32)
    expected = np.argsort(-affinities, axis=1, kind="stable")[:, :4]
    assert np.array_equal(top_buckets(affinities.copy(), 4), expected)


@pytest.mark.parametrize("kind", DRAWN)
def test_tables_place_every_class_and_depend_on_the_seed_alone(config: Config, tmp_path: Path, kind: str):
    _, store = set_up(config, tmp_path / "run")
    rows = np.arange(store.n_rows)
    choices = CHOICES.get(kind)
    drawn = config.hashing.model_copy(update={"assignment": kind, "choices": choices})
    hashing, other = (drawn.model_copy(update={"seed": seed}) for seed in (0, 1))
    table_RK = draw_table(hashing, store, rows, 32, range(4))
    assert table_RK.shape == (4, store.n_classes)
    assert table_RK.min() >= 0
    assert table_RK.max() < 32
    assert np.array_equal(draw_table(hashing, store, rows, 32, range(2, 4)), table_RK[2:])
    shares = [
        np.mean(table_RK[i] == table)
        for i, table in [(0, table_RK[1]), *enumerate(draw_table(other, store, rows, 32, range(2)))]
    ]
    assert max(shares) < 0.3  # other functions, or seeds, are other tables
    if kind == "balanced":
        counts_K = store.class_counts()
        spread = [np.ptp(np.bincount(buckets_K, counts_K, 32)) for buckets_K in table_RK]
        assert max(spread) < np.ptp(np.bincount(np.arange(store.n_classes) % 31, counts_K, 32))


def test_similar_classes_share_buckets(tmp_path: Path):
    """Classes 2g and 2g + 1 occur with the same features; by chance a pair would share one bucket in ten."""
    generator = np.random.default_rng(3)
    classes = generator.integers(0, 40, 800)
    lines = [f"{k} " + " ".join(f"{j}:1" for j in sorted(k // 2 * 5 + generator.choice(5, 3, False))) for k in classes]
    (tmp_path / "train.txt").write_text(f"{len(lines)} 100 40\n" + "\n".join(lines) + "\n")
    tree: dict = {"data": {"train": str(tmp_path / "train.txt"), "cache": str(tmp_path)}}
    tree["hashing"] = {"repetitions": 4, "buckets": 10, "assignment": "clustered", "choices": 2}
    run, store = set_up(parse_config(tree, "test"), tmp_path / "run")
    buckets_RK = run.assignment().buckets(np.arange(40))
    assert np.mean(buckets_RK[:, ::2] == buckets_RK[:, 1::2]) > 0.4
    means_KS = mean_features(store, np.arange(800), 0)
    np.testing.assert_allclose(np.linalg.norm(means_KS, axis=1), 1.0, rtol=1e-5)
    assert (means_KS[::2] * means_KS[1::2]).sum(1).min() > 0.8


@pytest.mark.parametrize("block", [1, 10**6])
def test_classes_move_to_top_buckets_only_and_stay_without_rows(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
):
    """Affinities by definition, beside those summed for a few classes at a time."""
    J, B, C = 2, 32, 3
    _, store = set_up(config, tmp_path / "run")
    rows = np.flatnonzero(store.class_ids[store.class_indptr[:-1]] != 7)[::2]
    probs_NO = np.random.default_rng(5).random((store.n_rows, J * B), np.float32)
    table_JK = np.random.default_rng(6).integers(0, B, (J, store.n_classes)).astype(np.uint8)
    monkeypatch.setattr(assignments, "AFFINITY_BYTES", block * 4 * J * B)
    monkeypatch.setattr(assignments, "CHUNK_ROWS", 100)
    moved_JK = relearned(store, rows, table_JK, B, C, lambda asked: probs_NO[asked])
    affinities_KO = np.zeros((store.n_classes, J * B))
    classes, counts = read_classes(store, rows)
    np.add.at(affinities_KO, classes, probs_NO[np.repeat(rows, counts)])
    has_rows_K = np.bincount(classes, minlength=store.n_classes) > 0
    for j in range(J):
        top_KC = np.argsort(-affinities_KO[:, j * B : (j + 1) * B], axis=1)[:, :C]
        assert (top_KC == moved_JK[j][:, None]).any(1)[has_rows_K].all()
    assert np.array_equal(moved_JK[:, ~has_rows_K], table_JK[:, ~has_rows_K])
    assert moved_JK.shape == table_JK.shape


@pytest.fixture(scope="module")
def learned(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learned") / "run"
    train_shard(job_of(config, path, 0, 1, 2, hashing=LEARNED)[1])
    return path


def table_of(path: Path, repetition: int) -> np.ndarray:
    return np.array(map_tensors(Run.open(path).repetition(repetition).weights_file())[0]["assignment"])


def test_a_learned_assignment_is_accurate_and_any_subset_answers(config: Config, learned: Path):
    run = Run.open(learned)
    assert config.data.test is not None
    rows = prepare(config.data, config.text, config.data.test, like=run.reference())
    before_RK = run.assignment().buckets(np.arange(120))
    for repetitions in ([0, 1, 2], [2], [2, 0]):
        model = load(learned, repetitions=repetitions)
        model.verify()
        tables = np.concatenate([table_of(learned, r) for r in repetitions])
        assert tables.dtype == np.uint8
        assert np.array_equal(model.assignment.buckets(np.arange(120)), tables)
        assert np.mean(tables != before_RK[run.functions(repetitions)]) > 0.05
        assert evaluate(model, rows, curve=False)[0]["P@1"] > (0.9 if len(repetitions) > 1 else 0.75)
    assert model.info()["assignment"] == "learned"
    moved = [row.get("moved") for row in run.repetition(1).read_metrics()]
    assert [bool(share) for share in moved] == [True, False, True, *[False] * 5]
    assert plan_of(run.config, rows).ledger.table_bytes == sum(table_of(learned, r).nbytes for r in range(3))


@pytest.mark.parametrize("interval", [31, 47])
def test_any_interruptions_end_in_the_same_table_and_bits(config: Config, learned: Path, tmp_path: Path, interval: int):
    """47 steps are an epoch: stops fall where classes have just moved, and between."""
    run, job = job_of(config, tmp_path / "run", 1, hashing=LEARNED)
    while not run.repetition(1).is_done:
        with contextlib.suppress(TrainingStoppedError):
            train_shard(job, should_stop=stop_after(interval))
    assert weight_bytes(tmp_path / "run", 1) == weight_bytes(learned, 1)


def test_a_trainer_that_dies_while_classes_move_ends_in_the_same_bits(
    config: Config, learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, job = job_of(config, tmp_path / "run", 1, hashing=LEARNED, training={"checkpoint_seconds": 0.0})
    dying = iter([False, True])

    def die(*arguments):
        moved_JK = relearned(*arguments)
        if next(dying):
            raise KeyboardInterrupt
        return moved_JK

    monkeypatch.setattr("mach.trainer.relearned", die)
    with pytest.raises(KeyboardInterrupt):
        train_shard(job)
    monkeypatch.undo()
    assert run.repetition(1).is_begun
    train_shard(job)
    assert weight_bytes(tmp_path / "run", 1) == weight_bytes(learned, 1)


def test_local_workers_write_the_same_bits(config: Config, learned: Path, tmp_path: Path):
    hashing = config.hashing.model_copy(update=LEARNED)
    run, store = set_up(config.model_copy(update={"hashing": hashing}), tmp_path / "run")
    train_locally(run, store, config.launch)
    for r in range(3):
        assert weight_bytes(tmp_path / "run", r) == weight_bytes(learned, r)


def test_the_best_epoch_keeps_its_own_table(config: Config, tmp_path: Path):
    sections: dict = {"data": {"validation_fraction": 0.2}, "training": {"epochs": 12, "patience": 2, "rate": 0.3}}
    run, job = job_of(config, tmp_path / "run", 0, hashing=LEARNED | {"relearn_epochs": [1]}, **sections)
    train_shard(job)
    done = run.repetition(0).summary()
    assert done.best_epoch is not None
    assert done.best_epoch > 1
    load(tmp_path / "run").verify()


@pytest.mark.parametrize("network", [{"hidden": []}, {"hidden": [16, 16], "weights": "int4"}])
def test_every_network_can_learn_its_assignment(config: Config, tmp_path: Path, network: dict):
    hashing = LEARNED | {"relearn_epochs": None, "choices": None}
    run, job = job_of(config, tmp_path / "run", 0, hashing=hashing, network=network, training={"epochs": 2})
    assert (run.config.hashing.choices, run.config.hashing.relearn_epochs) == (CHOICES["learned"], [1])
    train_shard(job)
    assert run.repetition(0).summary().best_epoch is None
    model = load(tmp_path / "run")
    assert model.topk(np.eye(1, 400), k=3)[0].shape == (1, 3)
    set_up(run.config, tmp_path / "run")  # opens again, as nothing has changed


def test_drawn_tables_are_extended_when_repetitions_are_raised(config: Config, tmp_path: Path):
    def at(**hashing: object) -> Run:
        changed = config.hashing.model_copy(update={"assignment": "balanced", **hashing})
        return set_up(config.model_copy(update={"hashing": changed}), tmp_path / "run")[0]

    first = at(repetitions=2).assignment()
    raised = at(repetitions=3).assignment()
    assert isinstance(raised, TableAssignment)
    assert raised.select([0, 1]).describe() == first.describe()
    with pytest.raises(ConfigError, match="hashing.seed: 1 here, 0 there"):
        at(repetitions=3, seed=1)
    with pytest.raises(ConfigError, match="hashing.choices: 3 here, 2 there"):
        at(repetitions=3, choices=3)


def test_validation_rows_do_not_place_classes(config: Config, tmp_path: Path):
    sections: dict = {"data": {"validation_fraction": 0.3}, "hashing": {"assignment": "clustered"}}
    run, _ = job_of(config, tmp_path / "run", **sections)
    store = set_up(run.config, tmp_path / "run")[1]
    rows, _ = split_rows(store.n_rows, 0.3, 0)
    expected = draw_table(run.config.hashing, store, rows, 32, range(3))
    assert np.array_equal(run.assignment().buckets(np.arange(120)), expected)


def test_a_damaged_table_is_found(learned: Path, tmp_path: Path):
    shutil.copytree(learned, tmp_path / "run")
    file = tmp_path / "run/repetitions/r001/weights.safetensors"
    arrays, metadata = map_tensors(file)
    wrong: list[tuple[np.ndarray, str]] = [
        (np.full((2, 120), 32, np.uint8), "bucket 32"),
        (np.zeros((2, 120), np.float32), "no unsigned integers"),
        (np.zeros((2, 119), np.uint8), r"assignment is \(2, 119\)"),
    ]
    for table_JK, message in wrong:
        changed = {name: np.array(array) for name, array in arrays.items()} | {"assignment": table_JK}
        with file.open("wb") as stream:
            write_tensors(stream, changed, metadata)
        with pytest.raises(StorageError, match=message):
            load(tmp_path / "run")


@pytest.mark.parametrize(
    ("hashing", "message"),
    [
        ({"assignment": "learned", "table": "t.npy"}, "table = 't.npy' with assignment = 'learned'"),
        ({"choices": 3}, "choices = 3 with assignment = 'universal': only balanced, clustered, learned can use it"),
        ({"assignment": "balanced", "relearn_epochs": [1]}, "relearn_epochs = \\[1\\] with assignment = 'balanced'"),
        ({"assignment": "random", "capacity": 999}, "capacity = 999 with assignment = 'random'"),
        ({"assignment": "learned", "relearn_epochs": [8]}, "relearn_epochs = \\[8\\]: give ascending epochs of 1 to 7"),
        ({"assignment": "learned", "relearn_epochs": [2, 1]}, "ascending epochs"),
    ],
)
def test_what_cannot_work_is_refused(config: Config, hashing: dict, message: str):
    tree = config.model_dump()
    tree["hashing"] |= hashing
    with pytest.raises(ConfigError, match=message):
        parse_config(tree, "test")


def test_affinities_that_cannot_be_held_are_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assignments, "AFFINITY_BYTES", 255)
    with pytest.raises(ConfigError, match="2 heads of 32 buckets take 256 bytes, at most 255"):
        job_of(config, tmp_path / "run", 0, hashing=LEARNED)
