"""Data behind URLs: fetched once a machine for every state, verified, and never half kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mach.config import Config
from mach.data.prepare import prepare
from mach.data.transfer import fetch_store
from mach.errors import DataError, StorageError
from mach.files import places
from mach.files.places import place
from tests.conftest import planted_rows, write_repository
from tests.flaky import FlakyFileSystem


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


def test_a_source_is_fetched_once_for_every_state(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_repository(tmp_path / "train.txt", planted_rows(50, seed=1))
    url = f"flaky://{source}"
    monkeypatch.setattr(FlakyFileSystem, "n_operations", {})
    data = config.data.model_copy(update={"cache": None, "classes": None})
    first = prepare(data, config.text, url)
    assert prepare(data, config.text, url).path == first.path
    assert FlakyFileSystem.n_operations["get"] == 1
    assert first.fingerprint == prepare(data, config.text, str(source)).fingerprint
    write_repository(source, planted_rows(60, seed=1))
    assert prepare(data, config.text, url).n_rows == 60
    with pytest.raises(DataError, match="cannot read flaky://.*none.txt: No such file"):
        prepare(data, config.text, f"flaky://{tmp_path}/none.txt")
    with pytest.raises(DataError, match="is a directory but no store"):
        prepare(data, config.text, f"flaky://{tmp_path}")


def test_a_destination_with_other_data_is_left_alone(config: Config, planted: Path, tmp_path: Path):
    url = place(f"memory://{tmp_path.name}/store")
    data = config.data.model_copy(update={"classes": None})
    for _ in range(2):
        prepare(data, config.text, str(planted / "train.txt"), url)
    with pytest.raises(StorageError, match="is a store of other data"):
        prepare(data, config.text, str(planted / "test.txt"), url)


def test_an_array_behind_a_url_brings_its_classes(config: Config, tmp_path: Path):
    np.save(tmp_path / "rows.npy", np.eye(6, dtype=np.float32))
    np.save(tmp_path / "rows.classes.npy", np.arange(6))
    data = config.data.model_copy(update={"classes": None})
    store = prepare(data, config.text, f"local://{tmp_path}/rows.npy")
    np.testing.assert_array_equal(store.class_ids, np.arange(6))
    (tmp_path / "names.txt").write_text("abcdef".replace("", "\n").strip())
    named = data.model_copy(update={"classes": f"local://{tmp_path}/names.txt"})
    assert prepare(named, config.text, f"local://{tmp_path}/rows.npy").class_names[3] == "d"  # type: ignore[index]


def test_a_store_is_fetched_once_and_a_damaged_one_not_kept(
    config: Config, planted: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    url = place(f"flaky://{tmp_path}/store")
    made = prepare(config.data, config.text, str(planted / "train.txt"), url)
    for trouble, complaint in (("spoil", "store flaky://.*/store is damaged"), ("cut", "bytes arrived")):
        spoilt = staticmethod(lambda kind, path, t=trouble: t if kind == "get" and path.endswith("_ids") else "")
        monkeypatch.setattr(FlakyFileSystem, "trouble", spoilt)
        with pytest.raises(StorageError, match=complaint):
            fetch_store(url)
        assert not list(cache.glob("store-*"))
    monkeypatch.setattr(FlakyFileSystem, "trouble", staticmethod(lambda kind, path: ""))
    store = fetch_store(url)
    assert (store.fingerprint, store.compute_fingerprint()) == (made.fingerprint, made.fingerprint)
    monkeypatch.setattr(FlakyFileSystem, "n_operations", {})
    assert fetch_store(url).path == store.path
    assert "get" not in FlakyFileSystem.n_operations
    with pytest.raises(StorageError, match="cannot read flaky://.*/nothing/meta.json: No such file"):
        fetch_store(f"flaky://{tmp_path}/nothing")
