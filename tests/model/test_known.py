"""Queries of which the model knows no feature: every answer says so, and what is likely is what is frequent."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_array

import mach
from mach.data.batch import DenseBatch
from mach.data.queries import QueryReader
from mach.model.ask import Ask
from mach.model.model import MachModel
from tests.cli.test_cli import mach as verb

WORDS = ["red", "green", "blue", "round", "square", "heavy", "light", "old"]
QUERIES = ["a red thing", "", "qwertz yxcv", "!? ...", "xx blue yy", "\t"]
KNOWN = [True, False, False, False, True, False]


def rows(folder: Path) -> Path:
    """Texts of two words, red more often than others."""
    generator = np.random.default_rng(0)
    shares = np.array([4, 2, 1, 1, 1, 1, 1, 1]) / 12
    lines = ["text,classes"]
    for _ in range(500):
        a, b = generator.choice(WORDS, 2, replace=False, p=shares)
        lines.append(f"a {a} and {b} thing,{a}|{b}")
    lines += ["~,red"] * 10  # rows of no feature teach no curve
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder / "rows.csv"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MachModel:
    """Of texts, with a re-ranker and a calibration."""
    folder = tmp_path_factory.mktemp("known")
    config = {
        "data": {
            "train": str(rows(folder)),
            "class_separator": "|",
            "cache": str(folder / "cache"),
            "validation_fraction": 0.2,
        },
        "hashing": {"repetitions": 2, "buckets": 6, "heads": 1},
        "training": {"epochs": 4, "precision": "float32"},
        "reranking": {"candidates": 8},
    }
    made = mach.train(config, folder / "run", launcher="here")
    assert made.reranker is not None
    assert made.calibration is not None
    return made


def test_an_answer_says_which_queries_are_known(model: MachModel):
    for rerank in (True, False):
        found = model.search(QUERIES, k=3, rerank=rerank)
        assert found.known_N.tolist() == KNOWN
        assert [bool(model.search(query, k=3, rerank=rerank).known_N[0]) for query in QUERIES] == KNOWN
        assert model.search(QUERIES[:1], k=3, allowed=["blue"], rerank=rerank).known_N.tolist() == [True]
    parts = list(model.answerer.answers(QUERIES, 3, Ask()))
    assert np.concatenate([part.known_N for part in parts]).tolist() == KNOWN


@pytest.mark.parametrize("rerank", [True, False])
@pytest.mark.parametrize("tail", [0.0, 0.5])
def test_the_probabilities_of_an_unknown_query_are_shares_of_training_rows(model: MachModel, rerank: bool, tail: float):
    n_rows, counts_K = model.run.manifest.n_rows, model.run.class_counts_K()
    options: dict[str, Any] = {"probabilities": True, "rerank": rerank, "tail": tail}
    ids_Nk, probabilities_Nk = model.topk(QUERIES, k=5, **options)
    scores_Nk = model.topk(QUERIES, k=5, rerank=rerank, tail=tail)[1]
    assert n_rows == 510
    for n, (query, is_known) in enumerate(zip(QUERIES, KNOWN, strict=True)):
        one_ids, one = model.topk(query, k=5, **options)
        np.testing.assert_array_equal(one_ids, ids_Nk[n])
        np.testing.assert_array_equal(one, probabilities_Nk[n])
        by_scores = model.probabilities(ids_Nk[n], scores_Nk[n], rerank=rerank, tail=tail)
        if is_known:
            np.testing.assert_array_equal(one, by_scores)
        else:
            np.testing.assert_allclose(one, counts_K[ids_Nk[n]] / n_rows, rtol=1e-6)
            again = model.probabilities(ids_Nk[n], scores_Nk[n], rerank=rerank, tail=tail, known=False)
            np.testing.assert_array_equal(again, one)
    padded = model.topk("", k=5, allowed=["blue"], **options)[1]
    assert padded[1:].tolist() == [0] * 4


def test_rows_without_features_teach_no_curve(model: MachModel):
    held = model.calibration
    assert held is not None
    n_known = held.plain.n_pairs // len(WORDS)
    assert 0 < n_known < held.n_rows  # some of the ten rows were held out


def test_an_added_class_is_as_likely_as_its_examples_are_many(model: MachModel):
    model.classes.add("grey", [["a red grey", "blue grey thing"]])
    try:
        ids, probabilities = model.topk("qwertz", k=9, probabilities=True)
        assert probabilities[model.names(ids).index("grey")] == pytest.approx(2 / 510)
        assert model.search("grey thing").known_N.tolist() == [True]
    finally:
        model.classes.undo()


def known_in(predictions: Path) -> list[bool]:
    """Of every row."""
    match predictions.suffix:
        case ".jsonl":
            return [json.loads(line)["known"] for line in predictions.read_text().splitlines()]
        case ".csv":
            with predictions.open(newline="") as file:
                return [row["known"] == "true" for row in csv.DictReader(file) if row["rank"] == "1"]
        case ".parquet":
            return [row["known"] for row in pq.read_table(predictions).to_pylist()]
    with np.load(predictions) as arrays:
        return list(arrays["known"].tolist())


def test_calibrations_of_earlier_versions_answer_as_they_did(model: MachModel, monkeypatch: pytest.MonkeyPatch):
    assert model.calibration is not None
    monkeypatch.setattr(model, "calibration", model.calibration.model_copy(update={"format": 1}))
    ids, probabilities = model.topk("", k=3, probabilities=True)
    scores = model.topk("", k=3)[1]
    np.testing.assert_array_equal(probabilities, model.curve()(scores))
    assert not np.allclose(probabilities, model.run.class_counts_K()[ids] / model.run.manifest.n_rows)


def test_the_command_line_says_it(model: MachModel, tmp_path: Path):
    run = model.run.path
    for query, is_known in zip(QUERIES, KNOWN, strict=True):
        result = verb("query", run, "--json", "--probabilities", "--", query)
        answer = json.loads(result.stdout)
        assert answer["known"] is is_known
        said = f"mach: query {query!r} has no feature that the run knows: the answer says nothing of it\n"
        assert (result.stderr == said) == (not is_known)
        shown = verb("query", run, "--", query)
        assert (said in shown.stderr) == (not is_known)
        assert said not in shown.stdout
        expected = model.topk(query, k=8, probabilities=True)[1]
        np.testing.assert_allclose(answer["probabilities"], expected[expected > 0], atol=1e-6)
    (tmp_path / "q.csv").write_text("text\na red thing\nqwertz\n")
    for ending in ("jsonl", "csv", "parquet", "npz"):
        out = tmp_path / f"out.{ending}"
        result = verb("predict", run, tmp_path / "q.csv", "-o", out, "-k", 2, "--probabilities")
        assert result.exit_code == 0, result.stderr
        assert "1 of 2 rows have no known feature, such as row 1" in result.stderr
        assert known_in(out) == [True, False], ending


def test_hashed_terms_are_known_where_training_had_them(tmp_path: Path):
    config = {
        "data": {"train": str(rows(tmp_path)), "class_separator": "|", "cache": str(tmp_path / "cache")},
        "text": {"hashing": True, "n_features": 2**16},
        "hashing": {"repetitions": 1},
        "training": {"epochs": 1},
        "reranking": {"candidates": 0},
    }
    hashed = mach.train(config, tmp_path / "run", launcher="here")
    assert hashed.search(QUERIES).known_N.tolist() == KNOWN
    assert verb("query", tmp_path / "run", "qwertz yxcv").stderr.startswith("mach: query 'qwertz yxcv' has no feature")
    (tmp_path / "q.csv").write_text("text\na red thing\nqwertz\n")
    result = verb("predict", tmp_path / "run", tmp_path / "q.csv")
    assert "1 of 2 rows have no feature that the run knows: their answers say nothing of them" in result.stderr


def test_rows_of_numbers_are_known_by_a_value_that_is_not_0():
    reader = QueryReader(n_features=3, dense_input=False, text_features=None)
    stored_zero = csr_array((np.array([0.0, 2.0], np.float32), np.array([1, 2]), np.array([0, 1, 2, 2])), shape=(3, 3))
    [batch] = reader.batches(stored_zero, 10)
    assert reader.known(batch).tolist() == [False, True, False]
    dense = DenseBatch(np.array([[0, 0], [0, -1]], np.float32))
    assert reader.known(dense).tolist() == [False, True]
