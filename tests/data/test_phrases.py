"""Phrases of documents: only their own words, the same for the same document, and enough to find a document by them."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from mach.config import DataConfig, TextConfig, parse_config
from mach.data import phrases as module
from mach.data.phrases import Document, phrases
from mach.data.prepare import prepare, texts_of
from mach.errors import ConfigError, DataError
from mach.model.loading import load
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard

WORDS = [f"{a}{b}{c}{d}" for a in "bdfgklmn" for b in "aeiou" for c in ("rst", "lm", "nd", "ck") for d in "aeo"]


def options(**given: object) -> DataConfig:
    return DataConfig.model_validate(
        {"train": "x", "class_column": "id", "strong_columns": ["title"], "weak_columns": ["body"]} | given
    )


def documents(n: int, seed: int, length: int = 40) -> list[Document]:
    generator = random.Random(seed)
    return [
        Document(f"d{k}", [" ".join(generator.sample(WORDS, 3))], [" ".join(generator.choices(WORDS, k=length))])
        for k in range(n)
    ]


def save(path: Path, rows: list[Document]) -> str:
    lines = [json.dumps({"id": d.name, "title": d.strong[0], "body": (*d.weak, "")[0]}) for d in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_phrases_hold_words_of_their_document_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PHRASES", 100)
    monkeypatch.setattr(module, "TYPOS", 0.0)
    for document in documents(20, seed=0):
        own = Counter(document.text.split())
        found = phrases(document)
        assert found[:2] == [document.strong[0], document.text]
        assert len(found) == 102
        assert all(text and Counter(text.split()) <= own for text in found)
        passages = [text for text in found[2:] if not set(text.split()) <= set(document.strong[0].split())]
        assert 30 <= len(passages) <= 70  # half are of the title
        with monkeypatch.context() as whole:
            whole.setattr(module, "WORD_DROPOUT", 0.0)
            assert all(
                text == document.strong[0] or f" {text} " in f" {document.weak[0]} " for text in phrases(document)[2:]
            )
        assert min(len(text.split()) for text in passages) <= 3
        assert max(len(text.split()) for text in passages) >= 15


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_typing_errors_touch_as_many_longer_words_as_asked(share: float, monkeypatch: pytest.MonkeyPatch):
    for name, value in (("PHRASES", 50), ("TYPOS", share), ("WORD_DROPOUT", 0.0)):
        monkeypatch.setattr(module, name, value)
    texts = phrases(Document("d", [" ".join(WORDS)]))[1:]
    wrong = sum(a != b for text in texts for a, b in zip(text.split(), WORDS, strict=True))
    longer = sum(len(word) >= module.SHORTEST_MISTYPED for word in WORDS) * len(texts)
    assert wrong == pytest.approx(share * longer, rel=0.15)


def test_phrases_follow_from_the_document(tmp_path: Path):
    first, second = documents(2, seed=1)
    assert phrases(first) == phrases(first)
    stores = []
    for number, rows in enumerate(([first, second], [second, first])):
        config = options(cache=str(tmp_path / str(number)))
        stores.append(prepare(config, TextConfig(), save(tmp_path / f"{number}.jsonl", rows)))
    here, there = stores
    n = 2 + module.PHRASES
    assert (here.n_rows, here.class_ids.tolist()) == (2 * n, [0] * n + [1] * n)
    assert here.text_features is not None
    assert here.features(0, n).toarray().tolist() == there.features(n, 2 * n).toarray().tolist()
    again = prepare(options(cache=str(tmp_path / "2")), TextConfig(), str(tmp_path / "0.jsonl"))
    assert again.fingerprint == here.fingerprint
    terms = {word for document in (first, second) for word in document.text.split()}
    assert here.n_features == len(terms)  # fitted on documents: mistyped words are no terms


@pytest.mark.parametrize(
    ("row", "given", "complaint"),
    [
        ({"id": "", "title": "t", "body": "b"}, {}, "document 1 has 0 names in column 'id'"),
        ({"id": "d", "title": " ", "body": None}, {}, "document 1, 'd', has no text"),
        ({"id": "d", "title": "t"}, {}, "no column 'body'.*strong_ and weak_columns"),
        ({"id": "d", "title": 7, "body": "b"}, {}, "line 1: column 'title' holds 7, not text"),
    ],
)
def test_documents_that_are_none_are_named(tmp_path: Path, row: dict, given: dict, complaint: str):
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=complaint):
        prepare(options(cache=str(tmp_path)), TextConfig(), str(tmp_path / "d.jsonl"))


def test_texts_of_embedded_documents_are_their_phrases(tmp_path: Path):
    store = prepare(options(cache=str(tmp_path)), TextConfig(), save(tmp_path / "d.jsonl", documents(3, seed=0)))
    n = 1 + module.PHRASES  # a name is all of its document
    found = texts_of(DataConfig(train="x"), "builtin:characters-names", [0, n], like=store)
    assert found == ["space", "exclamation mark"]


def test_documents_are_of_text(tmp_path: Path):
    (tmp_path / "d.svm").write_text("0 1:1\n")
    with pytest.raises(ConfigError, match="has the format svmlight"):
        prepare(options(cache=str(tmp_path)), TextConfig(), str(tmp_path / "d.svm"))


def test_documents_are_found_by_passages_that_training_has_not_seen(tmp_path: Path):
    """Planted: 100 documents of 18 words each; queries are five words from anywhere in a body."""
    rows, generator = documents(100, seed=2, length=15), random.Random(3)
    with (tmp_path / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        for document in rows:
            writer.writerow([document.name, " ".join(generator.sample(sorted(set(document.weak[0].split())), 5))])
    tree = {
        "data": {
            "train": save(tmp_path / "d.jsonl", rows),
            "cache": str(tmp_path / "cache"),
            "class_column": "id",
            "strong_columns": ["title"],
            "weak_columns": ["body"],
            "validation_fraction": 0.0,
        },
        "hashing": {"repetitions": 2, "buckets": 64, "heads": 1},
        "network": {"hidden": [64], "dropout": 0.0},
        "reranking": {"candidates": 0},
        "training": {"epochs": 12, "batch": 64, "rate": 0.02, "precision": "float32"},
    }
    run, store = set_up(parse_config(tree, "test"), tmp_path / "run")
    train_shard(ShardJob(str(run.path), str(store.path), (0, 1)))
    model, data = load(run.path), run.config.data
    test = prepare(data, run.config.text, str(tmp_path / "test.csv"), like=run.reference())
    assert test.n_rows == 100  # queries are taken as they are
    assert (model.search(test, 1).ids_Nk[:, 0] == test.class_ids).mean() > 0.75
    ids, _ = model.topk(rows[7].strong[0], k=1)
    assert model.names(ids) == ["d7"]
    # queries with the documents that were right are rows of the ordinary kind
    started = {"data": {"train": str(tmp_path / "test.csv")}, "training": {"start": str(tmp_path / "run")}}
    _, store = set_up(parse_config(started, "test"), tmp_path / "second")
    assert (store.n_rows - store.n_old_rows, store.n_classes) == (100, 100)
