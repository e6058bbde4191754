"""MACHClassifier: scikit-learn's own checks first, then what they do not ask."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sklearn
from scipy.sparse import csr_array, csr_matrix

pytest.importorskip("sklearn")

import torch
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MultiLabelBinarizer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import mach
from mach import MACHClassifier, MachError
from mach.data.limits import LEAST_IDS
from mach.errors import OmissionWarning
from mach.estimator.engine import Engine
from mach.estimator.rows import Rows
from mach.estimator.scoring import precision_at, psp_at
from mach.estimator.targets import Targets, ids_of
from mach.estimator.weights import weighted
from mach.sketch.metrics import evaluate, propensities
from tests.conftest import N_CLASSES, N_FEATURES, planted_rows

SMALL: dict[str, Any] = {"hidden": 16, "epochs": 12, "batch": 16, "rate": 0.02, "random_state": 0}
HASHED: dict[str, Any] = SMALL | {"hidden": 32, "buckets": 32, "repetitions": 3, "epochs": 8, "batch": 64}
FRUITS = {"apple": "sour green apple", "banana": "long yellow banana", "cherry": "small red cherry"}


SHUFFLED = "it shuffles the weighted rows, and the order of rows decides which are learned together"
EXCUSED = {f"check_sample_weight_equivalence_on_{kind}_data": SHUFFLED for kind in ("dense", "sparse")}


@parametrize_with_checks([MACHClassifier(**SMALL)], expected_failed_checks=lambda estimator: EXCUSED)
def test_scikit_learn(estimator, check):
    check(estimator)


def planted_matrix(n_rows: int, seed: int) -> tuple[csr_matrix, list[list[int]]]:
    """The rows of `planted_rows`: features, and the one or two classes that they tell."""
    lines = [line.split(" ", 1) for line in planted_rows(n_rows, seed)]
    X = np.zeros((n_rows, N_FEATURES), np.float32)
    for n, (_, pairs) in enumerate(lines):
        for pair in pairs.split():
            feature, value = pair.split(":")
            X[n, int(feature)] = float(value)
    return csr_matrix(X), [[int(k) for k in classes.split(",")] for classes, _ in lines]


def indicator_of(classes: list[list[int]]) -> np.ndarray:
    Y = np.zeros((len(classes), N_CLASSES), np.int64)
    for n, ks in enumerate(classes):
        Y[n, ks] = 1
    return Y


@pytest.fixture(scope="module")
def planted_many() -> tuple[csr_matrix, list[list[int]], csr_matrix, list[list[int]]]:
    return *planted_matrix(2000, seed=1), *planted_matrix(200, seed=2)


@pytest.fixture(scope="module")
def hashed(planted_many) -> MACHClassifier:
    """120 classes in 32 buckets, three times."""
    X, y, _, _ = planted_many
    return MACHClassifier(**HASHED, candidates=0).fit(X, indicator_of(y))


def test_an_effort_is_that_of_the_run_and_arguments_win(planted_many):
    X, y, _, _ = planted_many
    config = MACHClassifier(**HASHED, effort="fast", candidates=0).fit(X[:200], indicator_of(y[:200])).model_.run.config
    assert (config.training.effort, config.hashing.repetitions, config.training.epochs) == ("fast", 3, 8)


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    X, y = make_blobs(300, centers=[[-3, 0], [3, 0], [0, 4], [0, -4]], random_state=0)
    return X, y


@pytest.fixture(scope="module")
def fitted(blobs) -> MACHClassifier:
    return MACHClassifier(**SMALL).fit(*blobs)


def weight_files(classifier: MACHClassifier) -> list[bytes]:
    run = classifier.model_.run
    return [run.repetition(r).weights.read_bytes() for r in run.finished()]


def test_planted_classes_of_sparse_rows_are_found(hashed, planted_many):
    _, _, X, y = planted_many
    Y = indicator_of(y)
    assert hashed.model_.n_buckets == 32
    assert hashed.score(X, Y) > 0.8
    predicted = hashed.predict(X)
    assert predicted.shape == Y.shape
    assert (predicted == Y).mean() > 0.99
    probs = hashed.predict_proba(X)
    assert np.array_equal(probs >= 0.5, predicted == 1)
    assert np.array_equal(hashed.decision_function(X) >= 0, predicted == 1)


def test_topk_is_the_best_of_all_probabilities(hashed, planted_many):
    _, _, X, _ = planted_many
    classes, probs = hashed.predict_topk(X, k=5)
    all_probs = hashed.predict_proba(X)
    assert np.allclose(np.sort(all_probs)[:, ::-1][:, :5], probs, rtol=1e-5)
    assert np.allclose(np.take_along_axis(all_probs, classes, axis=1), probs, rtol=1e-5)
    assert hashed.predict_topk(X[:3], k=10**6)[0].shape == (3, N_CLASSES)


def test_an_indicator_comes_back_as_it_was_given(planted_many):
    X, y, queries, _ = planted_many
    Y = csr_array(indicator_of(y[:300]).astype(np.uint8))
    classifier = MACHClassifier(**SMALL).fit(X[:300], Y)
    predicted = classifier.predict(queries)
    assert isinstance(predicted, csr_array)
    assert (predicted.dtype, predicted.shape) == (np.uint8, (200, N_CLASSES))
    dense = clone(classifier).fit(X[:300], Y.toarray()).predict(queries)
    assert np.array_equal(predicted.toarray(), dense)


def test_lists_of_hashable_classes(planted_many):
    X, y, queries, truth = planted_many
    named = [[("class", k) if k % 2 else f"c{k}" for k in ks] for ks in y]
    classifier = MACHClassifier(**SMALL | {"hidden": 64, "epochs": 15, "batch": 64}).fit(X, named)
    predicted = classifier.predict(queries)
    assert isinstance(predicted, list)
    wanted = [{("class", k) if k % 2 else f"c{k}" for k in ks} for ks in truth]
    right = np.mean([set(found) == want for found, want in zip(predicted, wanted, strict=True)])
    assert right > 0.8
    assert classifier.score(queries, [list(want) for want in wanted]) == right
    first = list(dict.fromkeys(value for row in named for value in row))
    assert classifier.classes_.tolist() == first  # strings and tuples cannot be sorted


@pytest.mark.parametrize("kind", [np.asarray, csr_array, lambda X: [str(n) for n in X[:, 0]]])
def test_a_row_of_many_classes_does_not_make_others_dear(monkeypatch, kind):
    """Of 20 rows two have 100 of 900 classes: nobody scores 900 classes of all rows."""
    probs_NK = np.where(np.random.default_rng(0).random((20, 900)) < 0.003, 0.9, 0.1)
    probs_NK[[4, 11], :100] = 0.8
    asked = []

    def topk(self, features, k):
        rows = np.array(features, int) if isinstance(features, list) else features.sum(axis=1)
        asked.append(len(rows) * k)
        ids_nk = np.argsort(-probs_NK[rows], axis=1, kind="stable")[:, :k]
        return ids_nk, np.take_along_axis(probs_NK[rows], ids_nk, axis=1)

    monkeypatch.setattr(Engine, "topk", topk)
    found_NK = Engine(Path(), 900).likely(kind(np.arange(20)[:, None]))
    np.testing.assert_array_equal(found_NK.toarray() == 1, probs_NK >= 0.5)
    assert found_NK.has_sorted_indices
    assert sum(asked) <= 20 * 16 + 2 * (64 + 256)


def test_classes_are_ascending_and_of_their_own_type(blobs):
    X, y = blobs
    for classes in (np.array(["d", "b", "c", "a"]), np.array([7, 3, 5, 1]), [("d",), ("b",), ("c",), ("a",)]):
        values = [classes[k] for k in y]
        classifier = MACHClassifier(**SMALL).fit(X, values)
        assert classifier.classes_.tolist() == sorted(set(values))
        assert classifier.score(X, values) > 0.9
        assert classifier.predict(X[:3]).dtype == classifier.classes_.dtype


def test_probabilities_decisions_and_predictions_agree(fitted, blobs):
    X, _ = blobs
    probs, logits = fitted.predict_proba(X), fitted.decision_function(X)
    assert np.allclose(probs.sum(1), 1, atol=1e-5)
    assert np.array_equal(probs.argmax(1), logits.argmax(1))
    assert np.array_equal(fitted.classes_[probs.argmax(1)], fitted.predict(X))
    classes, best = fitted.predict_topk(X, k=2)
    assert np.array_equal(classes[:, 0], fitted.predict(X))
    assert np.array_equal(best, np.sort(probs)[:, ::-1][:, :2])


def test_a_row_is_answered_alike_alone_and_among_others(fitted, blobs):
    X, _ = blobs
    alone = np.concatenate([fitted.decision_function(row[None]) for row in X[:70]])
    assert np.array_equal(alone, fitted.decision_function(X[:70]))


def test_reranked_probabilities_order_classes_as_predictions_do(planted_many):
    X, y, queries, truth = planted_many
    first = [ks[0] for ks in y]
    classifier = MACHClassifier(**HASHED, candidates=20).fit(X, first)
    assert classifier.model_.reranker is not None
    logits = classifier.decision_function(queries)
    assert np.array_equal(classifier.classes_[logits.argmax(1)], classifier.predict(queries))
    classes, _ = classifier.predict_topk(queries, k=20)
    best = np.take_along_axis(logits, np.searchsorted(classifier.classes_, classes), axis=1)
    assert (np.diff(best) <= 0).all()
    assert classifier.score(queries, [ks[0] for ks in truth]) > 0.4  # one of two on many rows


def test_held_out_rows_cool_overconfident_probabilities():
    """A third of the classes are drawn at random: no network can be as sure as one that learned them by heart."""
    generator = np.random.default_rng(0)
    X = generator.standard_normal((2600, 16)).astype(np.float32)
    y = (X[:, 0] > 0) * 2 + (X[:, 1] > 0)
    wrong = generator.random(len(y)) < 0.33
    y[wrong] = generator.integers(0, 4, wrong.sum())
    classifier = MACHClassifier(
        hidden=64, epochs=30, batch=32, rate=0.01, dropout=0.0, random_state=0, config={"data.validation_fraction": 0.3}
    )
    classifier.fit(X[:600], y[:600])
    assert classifier._engine.temperature > 1.2

    def loss() -> float:
        return float(-np.mean(np.log(classifier.predict_proba(X[600:])[np.arange(2000), y[600:]])))

    cooled = loss()
    classifier._engine.temperature = 1.0
    assert cooled < loss() - 0.02


def test_a_large_matrix_is_refused_and_topk_named(fitted, blobs):
    X, _ = blobs
    limited = clone(fitted).set_params(max_proba_bytes=4 * 4 * 10).fit(*blobs)
    assert limited.predict_proba(X[:10]).shape == (10, 4)
    for method in (limited.predict_proba, limited.decision_function):
        with pytest.raises(MachError, match=r"11 rows and 4 classes takes 176 bytes.*160.*predict_topk"):
            method(X[:11])
    assert limited.predict_topk(X[:11], k=1)[0].shape == (11, 1)


def texts_of(n: int, *more: tuple[str, str]) -> tuple[list[str], list[str]]:
    rows = [*FRUITS.items(), *more] * n
    return [text for _, text in rows], [name for name, _ in rows]


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda texts: np.array(texts, object)])
def test_texts_of_any_column_type(kind):
    texts, names = texts_of(10)
    classifier = MACHClassifier(**SMALL).fit(kind(texts), names)
    assert classifier.predict(kind(["a green apple", "cherry"])).tolist() == ["apple", "cherry"]
    assert not hasattr(classifier, "n_features_in_")
    with pytest.raises(MachError, match="X holds numbers, the classifier was fitted to texts"):
        classifier.predict(np.zeros((1, 3)))
    with pytest.raises(MachError, match="give a list of texts"):
        classifier.predict("apple")


def test_a_text_that_is_missing_is_named():
    with pytest.raises(MachError, match="X, row 1 is None, no text"):
        MACHClassifier(**SMALL).fit(["one", None, "two"], [0, 1, 0])


def test_pipeline_and_grid_search(blobs):
    X, y = blobs
    search = GridSearchCV(
        make_pipeline(StandardScaler(), MACHClassifier(**SMALL)),
        {"machclassifier__hidden": [(), 16], "machclassifier__epochs": np.array([1, 8])},
        cv=2,
        error_score="raise",
    )
    search.fit(X, y)
    assert search.score(X, y) > 0.9
    assert search.best_params_["machclassifier__epochs"] == 8
    texts, names = texts_of(8)
    words = make_pipeline(TfidfVectorizer(), MACHClassifier(**SMALL)).fit(texts, names)
    assert words.score(texts, names) == 1.0


def test_grid_search_over_lists_of_classes(planted_many):
    X, y, _, _ = planted_many
    search = GridSearchCV(MACHClassifier(**HASHED), {"epochs": [1, 6]}, cv=KFold(2), error_score="raise")
    assert search.fit(X[:800], y[:800]).best_params_ == {"epochs": 6}


def test_pickles_answer_alike_and_clean_up_after_themselves(fitted, blobs):
    X, _ = blobs
    copy = pickle.loads(pickle.dumps(fitted))
    folder = copy.model_.run.path.parent
    assert folder != fitted.model_.run.path.parent
    assert np.array_equal(copy.predict_proba(X), fitted.predict_proba(X))
    assert np.array_equal(pickle.loads(pickle.dumps(copy)).predict_proba(X), fitted.predict_proba(X))
    assert folder.is_dir()
    del copy
    assert not folder.exists()
    assert not hasattr(clone(fitted), "classes_")


def test_a_fork_leaves_the_folder_to_its_parent(blobs):
    classifier = MACHClassifier(**SMALL).fit(*blobs)
    folder = classifier.model_.run.path
    child = os.fork()
    if child == 0:
        del classifier
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()


def test_saved_and_loaded(fitted, blobs, tmp_path: Path):
    X, y = blobs
    path = tmp_path / "saved"
    fitted.save(path)
    loaded = MACHClassifier.load(path)
    assert loaded.get_params() == fitted.get_params()
    assert loaded.n_features_in_ == 2
    assert np.array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    assert loaded.classes_.dtype == fitted.classes_.dtype
    model = mach.load(path)  # the folder is a run as well
    assert model.names(model.topk(X[:1], k=1)[0]) == [[str(fitted.predict(X[:1])[0])]]
    del loaded
    assert path.is_dir()
    with pytest.raises(MachError, match="exists already"):
        fitted.save(path)
    more = MACHClassifier.load(path).partial_fit(X, np.where(y == 0, 9, y))
    assert more.classes_.tolist() == [0, 1, 2, 3, 9]


@pytest.mark.parametrize("content", ["{", '{"format": 2}', '{"format": 1}', "[]"])
def test_a_damaged_save_is_one_line(fitted, tmp_path: Path, content: str):
    fitted.save(tmp_path / "saved")
    (tmp_path / "saved" / "classifier.json").write_text(content)
    with pytest.raises(MachError, match=r"\A[^\n]+\Z"):
        MACHClassifier.load(tmp_path / "saved")
    with pytest.raises(MachError, match="no saved classifier"):
        MACHClassifier.load(tmp_path / "none")


TIMES = list(np.array(["2026-01-02", "2025-01-01"], "datetime64[ns]"))


@pytest.mark.parametrize(
    "classes", [[("a", 1), ("b", 2)], [True, False], [3.0, 5.0], [b"x", b"y"], [(None,), "none"], TIMES]
)
def test_class_values_survive_saving(blobs, tmp_path: Path, classes: list[Any]):
    X, y = blobs
    values = [classes[k % 2] for k in y]
    classifier = MACHClassifier(**SMALL | {"epochs": 1}).fit(X, values)
    classifier.save(tmp_path / "saved")
    loaded = MACHClassifier.load(tmp_path / "saved")
    assert loaded.classes_.tolist() == classifier.classes_.tolist()
    assert loaded.predict(X).tolist() == classifier.predict(X).tolist()


def test_classes_that_json_cannot_hold_are_refused(blobs, tmp_path: Path):
    X, y = blobs
    kinds = [int, str, list, dict]
    classifier = MACHClassifier(**SMALL | {"epochs": 1}).fit(X, [kinds[k] for k in y])
    assert set(classifier.predict(X)) <= set(kinds)
    with pytest.raises(MachError, match="is a type, which cannot be saved"):
        classifier.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (np.asarray, {}),
        (np.asarray, {"hidden": ()}),
        (csr_matrix, {"heads": 2, "repetitions": 2}),
        (csr_matrix, {"hidden": (), "config": {"network.weights": "int4"}}),  # its outputs are packed
    ],
)
def test_new_classes_join_and_old_ones_stay(blobs, kind, options: dict[str, Any]):
    X, y = blobs
    X = kind(X)
    old = np.flatnonzero(y != 1)
    classifier = MACHClassifier(**SMALL | options).partial_fit(X[old[:150]], y[old[:150]])
    assert classifier.classes_.tolist() == [0, 2, 3]
    before = classifier.predict_proba(X[old])
    for _ in range(2):
        classifier.partial_fit(X[200:], y[200:])
    assert classifier.classes_.tolist() == [0, 2, 3, 1]
    assert classifier.score(X, y) > 0.9
    assert classifier.predict_proba(X).shape == (300, 4)
    assert np.mean(before.argmax(1) == classifier.predict_proba(X[old])[:, :3].argmax(1)) > 0.95


def test_hashed_classes_join_existing_buckets(planted_many):
    X, y, _, _ = planted_many
    first = np.array([ks[0] for ks in y])
    is_old = first < 100
    classifier = MACHClassifier(**HASHED | {"epochs": 12, "buckets": 64}, candidates=20)
    classifier.fit(X[is_old], first[is_old])
    assert classifier.model_.reranker is not None
    n_old = len(classifier.classes_)
    classifier.partial_fit(X[~is_old], first[~is_old], classes=[500])
    assert classifier.model_.n_buckets == 64
    assert classifier.classes_[n_old:].tolist() == [*np.unique(first[~is_old]), 500]
    assert classifier.model_.n_classes == len(classifier.classes_)
    found = classifier.predict(X[~is_old])
    assert np.mean(found == first[~is_old]) > 0.5
    assert np.mean(classifier.predict(X[is_old]) == first[is_old]) > 0.5


def test_one_class_first_and_others_later(blobs):
    X, y = blobs
    classifier = MACHClassifier(**SMALL).partial_fit(X[y == 0], ["zero"] * int((y == 0).sum()))
    assert set(classifier.predict(X)) == {"zero"}
    assert np.array_equal(classifier.predict_proba(X), np.ones((300, 1)))
    classifier.partial_fit(X[y == 1], ["one, a longer name"] * int((y == 1).sum()))
    assert classifier.classes_.tolist() == ["zero", "one, a longer name"]
    assert classifier.decision_function(X).shape == (300,)
    assert np.mean((classifier.decision_function(X) > 0)[y == 1]) > 0.9


def test_texts_and_lists_learn_on():
    texts, names = texts_of(10)
    classifier = MACHClassifier(**SMALL).partial_fit(texts, [[name, "fruit"] for name in names])
    more, _ = texts_of(10, ("leek", "long green leek"))
    classifier.partial_fit(more, [[text.split()[-1]] + ["fruit"] * ("leek" not in text) for text in more])
    assert classifier.classes_.tolist() == ["apple", "banana", "cherry", "fruit", "leek"]
    assert classifier.predict_topk(["long green leek"], k=1)[0].tolist() == [["leek"]]  # a word that was new


def test_kept_rows_are_bounded_and_none_are_needed(blobs):
    X, y = blobs

    def n_kept(classifier: MACHClassifier) -> int:
        assert classifier._engine.reservoir is not None
        return len(classifier._engine.reservoir.rows)

    classifier = MACHClassifier(**SMALL, kept_rows=40).fit(X[:100], y[:100])
    assert n_kept(classifier) == 40
    classifier.partial_fit(X[100:], y[100:])
    assert n_kept(classifier) == 40
    assert classifier.score(X, y) > 0.9
    none = clone(classifier).set_params(kept_rows=0).fit(X[:100], y[:100]).partial_fit(X[100:], y[100:])
    assert n_kept(none) == 0
    assert none.score(X, y) > 0.9


@pytest.mark.parametrize(("first", "later"), [(np.asarray, csr_array), (csr_array, np.asarray)])
def test_rows_may_be_dense_now_and_sparse_then(blobs, first, later):
    X, y = blobs
    classifier = MACHClassifier(**SMALL).fit(first(X[:150]), y[:150])
    assert classifier.partial_fit(later(X[150:]), y[150:]).score(later(X), y) > 0.9


def test_other_kinds_than_before_are_refused(fitted, blobs):
    X, y = blobs
    with pytest.raises(MachError, match="y holds lists, the classifier was fitted to classes"):
        fitted.partial_fit(X, [[k, 7] for k in y])
    with pytest.raises(MachError, match="X holds texts, the classifier was fitted to numbers"):
        fitted.partial_fit(["a"] * 300, y)
    with pytest.raises(ValueError, match="3 features"):
        fitted.partial_fit(np.zeros((300, 3)), y)


def test_processes_train_the_same_bits_in_silence(blobs, capfd):
    one = MACHClassifier(**SMALL | {"epochs": 2}).fit(*blobs)
    other = MACHClassifier(**SMALL | {"epochs": 2}, n_jobs=2).fit(*blobs)
    assert capfd.readouterr() == ("", "")
    assert weight_files(one) == weight_files(other)
    assert weight_files(one) != weight_files(clone(one).set_params(random_state=1).fit(*blobs))


@pytest.mark.slow
def test_a_ray_cluster_trains_the_same_bits(blobs):
    pytest.importorskip("ray")
    options = SMALL | {"epochs": 2, "repetitions": 2}
    here = MACHClassifier(**options).fit(*blobs)
    assert weight_files(MACHClassifier(**options, launcher="ray", n_jobs=1).fit(*blobs)) == weight_files(here)


def test_torch_is_left_as_it_was(blobs):
    torch.manual_seed(5)
    before, n_threads = torch.get_rng_state(), torch.get_num_threads()
    MACHClassifier(**SMALL | {"epochs": 1}).fit(*blobs)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == n_threads


def test_progress_is_silent_unless_asked_for(blobs, capfd):
    for verbose in (0, 1):
        MACHClassifier(**SMALL | {"epochs": 1}, verbose=verbose).fit(*blobs)
        captured = capfd.readouterr()
        assert not captured.out
        assert ("epoch 1/1" in captured.err) == bool(verbose)
        assert bool(captured.err) == bool(verbose)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effort": "more"}, "training.effort = 'more'"),
        ({"config": {"training.epoch": 3}}, "MACHClassifier: unknown key training.epoch"),
        ({"config": {"training.epochs": 3}}, "epochs = 12 and config.*say the same"),
        ({"config": {"data.train": "x"}}, "rows come from X and y"),
        ({"config": {"epochs": 3}}, "write section.key"),
        ({"n_jobs": 0}, "n_jobs = 0"),
        ({"launcher": "slurm"}, "launch.launcher = 'slurm'"),
        ({"epochs": 0}, "training.epochs = 0"),
        ({"device": "cuda:99"}, "device cuda:99 cannot be used"),
    ],
)
def test_a_parameter_that_cannot_work_is_one_line(blobs, options: dict[str, Any], message: str):
    with pytest.raises(MachError, match=message) as caught:
        MACHClassifier(**SMALL | options).fit(*blobs)
    assert "\n" not in str(caught.value)


def test_any_key_of_the_configuration(blobs):
    classifier = MACHClassifier(**SMALL, config={"network.weights": "bfloat16", "decoding.aggregate": "mean"})
    classifier.fit(*blobs)
    assert classifier.model_.run.config.network.weights == "bfloat16"
    assert classifier.model_.aggregate == "mean"
    assert np.allclose(classifier.predict_proba(blobs[0]).sum(1), 1, atol=1e-5)
    assert classifier.score(*blobs) > 0.9


def test_nothing_to_learn_is_said():
    with pytest.raises(MachError, match="no class in them"):
        MACHClassifier(**SMALL).fit(np.zeros((3, 2)), [[], [], []])
    with pytest.raises(MachError, match="holds 2: Unknown label type"):
        MACHClassifier(**SMALL).fit(np.zeros((2, 2)), csr_array([[0, 2], [1, 0]]))


def test_arrow_in_and_out(blobs):
    pa = pytest.importorskip("pyarrow")
    X, y = blobs
    table = pa.table({"left": X[:, 0], "right": X[:, 1]})
    classifier = MACHClassifier(**SMALL).fit(table, pa.array([f"c{k}" for k in y]))
    assert classifier.feature_names_in_.tolist() == ["left", "right"]
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(table.rename_columns(["left", "wrong"]))
    top = classifier.predict_topk(table.slice(0, 3), k=2, as_frame="pyarrow")
    assert top.column_names == ["query", "rank", "class", "probability"]
    assert top["query"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert top["class"].to_pylist()[::2] == classifier.predict(X[:3]).tolist()
    texts, names = texts_of(8)
    words = pa.table({"title": texts, "body": pa.chunked_array([texts])})
    lists = MACHClassifier(**SMALL).fit(words, pa.array([[name] for name in names]))
    assert [found.tolist() for found in lists.predict(words.slice(0, 2))] == [["apple"], ["banana"]]
    with pytest.raises(MachError, match=r"text \('title'\) and of numbers \('n'\)"):
        lists.predict(pa.table({"title": texts, "n": list(range(len(texts)))}))
    with pytest.raises(MachError, match="choose 'pandas' or 'pyarrow'"):
        lists.predict_topk(words, as_frame="csv")  # type: ignore[arg-type]


def test_pandas_in_and_out(blobs):
    pd = pytest.importorskip("pandas")
    X, y = blobs
    index = np.arange(300) + 1000
    frame = pd.DataFrame(X, columns=["left", "right"], index=index)
    series = pd.Series([f"c{k}" for k in y], index=index)
    for classes in (series, series.astype("category"), pd.DataFrame({"class": series})):
        classifier = MACHClassifier(**SMALL).fit(frame, classes)
        assert classifier.score(frame, series) > 0.9
        assert classifier.feature_names_in_.tolist() == ["left", "right"]
    top = classifier.predict_topk(frame, k=2, as_frame="pandas")
    assert list(top.columns) == ["query", "rank", "class", "probability"]
    assert len(top) == 600
    Y = pd.get_dummies(series)
    several = MACHClassifier(**SMALL).fit(frame, Y)
    assert (several.predict(frame) == Y.to_numpy()).mean() > 0.9
    texts, names = texts_of(8)
    words = MACHClassifier(**SMALL).fit(pd.Series(texts, dtype="string"), pd.Series(names))
    assert words.score(pd.DataFrame({"a": texts, "b": texts}), names) == 1.0
    with pytest.raises(MachError, match="row 1 is"):
        words.predict(pd.Series(["one", None]))
    pipeline = make_pipeline(StandardScaler(), MACHClassifier(**SMALL)).set_output(transform="pandas")
    assert pipeline.fit(frame, series)[-1].feature_names_in_.tolist() == ["left", "right"]
    assert pipeline.score(frame, series) > 0.9


def test_polars_in(blobs):
    pl = pytest.importorskip("polars")
    X, y = blobs
    frame = pl.DataFrame({"left": X[:, 0], "right": X[:, 1]})
    assert MACHClassifier(**SMALL).fit(frame, pl.Series(y)).score(frame, y) > 0.9
    texts, names = texts_of(8)
    assert MACHClassifier(**SMALL).fit(pl.Series(texts), names).score(pl.DataFrame({"a": texts}), names) == 1.0


class Stream:
    """As a relation of DuckDB: rows that can be had as a stream of Arrow alone."""

    def __init__(self, **columns: Any) -> None:
        self.table = pa.table(columns)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.to_reader().__arrow_c_stream__(requested_schema)


def test_streams_of_arrow_in(blobs):
    X, y = blobs
    frame = Stream(left=X[:, 0], right=X[:, 1])
    classifier = MACHClassifier(**SMALL).fit(frame, Stream(kind=y))
    assert classifier.score(frame, y) > 0.9
    assert classifier.feature_names_in_.tolist() == ["left", "right"]
    texts, names = texts_of(8)
    several = MACHClassifier(**SMALL).fit(Stream(a=texts, b=texts), Stream(kinds=[[name] for name in names]))
    assert several.predict(Stream(a=texts[:1]))[0].tolist() == [names[0]]


def test_without_scikit_learn_the_repair_is_told_and_the_rest_works():
    code = """
import sys
import mach
assert "sklearn" not in sys.modules and "torch" not in sys.modules
sys.modules["sklearn"] = None
try:
    mach.MACHClassifier
except mach.MachError as error:
    print(error)
mach.load
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"mach.MACHClassifier needs scikit-learn.*: pip install 'mach-classifier\[sklearn\]'\n", done.stdout
    )


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (
            [["a"], ["b"], []],
            [
                "X and y: 10 of 30 rows have no class, such as row 2, row 5, row 8",
                "X and y: 10 of 30 rows have no known feature, such as row 2, row 5, row 8",
            ],
        ),
        (  # rows without a class are left out: those that follow are not the caller's row 5 and row 8 any more
            ["a", None, "b"],
            [
                "y: 10 of 30 rows have no class, such as row 1, row 4, row 7; they are left out",
                "X and y, without the rows left out: 10 of 20 rows have no known feature, such as row 1, row 3, row 5",
            ],
        ),
    ],
)
def test_rows_that_teach_nothing_are_warned_of_by_numbers_that_hold(classes, told):
    with pytest.warns(OmissionWarning) as caught:
        MACHClassifier(random_state=0, epochs=2).fit(["red apple", "green pear", "!"] * 10, classes * 10)
    assert [str(one.message) for one in caught if one.category is OmissionWarning] == told


def test_columns_far_beyond_those_that_occur_are_refused_in_the_words_of_its_users():
    ones, rows = np.ones(8, np.float32), np.arange(8)
    wide, narrow = (csr_array((ones, (rows, rows % 2)), shape=(8, n)) for n in (LEAST_IDS + 1, 4))
    for X, y, name in ((wide, rows % 2, "X"), (narrow, wide.astype(np.int8), "y")):
        with pytest.raises(
            MachError, match=f"^{name} has .* = {LEAST_IDS + 1}, and only 2 .*: leave its empty columns out$"
        ) as caught:
            MACHClassifier().fit(X, y)
        assert "data." not in str(caught.value)


@pytest.mark.parametrize("n_classes", [40, 1100])
def test_rows_without_a_known_feature_get_the_shares_of_the_classes(n_classes: int):
    """Calibrated probabilities only: all is scored for few classes, and the best are searched for many."""
    generator = np.random.default_rng(0)
    texts, classes = [], []
    for n in range(max(n_classes, 400)):
        k = n % n_classes
        texts.append(f"word{k} word{k} other{generator.integers(30)}")
        classes.append(sorted({k, 0} if n % 3 == 0 else {k}))
    settings = {"text.words": [1, 1], "data.validation_fraction": 0.2}
    fitted = MACHClassifier(random_state=0, epochs=3, candidates=0, repetitions=1, buckets=64, config=settings)
    fitted.fit(texts, classes)
    assert fitted.model_.calibration is not None
    shares_K = np.bincount(np.concatenate([np.array(row) for row in classes]), minlength=n_classes) / len(texts)
    asked = ["unheard of", texts[5], ""]
    found, probs = fitted.predict_topk(asked, 3)
    assert found[0].tolist() == found[2].tolist() == np.argsort(-shares_K, kind="stable")[:3].tolist()
    np.testing.assert_allclose(probs[0], np.sort(shares_K)[::-1][:3], rtol=1e-5)
    np.testing.assert_allclose(fitted.predict_proba(asked)[0], shares_K, atol=1e-6)
    alone = fitted.predict_topk(asked[1:2], 3)
    assert (found[1].tolist(), probs[1].tolist()) == (alone[0][0].tolist(), alone[1][0].tolist())
    assert (np.diff(probs, axis=1) <= 0).all()


def test_rows_of_more_weight_are_learned_more(blobs):
    X, y = blobs
    flipped = np.where(np.arange(len(y)) % 2, y, 1 - np.minimum(y, 1))
    heavy = np.where(flipped == y, 5.0, 0.0)
    assert MACHClassifier(**SMALL).fit(X, flipped, sample_weight=heavy).score(X, y) > 0.9
    assert MACHClassifier(**SMALL).fit(X, flipped, sample_weight=1 - np.minimum(heavy, 1)).score(X, y) < 0.6
    with pytest.raises(ValueError, match="at least one non-zero"):
        MACHClassifier(**SMALL).fit(X, y, sample_weight=np.zeros(len(y)))
    with pytest.raises(MachError, match="no row has a weight above 0"):
        MACHClassifier(**SMALL, class_weight=dict.fromkeys(range(4), 0)).fit(X, y)


def test_rows_of_weight_two_are_learned_as_if_they_stood_there_twice(blobs):
    X, y = blobs
    weights = np.arange(len(y)) % 3
    heavy = MACHClassifier(**SMALL).fit(X, y, sample_weight=weights)
    repeated = MACHClassifier(**SMALL).fit(X.repeat(weights, axis=0), y.repeat(weights))
    assert weight_files(heavy) == weight_files(repeated) != weight_files(MACHClassifier(**SMALL).fit(X, y))


def test_weights_that_are_no_whole_numbers_have_their_due():
    rows = Rows(np.arange(4000, dtype=np.float32)[:, None], csr_array(np.ones((4000, 1), np.int8)))
    weights = np.where(np.arange(4000) < 1000, 0.3, 0.1)
    chosen = weighted(rows, np.array(["a"]), weights, None, np.random.RandomState(0)).features
    assert isinstance(chosen, np.ndarray)
    assert len(chosen) == pytest.approx(8000, abs=2), "2 on average"
    assert np.mean(chosen < 1000) == pytest.approx(0.5, abs=0.02)


def test_balanced_classes_have_equal_weight():
    texts, names = ["common word"] * 90 + ["common other"] * 10, ["a"] * 90 + ["b"] * 10
    rows = Rows(texts, ids_of(np.array(["a", "b"]), Targets.read(names))[:, :2])
    learned = weighted(rows, np.array(["a", "b"]), None, "balanced", np.random.RandomState(0)).features
    assert isinstance(learned, list)
    assert learned.count("common word") == pytest.approx(learned.count("common other"), abs=2)
    with pytest.raises(MachError, match="'balanced', or a dictionary"):
        weighted(rows, np.array(["a", "b"]), None, "even", np.random.RandomState(0))


def test_a_warm_start_goes_on(blobs):
    X, y = blobs
    classifier = MACHClassifier(**SMALL, warm_start=True).fit(X[:200], y[:200])
    first = classifier._engine
    assert classifier.fit(X, np.where(np.arange(len(y)) < 250, y, 7)).classes_.tolist() == [*np.unique(y[:200]), 7]
    assert classifier._engine is not first
    cold = MACHClassifier(**SMALL).fit(X[:200], y[:200])
    assert 7 not in cold.fit(X, y).classes_


def test_p_at_k_scores_in_a_grid_search():
    X, Y = planted_matrix(300, seed=5)
    for scorer, name in ((precision_at(1), "P@1"), (psp_at(3), "PSP@3")):
        search = GridSearchCV(MACHClassifier(**SMALL), {"epochs": [1, 6]}, scoring=scorer, cv=2, error_score="raise")
        search.fit(X, MultiLabelBinarizer(sparse_output=True).fit_transform(Y))
        assert search.best_params_ == {"epochs": 6}, name
        assert 0 < search.best_score_ <= 1
    best = search.best_estimator_
    run = best.model_.run
    weights_K = propensities(run.class_counts_K(), run.manifest.n_rows)
    Y = MultiLabelBinarizer().fit_transform(Y)
    truth = ids_of(best.classes_, Targets.read(Y))[:, : len(best.classes_)]
    ids = best._engine.topk(X, 3)[0]
    assert psp_at(3)(best, X, Y) == evaluate(ids, truth, ks=(3,), propensities=weights_K)["PSP@3"]
    piped = make_pipeline(MaxAbsScaler(), MACHClassifier(**SMALL)).fit(X, Y)
    assert precision_at(1)(piped, X, Y) > 0.5
    with pytest.raises(MachError, match="no predict_topk"):
        precision_at(1)(MaxAbsScaler(), X, Y)


def test_weights_are_routed_and_the_classifier_shows_itself(blobs):
    X, y = blobs
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = MACHClassifier(**SMALL).set_fit_request(sample_weight=True).set_score_request(sample_weight=False)
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        piped = make_pipeline(scaler, classifier).fit(X, y, sample_weight=np.where(y == 0, 0.0, 1.0))
    assert 0 not in piped.predict(X)
    assert "MACHClassifier" in classifier._repr_html_()
