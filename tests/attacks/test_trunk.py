"""A stranger's folder or configuration names code: it is never imported unless the caller passes the same name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from click.testing import CliRunner, Result
from torch import nn

import mach
from mach.cli import main
from mach.config import Config, LaunchConfig, to_toml
from mach.errors import ConfigError, MachError
from mach.estimator.classifier import MACHClassifier
from mach.networks.trunk import for_workers
from mach.reranking.fitting import RerankerTraining
from mach.runs import actors as serving
from mach.runs.ensemble import Ensemble
from mach.runs.run import Run
from mach.training.launch.launchers import Crew
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard

FIXTURE = Path(__file__).parents[1] / "fixtures/run-format-1"
HONEST = f"{__name__}:Honest"
NAMES = ["evil_trunk:Trunk", "os:system", "os:spawnvp", "subprocess:Popen"]
OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "os:spawnvp": lambda marker: {"file": "touch", "args": ["touch", marker]},
    "os:system": lambda marker: {"command": f"touch {marker}"},
    "subprocess:Popen": lambda marker: {"executable": "/bin/sh", "shell": True, "args": f"touch {marker}"},
}


class Honest(nn.Linear):
    """A user's trunk."""

    def __init__(self, in_features: int, width: int = 16) -> None:
        super().__init__(in_features, width)


def shell(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What hostile code would write; a module that does lies in the working directory."""
    marker = tmp_path / "marker"
    folder = tmp_path / "here"
    folder.mkdir()
    write_module(folder, marker)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("evil_trunk", None)  # of a test that failed
    yield marker
    assert not marker.exists()
    assert "evil_trunk" not in sys.modules
    assert os.getcwd() not in sys.path


def write_module(folder: Path, marker: Path) -> None:
    (folder / "evil_trunk.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nTrunk = 1\n")


def turned(source: Path, path: Path, name: str, marker: Path) -> Path:
    """A copy of a run that names code."""
    shutil.copytree(source, path)
    write_module(path, marker)
    tree = tomllib.loads((path / "config.toml").read_text())
    tree["network"] |= {"trunk": name, "trunk_options": OPTIONS.get(name, lambda marker: {})(str(marker))}
    (path / "config.toml").write_text(tomli_w.dumps(tree))
    return path


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hostile(name: str, trained: Path, tmp_path: Path, marker: Path) -> Path:
    """A finished run."""
    return turned(trained, tmp_path / "run", name, marker)


@pytest.fixture
def begun(hostile: Path) -> Path:
    """A run that lacks a repetition."""
    shutil.rmtree(hostile / "repetitions/r002")
    return hostile


def expect_line(text: str, where: object, name: str) -> None:
    assert len(text.strip().splitlines()) == 1, text
    assert f"{where}: network.trunk = {name!r} is code" in text
    assert "pass this name as trunk= (--trunk package.module:Class)" in text


def expect_refused(result: Result, where: object, name: str) -> None:
    assert result.exit_code == 2, result.output
    expect_line("".join(_refusals(result)), where, name)


def _refusals(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("mach: ")]  # after what was begun


# -- models


def test_a_folder_is_not_opened(name: str, tmp_path: Path, marker: Path):
    run = turned(FIXTURE, tmp_path / "run", name, marker)
    for options in ({}, {"trunk": HONEST}, {"trunk": Honest}, {"repetitions": [1]}, {"launcher": "ray"}):
        with pytest.raises(ConfigError) as caught:
            mach.load(run, **options).topk("a red thing")
        expect_line(str(caught.value), run / "config.toml", name)
    for folder in (tmp_path / "here", run):
        os.chdir(folder)
        expect_refused(shell("query", run, "a red thing"), run / "config.toml", name)


@pytest.mark.parametrize("verb", ["query", "evaluate", "predict", "calibrate", "report", "info", "classes", "list"])
def test_verbs_refuse(verb: str, hostile: Path, name: str, planted: Path):
    rows = planted / "test.txt"
    commands: dict[str, list[object]] = {
        "query": ["query", hostile, "1:1"],
        "evaluate": ["evaluate", hostile],
        "predict": ["predict", hostile, rows],
        "calibrate": ["calibrate", hostile, rows],
        "report": ["report", hostile],
        "info": ["info", hostile],
        "classes": ["classes", "add", hostile, "new", "--example", "1:1"],
        "list": ["classes", "list", hostile],
    }
    if verb == "report":
        pytest.importorskip("matplotlib")
        pytest.importorskip("jinja2")
    for options in ([], ["--trunk", HONEST]):
        expect_refused(shell(*commands[verb], *options), hostile / "config.toml", name)
    assert not (hostile / "report.html").exists()


def test_a_name_that_is_no_module_class_is_not_called(hostile: Path, name: str):
    """Even the caller's own word does not make a function, or a class of something else, a trunk."""
    if not name.startswith("evil"):
        result = shell("query", hostile, "1:1", "--trunk", name)
        assert (result.exit_code, result.stderr) == (
            2,
            f"mach: trunk {name!r} is no class of torch.nn.Module: give one\n",
        )


def test_status_reads_files_alone(hostile: Path):
    assert shell("status", hostile).exit_code == 0
    assert shell("classes", "list", hostile, "--history").exit_code == 0


def test_actors_refuse(hostile: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "node_name", lambda: "here")
    run = Run.open(hostile)
    with pytest.raises(ConfigError) as caught:
        serving.ScoreServer(str(hostile), serving.fingerprints_of(run), [0], {}).open()
    expect_line(str(caught.value), hostile / "config.toml", name)
    with pytest.raises(ConfigError) as caught:
        serving.serve(run, [0])
    expect_line(str(caught.value), hostile / "config.toml", name)


# -- training


def test_a_configuration_is_not_trained(config: Config, name: str, tmp_path: Path, marker: Path):
    network = config.network.model_copy(update={"trunk": name})
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config.model_copy(update={"network": network})))
    for options in ([], ["--trunk", HONEST], ["--dry-run"]):
        expect_refused(shell("train", path, tmp_path / "run", *options), path, name)
    (tmp_path / "plain.toml").write_text(to_toml(config))
    result = shell("train", tmp_path / "plain.toml", tmp_path / "run", "--set", f"network.trunk={name}")
    expect_refused(result, tmp_path / "plain.toml", name)
    with pytest.raises(ConfigError) as caught:
        set_up(config.model_copy(update={"network": network}), tmp_path / "run")
    expect_line(str(caught.value), "the configuration", name)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed(config: Config, begun: Path, name: str, tmp_path: Path):
    (tmp_path / "plain.toml").write_text("[data]\n" + f'train = "{config.data.train}"\n')
    for options in ([], ["--trunk", HONEST]):
        expect_refused(shell("train", begun, *options), begun / "config.toml", name)
    expect_refused(shell("train", tmp_path / "plain.toml", begun), begun / "config.toml", name)
    assert shell("train", tmp_path / "plain.toml", begun, "--trunk", HONEST).exit_code == 2


def test_a_run_is_not_started_from(config: Config, hostile: Path, name: str, tmp_path: Path):
    (tmp_path / "plain.toml").write_text("[data]\n" + f'train = "{config.data.train}"\n')
    command = ("train", tmp_path / "plain.toml", tmp_path / "new", "--from", hostile)
    expect_refused(shell(*command), hostile / "config.toml", name)
    result = shell(*command, "--trunk", HONEST)
    assert (result.exit_code, len(_refusals(result))) == (2, 1)
    assert not (tmp_path / "new").exists()


def test_workers_refuse(config: Config, trained: Path, hostile: Path, name: str):
    _, store = set_up(config, trained)
    training = RerankerTraining(Run.open(hostile), store)
    shutil.rmtree(hostile / "repetitions/r002")
    jobs: list[Any] = [
        lambda: Ensemble(training.run, training.run.finished()),
        lambda: train_shard(ShardJob(str(hostile), str(store.path), (2,))),
        lambda: Crew(LaunchConfig(workers=1)).train(Run.open(hostile), store),
    ]
    for job in jobs:
        with pytest.raises(ConfigError) as caught:
            job()
        expect_line(str(caught.value), hostile / "config.toml", name)


# -- the estimator


ROWS = np.eye(8, dtype=np.float32)[np.arange(64) % 8]
CLASSES = np.arange(64) % 8


def quick(**parameters: Any) -> MACHClassifier:
    return MACHClassifier(epochs=2, repetitions=2, buckets=4, random_state=0, **parameters)


def test_a_saved_classifier_is_not_opened(name: str, tmp_path: Path, marker: Path):
    quick().fit(ROWS, CLASSES).save(tmp_path / "saved")
    saved = turned(tmp_path / "saved", tmp_path / "hostile", name, marker)
    text = (saved / "classifier.json").read_text()
    assert '"trunk": null' in text
    (saved / "classifier.json").write_text(text.replace('"trunk": null', f'"trunk": "{name}"'))
    for options in ({}, {"trunk": HONEST}):
        with pytest.raises(ConfigError) as caught:
            MACHClassifier.load(saved, **options).predict(ROWS)
        expect_line(str(caught.value), saved / "config.toml", name)


def test_what_a_saved_classifier_says_of_its_trunk_is_not_believed(name: str, tmp_path: Path, marker: Path):
    quick().fit(ROWS, CLASSES).save(tmp_path / "saved")
    path = tmp_path / "saved/classifier.json"
    path.write_text(path.read_text().replace('"trunk": null', f'"trunk": "{name}"'))
    assert MACHClassifier.load(tmp_path / "saved").trunk is None
    path.write_text(path.read_text().replace('"config": null', f'"config": {{"network.trunk": "{name}"}}'))
    with pytest.raises(ConfigError) as caught:
        MACHClassifier.load(tmp_path / "saved").fit(ROWS, CLASSES)
    expect_line(str(caught.value), "the configuration", name)


# -- what is asked for works


def test_a_trunk_that_is_passed_trains_and_answers(config: Config, planted: Path, tmp_path: Path, marker: Path):
    """Worker processes train repetitions and the re-ranker with it, and every verb answers."""
    changed = {
        "hashing": config.hashing.model_copy(update={"repetitions": 2}),
        "data": config.data.model_copy(update={"validation_fraction": 0.1}),
        "training": config.training.model_copy(update={"epochs": 2}),
        "reranking": config.reranking.model_copy(update={"candidates": 10}),
        "launch": LaunchConfig(workers=1),
    }
    (tmp_path / "run.toml").write_text(to_toml(config.model_copy(update=changed)))
    run, passed = tmp_path / "run", ("--trunk", HONEST)
    result = shell("train", tmp_path / "run.toml", run, *passed)
    assert result.exit_code == 0, result.stderr
    assert Run.open(run).config.network.trunk == HONEST
    assert (run / "RERANKED").exists()
    assert mach.load(run, trunk=Honest).topk(np.eye(400, dtype=np.float32)[3], 2)[0].shape == (2,)
    for verb in (["query", run, "1:1"], ["evaluate", run], ["info", run], ["classes", "add", run, "x", "--text", "y"]):
        expect_refused(shell(*verb), run / "config.toml", HONEST)
    for verb in (["query", run, "1:1"], ["evaluate", run], ["info", run], ["classes", "rename", run, "1", "x"]):
        result = shell(*verb, *passed)
        assert result.exit_code == 0, result.stderr
    expect_refused(shell("train", run), run / "config.toml", HONEST)
    assert shell("train", run, *passed).exit_code == 0
    (tmp_path / "more.toml").write_text(f'[data]\ntrain = "{planted}/test.txt"\n[training]\nepochs = 1\n')
    more = shell("train", tmp_path / "more.toml", tmp_path / "more", "--from", run, "--dry-run", *passed)
    assert more.exit_code == 0, more.stderr


def test_workers_are_told_by_the_caller(config: Config, tmp_path: Path, marker: Path):
    changed = {"training": config.training.model_copy(update={"epochs": 1})}
    run, store = set_up(config.model_copy(update=changed), tmp_path / "run", trunk=Honest)
    Crew(LaunchConfig(workers=1)).train(run, store)
    assert run.finished() == [0, 1, 2]
    server = serving.ScoreServer(str(run.path), serving.fingerprints_of(run), [0, 1], for_workers(Honest))
    server.open()


def test_a_trunk_without_need_is_refused(trained: Path, marker: Path):
    result = shell("query", trained, "1:1", "--trunk", HONEST)
    assert result.exit_code == 2
    assert result.stderr == (
        f"mach: {trained}/config.toml: there is no network.trunk, and trunk {HONEST!r} was passed: leave it out\n"
    )
    result = shell("train", trained, "--trunk", HONEST)
    assert (result.exit_code, len(_refusals(result))) == (2, 1)
    assert HONEST in result.stderr


@pytest.mark.parametrize("wrong", ["os", "a:b:c", "../a:B", "a:B\nc", "", dict, 5])
def test_what_is_no_trunk_is_one_line(wrong: Any, trained: Path):
    with pytest.raises(MachError) as caught:
        mach.load(trained, trunk=wrong)
    assert len(str(caught.value).splitlines()) == 1


def test_a_classifier_takes_a_class(tmp_path: Path):
    class Local(Honest):
        pass

    alone = quick(trunk=Local).fit(ROWS, CLASSES)
    alone.partial_fit(ROWS, CLASSES)
    assert alone.predict(ROWS).shape == (64,)
    with pytest.raises(ConfigError, match="other processes cannot import it"):
        quick(trunk=Local, n_jobs=2).fit(ROWS, CLASSES)
    alone.save(tmp_path / "saved")
    np.testing.assert_array_equal(
        MACHClassifier.load(tmp_path / "saved", trunk=Local).predict(ROWS), alone.predict(ROWS)
    )
    with pytest.raises(ConfigError, match="never imports"):
        MACHClassifier.load(tmp_path / "saved")
    with pytest.raises(ConfigError, match="give trunk alone"):
        quick(trunk=Honest, config={"network.trunk": HONEST}).fit(ROWS, CLASSES)


def test_workers_find_what_lies_beside_a_script(tmp_path: Path):
    (tmp_path / "layers.py").write_text(
        "from torch import nn\nclass Mine(nn.Linear):\n    def __init__(self, n):\n        super().__init__(n, 8)\n"
    )
    (tmp_path / "script.py").write_text(
        "import numpy as np, layers\nfrom mach import MACHClassifier\n"
        "X = np.eye(8, dtype=np.float32)[np.arange(64) % 8]\n"
        "made = MACHClassifier(epochs=2, repetitions=1, buckets=4, n_jobs=2, random_state=0, trunk=layers.Mine)\n"
        "print(made.fit(X, np.arange(64) % 8).predict(X).shape)\n"
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout == "(64,)\n", done.stderr
