"""What callers may teach, and who may."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mach.errors import ConfigError
from mach.model.loading import load
from mach.serving.edition import version_of
from mach.serving.server import Settings
from mach.serving.tokens import Tokens
from tests.serving.conftest import Started

THINGS = "/v1/projects/things"
READ, LEARN = "r" * 16, "l" * 16


def best(client: TestClient, text: str) -> str:
    return client.post(f"{THINGS}/suggest", data={"text": text}).json()["results"][0]["label"]


def document(text: str, **subject) -> list[dict]:
    return [{"text": text, "subjects": [subject]}]


def test_nobody_teaches_unless_that_was_said(client: TestClient):
    for path, body in (("learn", document("red cup", label="green hat")), ("classes", {"name": "x", "texts": ["red"]})):
        response = client.post(f"{THINGS}/{path}", json=body)
        assert (response.status_code, "--learn" in response.json()["detail"]) == (403, True)


def test_what_is_taught_is_answered_next(start: Started, run: Path):
    client = start(learn=True)
    assert best(client, "red cup") != "green hat"
    response = client.post(f"{THINGS}/learn", json=document("red cup", label="green hat"))
    assert (response.status_code, response.content) == (204, b"")
    answer = client.post(f"{THINGS}/suggest", data={"text": "red cup"})
    assert answer.json()["results"][0]["label"] == "green hat"
    assert answer.headers["mach-version"] == response.headers["mach-version"]
    model = load(run)
    assert response.headers["mach-version"] == version_of(model)
    assert model.names(model.topk("red cup", 1)[0]) == ["green hat"]
    k = int(model.classes.ids_of("white cup")[0])
    assert client.post(f"{THINGS}/learn", json=document("pink hat", id=k)).status_code == 204
    assert best(client, "pink hat") == "white cup"


def test_subjects_that_are_not_there(start: Started):
    client = start(learn=True)
    version = client.get(THINGS).json()["version"]
    refused = client.post(f"{THINGS}/learn", json=document("red cup", uri="http://example.org/x"))
    assert (refused.status_code, "'http://example.org/x'" in refused.json()["detail"]) == (400, True)
    assert client.post(f"{THINGS}/learn", json=[]).status_code == 204
    assert client.post(f"{THINGS}/learn", json=document("zzz", label="green hat")).status_code == 400
    assert client.get(THINGS).json()["version"] == version
    both = [{"text": "red cup", "subjects": [{"uri": "http://example.org/x"}, {"uri": "", "label": "green hat"}]}]
    assert client.post(f"{THINGS}/learn", json=both).status_code == 204
    assert best(client, "red cup") == "green hat"


def test_a_class_is_added(start: Started):
    client = start(learn=True)
    added = client.post(f"{THINGS}/classes", json={"name": "teapot", "examples": ["omo ama", "omo ama ene"]})
    assert (added.status_code, added.json()["label"]) == (201, "teapot")
    assert best(client, "omo ama") == "teapot"
    found = client.get(f"{THINGS}/classes", params={"query": "teapot"}).json()["results"]
    assert [one["id"] for one in found] == [added.json()["id"]]
    again = client.post(f"{THINGS}/classes", json={"name": "teapot", "texts": ["x"]})
    assert (again.status_code, "is taken" in again.json()["detail"]) == (400, True)
    assert client.post(f"{THINGS}/classes", json={"name": "bare"}).status_code == 400


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# two\nread {READ}\n\nlearn {LEARN}\n")
    return path


def test_tokens_say_who_may_do_what(start: Started, token_file: Path):
    client = start(learn=True, token_file=token_file)
    body = document("red cup", label="green hat")
    statuses = {}
    for header in ("", f"Bearer {READ}", f"bearer {LEARN}", f"Basic {READ}", f"Bearer {READ[:-1]}", "Bearer é"):
        headers = {"authorization": header.encode()} if header else {}
        asked = client.post(f"{THINGS}/suggest", data={"text": "red"}, headers=headers)
        taught = client.post(f"{THINGS}/learn", json=body, headers=headers)
        statuses[header] = asked.status_code, taught.status_code
        assert client.get("/health/ready", headers=headers).status_code == 200
    assert statuses == {
        "": (401, 401),
        f"Bearer {READ}": (200, 403),
        f"bearer {LEARN}": (200, 204),
        f"Basic {READ}": (401, 401),
        f"Bearer {READ[:-1]}": (401, 401),
        "Bearer é": (401, 401),
    }
    assert client.get("/v1/projects").headers["www-authenticate"] == "Bearer"
    assert client.get("/metrics").status_code == 401


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no token"),
        ("read short", "line 1: need"),
        (f"write {READ}", "line 1: need"),
        (f"read {READ}\nread {READ} x", "line 2: need"),
        ("read éééééééééééééééé", "line 1: need"),
    ],
)
def test_a_wrong_token_file_is_refused(tmp_path: Path, text: str, told: str):
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}/tokens.*{told}"):
        Tokens.of_file(tmp_path / "tokens")


def test_a_token_file_that_is_not_there_is_told_with_what_it_holds(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"No such file or directory: give a file of lines `read TOKEN`"):
        Tokens.of_file(tmp_path / "tokens")


def test_a_refused_class_is_told_what_a_request_can_mend(start: Started):
    client = start(learn=True)
    for body in ({"name": "teapot"}, {"name": "teapot", "examples": ["zzz qqq"]}):
        refused = client.post(f"{THINGS}/classes", json=body)
        assert refused.status_code == 400
        assert refused.json()["detail"] == "class 'teapot' has no example or text with known features: give one"
    headers = {"content-type": "application/json"}
    broken = client.post(f"{THINGS}/classes", content=b'{"name"', headers=headers).json()["detail"]
    assert broken.startswith("the body is not as it should be: Invalid JSON: ")


def test_a_server_that_others_reach_says_who_may_ask(run: Path, token_file: Path):
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0 is reached by others: give --token-file FILE, or --no-auth"):
        Settings((str(run),), host="0.0.0.0").guard()
    with pytest.raises(ConfigError, match="give one of both"):
        Settings((str(run),), no_auth=True, token_file=token_file).guard()
    with pytest.raises(ConfigError, match="Not a directory"):
        Settings((str(run),), token_file=token_file / "x").guard()
    for host, options in (
        ("::1", {}),
        ("localhost", {}),
        ("0.0.0.0", {"no_auth": True}),
        ("::", {"token_file": token_file}),
    ):
        Settings((str(run),), host=host, **options).guard()


@pytest.mark.parametrize(
    ("origin", "host", "options", "status"),
    [
        ("http://localhost:8000", "localhost:8000", {}, 204),
        ("http://[::1]:8000", "[::1]:8000", {}, 204),
        ("http://evil.example", "localhost:8000", {}, 403),
        ("null", "localhost:8000", {}, 403),
        ("http://evil.example:8000", "evil.example:8000", {}, 403),  # a name that was turned to this machine
        ("http://mine.example:8000", "mine.example:8000", {"no_auth": True}, 204),
        ("http://evil.example", "mine.example", {"no_auth": True}, 403),
        ("http://[", "localhost:8000", {}, 403),
        ("http://[::1", "[::1", {}, 403),
    ],
)
def test_pages_of_others_do_not_teach(start: Started, origin: str, host: str, options: dict, status: int):
    client = start(learn=True, **options)
    headers = {"origin": origin, "host": host}
    body = document("red cup", label="green hat")
    assert client.post(f"{THINGS}/learn", json=body, headers=headers).status_code == status
    asked = client.post(f"{THINGS}/suggest", data={"text": "red"}, headers=headers)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "*")
    preflight = client.options(f"{THINGS}/suggest", headers=headers | {"access-control-request-method": "POST"})
    assert preflight.status_code == 200
