"""Missing labels mean no class in every format, by one rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from mach.config import DataConfig, TextConfig
from mach.data.missing import is_missing
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import DataError


def made(path: Path) -> Store:
    return prepare(DataConfig(train="x", cache=str(path.parent / "cache")), TextConfig(), str(path))


def classes_of(path: Path) -> list[list[str]]:
    store = made(path)
    names = [str(k) for k in range(store.n_classes)] if store.class_names is None else list(store.class_names)
    return [[names[k] for k in ids] for ids in np.split(store.class_ids, store.class_indptr[1:-1])]


@pytest.mark.parametrize("label", [None, float("nan"), np.float64("nan"), np.datetime64("NaT"), "", "\t"])
def test_what_is_missing(label: Any):
    assert is_missing(label)


@pytest.mark.parametrize("label", [0, False, 0.0, "nan", "None", "NA", "null", b"", (), (None,), np.int64(0), {}, []])
def test_what_is_not(label: Any):
    assert not is_missing(label)


def test_tables(tmp_path: Path):
    (tmp_path / "a.csv").write_text("text,classes\na,x\nb,\nc, \nd,NA\n")
    assert classes_of(tmp_path / "a.csv") == [["x"], [], [], ["NA"]]
    rows = [("a", "x"), ("b", None), ("c", float("nan")), ("d", ["y", None, float("nan"), ""]), ("e", 1.0), ("f", [])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "classes": k}) + "\n" for t, k in rows))
    assert classes_of(tmp_path / "a.jsonl") == [["x"], [], [], ["y"], ["1"], []]
    (tmp_path / "b.jsonl").write_text('{"text": "a", "classes": 1.5}\n')
    with pytest.raises(DataError, match=r"b.jsonl line 1: 1.5 in column 'classes' is no class name"):
        made(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["x", None, ""], [["x"], [], []]),
        ([1, None, 3], [["1"], [], ["3"]]),
        ([1.0, float("nan"), None], [["1"], [], []]),
        ([["x", None], None, []], [["x"], [], []]),
        ([[1.0, float("nan")], [], [2.0]], [["1"], [], ["2"]]),
    ],
)
def test_parquet(labels: list[Any], expected: list[list[str]], tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", "c"], "classes": labels}), tmp_path / "a.parquet")
    assert classes_of(tmp_path / "a.parquet") == expected


@pytest.mark.parametrize("name", ["a.svm", "a.txt"])
def test_numeric_text(name: str, tmp_path: Path):
    head = "5 9 3\n" if name == "a.txt" else ""
    (tmp_path / name).write_text(head + "nan 1:1\n2,NaN 1:1\nNAN,0 2:1\nnan\n1 3:1\n")
    assert classes_of(tmp_path / name) == [[], ["2"], ["0"], [], ["1"]]
    for wrong in ("na 1:1", "nano 1:1", "nan1 1:1", "n", "nan, 1:1"):
        (tmp_path / name).write_text(("1 9 3\n" if head else "") + wrong + "\n")
        with pytest.raises(DataError, match="is no integer from 0"):
            made(tmp_path / name)


@pytest.mark.parametrize("kind", [np.float64, np.int8, np.bool_])
def test_a_stored_zero_is_no_label(kind: Any, tmp_path: Path):
    x, y = csr_array(np.eye(3)), csr_array(np.ones((3, 4)))
    data = y.data.astype(kind)
    data[[0, 5, 6, 11]] = 0
    arrays = {"X_data": x.data, "X_indices": x.indices, "X_indptr": x.indptr, "X_shape": x.shape}
    arrays |= {"Y_data": data, "Y_indices": y.indices, "Y_indptr": y.indptr, "Y_shape": y.shape}
    if kind is np.float64:
        data[1] = np.nan
    np.savez(tmp_path / "a.npz", **arrays)
    np.save(tmp_path / "b.npy", np.eye(3))
    np.savez(tmp_path / "b.classes.npz", **arrays)
    expected = [["2", "3"] if kind is np.float64 else ["1", "2", "3"], ["0", "3"], ["0", "1", "2"]]
    assert classes_of(tmp_path / "a.npz") == classes_of(tmp_path / "b.npy") == expected
    np.savez(tmp_path / "c.npz", **(arrays | {"Y_data": data[:-1]}))
    with pytest.raises(DataError, match="Y_data has 11 entries, its indptr ends at 12"):
        made(tmp_path / "c.npz")


def test_classes_of_dense_rows(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.eye(4))
    np.save(tmp_path / "a.classes.npy", np.array([2, np.nan, 0, np.nan]))
    assert classes_of(tmp_path / "a.npy") == [["2"], [], ["0"], []]
    np.save(tmp_path / "a.classes.npy", np.array([2, np.nan, 0.5, np.nan]))
    with pytest.raises(DataError, match=r"row 2: class 0.5 is no integer"):
        made(tmp_path / "a.npy")


def test_arrays_are_read_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    x, y = csr_array(rng.random((50, 8)) * (rng.random((50, 8)) < 0.4)), csr_array(rng.random((50, 5)) < 0.4)
    parts = {f"{n}_{part}": getattr(m, part) for n, m in (("X", x), ("Y", y)) for part in ("data", "indices", "indptr")}
    np.savez(tmp_path / "a.npz", **parts, X_shape=x.shape, Y_shape=y.shape)
    whole = made(tmp_path / "a.npz").fingerprint
    monkeypatch.setattr("mach.data.matrices.BLOCK_ROWS", 7)
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    assert made(tmp_path / "b.npz").fingerprint == whole
    x.indptr[-1] += 1
    np.savez(tmp_path / "c.npz", **(parts | {"X_indptr": x.indptr}), X_shape=x.shape, Y_shape=y.shape)
    with pytest.raises(DataError, match="entries, its indptr ends at"):
        made(tmp_path / "c.npz")
