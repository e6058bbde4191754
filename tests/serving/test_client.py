"""`mach.Client`, `mach.AsyncClient` and `mach query --url` answer as the model that is served."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

import mach
from mach.cli import main
from mach.cli.shell import read_batches
from mach.errors import ConfigError, DataError, StorageError
from mach.model.model import MachModel
from mach.serving.server import Settings
from tests.serving.conftest import TEXTS, serving

Live = Callable[..., str]


def test_answers_have_the_shape_of_the_model(live: Live, offline: MachModel):
    url = live()
    with mach.Client(url) as client:
        assert client.url == url
        many = [f"{text} {n}" for n in range(15) for text in TEXTS]  # three requests
        pairs: list[tuple[Any, Any, dict[str, Any]]] = [(many, 3, {}), ("red cup", 5, {}), (TEXTS, 28, {})]
        pairs += [(TEXTS, 6, {"allowed": "warm"}), (["red"], 6, {"allowed": ["red cup", 3]})]
        for queries, k, how in pairs:
            ids, scores = offline.topk(queries, k, probabilities=True, **how)
            found = client.topk(queries, k, **how)
            np.testing.assert_array_equal(found[0], ids)
            np.testing.assert_array_equal(found[1], np.where(ids < 0, -np.inf, scores))
            assert [one.dtype.name for one in found] == ["int64", "float32"]
        assert client.topk("red")[0].shape == offline.topk("red")[0].shape

    async def ask() -> Any:
        async with mach.AsyncClient(url, "things") as client:
            return await asyncio.gather(*(client.topk(text, 3) for text in TEXTS))

    for (ids, _), right in zip(asyncio.run(ask()), offline.topk(TEXTS, 3)[0], strict=True):
        np.testing.assert_array_equal(ids, right)


def test_a_client_teaches(live: Live):
    url = live(learn=True)
    with mach.Client(url) as client:
        client.learn(["red cup"], ["green hat"])
        [answer] = client.suggest("red cup", 1)
        assert answer.results[0].label == "green hat"
        with pytest.raises(DataError, match="give one label a text"):
            client.learn(["red cup"], [])

    async def teach() -> Any:
        async with mach.AsyncClient(url) as client:
            await client.learn(["pink hat"], ["white cup"])
            return await client.suggest("pink hat", 1)

    assert asyncio.run(teach())[0].results[0].label == "white cup"


def test_errors_are_one_line(live: Live, tmp_path: Path):
    with pytest.raises(StorageError, match="is `mach serve` running there"):
        mach.Client("http://127.0.0.1:9").topk("x")
    for url in ("ftp://x", "nothing", "http://[::1", "http://x:port"):
        with pytest.raises((ConfigError, StorageError)) as refused:
            mach.Client(url).topk("x")
        assert "\n" not in str(refused.value)
    tokens = tmp_path / "tokens"
    tokens.write_text("read " + "r" * 16)
    url = live(token_file=tokens)
    with pytest.raises(DataError, match=r"refuses \(401\): send the header"):
        mach.Client(url, "things").topk("x")
    client = mach.Client(url, "things", token="r" * 16)
    assert client.topk("red", 1)[0].shape == (1,)
    with pytest.raises(DataError, match="no subset is called 'cold'"):
        client.topk("red", allowed="cold")
    with pytest.raises(DataError, match="takes texts, at least one"):
        client.topk([])
    with pytest.raises(ConfigError, match="from 1 to 1,000"):
        client.topk("red", 1001)
    with pytest.raises(DataError, match=r"refuses \(404\): there is no project 'other'"):
        mach.Client(url, "other", token="r" * 16).topk("red")


def answering(*responses: httpx.Response) -> tuple[mach.Client, list[httpx.Request]]:
    """A client whose server sends these, one after another."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return responses[min(len(asked), len(responses)) - 1]

    client = mach.Client("http://test", "things", timeout_seconds=1)
    client._client = httpx.Client(base_url="http://test", transport=httpx.MockTransport(handle))
    return client, asked


def test_a_busy_server_is_asked_again():
    def busy() -> httpx.Response:
        return httpx.Response(429, headers={"Retry-After": "0.05"}, json={"detail": "full"})

    def right() -> httpx.Response:
        return httpx.Response(200, json=[{"results": [], "version": "a.0", "known": True}])

    client, asked = answering(busy(), busy(), right())
    assert client.suggest("x")[0].version == "a.0"
    assert len(asked) == 3
    client, asked = answering(httpx.Response(429, headers={"Retry-After": "60"}, json={"detail": "full"}))
    with pytest.raises(StorageError, match=r"refuses \(429\): full"):
        client.suggest("x")
    assert len(asked) == 1

    async def ask(*responses: httpx.Response) -> str:
        async with mach.AsyncClient("http://test") as client:
            transport: Any = answering(*responses)[0]._client._transport
            client._client = httpx.AsyncClient(base_url="http://test", transport=transport)
            return (await client.suggest("x"))[0].version + str(client.project)

    projects = httpx.Response(200, json={"projects": [{"project_id": "things"}]})
    assert asyncio.run(ask(busy(), projects, busy(), right())) == "a.0things"


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, content=b"<html>"),
        httpx.Response(200, json={"results": []}),
        httpx.Response(200, json=[]),
        httpx.Response(200, json=[{"results": [], "version": "", "known": True}] * 2),
        httpx.Response(200, json=[{"results": [{"id": -5, "label": "x", "score": 1}], "version": "", "known": True}]),
        httpx.Response(
            200, json=[{"results": [{"id": 2**40, "label": "x", "score": 1}], "version": "", "known": True}]
        ),
        httpx.Response(500, content=b"\xff"),
        httpx.Response(502, json=[1]),
    ],
)
def test_what_a_server_sends_is_checked(response: httpx.Response):
    client, _ = answering(response)
    with pytest.raises(StorageError, match="http://test") as refused:
        client.topk("x")
    assert "\n" not in str(refused.value)


def test_query_asks_a_server(live: Live, run: Path):
    url = live()

    def query(*arguments: object) -> Any:
        return CliRunner().invoke(main, ["query", *map(str, arguments)])

    at_url, here = (query(*where, "red cup", "-k", 3, "--json") for where in (["--url", url], [run, "--probabilities"]))
    assert json.loads(at_url.stdout) == json.loads(here.stdout)
    told, same = (
        query("red cup", "zzz", f"--url={url}", "--project", "things"),
        query(run, "red cup", "zzz", "--probabilities"),
    )
    assert (told.stdout, told.stderr) == (same.stdout, same.stderr)
    assert query("--url", url, "--project", "other", "red").exit_code == 2
    assert "there is no project 'other'" in query("--url", url, "--project", "other", "red").stderr
    assert "\n--url\n" in query(run, "--", "--url").stdout
    nothing, beyond = query("--url", url), query("--url", url, "--threshold", 2, "red")
    assert (nothing.exit_code, "standard input is empty: give a query" in nothing.stderr) == (2, True)
    assert (beyond.exit_code, beyond.stderr.endswith("--threshold 2: a probability is 0 to 1: give one\n")) == (2, True)


def test_lines_that_wait_are_asked_together(live: Live, run: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch):
    sizes, suggest = list[int](), mach.Client.suggest

    def counted(self: Any, queries: list[str], *arguments: Any, **how: Any) -> Any:
        sizes.append(len(queries))
        return suggest(self, queries, *arguments, **how)

    monkeypatch.setattr(mach.Client, "suggest", counted)

    def query(*arguments: object, typed: str) -> Any:
        return CliRunner().invoke(main, ["query", *map(str, arguments), "-k", "3"], input=typed)

    lines = "".join(f"red cup {n}\n\n" for n in range(69)) + "zzz\n"
    told, same = query("--url", live(), typed=lines), query(run, "--probabilities", typed=lines)
    assert (told.stdout, told.stderr) == (same.stdout, same.stderr)
    assert sizes == [32, 32, 6]
    with serving(Settings((str(calibrated),))) as url:
        told = query("--url", url, "--json", typed="0:0.5 1:0.6\n1:0.5\n0:x\n1:1\n")
    assert [json.loads(line)["query"] for line in told.stdout.splitlines()] == ["0:0.5 1:0.6", "1:0.5"]
    assert (told.exit_code, "takes numbers" in told.stderr) == (2, True)


def test_lines_do_not_wait_for_others(monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    with os.fdopen(read) as stdin, os.fdopen(write, "wb", buffering=0) as other:
        monkeypatch.setattr("sys.stdin", stdin)
        batches = read_batches((), 3)
        for sent, found in [
            (b"\xef\xbb\xbfa\r\n \nb\nc", [["a", "b"]]),
            (b"d\n" * 4 + b"e", [["cd", "d", "d"], ["d"]]),
        ]:
            other.write(sent)
            assert [next(batches) for _ in found] == found
        other.write(b"\nf\n\xff\n")
        assert next(batches) == ["e", "f"]
        with pytest.raises(DataError, match="line 10 is not UTF-8"):
            next(batches)
