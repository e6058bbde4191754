"""A server follows its runs: every answer is whole, by the version that it names."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from starlette.testclient import TestClient

from mach.model.loading import load
from mach.serving.edition import version_of
from tests.serving.conftest import FIXTURE, TEXTS, Started

THINGS = "/v1/projects/things"
OTHER = FIXTURE.with_name("run-format-1-order-edited")


def suggest(client: TestClient, text: str) -> dict:
    response = client.post(f"{THINGS}/suggest", data={"text": text})
    assert response.status_code == 200
    return response.json()


def follow(client: TestClient, version: str) -> str:
    """Ask until another version than this one answers."""
    for _ in range(2000):
        if (found := suggest(client, "red")["version"]) != version:
            return found
    raise AssertionError(f"{version} still answers")


def test_an_edit_by_another_process_is_answered_at_once(client: TestClient, run: Path):
    version = suggest(client, "red cup")["version"]
    model = load(run)
    model.classes.upvote("red cup", "green hat")
    answer = suggest(client, "red cup")
    assert answer["results"][0]["label"] == "green hat"
    assert answer["version"] != version
    model.classes.undo()
    assert suggest(client, "red cup")["version"] == version
    model.classes.remove("red cup")
    assert "red cup" not in [one["label"] for one in suggest(client, "red cup")["results"]]


def test_a_run_in_its_place_is_answered_soon(client: TestClient, run: Path, tmp_path: Path):
    first = suggest(client, "red cup")
    shutil.copytree(OTHER, tmp_path / "next")
    run.rename(tmp_path / "last")
    assert suggest(client, "red cup") == first  # while there is none
    (tmp_path / "next").rename(run)
    follow(client, first["version"])
    offline = load(OTHER)
    ids, values = offline.topk("red cup", 10, probabilities=True)
    results = suggest(client, "red cup")["results"]
    assert [(one["id"], one["score"]) for one in results] == list(zip(ids.tolist(), values.tolist(), strict=True))


def test_copies_that_are_edited_apart_have_versions_of_their_own(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "copy")
    models = [load(run), load(tmp_path / "copy")]
    assert version_of(models[0]) == version_of(models[1])
    for model, label in zip(models, ("green hat", "white cup"), strict=True):
        model.classes.upvote("red cup", label)
    assert models[0].classes.version == models[1].classes.version
    assert version_of(models[0]) != version_of(models[1])


def test_a_run_that_is_damaged_does_not_answer(start: Started, run: Path, tmp_path: Path, capsys):
    client = start(learn=True)
    first = suggest(client, "red cup")
    (run / "classes/CURRENT").rename(tmp_path / "CURRENT")
    (run / "classes/CURRENT").write_text("{")
    assert suggest(client, "red cup") == first
    assert f"version {first['version']} goes on answering" in capsys.readouterr().err
    refused = client.post(f"{THINGS}/learn", json=[{"text": "red cup", "subjects": [{"label": "green hat"}]}])
    assert refused.status_code == 503
    shutil.rmtree(run)
    assert suggest(client, "red cup") == first


def test_no_answer_is_lost_or_mixed_while_runs_change(client: TestClient, run: Path, tmp_path: Path):
    """Two runs take turns in one place, and one is edited: whatever is answered is what that version answers."""
    shutil.copytree(OTHER, tmp_path / "waits")
    known: dict[str, dict[str, list]] = {}
    found: list[dict] = []
    errors: list[BaseException] = []
    is_over = threading.Event()

    def ask() -> None:
        try:
            while not is_over.is_set():
                for text in TEXTS:
                    found.append({"text": text} | suggest(client, text))
        except BaseException as error:
            errors.append(error)

    def note(path: Path, version: str) -> None:
        model = load(path)
        answers = zip(TEXTS, *(a.tolist() for a in model.topk(TEXTS, 10, probabilities=True)), strict=True)
        known[version] = {
            text: [list(pair) for pair in zip(i, v, strict=True) if pair[0] >= 0] for text, i, v in answers
        }

    version = suggest(client, "red")["version"]
    note(run, version)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(8):
        if turn % 2:
            load(run).classes.upvote(TEXTS[turn % 3], "green hat")
        else:
            run.rename(tmp_path / "aside")
            (tmp_path / "waits").rename(run)
            (tmp_path / "aside").rename(tmp_path / "waits")
        version = follow(client, version)
        note(run, version)
    is_over.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({one["version"] for one in found}) > 2
    for one in found:
        assert [[r["id"], r["score"]] for r in one["results"]] == known[one["version"]][one["text"]]
