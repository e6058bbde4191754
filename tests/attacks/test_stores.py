"""A stranger's prepared store: it is looked at once before a row of it is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mach.cli import main
from mach.config import DataConfig, TextConfig
from mach.data.class_texts import FILE
from mach.data.meta import DTYPES
from mach.data.prepare import prepare
from mach.errors import StorageError
from tests.attacks.hostile import line_of

HUGE = 2**63 - 1


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse store with names and texts."""
    folder = tmp_path_factory.mktemp("stores")
    rows = [f"{k % 5},{5 + k % 3} {k % 7}:0.5 {8 + k % 4}:1.5" for k in range(40)]
    (folder / "rows.txt").write_text("40 12 8\n" + "\n".join(rows) + "\n")
    (folder / "classes.csv").write_text("name,alternatives\n" + "".join(f"class {k},a|b\n" for k in range(8)))
    config = DataConfig(train="", classes=str(folder / "classes.csv"))
    return prepare(config, TextConfig(), str(folder / "rows.txt"), folder / "store").path


@pytest.fixture
def store(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "store")
    return tmp_path / "store"


def refusal(path: Path) -> str:
    line = line_of(lambda: prepare(DataConfig(train=""), TextConfig(), str(path)))
    assert str(path) in line
    return line


def test_a_good_store_is_used(store: Path):
    assert prepare(DataConfig(train=""), TextConfig(), str(store)).n_rows == 40


def entry(at: int, value: float) -> Callable[[Any], Any]:
    def changed(array: Any) -> Any:
        array[at] = value
        return array

    return changed


def last_of(letter: bytes, value: int) -> Callable[[Any], Any]:
    return lambda array: entry(array.tobytes().rindex(letter), value)(array)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("feature_indptr", entry(0, -HUGE), "feature_indptr does not ascend from 0 to 80"),
        ("feature_indptr", entry(20, HUGE), "feature_indptr does not ascend"),
        ("feature_indptr", entry(-1, HUGE), "feature_indptr does not ascend"),
        ("feature_indices", entry(41, 12), "feature 12 of row 20 is none of 0..11"),
        ("feature_indices", entry(0, -1), "feature -1 of row 0"),
        ("feature_indices", entry(41, 0), "feature ids of row 20 do not ascend"),
        ("feature_values", entry(3, np.nan), "feature_values 3 is NaN or infinity"),
        ("feature_values", entry(3, np.inf), "feature_values 3 is NaN or infinity"),
        ("class_indptr", lambda array: array[::-1], "class_indptr does not ascend"),
        ("class_ids", entry(79, 2**31 - 1), "class 2147483647 of row 39 is none of 0..7"),
        ("class_ids", entry(1, 0), "class ids of row 0 do not ascend"),
        ("class_name_offsets", entry(1, HUGE), "offsets of class names do not ascend"),
        ("class_name_offsets", entry(0, -1), "offsets of class names do not ascend"),
        ("class_name_bytes", entry(0, 255), "the name of class 0 is no UTF-8"),
        (FILE, entry(3, 255), "class_texts.safetensors: header of"),
        (FILE, lambda array: np.where(array == ord("b"), 255, array).astype(np.uint8), "class_texts.safetensors"),
        (FILE, last_of(b"b", 255), "alternatives: the name of class 15 is no UTF-8"),
    ],
)
def test_arrays_that_kernels_could_not_trust(store: Path, name: str, change: Callable[[Any], Any], said: str):
    change(np.fromfile(store / name, DTYPES[name]).copy()).tofile(store / name)
    assert said in refusal(store)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_rows", "x"),
        ("n_rows", -1),
        ("n_rows", 2**62),
        ("n_rows", float("inf")),
        ("n_rows", int("9" * 300)),
        ("n_rows", True),
        ("n_features", 2**31),
        ("n_features", None),
        ("n_classes", 7),
        ("kind", "dense"),
        ("kind", "other"),
        ("fingerprint", "../../x"),
        ("fingerprint", None),
        ("text_features", "x"),
        ("old_parts", [{"n_rows": 10**9, "fraction": 0.1, "seed": 0}]),
        ("old_parts", [{"n_rows": 1}]),
        ("old_parts", 5),
        ("row_features", -5),
        ("bytes", []),
        ("bytes", {}),
        ("bytes", {"../../x": 4}),
        ("key", None),
    ],
)
def test_a_description_that_does_not_hold(store: Path, key: str, value: Any):
    meta = json.loads((store / "meta.json").read_text()) | {key: value}
    (store / "meta.json").write_text(json.dumps(meta))
    line = refusal(store)
    assert key in line or "bytes" in line or "lists" in line or "old_parts" in line


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"[" * 10**5, b'{"a":' * 10**5, b"\xff", b"9" * 5000])
def test_a_description_that_is_none(store: Path, content: bytes):
    (store / "meta.json").write_bytes(content)
    assert "meta.json" in refusal(store)


@pytest.mark.parametrize("name", ["meta.json", *sorted(DTYPES.keys() - {"features"})])
def test_no_array_is_a_pipe_or_a_device(store: Path, name: str):
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path.name, path)):
        (store / name).unlink()
        make(store / name)
        assert name in refusal(store) or "Too many levels" in refusal(store)


def test_the_command_line_says_it(store: Path, trained: Path):
    entry_41 = np.fromfile(store / "feature_indices", "<i4")
    entry_41[41] = 2**30
    entry_41.tofile(store / "feature_indices")
    result = CliRunner().invoke(main, ["evaluate", str(trained), str(store)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "feature 1073741824 of row 20" in result.stderr


def test_dense_rows_are_finite(tmp_path: Path):
    np.save(tmp_path / "rows.npy", np.ones((20, 3), np.float32))
    np.save(tmp_path / "rows.classes.npy", np.arange(20) % 4)
    path = prepare(DataConfig(train=""), TextConfig(), str(tmp_path / "rows.npy"), tmp_path / "store").path
    values = np.fromfile(path / "features", "<f4")
    values[7] = np.nan
    values.tofile(path / "features")
    assert "features 7 is NaN or infinity" in refusal(path)


def test_text_features_of_another_width(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "red apple", "classes": ["a"]}\n' * 3)
    path = prepare(DataConfig(train=""), TextConfig(), str(tmp_path / "rows.jsonl"), tmp_path / "store").path
    (path / "meta.json").write_text((path / "meta.json").read_text().replace('"n_features": 2', '"n_features": 99'))
    assert "text features have D = 2, it has 99" in refusal(path)
    shutil.rmtree(path / "text_features")
    with pytest.raises(StorageError, match=r"text_features/text\.json"):
        prepare(DataConfig(train=""), TextConfig(), str(path))
