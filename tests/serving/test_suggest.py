"""The addresses of Annif's REST API answer as the model does, and refuse in one line what they cannot."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import tracemalloc
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mach.errors import ConfigError, DegradedWarning
from mach.model.loading import load
from mach.model.model import MachModel
from mach.serving.batcher import BATCH_ROWS
from mach.serving.edition import Question, RowAnswer
from mach.serving.projects import Project, project_names
from mach.serving.search import NameIndex
from tests.serving.conftest import FIXTURE, TEXTS, Started

SUGGEST, BATCH = "/v1/projects/things/suggest", "/v1/projects/things/suggest-batch"


def expected(offline: MachModel, texts: list[str], k: int, **how) -> list[list[tuple[int, str, float]]]:
    ids_Nk, values_Nk = offline.topk(texts, k, probabilities=True, **how)
    return [
        [(i, offline.names([i])[0], v) for i, v in zip(ids.tolist(), values.tolist(), strict=True) if i >= 0]
        for ids, values in zip(ids_Nk, values_Nk, strict=True)
    ]


def triples(answer) -> list[tuple[int, str, float]]:
    return [(one["id"], one["label"], one["score"]) for one in answer["results"]]


@pytest.mark.parametrize("k", [1, 3, 28])
def test_every_answer_is_that_of_the_model(client: TestClient, offline: MachModel, k: int):
    wanted = expected(offline, TEXTS, k)
    for text, right in zip(TEXTS, wanted, strict=True):
        response = client.post(SUGGEST, data={"text": text, "limit": k})
        assert triples(response.json()) == right
        assert response.headers["mach-version"] == response.json()["version"]
    documents = [{"text": text, "document_id": str(n)} for n, text in enumerate(TEXTS)]
    answers = client.post(BATCH, params={"limit": k}, json={"documents": documents}).json()
    assert [triples(answer) for answer in answers] == wanted
    assert [answer["document_id"] for answer in answers] == list("01234")
    assert [answer["known"] for answer in answers] == offline.search(TEXTS, k).known_N.tolist()


def test_limits_and_thresholds(client: TestClient, offline: MachModel):
    assert client.post(SUGGEST, data={"text": "red cup", "limit": 0}).json()["results"] == []
    [all_of_them] = expected(offline, ["red cup"], offline.n_classes)
    assert triples(client.post(SUGGEST, data={"text": "red cup", "limit": 1000}).json()) == all_of_them
    third = all_of_them[2][2]
    found = triples(client.post(SUGGEST, data={"text": "red cup", "threshold": third}).json())
    assert found == [one for one in all_of_them[:10] if one[2] >= third]
    assert client.post(BATCH, json={"documents": []}).json() == []


def test_only_some_classes(client: TestClient, offline: MachModel):
    [warm] = expected(offline, ["red cup"], 10, allowed="warm")
    assert triples(client.post(SUGGEST, data={"text": "red cup", "subset": "warm"}).json()) == warm
    [some] = expected(offline, ["red cup"], 10, allowed=["white cup", "red hat"])
    form = {"text": "red cup", "allowed": ["white cup", "red hat"]}
    assert triples(client.post(SUGGEST, data=form).json()) == some
    body = {"documents": [{"text": "red cup"}], "allowed": [some[0][0], some[1][1]]}
    assert triples(client.post(BATCH, json=body).json()[0]) == some


def test_many_names_do_not_take_the_memory_of_the_longest(client: TestClient):
    body = {"documents": [{"text": "red cup"}], "allowed": ["red cup"] * 2000 + ["x" * 20_000]}
    tracemalloc.start()
    response = client.post(BATCH, json=body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (response.status_code, "no class named 'xxx" in response.json()["detail"]) == (400, True)
    assert peak < 2**24  # an array of these names has 160 MB


@pytest.mark.parametrize(
    ("form", "status", "told"),
    [
        ({}, 400, "no text"),
        ({"text": "x", "limit": "-1"}, 400, "whole number from 0 to 1000"),
        ({"text": "x", "limit": "1001"}, 400, "whole number from 0 to 1000"),
        ({"text": "x", "limit": "1e3"}, 400, "whole number"),
        ({"text": "x", "limit": "9" * 5000}, 400, "whole number"),
        ({"text": "x", "threshold": "2"}, 400, "from 0 to 1"),
        ({"text": "x", "threshold": "nan"}, 400, "from 0 to 1"),
        ({"text": "x", "subset": "cold"}, 400, "stored: warm"),
        ({"text": "x", "allowed": "no such"}, 400, "no class named 'no such'"),
        ({"text": "x", "allowed": "red cup", "subset": "warm"}, 400, "one of both"),
    ],
)
def test_a_wrong_form_is_refused(client: TestClient, form: dict[str, str], status: int, told: str):
    response = client.post(SUGGEST, data=form or {"other": "x"})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert told in problem["detail"]
    assert problem["status"] == status
    assert "\n" not in problem["detail"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"documents": 3}', "application/json", 400),
        (b'{"documents": [{"text": 3}]}', "application/json", 400),
        (b'{"documents": [{}]}', "application/json", 400),
        (b'{"documents": ' + b"[" * 100_000, "application/json", 400),
        (b'{"documents": [], "allowed": [' + b"9" * 100_000 + b"]}", "application/json", 400),
        (b'{"documents": [' + b'{"text":"x"},' * 32 + b'{"text":"x"}]}', "application/json", 400),
        (b'{"documents": [{"text": "\xff"}]}', "application/json", 400),
        (b"text=x", "application/x-www-form-urlencoded", 415),
        (b"text=x", "", 415),
        (b'{"documents": [{"text": "' + b"x" * 2**23 + b'"}]}', "application/json", 413),
    ],
)
def test_a_wrong_body_is_refused(client: TestClient, content: bytes, kind: str, status: int):
    response = client.post(BATCH, content=content, headers={"content-type": kind})
    assert response.status_code == status
    assert response.json()["title"]


def test_a_body_of_unknown_length_is_cut_off(client: TestClient):
    pieces = (b"x" * 2**16 for _ in range(2**7 + 1))
    response = client.post(SUGGEST, content=pieces, headers={"content-type": "application/x-www-form-urlencoded"})
    assert response.status_code == 413


def test_halves_of_characters_are_answered(client: TestClient):
    response = client.post(BATCH, content=rb'{"documents": [{"text": "red \ud800 cup"}]}', headers=JSON)
    assert response.status_code in (200, 400)


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("name", ["%2e%2e%2fthings", "things%00", "%2Fetc%2Fpasswd", "nothing", "things%0d%0ax"])
def test_other_projects_are_not_there(client: TestClient, name: str):
    for path, method in ((f"/v1/projects/{name}", "GET"), (f"/v1/projects/{name}/suggest", "POST")):
        response = client.request(method, path)
        assert response.status_code == 404


def test_projects_are_told_as_annif_does(client: TestClient, offline: MachModel):
    [project] = client.get("/v1/projects").json()["projects"]
    assert project == client.get("/v1/projects/things").json()
    assert (project["project_id"], project["backend"], project["is_trained"]) == (
        "things",
        {"backend_id": "mach"},
        True,
    )
    assert project["vocab"]["size"] == offline.n_classes - len(offline.classes.edits.removed)
    assert client.get("/v1/").json()["title"] == "mach REST API"
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}


def test_a_whole_batch_is_answered_before_anybody_waits(
    start: Started, calibrated: Path, run: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes, answer = dict[str, list[int]](), Project.answer

    def noted(self: Project, question: Question, rows: list[str]) -> list[RowAnswer]:
        sizes.setdefault(self.name, []).append(len(rows))
        return answer(self, question, rows)

    monkeypatch.setattr(Project, "answer", noted)
    assert start(str(run), str(calibrated)).get("/health/ready").status_code == 200
    assert sizes == {"things": [BATCH_ROWS], "numbers": [BATCH_ROWS]}


def test_a_language_that_labels_do_not_have(start: Started):
    client = start(language="de")
    assert client.post(SUGGEST, data={"text": "red cup", "language": "de"}).status_code == 200
    assert "not supported" in client.post(SUGGEST, data={"text": "red cup", "language": "fi"}).json()["detail"]


def test_several_projects(start: Started, run: Path):
    client = start(str(run), f"other={FIXTURE}")
    assert [project["project_id"] for project in client.get("/v1/projects").json()["projects"]] == ["things", "other"]
    answers = [client.post(f"/v1/projects/{name}/suggest", data={"text": "red"}) for name in ("things", "other")]
    assert answers[0].json() == answers[1].json()


def test_runs_that_cannot_be_served(tmp_path: Path):
    with pytest.raises(ConfigError, match="two runs are called 'a', x/a and y/a"):
        project_names(["x/a", "y/a"])
    with pytest.raises(ConfigError, match="give a run made by"):
        Project("a", tmp_path / "nothing", "und", print)
    bare = FIXTURE.with_name("run-format-1")
    with pytest.raises(ConfigError, match=f"{bare} has no calibration, .*mach calibrate {bare}"):
        Project("a", bare, "und", print)
    with pytest.raises(ConfigError, match="a name has letters"):
        Project("a/b", FIXTURE, "und", print)


def test_numbers_are_rows_too(start: Started, calibrated: Path):
    client = start(f"numbers={calibrated}")
    answer = client.post("/v1/projects/numbers/suggest", data={"text": "0:0.5 1:0.6"}).json()
    assert answer["results"][0]["score"] <= 1
    refused = client.post("/v1/projects/numbers/suggest", data={"text": "0:0.5 1:x"})
    assert (refused.status_code, "takes numbers" in refused.json()["detail"]) == (400, True)


def test_classes_are_found_by_name(client: TestClient, offline: MachModel):
    answer = client.get("/v1/projects/things/classes", params={"query": "CUP", "limit": 100}).json()
    names = {offline.names([k])[0] for k in range(offline.n_classes) if k not in offline.classes.edits.removed}
    assert {one["label"] for one in answer["results"]} == {name for name in names if "cup" in name}
    removed = int(offline.classes.edits.removed[0])
    named = client.get("/v1/projects/things/classes", params={"query": offline.names([removed])[0]}).json()
    assert removed not in [one["id"] for one in named["results"]]


def test_similar_classes(client: TestClient, offline: MachModel):
    k = int(offline.classes.ids_of("red hat")[0])
    ids, cosines = offline.classes.similar(k, 3)
    answer = client.get(f"/v1/projects/things/classes/{k}/similar", params={"limit": 3}).json()
    assert [(one["id"], one["score"]) for one in answer["results"]] == list(
        zip(ids.tolist(), cosines.tolist(), strict=True)
    )
    assert client.get("/v1/projects/things/classes/999/similar").status_code == 400
    assert client.get("/v1/projects/things/classes/x/similar").status_code == 400


def test_a_search_is_that_of_every_name():
    names = ["Straße", "strasse nach  Süden", "a\nb", "", "Nachtstraße"]
    index = NameIndex(enumerate(names))
    assert index.find("STRASSE", 9) == [0, 1, 4]
    assert index.find("a b", 9) == [2]
    assert index.find("", 2) == [0, 1]
    assert NameIndex([]).find("x", 3) == []


def test_classes_say_why(client: TestClient, offline: MachModel):
    form = {"text": "Red cup ala", "limit": 3, "explain": "true"}
    plain, told = (client.post(SUGGEST, data=one).json() for one in (form | {"explain": "false"}, form))
    assert triples(told) == triples(plain)
    assert "explanation" not in plain["results"][0]
    why = told["results"][0]["explanation"]
    assert why["words"][0]["spans"] == [[0, 3]]
    assert why["probability"] == pytest.approx(told["results"][0]["score"])
    assert why["start"] + sum(part["added"] for part in why["parts"]) == pytest.approx(why["score"], abs=1e-4)
    assert offline.explain("Red cup ala", why["id"]).to_dict()["words"][0]["text"] == why["words"][0]["text"] == "red"
    every = client.post(SUGGEST, data=form | {"limit": 28}).json()["results"]
    assert sum("explanation" in one for one in every) == 20
    assert client.post(SUGGEST, data=form | {"limit": 0}).json()["results"] == []
    assert "true or false" in client.post(SUGGEST, data=form | {"explain": "yes"}).json()["detail"]
    too_long = client.post(SUGGEST, data=form | {"text": "a " * 10_001})
    assert (too_long.status_code, "20,000" in too_long.json()["detail"]) == (413, True)


def test_annif_gets_classes_with_uris_alone(run: Path, start: Started):
    load(run).classes.add(["lamp"], [["red lamp"]], uris=["http://example.org/lamp"])
    client, annif = start(), {"User-Agent": "Annif/1.4.3"}
    answer = client.post(SUGGEST, data={"text": "red lamp", "limit": 28}).json()
    assert {one["uri"] for one in answer["results"]} == {None, "http://example.org/lamp"}
    answer = client.post(SUGGEST, data={"text": "red lamp", "limit": 28}, headers=annif).json()
    assert [one["uri"] for one in answer["results"]] == ["http://example.org/lamp"]
    body = {"documents": [{"text": "red lamp"}]}
    [answer] = client.post(BATCH, json=body, params={"limit": 28}, headers=annif).json()
    assert [one["uri"] for one in answer["results"]] == ["http://example.org/lamp"]


def test_a_run_that_lacks_a_repetition_is_named_as_it_was_given(tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)
    shutil.rmtree(max((run / "repetitions").iterdir()))
    with pytest.warns(DegradedWarning, match=re.escape(f"{run}: ")), pytest.raises(ConfigError):
        Project("a", run, "und", print)  # what it was calibrated for is another ensemble


def test_projects_that_are_opened_at_once_leave_warnings_to_be_heard(run: Path, monkeypatch: pytest.MonkeyPatch):
    """Python has one place for who hears warnings: if the first to listen ended first, the second would put it back."""
    both_listen, first_ended, numbers = threading.Barrier(2), threading.Event(), itertools.count()

    def slow(path: str, **where: Any) -> MachModel:
        number = next(numbers)
        with suppress(threading.BrokenBarrierError):  # they never do both
            both_listen.wait(timeout=0.5)
            if number == 1:
                first_ended.wait(timeout=5)
        return load(path, **where)

    def opened(name: str) -> None:
        Project(name, run, "und", print)
        first_ended.set()

    monkeypatch.setattr("mach.serving.projects.load", slow)
    hears = warnings._showwarnmsg_impl  # type: ignore[attr-defined]
    threads = [threading.Thread(target=opened, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert next(numbers) == 2
    assert warnings._showwarnmsg_impl is hears  # type: ignore[attr-defined]
