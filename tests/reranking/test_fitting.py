"""Re-ranking as a whole: what it tells apart, its file, and how its training goes on."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from scipy.sparse import csr_array

from mach.cli import main
from mach.config import Config, LaunchConfig, parse_config, to_toml
from mach.data.batch import SparseBatch, read_batch, read_classes, right_of
from mach.data.kernels.views import N_HASHED, with_pairs
from mach.data.store import Store
from mach.errors import ConfigError, StorageError
from mach.files.records import read_json
from mach.files.tensors import map_tensors, write_tensors
from mach.model.accuracy import evaluate
from mach.model.ask import Ask
from mach.model.calibration import held_out
from mach.model.curves import TOP, calibration_error
from mach.model.loading import load
from mach.model.model import MachModel
from mach.reranking.blend import OF_DOCUMENTS, Blend, path_of, precisions
from mach.reranking.fitting import RerankerTraining, fitting_bytes
from mach.reranking.model import Reranker
from mach.reranking.order import FOLDS
from mach.reranking.parts import STAGES
from mach.reranking.record import Record, is_due
from mach.reranking.settings import FitSettings
from mach.reranking.signals.classifiers import Classifiers
from mach.reranking.signals.contract import Shortlist, features_of
from mach.reranking.signals.repeats import REPEAT_BYTES, Repeats
from mach.runs.run import Run
from mach.sketch.aggregates import naive
from mach.sketch.metrics import evaluate as metrics
from mach.sketch.terms import prior_terms
from mach.training.conductor import train, train_reranker
from mach.training.finetuning import training_store
from mach.training.launch.launchers import Crew
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard
from tests.conftest import N_CLASSES, write_repository
from tests.reranking.oracles import weights_of

SETTINGS = {"candidates": 20, "pairs": 0}
FITTING = FitSettings(threshold=0.01)


def changed(config: Config, **settings) -> Config:
    return config.model_copy(update={"reranking": config.reranking.model_copy(update=settings)})


@pytest.fixture(scope="module")
def paired(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Classes 2j and 2j + 1 share their buckets in both repetitions: the networks cannot tell them apart."""
    folder = tmp_path_factory.mktemp("paired")
    generator = np.random.default_rng(0)
    pairs_RJ = np.stack([generator.permutation(N_CLASSES // 2) % 32 for _ in range(2)])
    np.save(folder / "table.npy", np.repeat(pairs_RJ, 2, axis=1))
    hashing = {"repetitions": 2, "buckets": 32, "table": str(folder / "table.npy")}
    return changed(
        config.model_copy(
            update={
                "hashing": config.hashing.model_copy(update=hashing),
                "data": config.data.model_copy(update={"validation_fraction": 0.1}),
            }
        ),
        **SETTINGS,
    )


def train_here(config: Config, path: Path, settings: FitSettings | None = FITTING) -> None:
    """Repetitions and re-ranker in this process."""
    run, store = set_up(config, path)
    train_shard(ShardJob(str(run.path), str(store.path), (0, 1)))
    fit_here(run, store, settings)


def fit_here(run: Run, store: Store, settings: FitSettings | None = FITTING) -> None:
    training = RerankerTraining(run, store)
    training.begin(settings)
    for stage in STAGES:
        for part in training.parts(stage)[1]:
            assert training.make(part)
    training.finish()


@pytest.fixture(scope="module")
def reranked(paired: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "reranked"
    train_here(paired, path)
    return path


@pytest.fixture
def copied(reranked: Path, tmp_path: Path) -> Path:
    shutil.copytree(reranked, tmp_path / "run")
    return tmp_path / "run"


def rows_of(model: MachModel):
    from mach.data.prepare import prepare

    config = model.run.config
    assert config.data.test is not None
    return prepare(config.data, config.text, config.data.test, like=model.run.reference())


def parts_of(model: MachModel) -> tuple[Reranker, Classifiers, Repeats]:
    """The re-ranker and two of its signals."""
    reranker = model.reranker
    assert reranker is not None
    signals = {signal.name: signal for signal in reranker.signals}
    classifiers, repeats = signals["classifiers"], signals["repeats"]
    assert isinstance(classifiers, Classifiers)
    assert isinstance(repeats, Repeats)
    return reranker, classifiers, repeats


def losses(margins_NC: np.ndarray) -> np.ndarray:
    return np.square(np.maximum(0, 1 - margins_NC))


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_it_tells_apart_what_the_buckets_cannot(reranked: Path):
    model = load(reranked)
    *curve, last = evaluate(model, rows_of(model))
    assert [row["reranked"] for row in [*curve, last]] == [False, False, True]
    assert curve[-1]["P@1"] < 0.7
    assert last["P@1"] > 0.95
    assert len(evaluate(model, rows_of(model), curve=False, ask=Ask(rerank=False))) == 1
    done = read_json(model.run.reranked, Record)
    assert done.validated
    assert done.weight > 0
    assert model.info()["reranker_bytes"] == done.n_bytes == 3 * done.n_weights + 20 * N_CLASSES + 8
    model.verify()


def test_answers_are_the_candidates_in_the_order_of_the_formula(reranked: Path):
    model = load(reranked)
    queries = rows_of(model).features(0, 50)
    plain, found = model.search(queries, 20, rerank=False), model.search(queries, 5)
    reranker, classifiers, _ = parts_of(model)
    margins_NK = (queries @ weights_of(classifiers.own).T).toarray() + classifiers.arrays["biases"]
    margins_NC = np.take_along_axis(margins_NK, plain.ids_Nk, axis=1).astype(np.float32)
    strengths = reranker.blend.strengths
    priors_K = strengths["prior"] * np.log(1 + model.run.class_counts_K())
    priors_NC = (priors_K - priors_K.max())[plain.ids_Nk].astype(np.float32)
    scores_NC = plain.scores_Nk - strengths["weight"] * losses(margins_NC) + priors_NC
    np.testing.assert_allclose(found.scores_Nk, -np.sort(-scores_NC, axis=1)[:, :5], atol=1e-4)
    np.testing.assert_array_equal(model.score(queries, found.ids_Nk), found.scores_Nk)
    assert found.exact_N.all()
    everything = model.search(queries, N_CLASSES)
    certain_N = found.scores_Nk[:, -1] >= found.bound_N
    np.testing.assert_array_equal(found.ids_Nk[certain_N], everything.ids_Nk[certain_N, :5])
    one, _ = model.topk(queries[[3]].toarray()[0], 5)
    np.testing.assert_array_equal(one, found.ids_Nk[3])
    allowed = np.zeros(N_CLASSES, bool)
    allowed[[4, 7]] = True
    assert set(np.unique(model.topk(queries, 3, allowed=allowed)[0])) == {-1, 4, 7}
    assert load(reranked, repetitions=[1]).topk(queries, 5)[0].shape == (50, 5)


def test_logistic_classifiers_order_by_their_own_loss(paired: Config, tmp_path: Path):
    train_here(paired, tmp_path / "run", FitSettings(loss="logistic", cost=4.0, threshold=0.01))
    model = load(tmp_path / "run")
    reranker, classifiers, _ = parts_of(model)
    assert read_json(model.run.reranked, Record).settings["loss"] == classifiers.loss == "logistic"
    assert "log(1 + exp(-margin))" in read_json(model.run.reranked, Record).formula
    assert evaluate(model, rows_of(model), curve=False)[-1]["P@1"] > 0.95  # of classes that networks cannot tell apart
    queries = rows_of(model).features(0, 50)
    found = model.search(queries, 5)
    margins_NK = (queries @ weights_of(classifiers.own).T).toarray() + classifiers.arrays["biases"]
    losses_NC = np.log(1 + np.exp(-np.take_along_axis(margins_NK.astype(np.float64), found.ids_Nk, axis=1)))
    priors_NC = reranker.signals[1].arrays["priors"][found.ids_Nk]
    weight = reranker.blend.strengths["weight"]
    scores_NC = model.score(queries, found.ids_Nk, rerank=False) - weight * losses_NC + priors_NC
    np.testing.assert_allclose(found.scores_Nk, scores_NC, atol=1e-3)


def test_classifiers_of_pairs_answer_by_the_weights_in_the_file(paired: Config, reranked: Path, tmp_path: Path):
    train_here(changed(paired, pairs=6), tmp_path / "run", FitSettings(threshold=0.01, pairs=6, power=0.5))
    model = load(tmp_path / "run")
    (reranker, classifiers, _), (_, plain, _) = parts_of(model), parts_of(load(reranked))
    assert [(one.own.view.pairs, one.own.view.power) for one in (classifiers, plain)] == [(6, 0.5), (0, 1.0)]
    assert evaluate(model, rows_of(model), curve=False)[-1]["P@1"] > 0.95
    queries = rows_of(model).features(0, 50)
    wide = with_pairs(
        queries.indptr.astype(np.int64), queries.indices, queries.data, np.arange(50), 6, model.n_features, 0.5
    )
    weights = weights_of(classifiers.own)
    assert weights.shape[1] == model.n_features + N_HASHED > weights_of(plain.own).shape[1]
    assert (np.concatenate([weights.indices]) >= model.n_features).any()
    rows = csr_array((wide[2], wide[1], wide[0]), shape=(50, weights.shape[1]))
    margins_NK = (rows @ weights.T).toarray() + classifiers.arrays["biases"]
    found = model.search(queries, 5)
    losses_NC = losses(np.take_along_axis(margins_NK, found.ids_Nk, axis=1))
    priors_NC = reranker.signals[1].arrays["priors"][found.ids_Nk]
    weight = reranker.blend.strengths["weight"]
    scores_NC = model.score(queries, found.ids_Nk, rerank=False) - weight * losses_NC + priors_NC
    np.testing.assert_allclose(found.scores_Nk, scores_NC, atol=1e-3)
    one, scores = model.topk(queries[[3]].toarray()[0], 5)
    np.testing.assert_array_equal(one, found.ids_Nk[3])
    np.testing.assert_allclose(scores, found.scores_Nk[3], atol=1e-5)


@pytest.fixture(scope="module")
def once(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Groups of five classes; a row shows its group and one of twelve forms, and no form is twice in a class.

    A row's classes are thus those of its group that no training row of the same form has.
    """
    folder = tmp_path_factory.mktemp("once")
    generator = np.random.default_rng(0)
    pairs = generator.permutation([(k, form) for k in range(N_CLASSES) for form in range(12)])
    lines = [f"{k} {k // 5}:1 {100 + form}:1" for k, form in pairs]
    n_test = len(lines) // 8
    data = {
        "train": str(write_repository(folder / "train.txt", lines[n_test:])),
        "test": str(write_repository(folder / "test.txt", lines[:n_test])),
        "validation_fraction": 0.15,
    }
    sections = {
        "data": config.data.model_copy(update=data),
        "hashing": config.hashing.model_copy(update={"repetitions": 2}),
    }
    return changed(config.model_copy(update=sections), **SETTINGS)


def test_what_never_recurs_is_put_last(once: Config, tmp_path: Path):
    train_here(once, tmp_path / "run")
    model = load(tmp_path / "run")
    done, rows = read_json(model.run.reranked, Record), rows_of(model)
    assert done.repeats < -1
    assert "log(1 + equal rows of the class)" in done.formula
    reranker, classifiers, repeats = parts_of(model)
    table = repeats.arrays["repeats"]
    assert done.n_bytes == 3 * done.n_weights + 20 * N_CLASSES + 8 + table.nbytes
    assert 4 * table.size <= REPEAT_BYTES * 2 * model.run.manifest.n_rows + 8
    found = evaluate(model, rows, curve=False)[-1]["P@1"]
    train_here(changed(once, repeats=0.0), tmp_path / "other")
    other = load(tmp_path / "other")
    assert parts_of(other)[2].arrays == {}
    assert evaluate(other, rows, curve=False)[-1]["P@1"] < 0.25  # one of five by chance, less for what networks recall
    assert found > 0.4
    queries, strengths = rows.features(0, 40), reranker.blend.strengths
    answer, plain = model.search(queries, 5), model.search(queries, 20, rerank=False)
    np.testing.assert_array_equal(model.score(queries, answer.ids_Nk), answer.scores_Nk)
    known_NK = known_pairs(once, model)
    forms = [tuple(queries[[n]].indices) for n in range(40)]
    known_NC = np.array(
        [[known_NK.get((form, int(k)), 0) for k in ids] for form, ids in zip(forms, plain.ids_Nk, strict=True)]
    )
    batch = SparseBatch(queries.indptr.astype(np.int64), queries.indices, queries.data)
    shortlist = Shortlist(batch, plain.ids_Nk, plain.scores_Nk, np.empty((40, 0, 0), np.float32))
    np.testing.assert_array_equal(repeats.columns(shortlist)[:, :, 0], np.log1p(known_NC, dtype=np.float32))
    terms_NC = reranker.signals[1].arrays["priors"][plain.ids_Nk] + strengths["repeats"] * np.log1p(known_NC)
    losses_NC = losses(classifiers.columns(shortlist)[:, :, 0])
    scores_NC = plain.scores_Nk - strengths["weight"] * losses_NC + terms_NC
    np.testing.assert_allclose(answer.scores_Nk, -np.sort(-scores_NC, axis=1)[:, :5], atol=1e-4)


def known_pairs(config: Config, model: MachModel) -> Counter:
    """Rows that were learned from, by their features and class: held-out ones are not among them."""
    run, store = set_up(config, model.run.path)
    rows = RerankerTraining(run, store).rows
    x, (classes, counts) = store.features(0, store.n_rows), read_classes(store, rows)
    assert (counts == 1).all()
    return Counter((tuple(x[[row]].indices), int(k)) for row, k in zip(rows, classes, strict=True))


def test_prior_terms_order_equal_classes_by_their_rows():
    counts_K = np.array([0, 5, 1])
    for prior, order in [(-0.5, [0, 2, 1]), (0.5, [1, 2, 0])]:
        terms_K = prior_terms(counts_K, prior)
        assert terms_K.max() == 0
        assert np.argsort(-terms_K).tolist() == order


def test_held_out_rows_choose_the_blend_of_best_precision(paired: Config, reranked: Path):
    run, store = set_up(paired, reranked)
    training = RerankerTraining(run, store)
    rows = training.validation_rows
    ids_NC = np.random.default_rng(0).permuted(np.tile(np.arange(N_CLASSES), (len(rows), 1)), axis=1)[:, :30]
    scores_NC = np.random.default_rng(1).random(ids_NC.shape, np.float32)
    classes, counts = read_classes(store, rows)
    best_Nk = np.take_along_axis(ids_NC, np.argsort(-scores_NC, axis=1), axis=1)[:, :5]
    found = metrics(best_Nk, (np.concatenate([[0], np.cumsum(counts)]), classes), ks=(1, 3, 5))
    expected = np.mean([found[f"P@{k}"] for k in (1, 3, 5)])
    assert precisions(scores_NC, right_of(store, rows, ids_NC)).mean() == pytest.approx(expected, rel=1e-6)
    model, batch = load(reranked), read_batch(store, rows)
    assert isinstance(batch, SparseBatch)
    found_precisions = {}
    for weight, prior in path_of(FITTING):
        assert model.reranker is not None
        model.reranker.blend = Blend({"weight": weight, "prior": prior})
        right_Nk = right_of(store, rows, model.topk(batch.matrix(store.n_features), 5)[0])
        found_precisions[weight, prior] = np.mean([right_Nk[:, :k].mean() for k in (1, 3, 5)])
    done = read_json(run.reranked, Record)
    assert found_precisions[done.weight, done.prior] > max(found_precisions.values()) - 0.01


def test_rows_of_classes_are_those_that_have_or_list_them(paired: Config, reranked: Path, tmp_path: Path):
    shutil.copytree(reranked, tmp_path / "run")
    run, store = set_up(paired, tmp_path / "run")
    training = RerankerTraining(run, store)
    training.begin(FITTING)
    for part in training.parts("candidates")[1]:
        training.make(part)
    parts = len(training.folder.plan.rows) - 1
    ids_NC = np.concatenate([training.folder.map(f"rows{part:03d}.safetensors")[0]["ids"] for part in range(parts)])
    classes, counts = read_classes(store, training.rows)
    own = np.split(classes, np.cumsum(counts)[:-1])
    for lists, are_listed in ((own, False), (ids_NC, True)):
        indptr, rows = training._rows_by_class(20, 50, are_listed=are_listed)
        for k in range(20, 50):
            expected = [row for row, ids in zip(training.rows, lists, strict=True) if k in ids]
            assert rows[indptr[k - 20] : indptr[k - 19]].tolist() == expected


def test_memory_of_fitting_grows_with_the_largest_class_and_pairs(paired: Config, tmp_path: Path):
    run, store = set_up(paired, tmp_path / "run")
    n_features = store.n_nonzeros / store.n_rows
    n_rows = min(17 * (run.class_counts_K().max() + 1), store.n_rows)  # its own and 16 negatives for each, or all
    assert fitting_bytes(run, store) == round(n_rows * (24 + 12 * n_features))
    other, _ = set_up(changed(paired, pairs=3), tmp_path / "other")
    assert fitting_bytes(other, store) == round(n_rows * (24 + 12 * (n_features + 3)))


def test_reranked_scores_have_a_tail_and_probabilities_of_their_own(copied: Path):
    model = load(copied)
    rows = rows_of(model)
    found = model.search(rows, 5, tail=2.0)
    np.testing.assert_array_equal(model.score(rows, found.ids_Nk, tail=2.0), found.scores_Nk)
    assert np.any(found.ids_Nk != model.topk(rows, 5)[0])
    made = model.calibrate(rows)
    assert made.reranked is not None
    assert made.reranked != made.plain
    for rerank, curve in ((True, made.reranked), (False, made.plain)):
        ids, probabilities = model.topk(rows, 5, rerank=rerank, probabilities=True)
        np.testing.assert_array_equal(probabilities, curve(model.score(rows, ids, rerank=rerank)))
    for row in evaluate(load(copied), rows, curve=False, reliability=True):
        assert row["ECE"] <= row["ECE uncalibrated"]
    (copied / "RERANKED").unlink()
    with pytest.raises(ConfigError, match="for other repetitions, weights or settings"):
        load(copied).topk(rows, probabilities=True)


def test_a_file_of_the_first_version_is_read(copied: Path):
    file = copied / "reranker.safetensors"
    arrays, _ = map_tensors(file)
    old = {name: array.copy() for name, array in arrays.items() if name != "priors"}
    with file.open("wb") as opened:
        write_tensors(opened, old, {"fingerprint": "x", "candidates": "20", "weight": "3.0"})
    model = load(copied)
    assert model.reranker is not None
    assert model.reranker.blend == Blend({"weight": 3.0, "prior": 0.0, "repeats": 0.0})
    assert model.topk(rows_of(model).features(0, 3), 5)[0].shape == (3, 5)


def test_workers_make_the_bits_of_this_process_after_a_kill_and_again_for_other_settings(
    paired: Config, reranked: Path, copied: Path
):
    bits = (reranked / "reranker.safetensors").read_bytes()
    (copied / "RERANKED").unlink()
    run, store = set_up(paired, copied)
    training = RerankerTraining(run, store)
    training.begin(FITTING)
    training.make(0)  # and then it was killed
    first = (copied / "reranking" / "rows000.safetensors").stat().st_mtime_ns
    assert not training.make(1, should_stop=lambda: True)
    assert training.parts("candidates")[1] == list(range(1, 8))
    begun = RerankerTraining(run, store)
    begun.begin()
    assert begun.settings == FITTING  # as the plan says
    assert (copied / "reranking" / "rows000.safetensors").stat().st_mtime_ns == first
    train_reranker(run, store, Crew(LaunchConfig(workers=2)))
    assert (copied / "reranker.safetensors").read_bytes() == bits
    assert not list((copied / "reranking").glob("*.safetensors"))
    assert not is_due(run)
    run, store = set_up(changed(paired, pairs=3), copied)
    assert is_due(run)
    assert load(copied).reranker is not None  # the old one answers until the new one is whole
    train_reranker(run, store, Crew(LaunchConfig()))
    assert (copied / "reranker.safetensors").read_bytes() != bits
    run, _ = set_up(changed(paired, candidates=0), copied)
    assert load(copied).reranker is None


def test_the_command_line_trains_it_once_all_repetitions_are_finished(paired: Config, tmp_path: Path):
    def mach(*arguments: object):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.stderr
        return result

    (tmp_path / "config.toml").write_text(to_toml(paired, brief=True))
    assert "re-ranker" in mach("train", tmp_path / "config.toml", "--dry-run").stdout
    mach("train", tmp_path / "config.toml", tmp_path / "run", "--repetitions", "1")
    assert not (tmp_path / "run/RERANKED").exists()
    assert "not trained yet" in mach("status", tmp_path / "run").stdout
    mach("train", tmp_path / "config.toml", tmp_path / "run", "--repetitions", "0")
    assert "re-ranker finished" in mach("status", tmp_path / "run").stdout
    rows = json.loads(mach("evaluate", tmp_path / "run", "--json").stdout)
    assert [row["reranked"] for row in rows] == [False, False, True]
    assert "yes" in mach("evaluate", tmp_path / "run").stdout.splitlines()[-1]
    query = " ".join(f"{j}:0.5" for j in (21, 22))
    with_it, without = (json.loads(mach("query", tmp_path / "run", query, "--json", "--scores", *more).stdout)
                        for more in ((), ("--no-rerank",)))  # fmt: skip
    assert with_it["ids"][0] == 7
    assert with_it["scores"] != without["scores"]


def test_where_rows_are_phrases_of_the_classes_own_texts_likeness_decides(tmp_path: Path):
    generator = np.random.default_rng(0)
    names = [" ".join(f"w{word}" for word in generator.choice(90, 3, replace=False)) for _ in range(60)]
    table = tmp_path / "classes.csv"
    table.write_text("id,name\n" + "".join(f"{k},{name}\n" for k, name in enumerate(names)))
    data = {"train": str(table), "classes": str(table), "class_column": "id", "strong_columns": ["name"]}
    config = parse_config(
        {
            "data": data | {"cache": str(tmp_path / "cache"), "validation_fraction": 0.2},
            "hashing": {"repetitions": 1, "buckets": 16},
            "network": {"hidden": [8]},
            "reranking": {"candidates": 20},
            "training": {"epochs": 1},
        },
        "test",
    )
    model = train(config, tmp_path / "run", launcher="here")
    assert model.reranker is not None
    assert model.reranker.blend.strengths.items() <= OF_DOCUMENTS.items()
    assert model.reranker.order is None
    record = read_json(model.run.reranked, Record)
    assert (record.n_weights, record.n_pairs) == (0, 0)  # no classifier was fitted
    first, _ = model.topk(names, k=1)  # words in another order would be as alike: none is
    assert [name.split() for name in np.ravel(model.names(first))] == [name.split() for name in names]


def test_an_order_of_held_out_rows_is_kept_whole_and_what_had_not_seen_them_calibrates_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mach.reranking.fitting.LEAST_TEACHING_ROWS", 50)
    run, done = Run.open(copied), []
    store = training_store(run)
    for kept in (1, 0, 0):  # the blend, then the order, twice
        monkeypatch.setattr("mach.reranking.fitting.best_of", lambda *_, kept=kept: kept)
        fit_here(run, store)
        done.append(read_json(run.reranked, Record))
    assert [one.learned for one in done] == [False, True, True]
    assert done[0].digest != done[1].digest == done[2].digest
    model = load(copied)
    order = parts_of(model)[0].order
    assert order is not None
    assert order.n_folds == FOLDS
    model.verify()
    assert evaluate(model, rows_of(model), curve=False)[-1]["P@1"] > 0.95  # as by the blend
    queries = rows_of(model).features(0, 50)
    found = model.search(queries, 5)
    np.testing.assert_array_equal(model.score(queries, found.ids_Nk), found.scores_Nk)

    held, blind = held_out(model.run, store), Reranker.blind
    asked = []

    def counted(own: Reranker, fold: int) -> Reranker:
        asked.append(fold)
        return blind(own, fold)

    monkeypatch.setattr(Reranker, "blind", counted)
    made = model.calibrate(store, held)
    assert asked == list(range(FOLDS))
    whole, scores, right = parts_of(model)[0], [], []
    for fold in range(FOLDS):
        model.classes.answerer.reranker = blind(whole, fold)
        top = model.search(features_of(store, held[fold::FOLDS]), TOP)
        scores.append(top.scores_Nk)
        right.append(right_of(store, held[fold::FOLDS], top.ids_Nk))
    naive_error = calibration_error(naive(np.concatenate(scores).ravel(), "log-mean"), np.concatenate(right).ravel())
    assert made.reranked is not None
    assert made.reranked.ece_before == pytest.approx(naive_error)
    model.classes.answerer.reranker = whole
    assert model.calibrate(rows_of(model)).n_rows == rows_of(model).n_rows
    assert asked == list(range(FOLDS))  # other rows are new to all


def test_damaged_files_and_dense_rows_get_one_line(paired: Config, copied: Path, tmp_path: Path):
    file = copied / "reranker.safetensors"
    arrays, metadata = map_tensors(file)
    whole = {name: array.copy() for name, array in arrays.items()}
    for spoiled, notes in [
        (whole | {"codes": whole["codes"][1:]}, metadata),
        ({name: array for name, array in whole.items() if name != "gaps"}, metadata),
        (whole | {"biases": whole["biases"].astype(np.float64)}, metadata),
        (whole, {}),
        (whole, metadata | {"loss": "squared"}),
        *((whole, metadata | {"candidates": number}) for number in ("-1", "10001", "1.5")),
        *((whole, metadata | {strength: "nan"}) for strength in ("weight", "prior", "repeats")),
    ]:
        with file.open("wb") as opened:
            write_tensors(opened, spoiled, notes)
        with pytest.raises(StorageError, match="train it again"):
            load(copied)
    with file.open("wb") as opened:
        write_tensors(opened, whole | {"biases": whole["biases"] + 1}, metadata)
    with pytest.raises(StorageError, match="digest"):
        load(copied).verify()
    np.save(tmp_path / "dense.npy", np.eye(8, dtype=np.float32))
    np.save(tmp_path / "dense.classes.npy", np.arange(8))
    data = paired.data.model_copy(update={"train": str(tmp_path / "dense.npy"), "classes": None})
    hashing = paired.hashing.model_copy(update={"table": None, "buckets": 4})
    with pytest.raises(ConfigError, match="the rows are dense"):
        set_up(paired.model_copy(update={"data": data, "hashing": hashing}), tmp_path / "dense")
