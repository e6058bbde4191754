"""A stranger's saved classifier: what classifier.json says is looked at before it is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mach.estimator.classifier import MACHClassifier
from tests.attacks.hostile import line_of

ROWS, CLASSES = np.eye(8, dtype=np.float32)[np.arange(64) % 8], np.arange(64) % 8


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifiers") / "saved"
    MACHClassifier(epochs=1, repetitions=1, buckets=4, random_state=0).fit(ROWS, CLASSES).save(path)
    return path


@pytest.fixture
def saved(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "saved")
    return tmp_path / "saved"


def refusal(path: Path) -> str:
    line = line_of(lambda: MACHClassifier.load(path).predict(ROWS))
    assert "classifier.json" in line
    return line


def test_a_good_one_answers(saved: Path):
    assert MACHClassifier.load(saved).predict(ROWS).shape == (64,)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", 2),
        ("parameters", []),
        ("parameters", {"nonsense": 1}),
        ("classes", []),
        ("classes", {"dtype": "<i8", "values": "x"}),
        ("classes", {"dtype": "<i8", "values": []}),
        ("classes", {"dtype": "<i8", "values": list(range(10**5))}),
        ("classes", {"dtype": "<i8", "values": [None] * 8}),
        ("classes", {"dtype": "<i8", "values": [2**70] * 8}),
        ("classes", {"dtype": "|i1", "values": [2**40] * 8}),
        ("classes", {"dtype": "<U999999999", "values": ["a"] * 8}),
        ("classes", {"dtype": "V99999999999", "values": ["a"] * 8}),
        ("classes", {"dtype": "i4,i4", "values": [1] * 8}),
        ("classes", {"dtype": ["i4"], "values": [1] * 8}),
        ("classes", {"dtype": "|O", "values": [{"tuple": 5}] * 8}),
        ("classes", {"dtype": "|O", "values": [{"bytes": "xyz"}] * 8}),
        ("classes", {"dtype": "|O", "values": [{"frozenset": [{}]}] * 8}),
        ("classes", {"dtype": "|O", "values": [{"os": ["x"]}] * 8}),
        ("classes", {"dtype": "<M8[never]", "values": [1] * 8}),
        ("classes", {}),
        ("form", {}),
        ("form", {"form": "x", "dtype": "<i8", "is_sparse": False}),
        ("form", {"form": "classes", "dtype": "<U999999999", "is_sparse": False}),
        ("form", {"form": "classes", "dtype": "nonsense", "is_sparse": False}),
        ("form", {"form": "classes", "dtype": "<i9", "is_sparse": False}),
        ("temperature", 0),
        ("temperature", "x"),
        ("temperature", float("nan")),
        ("rate", float("inf")),
        ("n_features_in", "x"),
        ("n_features_in", 9),
        ("n_features_in", 2**63),
        ("feature_names_in", 5),
        ("surprise", 5),
    ],
)
def test_what_it_says_does_not_hold(saved: Path, path: str, value: Any):
    told = json.loads((saved / "classifier.json").read_text()) | {path: value}
    (saved / "classifier.json").write_text(json.dumps(told))
    refusal(saved)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"[" * 10**5, b"\xff", b'{"format": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json(saved: Path, content: bytes):
    (saved / "classifier.json").write_bytes(content)
    refusal(saved)


def test_deep_classes(saved: Path):
    told = json.loads((saved / "classifier.json").read_text())
    deep: Any = []
    for _ in range(200):
        deep = {"tuple": [deep]}
    told["classes"] = {"dtype": "|O", "values": [deep] * 8}
    (saved / "classifier.json").write_text(json.dumps(told))
    assert "nests deeper" in refusal(saved)


def test_a_file_does_not_say_which_cluster_gets_code(saved: Path):
    told = json.loads((saved / "classifier.json").read_text())
    told["parameters"]["address"] = "elsewhere.example:6379"
    (saved / "classifier.json").write_text(json.dumps(told))
    assert MACHClassifier.load(saved).address is None
