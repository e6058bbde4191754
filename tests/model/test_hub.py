"""Models on a hub, by a local fake of the four functions that are called."""

from __future__ import annotations

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import mach
from mach.errors import ConfigError, StorageError
from mach.files.records import write_json
from mach.model.calibration import Calibration, fingerprint
from mach.model.curves import Curve
from tests.model.test_arguments import rows_of


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all repositories."""
    folder = tmp_path / "hub"

    class HfApi:
        def create_repo(self, *, repo_id: str, private: bool, exist_ok: bool) -> None:
            (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns: list[str]) -> None:
            def ignored(at: str, names: list[str]) -> set[str]:
                inside = Path(at).relative_to(folder_path)
                return {n for n in names if any(fnmatch(str(inside / n), pattern) for pattern in ignore_patterns)}

            shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True, ignore=ignored)

        def upload_file(self, *, repo_id: str, path_or_fileobj: bytes, path_in_repo: str) -> None:
            (folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def snapshot_download(*, repo_id: str, revision: str | None, local_dir: str) -> str:
        shutil.copytree(folder / repo_id, local_dir, dirs_exist_ok=True)
        return local_dir

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    )
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_pushed_model_is_loaded_and_answers_the_same(hub: Path, trained: Path):
    model = mach.load(trained)
    assert model.push_to_hub("someone/planted", licence="cc0-1.0") == "hf://someone/planted"
    card = (hub / "someone/planted/README.md").read_text()
    assert "license: cc0-1.0" in card
    assert 'mach.load("hf://someone/planted")' in card
    again: Any = mach.load("hf://someone/planted")
    for mine, theirs in zip(model.topk(rows_of(), 5), again.topk(rows_of(), 5), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_card_has_the_measures_and_the_curve_of_the_calibration(hub: Path, trained: Path, tmp_path: Path):
    run, drawn = tmp_path / "run", hub / "someone/planted/calibration.svg"
    shutil.copytree(trained, run)
    for name in ("curve.json", "calibration.json"):
        (run / name).unlink(missing_ok=True)
    model = mach.load(run)
    model.push_to_hub("someone/planted")
    assert "It was not measured" in (hub / "someone/planted/README.md").read_text()
    assert not drawn.exists()
    curve = Curve(
        method="beta", scores=[-3, -1, 0], probabilities=[0, 0.5, 1], n_pairs=9, ece_before=0.1, ece_after=0.02
    )
    digest = fingerprint(model.run, model.repetitions)
    model.calibration = Calibration(fingerprint=digest, n_rows=9, prior=0, plain=curve, reranked=None)
    write_json(
        model.run.curve_file, {"fingerprint": "0", "n_rows": 9, "version": 0, "rows": [{"P@1": 0.5, "P@3": 0.25}]}
    )
    model.push_to_hub("someone/planted")
    card = (hub / "someone/planted/README.md").read_text()
    assert "| P@1 | P@3 |\n|---|---|\n| 50.0 | 25.0 |" in card
    assert "error is 2.0 %.\n![The probability that a class is right, by its score](calibration.svg)" in card
    [line] = [each for each in ElementTree.fromstring(drawn.read_text()) if each.tag.endswith("polyline")]
    assert line.get("points") == "40.0,170.0 240.0,95.0 340.0,20.0"


def test_weights_that_are_not_those_of_training_are_refused(hub: Path, trained: Path):
    mach.load(trained).push_to_hub("someone/planted")
    [weights, *_] = sorted((hub / "someone/planted/repetitions").rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StorageError):
        mach.load("hf://someone/planted")


@pytest.mark.parametrize("name", ["hf://model", "hf://a/b/c", "hf:///x"])
def test_a_name_of_no_model_is_one_line(hub: Path, name: str):
    with pytest.raises(ConfigError, match="hf://user/model"):
        mach.load(name)


def test_what_is_not_there_is_one_line(hub: Path):
    with pytest.raises(StorageError, match="hf://some/thing cannot be fetched"):
        mach.load("hf://some/thing")


def test_the_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"mach-classifier\[hub\]"):
        mach.load("hf://some/thing")
