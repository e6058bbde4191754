"""Rows for a trained model: classes are optional, its class names hold, standard input is a source."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mach.config import DataConfig, TextConfig
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import ConfigError, DataError

TEXTS = '{"text": "red apple", "classes": ["fruit", "red"]}\n{"text": "green car", "classes": ["car"]}\n'
NUMBERS = "3 6 4\n0,2 1:0.5 4:1\n 5:2\n3\n"


def ready(source: str, like: Store | None = None, destination: Path | None = None, classes: str | None = None) -> Store:
    return prepare(DataConfig(train="unused", classes=classes), TextConfig(), source, destination, like=like)


def save(name: str, content: str) -> str:
    Path(name).write_text(content, encoding="utf-8")
    return name


def classes_of(store: Store) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(store.class_ids, store.class_indptr[1:-1])]


def names_of(store: Store) -> list[str]:
    assert store.class_names is not None
    return list(store.class_names)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with the cache and temporary files inside, as working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.fixture
def texts(home) -> Store:
    return ready(save("t.jsonl", TEXTS))


@pytest.fixture
def numbers(home) -> Store:
    return ready(save("t.txt", NUMBERS))


@pytest.mark.parametrize("name", ["u.csv", "u.jsonl", "u.parquet"])
def test_texts_for_a_model_need_no_classes(home, name):
    import pyarrow
    import pyarrow.parquet

    train = ready(save("t.jsonl", TEXTS))
    save("u.csv", "text\nred car\n")
    save("u.jsonl", '{"text": "red car"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["red car"]}), "u.parquet")
    test = ready(name, like=train)
    assert (classes_of(test), test.meta["n_rows_without_classes"], names_of(test)) == ([[]], 1, names_of(train))
    with pytest.raises(DataError, match="has no column 'classes'"):
        ready(name)


def test_numbers_for_a_model_need_no_classes(home):
    np.save("d.npy", np.ones((2, 3)))
    np.save("d.classes.npy", np.array([0, 1]))
    dense = ready("d.npy")
    np.save("e.npy", np.ones((2, 3)))
    test = ready("e.npy", like=dense)
    assert (test.n_classes, classes_of(test), test.meta["n_rows_without_classes"]) == (2, [[], []], 2)
    with pytest.raises(DataError, match=r"e\.npy has no classes beside it"):
        ready("e.npy")
    np.save("e.classes.npy", np.array([1, 1]))
    assert classes_of(ready("e.npy", like=dense)) == [[1], [1]]  # whether there are any is part of the key
    sparse = ready(save("train.txt", NUMBERS))
    np.savez("x.npz", X_data=[1.0], X_indices=[2], X_indptr=[0, 1, 1], X_shape=[2, 6])
    assert (ready("x.npz", like=sparse).n_classes, classes_of(ready("x.npz", like=sparse))) == (4, [[], []])
    assert classes_of(ready(save("x.txt", "1 6 0\n 2:1\n"), like=sparse)) == [[]]


@pytest.mark.parametrize("name", ["t.jsonl", "a.txt"])
def test_the_file_of_class_names_is_not_looked_at_for_a_trained_model(home, name):
    save("t.jsonl", TEXTS)
    save("a.txt", NUMBERS)
    names = save("names.txt", "car\nfruit\nred\nship\n")
    train = ready(name, classes=names)
    before = ready(name, like=train, classes=names)
    Path(names).unlink()
    after = ready(name, like=train, classes=names)
    assert (after.path, names_of(after)) == (before.path, names_of(train))


# --- standard input


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_texts_one_a_line(texts, home, monkeypatch):
    feed(monkeypatch, b"red car\n\nthe apple")
    store = ready("-", texts)
    assert store.features(0, 3).toarray().astype(bool).sum(axis=1).tolist() == [2, 0, 1]
    assert (store.n_features, store.n_classes, store.meta["n_rows_without_classes"]) == (4, 3, 3)
    assert names_of(store) == ["fruit", "red", "car"]
    assert store.path.parent == home / "cache"
    assert store.path.name.startswith("standard-input-")
    assert list((home / "temporary").iterdir()) == []


def test_rows_of_numbers_without_a_header(numbers, home, monkeypatch):
    feed(monkeypatch, b"3,1 5:2\n 0:1\n1:1 2:1\n\n")
    store = ready("-", numbers, home / "chosen")
    assert store.path == home / "chosen"
    assert store.features(0, 4).toarray().tolist() == [[0] * 5 + [2], [1] + [0] * 5, [0, 1, 1, 0, 0, 0], [0] * 6]
    assert (store.n_classes, store.class_indptr.tolist(), store.class_ids.tolist()) == (4, [0, 2, 2, 2, 2], [1, 3])


def test_the_key_is_of_the_content(texts, monkeypatch):
    feed(monkeypatch, b"red\n")
    first = ready("-", texts)
    feed(monkeypatch, b"apple\n")
    second = ready("-", texts)
    feed(monkeypatch, b"red\n")
    assert ready("-", texts).path == first.path != second.path
    assert first.feature_indices.tolist() != second.feature_indices.tolist()


def test_errors_name_the_line(texts, numbers, home, monkeypatch):
    feed(monkeypatch, b"red\n\xff\n")
    with pytest.raises(DataError, match=r"^standard input line 2: byte 0xff is not UTF-8"):
        ready("-", texts)
    for line, complaint in (
        (b"0:1 x", "feature 'x'"),
        (b"4 0:1", "class '4' is outside"),
        (b" 6:1", "feature index '6'"),
    ):
        feed(monkeypatch, b"0:1\n\n" + line)
        with pytest.raises(DataError, match=f"^standard input line 3: {complaint}"):
            ready("-", numbers)
    assert list((home / "temporary").iterdir()) == []


def test_no_input_has_no_rows(texts, monkeypatch):
    feed(monkeypatch, b"")
    with pytest.raises(DataError, match="^standard input holds no rows"):
        ready("-", texts)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="^standard input holds no rows"):
        ready("-", texts)


def test_only_a_model_of_text_or_sparse_rows_reads_it(home):
    with pytest.raises(ConfigError, match="^standard input is read as queries of a trained model only"):
        ready("-")
    np.save("d.npy", np.ones((1, 2)))
    np.save("d.classes.npy", np.array([0]))
    dense = ready("d.npy")
    with pytest.raises(ConfigError, match=r"^standard input holds text or sparse rows, .* has dense ones: name an"):
        ready("-", dense)


def test_an_interrupt_leaves_nothing_behind(texts, home, monkeypatch):
    before = list((home / "cache").iterdir())

    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        ready("-", texts)
    assert list((home / "cache").iterdir()) == before
    assert list((home / "temporary").iterdir()) == []


class Endless(io.BytesIO):
    """Lines, and then one that does not end; nobody may read on and on."""

    n_left = 4

    def read(self, n: int | None = -1) -> bytes:
        self.n_left -= 1
        assert self.n_left >= 0
        return (b"red\nblue\n" if self.n_left == 3 else b"") + b"x" * (n or 0)


def test_a_line_of_standard_input_that_does_not_end_is_not_copied(texts, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Endless()))
    with pytest.raises(DataError, match=r"^standard input line 3 has more than 8,388,608 bytes: check that its lines"):
        ready("-", texts)
