"""A server whose weights are kept by actors of a cluster answers as any other, and says when some of them are lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

import mach
from mach.cli import main
from mach.model.loading import load
from mach.model.model import MachModel
from mach.serving import projects
from mach.serving.server import Settings
from tests.serving.conftest import FIXTURE, Started, serving

THINGS = "/v1/projects/things"
LEARN = [{"text": "red cup ala", "subjects": [{"label": "green hat"}]}]


def suggest(client: Any, text: str, **fields: Any) -> dict[str, Any]:
    response = client.post(f"{THINGS}/suggest", data={"text": text, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def shown(model: MachModel, text: str) -> list[tuple[int, float]]:
    ids, values = model.topk(text, 10, probabilities=True)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A seam that plays a cluster of which one actor is lost; what it was asked to open with, and what was closed."""
    seen: list[dict[str, Any]] = []

    def opened(path: Any, **where: Any) -> MachModel:
        seen.append({"path": str(path), **where})
        model = load(path)
        search = type(model).search

        class Degraded(MachModel):
            def search(self, *arguments: Any, **options: Any) -> Any:
                answer = search(self, *arguments, **options)
                return replace(answer, answered_NR=np.zeros_like(answer.answered_NR))

            def close(self) -> None:
                seen.append({"closed": str(path)})

        model.__class__ = Degraded
        return model

    monkeypatch.setattr(projects, "load", opened)
    return seen


def test_an_answer_without_some_actors_says_so(cluster: list[dict[str, Any]], run: Path, offline: MachModel):
    settings = Settings((str(run),), launcher="ray", address="head:6379")
    with serving(settings) as url, mach.Client(url) as client:
        with pytest.warns(mach.DegradedWarning, match="not all repetitions of the run answer now"):
            ids, _ = client.topk("red cup", 3)
        assert ids.tolist() == offline.topk("red cup", 3)[0].tolist()
    assert cluster == [{"path": str(run), "launcher": "ray", "address": "head:6379"}, {"closed": str(run)}]


@pytest.mark.usefixtures("cluster")
def test_versions_of_classes_are_followed_and_other_runs_are_not(
    start: Started, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    client = start(launcher="ray", learn=True)
    first = suggest(client, "red cup ala")
    assert first["degraded"]
    load(run).classes.upvote("red cup ala", "green hat")
    second = suggest(client, "red cup ala")
    assert second["results"][0]["label"] == "green hat"
    assert client.get(f"{THINGS}/classes/1/similar").json()["detail"].startswith("similar classes are read from")
    run.rename(tmp_path / "last")
    shutil.copytree(FIXTURE.with_name("run-format-1-order-edited"), run)
    for _ in range(3):
        assert suggest(client, "red cup ala") == second
    refused = client.post(f"{THINGS}/learn", json=LEARN)
    assert (refused.status_code, "start the server anew" in refused.json()["detail"]) == (503, True)
    assert suggest(client, "red cup ala") == second
    assert capfd.readouterr().err.count("start the server anew") == 1


def test_local_weights_take_no_cluster(run: Path):
    for options, told in (
        (["--address", "head:6379"], "address: the launcher local takes no such argument: choose the launcher ray"),
        (["--launcher", "ray", "--workers", "2"], "--workers 2: with --launcher ray one process serves: give 1"),
    ):
        done = CliRunner(env={"OPENBLAS_NUM_THREADS": "1"}).invoke(main, ["serve", str(run), *options])
        assert (done.exit_code, told in done.stderr) == (2, True), done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mach.errors.DegradedWarning")
def test_actors_answer_as_one_process(run: Path, offline: MachModel):
    pytest.importorskip("ray")
    settings = Settings((str(run),), launcher="ray", address="local", learn=True)
    opened = settings.projects()
    with TestClient(settings.app(projects=opened)) as client:
        answer = suggest(client, "red cup ala")
        assert [(one["id"], one["score"]) for one in answer["results"]] == shown(offline, "red cup ala")
        assert "degraded" not in answer
        assert suggest(client, "red cup ala", limit=1, explain="true")["results"][0]["explanation"]["words"]
        assert client.post(f"{THINGS}/learn", json=LEARN).status_code == 204
        taught = suggest(client, "red cup ala")
        assert [(one["id"], one["score"]) for one in taught["results"]] == shown(load(run), "red cup ala")
        os.kill(_process_of(opened["things"].edition.model), signal.SIGKILL)
        _until(lambda: "degraded" in suggest(client, "red cup ala"))
        _until(lambda: suggest(client, "red cup ala") == taught)


def _process_of(model: MachModel) -> int:
    import ray

    scorer: Any = model.ensemble.scorer
    return int(ray.get(scorer._parts[0].actor._handle.__ray_call__.remote(lambda actor: os.getpid()), timeout=300))


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
