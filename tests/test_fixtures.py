"""Run directories of every format so far load and answer as on the day they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mach
from mach.errors import MachError
from mach.reranking.record import is_due
from mach.runs.manifest import FORMAT
from mach.runs.run import Run
from tests.fixtures import answer, described

FIRST = {
    f"run-format-1{end}" for end in ("", "-kept", "-reranked", "-reranked-pairs", "-reranked-repeats")
}  # ask little
WHOLE = Path(__file__).parent / "fixtures/run-format-1-reranked-repeats"
FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("run-format-*"))


def test_the_current_format_has_a_fixture():
    assert f"run-format-{FORMAT}" in [path.name for path in FIXTURES]


@pytest.mark.parametrize("path", [path for path in FIXTURES if path.name in FIRST], ids=lambda path: path.name)
def test_an_old_run_answers_as_ever(path: Path):
    expected = json.loads((path / "expected.json").read_text())
    model = mach.load(path)
    ids, scores = model.topk(expected["queries"], k=3)
    np.testing.assert_array_equal(ids, expected["ids"])
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-4)
    assert model.names(ids[0])[0] == "red"
    assert (model.calibration is not None) == ("probabilities" in expected)
    if model.calibration:
        probabilities = model.topk(expected["queries"], k=3, probabilities=True)[1]
        np.testing.assert_allclose(probabilities, expected["probabilities"], rtol=1e-4)
    model.info()


@pytest.mark.parametrize("path", [path for path in FIXTURES if path.name not in FIRST], ids=lambda path: path.name)
def test_an_old_run_answers_all_questions_as_ever(path: Path):
    """Those of every version of its classes; ``python -m tests.fixtures check`` compares bits."""
    expected = json.loads((path / "expected.json").read_text())
    trunk = Run.open(path).config.network.trunk  # these are our own
    for version in expected["versions"]:
        version["info"].pop("assignment")  # how a table was made is not told any more
        with mach.load(path, version=version["version"], trunk=trunk) as model:
            found = described(model)
            assert (found["names"], found["history"]) == (version["names"], version["history"])
            assert {key: found["info"].get(key) for key in version["info"]} == version["info"]
            for asked in version["answers"]:
                verb, how = asked["verb"], asked["how"]
                got, where = answer(model, expected["queries"], verb, how), f"{verb}, {how}"
                assert got.get("ids") == asked.get("ids"), where
                np.testing.assert_allclose(got["scores"], asked["scores"], rtol=1e-5, atol=1e-6, err_msg=where)
            model.verify()
    assert is_due(Run.open(path)) == expected["is_due"]


def use_everything(run: Path) -> None:
    model = mach.load(run)
    model.names(model.topk("a red thing")[0])
    model.info()


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "config.toml",
        "class_names.safetensors",
        "text/text.json",
        "repetitions/r000/DONE",
        "repetitions/r000/weights.safetensors",
        "reranker.safetensors",
        "RERANKED",
        "calibration.json",
    ],
)
@pytest.mark.parametrize("damage", ["emptied", "cut", "garbage", "another shape"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, damage: str):
    run = tmp_path / "run"
    shutil.copytree(WHOLE, run)
    whole = (run / name).read_bytes()
    broken = {
        "emptied": b"",
        "cut": whole[: len(whole) // 2],
        "garbage": bytes(range(128, 256)) * 4,
        "another shape": b"[]" if name.endswith(("json", "DONE", "RERANKED")) else b"a = 1\n",
    }
    (run / name).write_bytes(broken[damage])
    with pytest.raises(MachError) as caught:
        use_everything(run)
    assert "\n" not in str(caught.value)
    assert name.rpartition("/")[2].partition(".")[0] in str(caught.value)


def test_a_run_of_a_newer_format_is_refused(tmp_path: Path):
    shutil.copytree(WHOLE, tmp_path / "run")
    manifest = tmp_path / "run/manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(MachError, match=f"has format {FORMAT + 1}, this version reads format {FORMAT}"):
        Run.open(tmp_path / "run")
