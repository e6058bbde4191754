"""Starting from another run: new classes are learned, old ones kept, bits do not depend on interruptions."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import mach
from mach.config import Config, LaunchConfig, parse_config
from mach.data.batch import Batch, read_batch, read_classes
from mach.data.joining import find, join
from mach.data.prepare import prepare
from mach.data.store import Store, split_rows
from mach.data.transfer import fetch_store
from mach.errors import ConfigError, DataError, IncompleteRunError, TrainingStoppedError
from mach.files.places import place
from mach.model.accuracy import evaluate
from mach.model.classes.versions import Versions
from mach.model.loading import load
from mach.networks import steps
from mach.networks.network import Network
from mach.runs.run import Run
from mach.sketch.tables import TableAssignment
from mach.training import trainer as trainer_module
from mach.training.conductor import train_reranker
from mach.training.finetuning import Origin, training_store
from mach.training.launch.launchers import Crew
from mach.training.setup import set_up, shared_store
from mach.training.shard import ShardJob, train_shard
from tests.conftest import N_FEATURES

N_OLD, N_ALL = 100, 120
R = 3


def rows_of(classes: range, n_rows: int, seed: int) -> list[str]:
    """As `tests.conftest.planted_rows`, of some classes only."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(n_rows):
        chosen = np.sort(generator.choice(classes, generator.integers(1, 3), replace=False))
        owned = np.concatenate([3 * k + generator.choice(3, 2, replace=False) for k in chosen])
        features = np.sort(np.concatenate([owned, 360 + generator.choice(40, 2, replace=False)]))
        lines.append(",".join(map(str, chosen)) + "".join(f" {j}:0.5" for j in features))
    return lines


def write(path: Path, lines: list[str], n_classes: int) -> str:
    path.write_text(f"{len(lines)} {N_FEATURES} {n_classes}\n" + "\n".join(lines) + "\n")
    return str(path)


def learn(config: Config, path: Path | str) -> Run:
    run, store = set_up(config, path)
    train_shard(ShardJob(str(run.path), str(store.path), tuple(range(R))))
    return run


def with_keys(config: Config, **sections: dict) -> Config:
    tree = config.model_dump(exclude_unset=True)
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write(folder / "old.txt", rows_of(range(N_OLD), 2400, seed=1), N_OLD)
    write(folder / "new.txt", rows_of(range(N_OLD, N_ALL), 600, seed=2), N_ALL)
    write(folder / "test-old.txt", rows_of(range(N_OLD), 300, seed=3), N_ALL)
    write(folder / "test-new.txt", rows_of(range(N_OLD, N_ALL), 150, seed=4), N_ALL)
    return folder


@pytest.fixture(scope="module")
def old_config(folder: Path) -> Config:
    tree = {
        "data": {"train": str(folder / "old.txt"), "cache": str(folder / "cache"), "validation_fraction": 0.1},
        "hashing": {"repetitions": R, "buckets": 32, "heads": 1},
        "network": {"hidden": [32], "dropout": 0.1, "weights": "int4"},
        "reranking": {"candidates": 0},
        "training": {"epochs": 8, "batch": 64, "rate": 0.02, "precision": "float32"},
    }
    return parse_config(tree, "fixture")


@pytest.fixture(scope="module")
def old(old_config: Config, folder: Path) -> Run:
    return learn(old_config, folder / "old")


@pytest.fixture(scope="module")
def config(old: Run, folder: Path) -> Config:
    """What a user writes: the new rows and the run to start from."""
    return parse_config(
        {"data": {"train": str(folder / "new.txt")}, "training": {"start": str(old.path), "precision": "float32"}}, "t"
    )


@pytest.fixture(scope="module")
def tuned(config: Config, folder: Path) -> Run:
    return learn(config, folder / "tuned")


def first_softmax(config: Config, folder: Path) -> Path:
    """A run of the old rows, trained for an epoch by the softmax loss."""
    assert config.training.start is not None
    old = Run.open(Path(config.training.start)).config
    keys = {"epochs": 1, "loss": "softmax"}
    return Path(str(learn(with_keys(old, training=keys), folder / "softmax").path))


def precision(run: Run, folder: Path, part: str) -> float:
    model, data = load(run.path), run.config.data
    test = prepare(data, run.config.text, str(folder / f"test-{part}.txt"), like=run.reference())
    return float(evaluate(model, test, ks=(1,), curve=False)[-1]["P@1"])


def weights(run: Run) -> list[bytes]:
    return [run.repetition(r).weights.read_bytes() for r in run.finished()]


def test_new_classes_are_learned_and_old_ones_kept(config: Config, tuned: Run, folder: Path, tmp_path: Path):
    assert precision(tuned, folder, "old") > 0.96
    assert precision(tuned, folder, "new") > 0.96
    rate = {"rate": 0.02, "epochs": 8}
    replayed, forgot = (
        learn(with_keys(config, training=rate | {"replay": replay}), tmp_path / str(replay)) for replay in (1.0, 0.0)
    )
    assert precision(forgot, folder, "new") > 0.96
    assert precision(forgot, folder, "old") < precision(replayed, folder, "old") - 0.05


def test_it_starts_where_the_other_ended(config: Config, old: Run, folder: Path, tmp_path: Path):
    """With steps too small to matter the new run answers old classes as the old one, which a random start cannot."""
    run = learn(with_keys(config, training={"rate": 1e-9, "epochs": 1}), tmp_path / "run")
    assert precision(run, folder, "old") > 0.9
    known = np.arange(N_OLD)
    np.testing.assert_array_equal(run.assignment().buckets(known), old.assignment().buckets(known))


def test_any_interruptions_end_in_the_same_bits(config: Config, old: Run, tuned: Run, folder: Path, tmp_path: Path):
    """Not even the other run is needed once this one has begun, for it keeps copies of the weights."""
    shutil.copytree(str(old.path), tmp_path / "old")
    run, store = set_up(with_keys(config, training={"start": str(tmp_path / "old")}), tmp_path / "run")
    shutil.rmtree(tmp_path / "old")
    job = ShardJob(str(run.path), str(store.path), tuple(range(R)))
    n_stops = 0
    while len(run.finished()) < R:
        assert set_up(run.config, run.path)[1].path == store.path
        calls = iter(range(23))
        try:
            train_shard(job, should_stop=lambda calls=calls: next(calls, None) is None)  # type: ignore[misc]
        except TrainingStoppedError:
            n_stops += 1
    assert n_stops >= 5
    assert weights(run) == weights(tuned)
    assert not list(run.path.rglob("start.safetensors"))


def test_an_epoch_has_all_new_rows_and_some_old_ones_but_none_held_out(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, store = set_up(with_keys(config, training={"replay": 0.5}), tmp_path / "run")
    n_held_out = round(0.1 * 2400)
    training, validation = store.split(0.1, 0)
    np.testing.assert_array_equal(validation[:n_held_out], split_rows(2400, 0.1, 0)[1])
    assert (store.n_rows, store.n_old_rows, len(training)) == (3000, 2400, 2700)
    seen: list[np.ndarray] = []

    def read(store: Store, rows: np.ndarray) -> Batch:
        seen.append(rows)
        return read_batch(store, rows)

    monkeypatch.setattr(trainer_module, "read_batch", read)
    train_shard(ShardJob(str(run.path), str(store.path), (0,)))
    n_epochs = run.config.training.epochs
    trained = [rows for rows in seen if not np.isin(rows, validation).any()]
    per_epoch = np.split(np.concatenate(trained), n_epochs)
    for rows in per_epoch:
        assert sorted(rows[rows >= 2400]) == sorted(training[training >= 2400])
        assert len(np.unique(rows[rows < 2400])) == 270 == sum(rows < 2400)
    assert set(per_epoch[0][per_epoch[0] < 2400]) != set(per_epoch[1][per_epoch[1] < 2400])


@pytest.mark.parametrize("replay", [0.0, 0.5])
def test_samples_go_by_the_rows_of_the_steps_to_come(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: float
):
    """Not by all rows that the classes ever had: those are nearly all old here."""
    keys = {"replay": replay, "loss": "softmax"}
    told: list[np.ndarray] = []
    monkeypatch.setattr(Network, "expect", lambda _, shares: told.append(shares))
    monkeypatch.setattr(steps, "MANY_BUCKETS", 32)
    run, store = set_up(
        with_keys(config, training={"start": str(first_softmax(config, tmp_path))} | keys), tmp_path / "r"
    )
    train_shard(ShardJob(str(run.path), str(store.path), (0,)))
    rows = store.split(0.1, 0)[0]
    weights_N = np.where(rows >= store.n_old_rows, 1.0, replay * (rows >= store.n_old_rows).sum() / (rows < 2400).sum())
    classes, counts = read_classes(store, rows)
    buckets = run.assignment().select([0]).buckets(classes)[0]
    expected = np.bincount(buckets, np.repeat(weights_N, counts), 32) / weights_N.sum()
    np.testing.assert_allclose(told[-1], np.minimum(expected, 1.0), rtol=0.01)


def test_new_classes_are_spread_over_the_buckets_of_a_table(old: Run, tuned: Run):
    before, after = old.assignment(), tuned.assignment()
    assert isinstance(after, TableAssignment)
    np.testing.assert_array_equal(after.buckets(range(N_OLD)), before.buckets(range(N_OLD)))
    assert after.n_classes == N_ALL
    loads = np.bincount(after.buckets(range(N_OLD, N_ALL))[0], minlength=32)
    assert loads.max() <= 3


def test_a_run_below_a_url_starts_another_that_starts_a_third(config: Config, old: Run, folder: Path, tmp_path: Path):
    """The third run replays the rows of both, though the data of the second lie nowhere but in the cache."""
    url = f"memory://{tmp_path.name}"
    prepare(config.data, config.text, config.data.train, place(f"{url}/new"))
    started = with_keys(config, data={"train": f"{url}/new"}, training={"epochs": 1})
    second, store = set_up(started, f"{url}/second")
    assert fetch_store(shared_store(second, store)).n_rows == 3000  # not the new rows alone
    train_shard(ShardJob(str(second.path), shared_store(second, store), tuple(range(R))))
    lines = rows_of(range(5), 64, seed=9)
    third_config = parse_config(
        {"data": {"train": write(tmp_path / "third.txt", lines, N_ALL)}, "training": {"start": str(second.path)}}, "t"
    )
    third, store = set_up(third_config, tmp_path / "third")
    assert (store.n_old_rows, [part.n_rows for part in store.old_parts]) == (3000, [2400, 600])
    assert third.config.training.rate == second.config.training.rate  # not two thirds of two thirds
    train_shard(ShardJob(str(third.path), str(store.path), tuple(range(R))))
    assert precision(third, folder, "old") > 0.9
    assert training_store(third).path == store.path


def test_the_re_ranker_is_trained_on_old_and_new_rows(config: Config, folder: Path, tmp_path: Path):
    run = learn(with_keys(config, reranking={"candidates": 20}), tmp_path / "run")
    train_reranker(run, training_store(run), Crew(LaunchConfig()))
    model = load(run.path)
    assert model.reranker is not None
    assert min(precision(run, folder, part) for part in ("old", "new")) > 0.96


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"network": {"hidden": [16]}}, ["network.hidden: [16] here, [32] there"]),
        ({"hashing": {"buckets": 64}}, ["hashing.buckets: 64 here"]),
        ({"training": {"loss": "softmax"}}, ["training.loss: 'softmax' here, 'binary' there"]),
        ({"text": {"n_features": 10}}, ["text.n_features"]),
        (
            {"training": {"replay": 0.0}, "reranking": {"candidates": 5}},
            ["training.replay = 0", "reranking.candidates"],
        ),
    ],
)
def test_what_the_weights_do_not_fit_is_refused(config: Config, tmp_path: Path, sections: dict, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        set_up(with_keys(config, **sections), tmp_path / "run")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit_are_refused(config: Config, old_config: Config, folder: Path, tmp_path: Path):
    (tmp_path / "wide.txt").write_text("1 500 120\n0 499:1\n")
    np.save(tmp_path / "dense.npy", np.ones((2, N_FEATURES)))
    np.save(tmp_path / "dense.classes.npy", np.array([0, 1]))
    for name, complaint in (("wide.txt", "D = 500"), ("dense.npy", "dense features")):
        with pytest.raises(DataError, match=complaint):
            set_up(with_keys(config, data={"train": str(tmp_path / name)}), tmp_path / "run")
    unfinished, _ = set_up(old_config, tmp_path / "unfinished")
    with pytest.raises(IncompleteRunError, match="has finished 0 of 3 repetitions"):
        set_up(with_keys(config, training={"start": str(unfinished.path)}), tmp_path / "run")
    with pytest.raises(ConfigError, match="needs training.start"):
        parse_config({"data": {"train": "x"}, "training": {"replay": 1.0}}, "test")


def test_old_data_that_are_gone_are_named(old_config: Config, config: Config, folder: Path, tmp_path: Path):
    rows, cache = tmp_path / "rows.txt", {"cache": str(tmp_path / "cache")}
    shutil.copy(folder / "old.txt", rows)
    run = learn(with_keys(old_config, data={"train": str(rows), **cache}, training={"epochs": 1}), tmp_path / "first")
    rows.unlink()
    started = with_keys(config, data=cache, training={"start": str(run.path)})
    assert set_up(started, tmp_path / "second")[1].n_old_rows == 2400  # the cache still has them
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"cannot be replayed \(.*rows.txt.*training.replay=0"):
        set_up(started, tmp_path / "third")
    run, store = set_up(with_keys(started, training={"replay": 0.0}), tmp_path / "third")
    assert (store.n_rows, store.n_old_rows, run.manifest.n_rows) == (600, 0, 3000)
    assert run.class_counts_K()[:N_OLD].sum() == Run.open(tmp_path / "first").class_counts_K().sum()


def test_a_damaged_store_in_the_cache_is_passed_over(tmp_path: Path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/meta.json").write_text('{"fingerprint": "wanted"}')
    assert find("wanted", str(tmp_path)) is None


def test_the_vocabulary_of_classes_grows_and_that_of_words_stays(old_config: Config, tmp_path: Path):
    def save(name: str, texts: list[tuple[str, list[str]]]) -> str:
        rows = [json.dumps({"text": text, "classes": classes}) for text, classes in texts]
        (tmp_path / name).write_text("\n".join(rows) + "\n")
        return str(tmp_path / name)

    first = save("first.jsonl", [("red apple", ["fruit", "red"]), ("blue car", ["car"])] * 20)
    second = save("second.jsonl", [("red pear", ["pear", "fruit"]), ("green car", ["green", "car"])] * 20)
    sections: dict = {"data": {"train": first, "cache": str(tmp_path / "cache")}, "hashing": {"buckets": 3}}
    old = learn(with_keys(old_config, **sections, training={"epochs": 1}), tmp_path / "old")
    started = parse_config({"data": {"train": second}, "training": {"start": str(old.path)}}, "test")
    run, store = set_up(started, tmp_path / "run")
    assert list(run.class_names or []) == list(store.class_names or []) == ["fruit", "red", "car", "pear", "green"]
    assert store.class_ids[-4:].tolist() == [0, 3, 2, 4]
    assert run.text_features is not None
    assert old.text_features is not None
    assert run.text_features.fingerprint() == old.text_features.fingerprint()
    assert store.features(40, 42).toarray().astype(bool).sum(1).tolist() == [1, 1]  # "red" and "car": no new words
    # an order of its own is renumbered by names
    other = prepare(run.config.data, run.config.text, second)
    joined = join(Store.open(other.path), None, old.reference(), cache=str(tmp_path / "cache"))
    assert (list(joined.class_names or []), joined.class_ids[:4].tolist()) == (
        ["fruit", "red", "car", "pear", "green"],
        [0, 3, 2, 4],
    )


def test_classes_added_and_removed_after_training_stay_so(
    config: Config, old: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(str(old.path), tmp_path / "old")
    with load(tmp_path / "old") as model:
        rows = np.zeros((3, N_FEATURES), np.float32)
        rows[:, 396:] = 0.5
        added = model.classes.add(["added"], [rows])
        model.classes.remove([7])
    assert added.tolist() == [N_OLD]
    buckets = Versions(Run.open(tmp_path / "old")).load().buckets(range(R), 32)  # where the networks expect it
    lines = rows_of(range(N_OLD + 1, N_ALL), 64, seed=5)
    new = {"train": write(tmp_path / "new.txt", lines, N_ALL)}
    started = with_keys(config, data=new, training={"start": str(tmp_path / "old"), "epochs": 1})

    def stop(self: Origin, run: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Origin, "keep_removed", stop)
        with pytest.raises(KeyboardInterrupt):
            set_up(started, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # rather than a run that does not know what was removed
    told = io.StringIO()
    mach.train(started, tmp_path / "run", launcher="here", repetitions=[0], console=Console(file=told, width=400))
    left = f"3 examples, texts and upvotes that {tmp_path / 'old'} was taught after its training are no rows"
    assert left in told.getvalue()
    run, store = set_up(started, tmp_path / "run")
    with load(tmp_path / "old") as model:
        model.classes.remove([8])
    assert set_up(started, tmp_path / "run")[1].path == store.path  # what is done to the other run later is its own
    np.testing.assert_array_equal(run.assignment().buckets(added), buckets)
    assert run.class_counts_K()[N_OLD] == 3
    assert 7 not in store.class_ids
    train_shard(ShardJob(str(run.path), str(store.path), tuple(range(R))))
    asked = np.zeros(N_FEATURES, np.float32)
    asked[21:24] = 0.5  # what class 7 owns
    with load(run.path) as model:
        assert 7 not in model.topk(asked, k=50)[0]
    data = {"train": write(tmp_path / "seven.txt", ["7 21:1"], N_ALL)}
    with pytest.raises(DataError, match="has rows of class 7, which was removed"):
        set_up(with_keys(started, data=data), tmp_path / "third")
