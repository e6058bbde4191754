"""A trained model end to end: accuracy on planted data, queries of every kind, subsets of repetitions."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array, csr_matrix

from mach.config import Config
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import ConfigError, DataError, DegradedWarning, IncompleteRunError, StorageError
from mach.files.tensors import map_tensors
from mach.model.accuracy import evaluate
from mach.model.loading import load
from mach.model.model import MachModel
from mach.runs.run import Run
from mach.sketch.decoder import topk_oracle
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard
from tests.conftest import N_CLASSES, N_FEATURES


def sparse_row(indices: list[int], values: list[float]) -> csr_matrix:
    """One row that is not looked at: scipy's own constructor refuses indices out of range."""
    row = csr_matrix((1, N_FEATURES))
    row.indices, row.data = np.array(indices, np.int32), np.array(values)
    row.indptr = np.array([0, len(indices)], np.int32)
    return row


@pytest.fixture(scope="module")
def test_rows(config: Config, trained: Path) -> Store:
    assert config.data.test is not None
    return prepare(config.data, config.text, config.data.test, like=Run.open(trained).reference())


def test_the_planted_classes_are_found(model: MachModel, test_rows: Store):
    """Two classes a row at most, three repetitions of 32 buckets for 120 classes: a broken learner or decoder
    finds about 1 %."""
    curve = evaluate(model, test_rows)
    assert [row["n_repetitions"] for row in curve] == [1, 2, 3]
    assert curve[0]["P@1"] < curve[1]["P@1"]  # one repetition cannot tell a bucket's four classes apart
    assert curve[-1]["P@1"] > 0.93
    assert curve[-1]["recall@3"] > 0.93


def test_answers_are_those_of_the_oracle(model: MachModel, test_rows: Store):
    ids, scores = model.topk(test_rows, k=7)
    expected_ids, expected_scores = topk_oracle(model.bucket_scores(test_rows), model.assignment, 7, model.aggregate)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


def test_every_kind_of_query_gives_the_same_answer(model: MachModel, test_rows: Store):
    rows = test_rows.features(0, 5)
    ids, scores = model.topk(rows)
    assert ids.shape == scores.shape == (5, 10)
    for same in (
        csr_matrix(rows),
        rows.toarray(),
        rows.tocsc(),
        rows.toarray().astype(np.float64),
        rows.toarray().tolist(),
    ):
        other_ids, other_scores = model.topk(same)
        np.testing.assert_array_equal(other_ids, ids)
        np.testing.assert_allclose(other_scores, scores, rtol=1e-5)
    one_ids, one_scores = model.topk(rows.toarray()[2])
    assert one_ids.shape == one_scores.shape == (10,)
    np.testing.assert_array_equal(one_ids, ids[2])


def test_scores_of_given_classes_are_those_of_topk(model: MachModel, test_rows: Store):
    rows = test_rows.features(0, 4)
    ids, scores = model.topk(rows, k=6)
    np.testing.assert_array_equal(model.score(rows, ids), scores)
    np.testing.assert_array_equal(model.score(rows, ids[0]), model.score(rows, np.tile(ids[0], (4, 1))))
    np.testing.assert_array_equal(model.score(rows.toarray()[1], ids[1]), scores[1])
    with pytest.raises(DataError, match=str(N_CLASSES)):
        model.score(rows, [N_CLASSES])


def test_only_allowed_classes_are_returned(model: MachModel, test_rows: Store):
    allowed = np.zeros(N_CLASSES, np.bool_)
    allowed[[3, 50, 77]] = True
    ids, scores = model.topk(test_rows.features(0, 6), k=5, allowed=allowed)
    assert set(ids[:, :3].ravel()) == {3, 50, 77}
    assert (ids[:, 3:] == -1).all()
    assert np.isneginf(scores[:, 3:]).all()


def test_chunks_of_queries_do_not_change_answers(model: MachModel, test_rows: Store, monkeypatch: pytest.MonkeyPatch):
    whole = model.search(test_rows, 5)
    monkeypatch.setattr("mach.runs.ensemble.CHUNK_SCORES", 3 * 32 * 50)  # fifty rows at once
    parts = model.search(test_rows, 5)
    np.testing.assert_array_equal(parts.ids_Nk, whole.ids_Nk)
    assert parts.exact_N.all()
    assert len(parts.bound_N) == test_rows.n_rows


def test_any_subset_of_repetitions_answers(trained: Path, test_rows: Store):
    precision = {}
    for repetitions in ([2], [0, 2], [2, 0], [0, 1, 2]):
        model = load(trained, repetitions=repetitions)
        precision[tuple(repetitions)] = evaluate(model, test_rows, curve=False)[0]["P@1"]
    assert precision[2, 0] == pytest.approx(precision[0, 2], abs=0.01)
    assert precision[2,] < precision[0, 2] <= precision[0, 1, 2] + 0.02


def test_unfinished_repetitions_are_left_out_or_refused(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/repetitions/r001/DONE").unlink()
    with pytest.warns(DegradedWarning, match="2 of 3 repetitions answer"):
        assert load(tmp_path / "run").repetitions == [0, 2]
    with pytest.raises(IncompleteRunError, match=r"repetitions \[1\] are not finished, \[0, 2\] are"):
        load(tmp_path / "run", repetitions=[0, 1])


def test_weights_of_another_repetition_or_shape_are_refused(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    files = [Run.open(tmp_path / "run").repetition(r) for r in range(3)]
    shutil.copy(files[1].weights_file(), files[0].weights_file())
    with pytest.raises(StorageError, match="r000/weights.safetensors holds repetition 1"):
        load(tmp_path / "run")
    good = map_tensors(files[1].weights_file())[0]
    for name, array in good.items():
        files[0].save(files[0].weights, {**good, name: array[:-1]}, {"repetition": "0"})
        with pytest.raises(StorageError, match=f"{name} is "):
            load(tmp_path / "run")
        files[0].save(files[0].weights, {n: a for n, a in good.items() if n != name}, {"repetition": "0"})
        with pytest.raises(StorageError, match=f"{name} is missing"):
            load(tmp_path / "run")
    files[0].save(files[0].weights, good, {"repetition": "0"})
    model = load(tmp_path / "run")  # right in shape: only the digest tells
    with pytest.raises(StorageError, match="digest"):
        model.verify()
    load(trained).verify()


def test_names_follow_the_shape_of_ids(model: MachModel):
    with pytest.raises(DataError, match="class 120 is none of the 120 classes"):
        model.names([3, 120])
    assert model.names([[7]]) == [["class number 7"]]
    assert model.names([7, -1]) == ["class number 7", None]
    assert model.names(np.array([[1, 2], [3, 4]]))[1] == ["class number 3", "class number 4"]


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ("text", "trained on numbers, not on text"),
        (["text"], "trained on numbers, not on text"),
        (np.zeros((2, N_FEATURES + 1)), f"shape (2, {N_FEATURES + 1}), the model takes (N, {N_FEATURES})"),
        (np.zeros((2, 3)), "the model takes"),
        (np.full((1, N_FEATURES), np.nan), "NaN or infinity"),
        (csr_array(np.full((1, N_FEATURES), np.inf, np.float32)), "NaN or infinity"),
        (np.full((1, N_FEATURES), 1e300), "values that float32 does not"),
        (sparse_row([N_FEATURES + 5], [1.0]), f"features {N_FEATURES + 5} to {N_FEATURES + 5}"),
        (sparse_row([-5], [1.0]), "features -5 to -5"),
        ([[1.0], [1.0, 2.0]], "neither texts nor rows"),
        (np.zeros((0, N_FEATURES)), "no queries"),
    ],
)
def test_queries_that_do_not_fit_are_refused(model: MachModel, queries, words: str):
    with pytest.raises(DataError) as caught:
        model.topk(queries)
    assert words in str(caught.value)


def test_values_of_a_feature_that_is_named_twice_add_up(model: MachModel):
    twice = sparse_row([7, 7, 12], [0.25, 0.25, 0.5])
    np.testing.assert_array_equal(
        model.search(twice).scores_Nk, model.search(sparse_row([7, 12], [0.5, 0.5])).scores_Nk
    )
    assert twice.nnz == 3, "the caller's row is as it was"


def test_scores_of_no_class_are_none_and_names_are_no_ids(model: MachModel, test_rows: Store):
    assert model.score(test_rows.features(0, 2), []).shape == (2, 0)
    with pytest.raises(DataError, match="need integers"):
        model.score(test_rows.features(0, 1), ["class number 3"])


def test_k_below_one_is_refused(model: MachModel, test_rows: Store):
    with pytest.raises(ConfigError, match="k"):
        model.topk(test_rows, k=0)


def test_info_tells_the_cost_and_the_silence(model: MachModel):
    info = model.info()
    assert (info["n_classes"], info["n_buckets"], info["n_repetitions"]) == (N_CLASSES, 32, 3)
    assert info["effort"] == "best"
    assert info["peer_bytes"] == 0
    # bfloat16 matrices, float32 biases, a header
    assert 0 < info["weight_bytes"] - 3 * (2 * (N_FEATURES * 32 + 32 * 32) + 4 * 64) < 3 * 600


def train_text_model(config: Config, folder: Path, path: str | Path) -> None:
    words = ["red", "green", "blue", "round", "square", "heavy", "light", "old", "new", "wooden"]
    generator = np.random.default_rng(0)
    rows = ["text,classes"]
    for _ in range(600):
        chosen = generator.choice(10, 2, replace=False)
        rows.append(f"a {words[chosen[0]]} and {words[chosen[1]]} thing,{words[chosen[0]]}|{words[chosen[1]]}")
    (folder / "train.csv").write_text("\n".join(rows) + "\n")
    changed = {
        "data": config.data.model_copy(
            update={"train": str(folder / "train.csv"), "classes": None, "class_separator": "|"}
        ),
        "hashing": config.hashing.model_copy(update={"repetitions": 2, "buckets": 6}),
    }
    run, store = set_up(config.model_copy(update=changed), path)
    train_shard(ShardJob(str(run.path), str(store.path), (0, 1)))


def test_text_in_names_out_from_the_run_folder_alone(config: Config, tmp_path: Path):
    train_text_model(config, tmp_path, tmp_path / "run")
    (tmp_path / "train.csv").unlink()
    model = load((tmp_path / "run").rename(tmp_path / "moved"))
    ids, _ = model.topk("something old, and BLUE", k=2)
    assert sorted(model.names(ids)) == ["blue", "old"]
    many, _ = model.topk(["old blue", "round heavy"], k=2)
    assert sorted(model.names(many[1])) == ["heavy", "round"]
    empty_ids, _ = model.topk("", k=2)  # no known word: the prior answers
    assert (empty_ids >= 0).all()


def test_dense_rows_train_and_answer(config: Config, tmp_path: Path):
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((20, 12), dtype=np.float32)
    classes = generator.integers(0, 20, 1500)
    rows = centres[classes] + 0.1 * generator.standard_normal((1500, 12), dtype=np.float32)
    np.save(tmp_path / "train.npy", rows)
    np.save(tmp_path / "train.classes.npy", classes)
    changed = {
        "data": config.data.model_copy(update={"train": str(tmp_path / "train.npy"), "classes": None}),
        "hashing": config.hashing.model_copy(update={"repetitions": 3, "buckets": 8}),
    }
    run, store = set_up(config.model_copy(update=changed), tmp_path / "run")
    assert run.manifest.loss == "softmax"  # every row has exactly one class
    train_shard(ShardJob(str(run.path), str(store.path), (0, 1, 2)))
    ids, _ = load(run.path).topk(centres, k=1)
    assert (ids[:, 0] == np.arange(20)).mean() >= 0.95


def test_loading_imports_neither_torch_nor_sklearn(trained: Path):
    import subprocess
    import sys

    code = f"import sys, mach; mach.load({str(trained)!r}).topk([0.0] * {N_FEATURES}); "
    code += "print(sorted({'torch', 'sklearn', 'ray', 'pandas', 'pyarrow', 'mach.training.launch'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
