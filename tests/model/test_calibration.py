"""Calibration: laws of the curves, planted probabilities, priors against all classes, files and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.cli import main
from mach.config import Config, to_toml
from mach.data.batch import right_of
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import ConfigError, StorageError
from mach.model.accuracy import evaluate
from mach.model.ask import Ask
from mach.model.calibration import Calibration, calibrate_when_due, fingerprint, held_out
from mach.model.classes.answerer import Answerer
from mach.model.curves import METHODS, Curve, calibration_error, fit, reliability
from mach.model.loading import load
from mach.model.model import MachModel
from mach.runs.run import Run
from mach.sketch.aggregates import naive
from mach.sketch.decoder import Decoder, class_scores_oracle
from mach.sketch.hashing import UniversalAssignment
from mach.sketch.metrics import propensities
from mach.sketch.terms import prior_terms, tail_terms, topk_with_terms
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard
from tests.conftest import N_CLASSES, N_FEATURES

AGGREGATES = ("mean", "log-mean", "logit-mean", "min")


def mach(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def with_prior(model: MachModel, prior: float) -> Answerer:
    return Answerer(model.ensemble, model.reranker, prior, model.classes.edits)


@pytest.fixture(scope="module")
def test_rows(config: Config, trained: Path) -> Store:
    assert config.data.test is not None
    return prepare(config.data, config.text, config.data.test, like=Run.open(trained).reference())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 400),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    decimals=st.sampled_from([0, 1, 9]),
    aggregate=st.sampled_from(AGGREGATES),
)
def test_curves_ascend_within_0_and_1_whatever_the_pairs(seed: int, n: int, rate: float, decimals: int, aggregate: str):
    random = np.random.default_rng(seed)
    scores = random.normal(-1, 3, n).round(decimals).astype(np.float32)
    right, rows = random.random(n) < rate, np.arange(n) // 2 if n > 3 else np.arange(n)
    curve = fit(scores, right, rows, aggregate)
    asked = np.sort(np.concatenate([scores, [-1e30, 1e30]]).astype(np.float32))
    found = curve(asked)
    assert np.all(np.diff(found) >= 0)
    assert found.min() >= 0
    assert found.max() <= 1
    assert curve(np.array([-np.inf], np.float32)).tolist() == [0]
    assert Curve.model_validate_json(curve.model_dump_json()) == curve


@pytest.mark.parametrize("method", list(METHODS))
def test_planted_probabilities_are_recovered(method: str):
    """Scores are log p^3: what they look like is far too low."""
    random = np.random.default_rng(1)
    p = random.uniform(0.02, 0.98, 40_000)
    right, scores = random.random(len(p)) < p, 3 * np.log(p)
    knots = METHODS[method](scores, right, "log-mean")
    found = np.interp(scores, *knots)
    assert np.mean(np.abs(found - p)) < 0.02
    curve = fit(scores.astype(np.float32), right, np.arange(len(p)) // 10, "log-mean")
    fresh = random.random(len(p)) < p
    before, after = (calibration_error(q, fresh) for q in (naive(scores, "log-mean"), curve(scores)))
    assert before > 0.15
    assert after < 0.01
    assert curve.ece_before == pytest.approx(before, abs=0.01)
    assert curve.ece_after == pytest.approx(after, abs=0.01)


def test_errors_of_a_few_bins_are_those_of_the_definition():
    probabilities, right = np.array([0.9, 0.1, 0.5, 0.5]), np.array([False, False, True, True])
    table = reliability(probabilities, right, n_bins=2)
    np.testing.assert_allclose(table, [[2, 0.3, 0.5], [2, 0.7, 0.5]])
    assert calibration_error(probabilities, right, n_bins=2) == pytest.approx(0.2)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    strength=st.floats(-3, 3),
    tail=st.sampled_from([0.0, 0.5, 2.0]),
    n_candidates=st.integers(1, 30),
    k=st.integers(1, 12),
    is_masked=st.booleans(),
    budget=st.sampled_from([None, None, 5, 100]),
)
def test_what_is_certified_is_best_among_all_classes(
    seed: int, strength: float, tail: float, n_candidates: int, k: int, is_masked: bool, budget: int | None
):
    random = np.random.default_rng(seed)
    K, counts_K = 150, random.geometric(0.02, 150)
    assignment = UniversalAssignment.draw(n_classes=K, n_buckets=12, n_repetitions=3, seed=seed % 1000)
    probs_NRB = random.random((4, 3, 12)).astype(np.float32) ** 4
    allowed_K = random.random(K) < 0.2 if is_masked else None
    terms_K = prior_terms(counts_K, strength) + tail_terms(counts_K, 10_000, tail)
    assert terms_K.max() <= 0
    decoder = Decoder(assignment)

    def search(probs_NRB, k):
        return decoder.topk(probs_NRB, k, allowed_K=allowed_K, budget=budget)

    found = topk_with_terms(search, probs_NRB, k, terms_K, n_candidates)
    scores_NK = class_scores_oracle(probs_NRB, assignment, "log-mean") + terms_K
    if allowed_K is not None:
        scores_NK[:, ~allowed_K] = -np.inf
    best_Nk = np.argsort(-scores_NK, axis=1, kind="stable")[:, :k]
    expected_Nk = np.take_along_axis(scores_NK, best_Nk, axis=1)
    if budget is None:
        assert found.exact_N.all()
    np.testing.assert_array_equal(found.scores_Nk[found.exact_N], expected_Nk[found.exact_N])
    is_there_Nk = found.exact_N[:, None] & np.isfinite(expected_Nk)
    np.testing.assert_array_equal(found.ids_Nk[is_there_Nk], best_Nk[is_there_Nk])
    for n in range(4):  # the bound holds of everything left out, certified or not
        outside = np.setdiff1d(np.arange(K), found.ids_Nk[n])
        assert scores_NK[n, outside].max(initial=-np.inf) <= found.bound_N[n]


def test_prior_and_tail_of_a_model_are_the_formula(copied: Path, test_rows: Store):
    model = load(copied)
    rows = test_rows.features(0, 20)
    raw_NK = model.score(rows, np.arange(N_CLASSES))
    counts_K = model.run.class_counts_K()
    tail_K = -0.5 * np.log(propensities(counts_K, model.run.manifest.n_rows))
    model.classes.answerer = with_prior(model, -0.3)
    prior_K = -0.3 * np.log(1 + counts_K)
    expected_NK = raw_NK + (prior_K - prior_K.max() + tail_K - tail_K.max())
    found = model.search(rows, 6, tail=0.5)
    assert found.exact_N.all()
    np.testing.assert_allclose(found.scores_Nk, -np.sort(-expected_NK, axis=1)[:, :6], atol=1e-5)
    np.testing.assert_array_equal(model.score(rows, found.ids_Nk, tail=0.5), found.scores_Nk)
    assert model.search(rows, 5, tail=0.5, allowed=[1, 2]).ids_Nk[0, 2:].tolist() == [-1] * 3
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="tail .*: need a finite number of at least 0"):
            model.topk(rows, tail=wrong)


def test_probabilities_keep_the_order_and_need_a_calibration_of_these_weights(copied: Path, test_rows: Store):
    model = load(copied)
    with pytest.raises(ConfigError, match="has no calibration.*mach calibrate"):
        model.topk(test_rows, probabilities=True)
    model.calibrate(test_rows)
    model = load(copied)
    ids, scores = model.topk(test_rows, 5)
    same, found = model.topk(test_rows, 5, probabilities=True)
    np.testing.assert_array_equal(same, ids)
    assert np.all(np.diff(found, axis=1) <= 0)
    np.testing.assert_array_equal(found, model.probabilities(ids, scores))
    padded_ids, padded = model.topk(test_rows.features(0, 2), 5, allowed=[3, 4], probabilities=True)
    assert (padded_ids[:, 2:] < 0).all()
    assert (padded[padded_ids < 0] == 0).all()
    tail_ids, of_tail = model.topk(test_rows, 5, tail=1.0, probabilities=True)
    plain = model.probabilities(tail_ids, model.score(test_rows, tail_ids))
    np.testing.assert_allclose(of_tail, plain, atol=1e-4)  # the tail changes the order, not the probabilities
    last = evaluate(model, test_rows, curve=False, reliability=True)[-1]
    assert last["ECE"] <= last["ECE uncalibrated"]
    with pytest.raises(ConfigError, match="is for other repetitions"):
        load(copied, repetitions=[0, 1]).topk(test_rows, probabilities=True)
    with pytest.raises(ConfigError, match="for all 3 repetitions, not the first 2"):
        load(copied).topk(test_rows, probabilities=True, repetitions=2)
    with pytest.raises(ConfigError, match="at least 50"):
        model.calibrate(test_rows, np.arange(49))


def test_damaged_files_are_one_line(copied: Path, test_rows: Store):
    load(copied).calibrate(test_rows)
    file = copied / "calibration.json"
    whole = json.loads(file.read_text())
    spoils: list[dict[str, Any]] = [
        {"probabilities": whole["plain"]["probabilities"][::-1]},
        {"probabilities": [2.0] * len(whole["plain"]["scores"])},
        {"scores": whole["plain"]["scores"][1:]},
        {"scores": [], "probabilities": []},
    ]
    for spoiled in spoils:
        file.write_text(json.dumps(whole | {"plain": whole["plain"] | spoiled}))
        with pytest.raises(StorageError, match="calibration.json is damaged: plain"):
            load(copied)
    file.write_text("{")
    with pytest.raises(StorageError, match="calibration.json is damaged"):
        load(copied)


def test_a_remote_run_is_calibrated_as_any_other(trained: Path, test_rows: Store, tmp_path: Path):
    from mach.files.places import place, upload_folder

    where = place(f"memory://{tmp_path.name}/run")
    upload_folder(trained, where)
    load(where).calibrate(test_rows)
    model = load(where)
    assert model.calibration == Calibration.load(Run.open(where))
    assert model.topk(test_rows, 3, probabilities=True)[1].max() <= 1


def test_training_ends_with_a_calibration_on_held_out_rows(
    config: Config, tmp_path: Path, planted: Path, test_rows: Store
):
    held = config.model_copy(
        update={
            "data": config.data.model_copy(update={"validation_fraction": 0.05}),
            "hashing": config.hashing.model_copy(update={"repetitions": 2}),
        }
    )
    (tmp_path / "config.toml").write_text(to_toml(held, brief=True))
    path = tmp_path / "run"
    result = mach("train", tmp_path / "config.toml", path, "--repetitions", "0")
    assert result.exit_code == 0, result.stderr
    assert not (path / "calibration.json").exists()
    result = mach("train", tmp_path / "config.toml", path)
    assert "calibration by 150 rows" in result.stderr
    made = json.loads((path / "calibration.json").read_text())
    assert made["reranked"] is None
    assert made["plain"]["ece_after"] < made["plain"]["ece_before"]
    assert load(path).prior == made["prior"]
    assert "calibration" not in mach("train", tmp_path / "config.toml", path).stderr
    again = mach("calibrate", path, "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["n_rows"] == 150
    assert json.loads((path / "calibration.json").read_text()) == made
    other = mach("calibrate", path, planted / "test.txt")
    assert "calibration by 400 rows" in other.stdout
    assert load(path).prior == made["prior"]
    rows = json.loads(mach("evaluate", path, "--reliability", "--json").stdout)
    assert "ECE" not in rows[0]
    assert rows[-1]["ECE"] <= rows[-1]["ECE uncalibrated"]
    assert "ECE" in mach("evaluate", path, "--reliability").stdout.splitlines()[0]
    answer = json.loads(mach("query", path, "21:0.5 22:0.5", "--json", "--probabilities", "--tail", "0.5").stdout)
    assert 0 <= min(answer["probabilities"]) <= max(answer["probabilities"]) <= 1
    mach("predict", path, planted / "test.txt", "--probabilities", "-k", 2, "-o", tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().startswith("row,rank,id,probability")
    result = mach("train", tmp_path / "config.toml", path, "--set", "decoding.prior=-0.25")
    assert "decoding.prior is no key any more, leave it out: held-out rows choose it" in result.stderr
    # a run of old whose configuration states a prior keeps it, and its calibration is of that prior
    old = (path / "config.toml").read_text()
    (path / "config.toml").write_text(old.replace("[decoding]\n", "[decoding]\nprior = -0.25\ncandidates = 7\n"))
    assert load(path).prior == -0.25
    with pytest.raises(ConfigError, match="or settings"):
        load(path).topk(np.zeros(N_FEATURES, np.float32), probabilities=True)
    assert load(path).calibrate(test_rows).prior == -0.25
    assert load(path).topk(np.zeros(N_FEATURES, np.float32), probabilities=True)[1].max() <= 1


def test_the_prior_of_best_ndcg_is_chosen(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held = config.model_copy(update={"data": config.data.model_copy(update={"validation_fraction": 0.1})})
    run, store = set_up(held, tmp_path / "run")
    train_shard(ShardJob(str(run.path), str(store.path), (0, 1, 2)))
    rows = held_out(run, store)
    figures, model = {}, load(run.path)
    for prior in (-9.0, 0.0, 9.0):
        (answer,) = with_prior(model, prior).answers(store.features(0, store.n_rows), 5, Ask())
        figures[prior] = right_of(store, rows, answer.ids_Nk[rows])[:, 0].mean()
    monkeypatch.setattr("mach.model.calibration.PRIORS", (-9.0, 0.0, 9.0))
    made = calibrate_when_due(run, store)
    assert made is not None
    assert figures[9.0] < figures[made.prior] == max(figures.values())
    assert made.prior == 0.0
    assert made.fingerprint == fingerprint(run, [2, 1, 0])
    assert calibrate_when_due(run, store) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calibrate", "{run}"], ["0 rows", "at least 50", "data.validation_fraction"]),
        (["query", "{run}", "1:1", "--probabilities"], ["no calibration", "mach calibrate"]),
        (["predict", "{run}", "{planted}/test.txt", "--probabilities"], ["no calibration", "mach calibrate"]),
        (["evaluate", "{run}", "--reliability"], ["no calibration", "mach calibrate"]),
        (["query", "{run}", "1:1", "--tail", "-1"], ["tail -1", "at least 0"]),
    ],
)
def test_mistakes_get_one_line(trained: Path, planted: Path, arguments: list[str], words: list[str]):
    result = mach(*(argument.format(run=trained, planted=planted) for argument in arguments))
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("mach: ")
    for word in words:
        assert word in last
