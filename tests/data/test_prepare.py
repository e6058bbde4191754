"""From a source to a store: formats, the cache, test rows like training rows, two processes at once."""

from __future__ import annotations

import gzip
import json
import lzma
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from mach.config import DataConfig, TextConfig
from mach.data import characters, tables
from mach.data.prepare import prepare
from mach.data.readers import NumericText
from mach.data.store import Reference, Store
from mach.errors import ConfigError, DataError, StorageError
from mach.files.places import names_in

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
NUMBERS = "3 6 4\n0,2 1:0.5 4:1\n 5:2\n3\n"
TEXTS = [("red apple", ["fruit", "red"]), ("", ["fruit"]), ("green car", ["car"]), ("a thing", [])]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with the cache inside, as working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def options(**changes: object) -> DataConfig:
    return DataConfig.model_validate({"train": "unused"} | changes)


def ready(source: str, like: Store | None = None, text: TextConfig | None = None, **changes: object) -> Store:
    return prepare(options(**changes), text or TextConfig(), source, like=like)


def save(name: str, content: str) -> str:
    Path(name).write_text(content, encoding="utf-8")
    return name


def save_texts(name: str, rows: list[tuple[str, list[str]]]) -> str:
    return save(name, "".join(json.dumps({"text": text, "classes": names}) + "\n" for text, names in rows))


def classes_of(store: Store) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(store.class_ids, store.class_indptr[1:-1])]


def names_of(store: Store) -> list[str]:
    assert store.class_names is not None
    return list(store.class_names)


# --- numbers


def test_a_repository_file_becomes_a_store(home):
    store = ready(save("set.train.txt", NUMBERS))
    assert store.path.parent == home / "cache"
    assert store.path.name.startswith("set-")
    assert (store.n_rows, store.n_features, store.n_classes) == (3, 6, 4)
    assert classes_of(store) == [[0, 2], [], [3]]
    assert store.features(0, 3).toarray().tolist() == [[0, 0.5, 0, 0, 1, 0], [0, 0, 0, 0, 0, 2], [0] * 6]
    assert (store.meta["n_rows_without_classes"], store.meta["n_rows_without_features"]) == (1, 1)
    assert (store.class_names, store.text_features) == (None, None)
    assert store.meta["source"] == "set.train.txt"


def test_formats_of_the_same_rows_make_the_same_content(home):
    repository = ready(save("a.txt", NUMBERS))
    svmlight = ready(save("a.svm", "0,2 1:0.5 4:1\n5:2 # no class\n3.0\n"))
    chosen = ready(save("a.data", NUMBERS), format="repository")
    assert repository.fingerprint == svmlight.fingerprint == chosen.fingerprint
    assert repository.path != chosen.path


def test_dense_rows(home):
    dense = np.arange(8, dtype=np.float32).reshape(4, 2)
    np.save("d.npy", dense)
    np.save("d.classes.npy", np.array([0, 5, 0, 1]))
    store = ready("d.npy")
    np.testing.assert_array_equal(store.dense_ND, dense)
    assert (store.n_classes, classes_of(store)) == (6, [[0], [5], [0], [1]])
    np.save("d.classes.npy", np.array([0, 5, 0, 2]))
    assert classes_of(ready("d.npy"))[3] == [2]  # the classes' file is part of the key


def test_names_are_attached_to_numbers(home):
    source = save("a.txt", NUMBERS)
    store = ready(source, classes=save("names.txt", "zero\none\r\n two \n\n"))
    assert names_of(store) == ["zero", "one", "two", ""]
    with pytest.raises(DataError, match=r"data\.classes has 3 names, a\.txt has K = 4 classes: set it to"):
        ready(source, classes=save("names.txt", "zero\none\ntwo"))
    svmlight = save("a.svm", "1 1:1\n")
    assert ready(svmlight, classes="names.txt").n_classes == 3
    with pytest.raises(DataError, match=r"line 1: class '1' is outside 0\.\.0"):
        ready(svmlight, classes=save("names.txt", "zero"))


def test_test_rows_take_the_shape_of_the_training_rows(home):
    train = ready(save("train.txt", NUMBERS), classes=save("names.txt", "a\nb\nc\nd\n"))
    test = ready(save("test.txt", "1 5 3\n2 1:1\n"), like=train)
    assert (test.n_features, test.n_classes, names_of(test)) == (6, 4, ["a", "b", "c", "d"])
    with pytest.raises(DataError, match=r"test\.txt has D = 7 sparse features, the training store .* has D = 6 sparse"):
        ready(save("test.txt", "1 7 3\n2 1:1\n"), like=train)
    with pytest.raises(DataError, match=r"test\.txt has K = 5 classes, the training store .* has K = 4: prepare"):
        ready(save("test.txt", "1 6 5\n2 1:1\n"), like=train)
    with pytest.raises(DataError, match=r"test\.svm line 2: feature index '6' is outside 0\.\.5"):
        ready(save("test.svm", "0 5:1\n0 6:1\n"), like=train)
    np.save("d.npy", np.zeros((1, 6)))
    np.save("d.classes.npy", np.array([0]))
    with pytest.raises(DataError, match=r"d\.npy has D = 6 dense features, the training store .* has D = 6 sparse"):
        ready("d.npy", like=train)


# --- text


def test_text_gets_features_and_ids_by_first_appearance(home):
    store = ready(save_texts("t.jsonl", TEXTS), text=TextConfig())
    assert names_of(store) == ["fruit", "red", "car"]
    assert classes_of(store) == [[0, 1], [0], [2], []]
    assert store.text_features is not None
    indptr, indices, values = store.text_features.transform([text for text, _ in TEXTS])
    for actual, expected in (
        (store.feature_indptr, indptr),
        (store.feature_indices, indices),
        (store.feature_values, values),
    ):
        np.testing.assert_array_equal(actual, expected)
    assert store.n_features == store.text_features.n_features == 6
    assert (store.meta["n_rows_without_classes"], store.meta["n_rows_without_features"]) == (1, 1)


def test_test_texts_use_the_training_vocabularies(home):
    train = ready(save_texts("t.jsonl", TEXTS))
    test = ready(save_texts("u.jsonl", [("red car", ["car", "boat"]), ("boat", ["boat"])]), like=train)
    assert (test.n_features, test.n_classes, names_of(test)) == (train.n_features, 3, names_of(train))
    assert classes_of(test) == [[2], []]
    assert test.meta["n_unknown_classes"] == 2
    assert test.meta["text_features"] == train.meta["text_features"]
    assert np.diff(test.feature_indptr).tolist() == [2, 0]
    numbers = ready(save("a.txt", NUMBERS))
    with pytest.raises(DataError, match=r"u\.jsonl holds text, but the training store .* was made of numbers"):
        ready("u.jsonl", like=numbers)


def test_a_given_vocabulary_of_classes_drops_other_names(home):
    store = ready(save_texts("t.jsonl", TEXTS), classes=save("names.txt", "car\nfruit\nship\n"))
    assert (names_of(store), store.n_classes) == (["car", "fruit", "ship"], 3)
    assert classes_of(store) == [[1], [1], [0], []]
    assert store.meta["n_unknown_classes"] == 1
    with pytest.raises(DataError, match=r"names\.txt line 3: class 'car' stands on line 1 too"):
        ready("t.jsonl", classes=save("names.txt", "car\nfruit\ncar\n"))


def test_builtin_characters(home, monkeypatch):
    rows = {"train": [("latin small a", ["LATIN SMALL LETTER A"])], "test": [("a", ["LATIN SMALL LETTER A", "A", "B"])]}
    monkeypatch.setattr(characters, "rows", lambda split, report: iter(rows[split]))
    monkeypatch.setattr(characters, "class_names", lambda: ["B", "LATIN SMALL LETTER A"])
    train = ready("builtin:characters")
    assert (names_of(train), classes_of(train)) == (["B", "LATIN SMALL LETTER A"], [[1]])
    test = ready("builtin:characters-test", like=train)
    assert (classes_of(test), test.meta["n_unknown_classes"]) == ([[0, 1]], 1)
    with pytest.raises(
        ConfigError, match=r"no embedded set 'builtin:letters' .* there are builtin:characters, builtin:"
    ):
        ready("builtin:letters")


def progress(source: str, text: TextConfig | None = None) -> dict[str, list[float]]:
    """Reported fractions by stage."""
    fractions: dict[str, list[float]] = {}
    prepare(
        options(),
        text or TextConfig(),
        source,
        report=lambda stage, fraction: fractions.setdefault(stage, []).append(fraction),
    )
    return fractions


@pytest.mark.parametrize("name", ["a.txt.xz", "a.svm", "a.jsonl.gz", "builtin:characters"])
def test_every_stage_rises_to_one(home, monkeypatch, name):
    rows = [(f"letter {n}", ["A"]) for n in range(5)]
    monkeypatch.setattr(tables, "CHUNK_ROWS", 2)

    def made(split: str, report: Callable[[float], None]) -> Iterator[tuple[str, list[str]]]:
        yield from rows
        report(1.0)

    monkeypatch.setattr(characters, "rows", made)
    monkeypatch.setattr(characters, "class_names", lambda: ["A"])
    Path("a.txt.xz").write_bytes(lzma.compress(NUMBERS.encode()))
    save("a.svm", "1 1:1\n\n# the end")
    Path("a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "classes": ["b"]}\n' * 3 + b"\n" * 9))
    stages = progress(name)
    assert all(fractions[-1] == 1 and fractions == sorted(fractions) for fractions in stages.values())
    if name.startswith("builtin:"):
        assert list(stages) == ["making rows", "fitting text", "reading"]
        assert stages["reading"] == stages["fitting text"] == [0.4, 0.8, 1, 1]


# --- the cache


def test_a_second_call_does_not_read_the_source(home, monkeypatch):
    first = ready(save("a.txt", NUMBERS))
    monkeypatch.setattr(NumericText, "chunks", None)
    second = ready(str(home / "a.txt"))
    assert (second.path, second.fingerprint) == (first.path, first.fingerprint)
    assert prepare(options(), TextConfig(min_rows=3), "a.txt").path == first.path  # text options do not matter here


def test_the_key_covers_all_that_matters(home):
    source, like = save_texts("t.jsonl", TEXTS), ready(save_texts("like.jsonl", TEXTS[:1]))
    names = save("names.txt", "car\n")
    stores = [
        ready(source),
        ready(source, like=like),
        ready(source, text=TextConfig(sublinear=True)),
        ready(source, class_separator=" "),
        ready(source, classes=names),
        ready(save_texts("v.jsonl", TEXTS)),
    ]
    save(names, "fruit\n")
    stores.append(ready(source, classes=names))
    save_texts(source, TEXTS[:2])
    stores.append(ready(source))
    os.utime(source, ns=(1, 1))
    stores.append(ready(source))
    assert len({store.path for store in stores}) == len(stores)


def test_a_chosen_cache_and_a_chosen_destination(home):
    source = save("a.txt", NUMBERS)
    assert ready(source, cache=str(home / "mine")).path.parent == home / "mine"
    store = prepare(options(), TextConfig(), source, home / "deep" / "store")
    assert store.path == home / "deep" / "store"
    assert prepare(options(), TextConfig(), source, store.path).fingerprint == store.fingerprint
    os.utime(source, ns=(1, 1))
    with pytest.raises(StorageError, match=r"deep/store was not prepared from a\.txt with these options"):
        prepare(options(), TextConfig(), source, store.path)


def test_a_failure_leaves_no_store(home):
    with pytest.raises(DataError, match=r"a\.txt line 3"):
        ready(save("a.txt", "2 9 9\n1 1:1\n1 x\n"))
    assert names_in(home / "cache") == []


@pytest.mark.parametrize("stage", ["fitting text", "reading"])
def test_an_interrupt_leaves_no_store(home, stage):
    def interrupt(at: str, fraction: float) -> None:
        if at == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(options(), TextConfig(), save_texts("t.jsonl", TEXTS), report=interrupt)
    assert names_in(home / "cache") == []


def test_long_names(home):
    store = ready(save(f"{'ä' * 125}.txt", NUMBERS))  # its name has 254 bytes
    assert store.path.name.startswith("ä" * 32 + "-")
    for source in ("n" * 300 + ".txt", "n" * 300):
        with pytest.raises(StorageError, match=r"cannot look for nnn.*: File name too long"):
            ready(source)
    with pytest.raises(DataError, match=r"cannot read nnn.*: File name too long"):
        ready(save("a.txt", NUMBERS), classes="n" * 300)
    with pytest.raises(StorageError, match=r"cannot keep .*nnn in .*: File name too long"):
        prepare(options(), TextConfig(), "a.txt", home / ("n" * 300))


# --- stores as sources


def test_a_store_is_opened_as_it_is(home):
    train = ready(save("train.txt", NUMBERS))
    assert ready(str(train.path)).path == train.path
    assert ready(str(train.path), like=train).path == train.path
    with pytest.raises(ConfigError, match=r"is a store already and used as it is: leave out the destination"):
        prepare(options(), TextConfig(), str(train.path), home / "elsewhere")
    with pytest.raises(ConfigError, match=r"is a store already .*: prepare its source with classes = names\.txt"):
        ready(str(train.path), classes="names.txt")
    assert ready(str(train.path), like=train, classes="names.txt").path == train.path
    wide = ready(save("wide.txt", "1 7 4\n0 6:1\n"))
    with pytest.raises(DataError, match=r"has D = 7 sparse features, the training store .* has D = 6"):
        ready(str(wide.path), like=train)


def test_what_a_model_remembers_serves_as_the_training_store(home):
    train = ready(save_texts("t.jsonl", TEXTS))
    reference = Reference(
        path=home / "run",
        fingerprint=train.fingerprint,
        n_features=train.n_features,
        n_classes=train.n_classes,
        is_dense=False,
        class_names=train.class_names,
        text_features=train.text_features,
    )
    source = save_texts("u.jsonl", TEXTS[2:])
    test = prepare(options(), TextConfig(), source, like=reference)
    assert test.path == ready(source, like=train).path
    assert ready(str(test.path), like=train).path == test.path


def test_a_store_of_other_text_does_not_fit(home):
    train = ready(save_texts("t.jsonl", TEXTS))
    other = ready(save_texts("u.jsonl", TEXTS[:2]))
    with pytest.raises(DataError, match="has other text features than"):
        ready(str(other.path), like=train)
    names = ready(save_texts("v.jsonl", [(text, [f"{name}!" for name in row]) for text, row in TEXTS]))
    with pytest.raises(DataError, match="has other class names than"):
        ready(str(names.path), like=train)


# --- sources that cannot be read


@pytest.mark.parametrize("name", ["a.svm", "a.csv", "a.jsonl"])
def test_a_source_without_rows_is_refused(home, name):
    with pytest.raises(DataError, match=rf"{name} (holds no rows|is empty or lacks)"):
        ready(save(name, ""))


def test_a_header_of_no_rows_is_refused(home):
    with pytest.raises(DataError, match=r"a\.txt holds no rows"):
        ready(save("a.txt", "0 5 5\n"))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "3 0 4\n1\n1\n1\n", r"a\.txt holds no features"),
        ("a.txt", "1 4 0\n 1:1\n", r"a\.txt holds no classes"),
        ("a.txt", "1 0 4\n1 0:1\n", r"a\.txt holds no features"),
        ("a.txt", "1 4 0\n1 1:1\n", r"a\.txt holds no classes"),
        ("a.svm", "1\n", r"a\.svm holds no features"),
        ("a.svm", "1:1\n", r"a\.svm holds no classes"),
        ("a.jsonl", '{"text": "a", "classes": []}\n', r"a\.jsonl holds no classes"),
    ],
)
def test_a_source_without_features_or_classes_is_refused(home, name, content, complaint):
    with pytest.raises(DataError, match=complaint):
        ready(save(name, content))
    assert names_in(home / "cache") == []


@pytest.mark.parametrize("name", ["a.doc", "a", "a.npz.gz", "a.parquet.xz"])
def test_an_ending_that_tells_no_format(home, name):
    with pytest.raises(ConfigError, match=rf"the ending of {name} tells no format: it may be \.txt, \.svm"):
        ready(save(name, ""))


def test_missing_sources_and_plain_directories(home):
    with pytest.raises(DataError, match=r"cannot read nothing\.txt: No such file"):
        ready("nothing.txt")
    with pytest.raises(DataError, match=r"cannot read names\.txt: No such file"):
        ready(save("a.txt", NUMBERS), classes="names.txt")
    (home / "folder").mkdir()
    with pytest.raises(DataError, match="cannot read folder: Is a directory"):
        ready("a.txt", classes="folder")
    with pytest.raises(DataError, match=r"folder is a directory but no store \(no meta\.json in it\)"):
        ready("folder")


# --- two at once


def _prepare_at_once(barrier: Barrier, source: str, queue: multiprocessing.Queue[tuple[str, str]]) -> None:
    barrier.wait()
    store = ready(source)
    queue.put((str(store.path), store.fingerprint))


def test_two_processes_at_once(home):
    source = save_texts("t.jsonl", TEXTS * 500)
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_prepare_at_once, args=(barrier, source, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(results) == 1
    assert results == {(str(ready(source).path), ready(source).fingerprint)}
    assert len(list((home / "cache").iterdir())) == 1


# --- a real set


@pytest.mark.skipif(not SHARED.exists(), reason=f"real data sets are absent: no {SHARED}")
def test_tate_leaf(home):
    train = ready(str(SHARED / "tate-leaf" / "train.txt.xz"), classes=str(SHARED / "tate-leaf" / "labels.txt.xz"))
    assert (train.n_rows, train.n_features, train.n_classes) == (49_060, 12_558, 15_015)
    assert len(names_of(train)) == 15_015
    assert round(len(train.class_ids) / train.n_rows, 1) == 6.2
    test = ready(str(SHARED / "tate-leaf" / "test.txt.xz"), like=train)
    assert (test.n_rows, test.n_features) == (9_733, 12_558)
    norms = np.sqrt(train.features(0, 1000).multiply(train.features(0, 1000)).sum(axis=1))
    np.testing.assert_allclose(norms, 1, atol=1e-3)
