"""Strangers at the port: whatever they send or do not send, others are answered."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from mach.serving import bodies, connection
from mach.serving.edition import Question, RowAnswer
from mach.serving.projects import Project
from tests.serving.conftest import live, run

__all__ = ["live", "run"]  # fixtures
Live = Callable[..., str]
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"
SUGGEST = b"POST /v1/projects/things/suggest HTTP/1.1\r\nHost: x\r\n" + FORM


def opened(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=30)


def sent(url: str, data: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    with opened(url) as stream:
        try:
            stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: stream.recv(2**16), b""))
        except (ConnectionError, BrokenPipeError):
            return b""


def is_cut_off(stream: socket.socket, pieces: list[bytes], pause: float = 0.0) -> bool:
    """Whether the server closes the connection before it has all of the pieces."""
    try:
        for piece in pieces:
            stream.sendall(piece)
            time.sleep(pause)
    except ConnectionError:
        return True
    return False


def is_answering(url: str) -> bool:
    response = httpx.post(f"{url}/v1/projects/things/suggest", data={"text": "red cup"}, timeout=30)
    return response.status_code == 200 and len(response.json()["results"]) == 10


def test_random_bytes(live: Live):
    url, generator = live(), np.random.default_rng(0)
    for begin in (b"", b"POST ", b"GET / HTTP/1.1\r\n", SUGGEST, SUGGEST + b"Content-Length: 4000\r\n\r\n"):
        for _ in range(20):
            answer = sent(url, begin + generator.bytes(int(generator.integers(1, 8000))))
            assert b" 500 " not in answer[:20]
            assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert is_answering(url)


def test_bodies_of_random_bytes(live: Live):
    url, generator = live(learn=True), np.random.default_rng(1)
    kinds = {"suggest": bodies.FORM, "suggest-batch": bodies.JSON, "learn": bodies.JSON, "classes": bodies.JSON}
    with httpx.Client(base_url=f"{url}/v1/projects/things/", timeout=30) as client:
        for verb, kind in kinds.items():
            for begin in (b"", b"text=", b'{"documents":[{"text":"', b'[{"text":"'):
                content = begin + generator.bytes(200)
                response = client.post(verb, content=content, headers={"content-type": kind})
                assert response.status_code in (200, 400), (verb, content)
                assert response.status_code == 200 or response.json()["detail"]
    assert is_answering(url)


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/projects/../../etc/passwd",
        b"/v1/projects/..%2f..%2fetc%2fpasswd",
        b"/v1/projects/%00",
        b"/v1/projects/%ff%fe",
        b"/v1/projects//etc",
        b"//etc/passwd",
        b"/v1/projects/things/classes/-1/similar",
        b"/v1/projects/things/classes/" + b"9" * 5000 + b"/similar",
        b"/" + b"a" * 60_000,
        b"http://elsewhere/v1/projects/x",
        b"*",
    ],
)
def test_paths_that_lead_nowhere(live: Live, path: bytes):
    answer = sent(live(), b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ", 2)[1] in (b"400", b"404"), answer[:200]


def test_slow_heads_are_cut_off(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    url = live()
    with httpx.Client(base_url=url) as client:
        assert client.get("/health/live").status_code == 200
        streams = [opened(url) for _ in range(50)]
        for stream in streams[:25]:
            stream.sendall(SUGGEST)
        assert is_answering(url)
        for stream in streams:
            with stream:
                assert stream.recv(1) == b""  # closed by the server; a timeout would be an error
        with opened(url) as again:  # the second head of a connection is as slow
            again.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert again.recv(2**16).startswith(b"HTTP/1.1 200")
            assert is_cut_off(again, [b"G"] * 400, pause=0.05)


def test_slow_bodies_are_cut_off(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    url = live()
    with opened(url) as stream:
        stream.sendall(SUGGEST + b"Content-Length: 100\r\n\r\ntext=")
        assert is_answering(url)
        assert stream.recv(2**16).startswith(b"HTTP/1.1 408")


def test_small_bodies_are_read_when_there_is_no_place_for_large_ones(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bodies, "HELD_BYTES", 0)
    url = live()
    refused = httpx.post(f"{url}/v1/projects/things/suggest", data={"text": "x" * 2**17}, timeout=30)
    assert (refused.status_code, "too many bodies" in refused.json()["detail"]) == (503, True)
    assert is_answering(url)


def test_endless_heads_are_cut_off(live: Live):
    url = live()
    with opened(url) as stream:
        stream.sendall(SUGGEST)
        assert is_cut_off(stream, [b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(10_000)])
    assert is_answering(url)


def test_a_second_head_is_bounded_while_the_first_request_is_answered(live: Live, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()

    def answer(self: Project, question: Question, rows: Sequence[str]) -> list[RowAnswer]:
        assert gate.wait(60)
        return [RowAnswer("v", [], True) for _ in rows]

    url = live()
    monkeypatch.setattr(Project, "answer", answer)
    with opened(url) as stream:
        stream.sendall(SUGGEST + b"Content-Length: 6\r\n\r\ntext=x" + SUGGEST)
        try:
            assert is_cut_off(stream, [b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(10_000)])
        finally:
            gate.set()


def test_those_who_do_not_read_are_left(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connection, "READ_SECONDS", 0.3)
    url, n = live(), 500
    with opened(url) as stream:
        stream.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * n)
        time.sleep(2)
        try:
            n_bytes = sum(map(len, iter(lambda: stream.recv(2**20), b"")))
        except ConnectionError:
            n_bytes = 0
    assert n_bytes < n * len(httpx.get(f"{url}/openapi.json").content)
    assert is_answering(url)


@pytest.mark.parametrize("framing", [b"Content-Length: 999999999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_huge_bodies_are_cut_off(live: Live, framing: bytes):
    url = live()
    with opened(url) as stream:
        stream.sendall(SUGGEST + framing)
        piece = b"x" * 2**16
        assert is_cut_off(stream, [b"10000\r\n" + piece + b"\r\n" if b"chunked" in framing else piece] * 2000)
        try:
            answer = stream.recv(100)
        except ConnectionError:
            answer = b""
        assert not answer or answer.startswith(b"HTTP/1.1 413")
    assert is_answering(url)


def test_smuggled_requests_are_refused(live: Live):
    both = SUGGEST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n"
    assert sent(live(), both).count(b"HTTP/1.1 200") == 0
