"""The conductor: what it takes for a configuration, what it reports, and the same bits by every launcher."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mach
from mach.config import Config, to_toml
from mach.errors import ConfigError, IncompleteRunError, OmissionWarning
from mach.files.tensors import map_tensors
from mach.runs.run import Run
from mach.training.conductor import configuration, plan_of_run


def bits(path: Path) -> dict[str, bytes]:
    """Everything that was learned, by the file and the name of its array."""
    files = [*sorted(path.rglob("weights.safetensors")), path / "reranker.safetensors"]
    learned = {
        f"{file.relative_to(path)} {name}": a.tobytes() for file in files for name, a in map_tensors(file)[0].items()
    }
    calibration = json.loads((path / "calibration.json").read_text())
    return learned | {"calibration": repr(calibration).encode()}


@pytest.fixture(scope="module")
def whole(config: Config) -> Config:
    """With all steps: held-out rows, a re-ranker whose order a pilot teaches, a calibration."""
    tree = config.model_dump(exclude_unset=True)
    tree["data"] |= {"validation_fraction": 0.1}
    tree["hashing"] |= {"repetitions": 2}
    tree["training"] |= {"epochs": 2}
    tree["reranking"] = {"candidates": 10, "pilots": 1}
    return Config.model_validate(tree)


def test_every_launcher_comes_to_the_same_bits(whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mach.reranking.order.LEAST_STEPS", 50)
    told: list[tuple[str, float]] = []
    model = mach.train(whole, tmp_path / "here", launcher="here", report=lambda *stage: told.append(stage))
    assert model.reranker is not None
    assert model.calibration is not None
    assert {"training", "re-ranker: candidates", "re-ranker: classifiers", "calibrating"} <= {
        stage for stage, _ in told
    }
    assert all(0 <= fraction <= 1 for _, fraction in told)
    assert told[-1] == ("calibrating", 1.0)
    mach.train(whole, tmp_path / "local", workers=1)
    assert bits(tmp_path / "local") == bits(tmp_path / "here")
    assert not (tmp_path / "here/pilots").exists()


def test_a_run_goes_on_and_a_finished_one_is_opened(config: Config, trained: Path, tmp_path: Path):
    first = mach.train(config, tmp_path / "run", launcher="here", repetitions=[1])
    assert first.repetitions == [1]
    assert mach.train(tmp_path / "run", launcher="here").repetitions == [0, 1, 2]
    for r in range(3):
        files = [Run.open(path).repetition(r).weights for path in (tmp_path / "run", trained)]
        assert files[0].read_bytes() == files[1].read_bytes()
    written = files[0].stat().st_mtime_ns
    assert mach.train(tmp_path / "run").repetitions == [0, 1, 2]
    assert files[0].stat().st_mtime_ns == written


def test_a_run_of_an_earlier_version_goes_on_by_its_own_rule_of_words(tmp_path: Path, monkeypatch):
    rows = "".join(f"C++ हिन्दी {colour},{colour}\nC# हिन्द {colour},{colour}\n" for colour in ("red", "blue") * 20)
    (tmp_path / "rows.csv").write_text("text,classes\n" + rows)
    tree: dict[str, Any] = {
        "data": {"train": str(tmp_path / "rows.csv"), "cache": str(tmp_path / "cache")},
        "hashing": {"repetitions": 1},
        "training": {"epochs": 1},
    }
    monkeypatch.setattr("mach.data.prepare.RULE", 1)
    before = mach.train(tree, tmp_path / "run", launcher="here")
    monkeypatch.undo()
    assert "हिन्दी" not in (tmp_path / "run/text/terms.txt").read_text().split("\n")
    shutil.rmtree(tmp_path / "cache")
    tree["hashing"] |= {"repetitions": 2}
    after = mach.train(tree, tmp_path / "run", launcher="here")  # reads the rows again, by the rule of the run
    assert after.repetitions == [0, 1]
    assert after.n_features == before.n_features
    mach.train(tree, tmp_path / "new", launcher="here")
    assert "हिन्दी" in (tmp_path / "new/text/terms.txt").read_text().split("\n")


@pytest.mark.parametrize("is_text", [False, True])
def test_a_run_of_an_earlier_version_goes_on_with_its_spelling_of_names(is_text: bool, tmp_path: Path, monkeypatch):
    (tmp_path / "rows.csv").write_text("text,classes\n" + "apple,cafe\u0301\npear,the\n" * 20)
    (tmp_path / "rows.svm").write_text("0 0:1\n1 1:1\n" * 20)
    (tmp_path / "names.txt").write_text("cafe\u0301\nthe \n")
    data = {"train": str(tmp_path / ("rows.csv" if is_text else "rows.svm")), "cache": str(tmp_path / "cache")}
    if not is_text:
        data["classes"] = str(tmp_path / "names.txt")
    tree: dict[str, Any] = {"data": data, "hashing": {"repetitions": 1}, "training": {"epochs": 1}}
    for module in ("names", "tables"):
        monkeypatch.setattr(f"mach.data.{module}.class_name", lambda text: text)
    before = mach.train(tree, tmp_path / "run", launcher="here")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cache")
    tree["hashing"] |= {"repetitions": 2}
    after = mach.train(tree, tmp_path / "run", launcher="here")
    assert after.repetitions == [0, 1]
    assert list(after.run.class_names or []) == list(before.run.class_names or [])
    assert after.classes.ids_of(["caf\u00e9", "the"]).tolist() == [0, 1]


def test_what_may_stand_for_a_configuration(config: Config, trained: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(to_toml(config))
    Path("fruits.csv").write_text("text,classes\napple,a\n")
    tree: dict[str, Any] = {"data": {"train": "fruits.csv"}}
    assert configuration("mine.toml") == (config, Path("runs/mine"))
    assert configuration("mine.toml", "elsewhere")[1] == Path("elsewhere")
    assert configuration("fruits.csv") == (Config.model_validate(tree), Path("runs/fruits"))
    assert configuration("builtin:characters")[1] == Path("runs/characters")
    assert configuration(tree, overrides=["training.epochs=2"])[0].training.epochs == 2
    assert tree == {"data": {"train": "fruits.csv"}}
    assert configuration(config, "there")[0] is config
    assert configuration(trained) == (Run.open(trained).config, trained)


def test_a_repetition_that_the_run_has_not_is_named(config: Config, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"repetitions 3: the run has repetitions 0-2"):
        mach.train(config, tmp_path / "run", repetitions=[0, 3])
    assert not (tmp_path / "run").exists()


def test_nobody_is_told_unless_asked(config: Config, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    tree = config.model_dump(exclude_unset=True)
    tree["hashing"] |= {"repetitions": 1}
    tree["training"] |= {"epochs": 1}
    mach.train(tree, tmp_path / "quiet", launcher="here")
    assert capfd.readouterr() == ("", "")
    told = io.StringIO()
    monkeypatch.setattr("mach.training.conductor.FEW_CLASSES", 120)
    mach.train(tree, tmp_path / "told", launcher="here", console=Console(file=told, width=400))
    assert "repetition 0: finished" in told.getvalue()
    assert "120 classes: for so few one output a class is simpler" in told.getvalue()
    told.truncate(0)
    monkeypatch.setattr("mach.training.conductor.FEW_CLASSES", 119)
    mach.train(tree, tmp_path / "many", launcher="here", console=Console(file=told, width=400))
    assert "so few" not in told.getvalue()


def test_values_of_an_older_run_that_a_new_reranker_does_not_hear_are_told(
    config: Config, trained: Path, tmp_path: Path
):
    shutil.copytree(trained, tmp_path / "run")
    file, told = tmp_path / "run/config.toml", io.StringIO()
    file.write_text(file.read_text().replace("[reranking]\n", "[reranking]\nweight = 0.3\n"))
    wanted = Config.model_validate(config.model_dump(exclude_unset=True) | {"reranking": {"candidates": 20}})
    mach.train(wanted, tmp_path / "run", launcher="here", console=Console(file=told, width=400))
    assert "reranking.weight of" in told.getvalue()
    assert "held-out rows choose its blend" in told.getvalue()


def test_a_run_does_not_say_which_cluster_it_goes_on_at(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run/config.toml"
    file.write_text(file.read_text().replace("[launch]\n", '[launch]\naddress = "elsewhere.example:6379"\n'))
    assert Run.open(tmp_path / "run").config.launch.address == "elsewhere.example:6379"
    assert configuration(tmp_path / "run")[0].launch.address is None  # nobody is asked who works here
    with pytest.raises(ConfigError, match=r"names the cluster elsewhere\.example:6379: pass it"):
        configuration(tmp_path / "run", overrides=['launch.launcher="ray"'])
    for override in ('launch.address="10.0.0.5:6379"', 'launch.address = "10.0.0.5:6379"'):
        given = configuration(tmp_path / "run", overrides=['launch.launcher="ray"', override])[0]
        assert given.launch.address == "10.0.0.5:6379"


def test_a_repetition_that_is_removed_before_the_end_is_no_finished_run(
    config: Config, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(trained, tmp_path / "run")
    removed = tmp_path / "run/repetitions/r001"
    with monkeypatch.context() as patched:
        patched.setattr("mach.training.conductor.calibrate_when_due", lambda *arguments: shutil.rmtree(removed))
        with pytest.raises(IncompleteRunError, match=r"other than \[0, 2\] are gone .*: run the same command again"):
            mach.train(config, tmp_path / "run", launcher="here")
    mach.train(config, tmp_path / "run", launcher="here")
    assert (removed / "weights.safetensors").read_bytes() == (
        trained / "repetitions/r001/weights.safetensors"
    ).read_bytes()


def test_a_plan_says_what_is_left_out_as_training_does(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("text,classes\n" + 9 * "sour,apple\nlong,banana\n" + "red,cherry\n")
    (tmp_path / "names.txt").write_text("apple\nbanana\n")
    data = {"train": str(tmp_path / "rows.csv"), "classes": str(tmp_path / "names.txt"), "cache": str(tmp_path)}
    with (
        pytest.warns(OmissionWarning, match="no class, such as row 18"),
        pytest.warns(OmissionWarning, match=r"1 class name of its rows left out, not in data.classes, .* 'cherry'"),
    ):
        plan_of_run(configuration({"data": data})[0])


def test_a_missing_file_is_no_chain_of_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read configuration .*run\.toml") as caught:
        mach.train(tmp_path / "run.toml", tmp_path / "run")
    assert (caught.value.__cause__, caught.value.__suppress_context__) == (None, True)
