"""The store: a frozen format, checks on opening, and writing that is whole or not at all."""

from __future__ import annotations

import errno
import json
import resource
from collections.abc import Sequence, Sized
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mach.config import TextConfig
from mach.data.store import Chunk, Store, split_rows
from mach.data.text import TextFeatures
from mach.data.writer import StoreWriter
from mach.errors import DataError, StorageError

# Two rows: classes {0, 2} with features 1: 0.5, 3: -2, and no class with no feature. Never change these bytes: a
# store of format 1 must open with every later version.
GOLDEN = {
    "meta.json": b'{"format": 1, "kind": "sparse", "source": "golden", "key": "", "n_rows": 2, "n_features": 4, '
    b'"n_classes": 3, "n_rows_without_features": 1, "n_rows_without_classes": 1, "n_unknown_classes": 5, '
    b'"text_features": null, "fingerprint": "9c2f", "bytes": {"feature_indptr": 24, "feature_indices": 8, '
    b'"feature_values": 8, "class_indptr": 24, "class_ids": 8, "class_name_bytes": 4, "class_name_offsets": 32}}',
    "feature_indptr": bytes.fromhex("0000000000000000 0200000000000000 0200000000000000"),
    "feature_indices": bytes.fromhex("01000000 03000000"),
    "feature_values": bytes.fromhex("0000003f 000000c0"),
    "class_indptr": bytes.fromhex("0000000000000000 0200000000000000 0200000000000000"),
    "class_ids": bytes.fromhex("00000000 02000000"),
    "class_name_bytes": "aäc".encode(),
    "class_name_offsets": bytes.fromhex("0000000000000000 0100000000000000 0300000000000000 0400000000000000"),
}


@pytest.fixture
def golden(tmp_path) -> Path:
    folder = tmp_path / "golden"
    folder.mkdir()
    for name, content in GOLDEN.items():
        (folder / name).write_bytes(content)
    return folder


def chunk(classes: list[list[int]], features: list[dict[int, float]]) -> Chunk:
    def indptr(rows: Sequence[Sized]) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, rows)], dtype=np.int64)

    indices = np.array([i for row in features for i in row], dtype=np.int32)
    values = np.array([v for row in features for v in row.values()], dtype=np.float32)
    ids = np.array([k for row in classes for k in row], dtype=np.int32)
    return Chunk(indptr(classes), ids, (indptr(features), indices, values))


GOLDEN_CHUNK = chunk([[0, 2], []], [{1: 0.5, 3: -2.0}, {}])


def test_the_golden_store_opens(golden):
    store = Store.open(golden)
    assert (store.n_rows, store.n_features, store.n_classes, store.n_nonzeros) == (2, 4, 3, 2)
    assert (store.fingerprint, store.is_dense, store.text_features) == ("9c2f", False, None)
    assert store.class_names is not None
    assert list(store.class_names) == ["a", "ä", "c"]
    assert (store.class_names[-1], store.class_names[:2]) == ("c", ["a", "ä"])
    with pytest.raises(IndexError, match="class 3 of 3 named classes"):
        store.class_names[3]
    assert store.class_counts().tolist() == [1, 0, 1]
    assert store.features(0, 2).toarray().tolist() == [[0, 0.5, 0, -2], [0, 0, 0, 0]]
    assert store.features(1, 2).toarray().tolist() == [[0, 0, 0, 0]]
    assert store.features(2, 9).shape == (0, 4)
    assert store.describe() == {
        "path": str(golden),
        "kind": "sparse",
        "n_rows": 2,
        "n_features": 4,
        "n_classes": 3,
        "n_rows_without_features": 1,
        "n_rows_without_classes": 1,
        "n_unknown_classes": 5,
        "fingerprint": "9c2f",
    }


def test_arrays_are_read_only_and_not_copied(golden):
    store = Store.open(golden)
    with pytest.raises(ValueError, match="read-only"):
        store.feature_values[0] = 1
    assert np.shares_memory(store.feature_values, store.feature_values)
    with pytest.raises(StorageError, match="holds sparse features: it has no array features"):
        store.dense_ND  # noqa: B018


def test_the_writer_makes_the_golden_bytes(tmp_path):
    with StoreWriter(tmp_path / "store", source="golden", n_features=4) as writer:
        writer.append(GOLDEN_CHUNK)
        writer.class_names, writer.n_unknown_classes = ["a", "ä", "c"], 5
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    assert meta | {"fingerprint": "9c2f"} == json.loads(GOLDEN["meta.json"])
    for name in meta["bytes"]:
        assert (tmp_path / "store" / name).read_bytes() == GOLDEN[name], name
    assert {path.name for path in (tmp_path / "store").iterdir()} == set(GOLDEN)


def test_the_fingerprint_is_of_the_content_not_of_the_chunks(tmp_path):
    def fingerprint(name: str, chunks: list[Chunk], **options: object) -> str:
        with StoreWriter(tmp_path / name, source=name, key=name, n_features=4, n_classes=3) as writer:
            for part in chunks:
                writer.append(part)
            writer.class_names = options.get("names")  # type: ignore[assignment]
        return Store.open(tmp_path / name).fingerprint

    whole = fingerprint("whole", [GOLDEN_CHUNK])
    assert whole == "31991448cbafa8e473536f8bc075d88f"  # frozen: prepared test stores are found by it
    assert whole == fingerprint("parts", [chunk([[0, 2]], [{1: 0.5, 3: -2.0}]), chunk([[]], [{}])])
    assert whole != fingerprint("value", [chunk([[0, 2], []], [{1: 0.5, 3: -2.5}, {}])])
    assert whole != fingerprint("class", [chunk([[0, 1], []], [{1: 0.5, 3: -2.0}, {}])])
    assert whole != fingerprint("rows", [chunk([[0, 2], [], []], [{1: 0.5, 3: -2.0}, {}, {}])])
    assert whole != fingerprint("names", [GOLDEN_CHUNK], names=["a", "b", "c"])


def test_dense_rows_and_empty_arrays(tmp_path):
    dense = np.arange(6, dtype=np.float32).reshape(3, 2)
    with StoreWriter(tmp_path / "dense", source="", dense=True) as writer:
        for begin, end in ((0, 1), (1, 3)):
            n = end - begin
            writer.append(Chunk(np.zeros(n + 1, np.int64), np.empty(0, np.int32), dense[begin:end]))
    store = Store.open(tmp_path / "dense")
    assert (store.n_rows, store.n_features, store.n_classes, store.n_nonzeros) == (3, 2, 0, 6)
    assert store.is_dense
    np.testing.assert_array_equal(store.dense_ND, dense)
    view = store.features(1, 3)
    np.testing.assert_array_equal(view, dense[1:])
    assert np.shares_memory(view, store.dense_ND)
    assert store.meta["n_rows_without_classes"] == 3
    assert store.class_ids.dtype == np.int32


@settings(max_examples=25)  # every example flushes files to the disk
@given(names=st.lists(st.text(st.characters(), max_size=4), max_size=6))
def test_any_class_names_come_back(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("names") / "store"
    with StoreWriter(path, source="", n_classes=len(names)) as writer:
        writer.append(chunk([[]], [{}]))
        writer.class_names = iter(names)
    stored = Store.open(path).class_names
    assert stored is not None
    assert list(stored) == names


def test_text_features_travel_with_the_store(tmp_path):
    features = TextFeatures(TextConfig()).fit(["red apple", "green apple"])
    with StoreWriter(tmp_path / "store", source="", n_features=3) as writer:
        writer.append(chunk([[0]], [{0: 1}]))
        writer.text_features = features
    loaded = Store.open(tmp_path / "store").text_features
    assert loaded is not None
    assert loaded.fingerprint() == features.fingerprint() == Store.open(tmp_path / "store").meta["text_features"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("meta.json", None, "is not a complete store: meta.json is missing"),
        ("meta.json", b"{", "meta.json is damaged ("),
        ("meta.json", b"[]", "meta.json is damaged ("),
        ("meta.json", b"\xff", "meta.json is damaged ("),
        ("meta.json", b'{"format": 1, "bytes": {}}', "meta.json is damaged (kind"),
        ("meta.json", b'{"format": 2}', "has format 2, this version reads 1: rebuild it"),
        ("meta.json", GOLDEN["meta.json"].replace(b"class_ids", b"../x"), "lists an unknown array '../x'"),
        ("class_ids", None, "is not a complete store: class_ids is missing"),
        ("class_ids", b"1234", "class_ids has 4 bytes instead of 8: rebuild it"),
    ],
)
def test_a_damaged_store_is_named(golden, name, content, complaint):
    (golden / name).unlink()
    if content is not None:
        (golden / name).write_bytes(content)
    with pytest.raises(StorageError) as caught:
        Store.open(golden)
    assert str(golden) in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_array_sizes_must_agree_with_the_counts(golden):
    meta = json.loads(GOLDEN["meta.json"]) | {"n_rows": 3}
    (golden / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        StorageError, match=r"meta\.json is damaged \(feature_indptr has 24 bytes, its count needs 32\)"
    ):
        Store.open(golden)


# --- whole or not at all


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_behind(tmp_path, error):
    def write() -> None:
        with StoreWriter(tmp_path / "store", source="") as writer:
            writer.append(GOLDEN_CHUNK)
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "names", "complaint"),
    [
        ({"n_features": 3}, None, r"feature index 3 is outside 0\.\.2"),
        ({"n_classes": 2}, None, r"class 2 is outside 0\.\.1"),
        ({"n_classes": 5}, ["a", "b"], "2 class names for 5 classes"),
        ({}, [], "0 class names for 3 classes"),
    ],
)
def test_rows_that_contradict_the_writer_are_refused(tmp_path, options, names, complaint):
    def write() -> None:
        with StoreWriter(tmp_path / "store", source="", **options) as writer:
            writer.class_names = names
            writer.append(GOLDEN_CHUNK)

    with pytest.raises(DataError, match=complaint):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_not_overwritten(golden):
    with pytest.raises(StorageError, match=r"golden exists already: remove it"), StoreWriter(golden, source=""):
        pass
    assert Store.open(golden).n_rows == 2


def test_a_file_limit_met_in_the_middle_is_a_storage_error(tmp_path):
    big = chunk([[0]] * 2000, [dict.fromkeys(range(100), 1.0)] * 2000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with (
            pytest.raises(StorageError, match=r"cannot write store .*store: File too large"),
            StoreWriter(tmp_path / "store", source="") as writer,
        ):
            writer.append(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "write_text"])
def test_a_full_disk_at_the_end_is_a_storage_error(tmp_path, monkeypatch, call):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync" if call == "fsync" else f"pathlib.Path.{call}", full)
    with (
        pytest.raises(StorageError, match=r"cannot write store .*store: No space left on device"),
        StoreWriter(tmp_path / "store", source="") as writer,
    ):
        writer.append(GOLDEN_CHUNK)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"cannot write store .*file/store: (Not a directory|File exists)"),
        StoreWriter(tmp_path / "file" / "store", source=""),
    ):
        pass


def test_a_name_that_is_too_long_is_a_storage_error(tmp_path):
    with (
        pytest.raises(StorageError, match=r"cannot write store .*nn: File name too long"),
        StoreWriter(tmp_path / ("n" * 300), source=""),
    ):
        pass


# --- splitting


@given(n_rows=st.integers(0, 300), fraction=st.floats(0, 0.999), seed=st.integers(0, 2**32))
def test_a_split_partitions_the_rows(n_rows, fraction, seed):
    training, validation = split_rows(n_rows, fraction, seed)
    assert training.dtype == validation.dtype == np.int64
    assert np.all(np.diff(training) > 0)
    assert np.all(np.diff(validation) > 0)
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(n_rows))
    if n_rows >= 2:
        assert len(training) >= 1
        assert abs(len(validation) - fraction * n_rows) <= 1
        assert bool(len(validation)) == (fraction > 0)


def test_a_split_is_frozen_and_depends_on_the_seed():
    assert split_rows(10, 0.3, 0)[1].tolist() == [2, 4, 6]
    assert split_rows(10, 0.3, 0)[1].tolist() != split_rows(10, 0.3, 1)[1].tolist()
