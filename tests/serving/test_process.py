"""``mach serve`` as a process: it starts, answers what it took, ends when told to, and says in a line why it cannot."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from mach.cli import main
from mach.model.loading import load

Process = tuple[subprocess.Popen[str], str]


@pytest.fixture
def process(run: Path) -> Iterator[Callable[..., Process]]:
    """Starts the command, and returns it with its url once it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> Process:
        command = [sys.executable, "-m", "mach.cli", "serve", str(run), "--port", "0", *options]
        one = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.append(one)
        assert one.stderr is not None
        for line in one.stderr:
            if found := re.search(r"serving at (http://\S+);", line):
                break
        else:
            raise AssertionError("it did not start")
        url = found[1]
        with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
            assert client.get(f"{url}/health/ready", timeout=60).status_code == 200
        return one, url

    yield start
    for one in started:
        one.kill()
        one.wait()
        assert one.stderr is not None
        one.stderr.close()


def suggest(url: str, text: str) -> Any:
    return httpx.post(f"{url}/v1/projects/things/suggest", data={"text": text}, timeout=60).json()["results"]


def test_what_was_taken_is_answered_before_the_end(process: Callable[..., Process]):
    one, url = process()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as stream:
        stream.sendall(b"POST /v1/projects/things/suggest HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n")
        stream.sendall(b"Content-Type: application/x-www-form-urlencoded\r\n\r\ntext=")
        assert suggest(url, "red")  # the head of the other request has been taken meanwhile
        one.send_signal(signal.SIGTERM)
        for _ in range(1000):  # until nobody is let in any more
            try:
                socket.create_connection((host, int(port)), timeout=60).close()
            except ConnectionError:
                break
            time.sleep(0.01)
        stream.sendall(b"red cup")
        assert stream.recv(2**16).startswith(b"HTTP/1.1 200")
    assert one.wait(60) == 0
    assert one.stderr is not None
    assert "Traceback" not in one.stderr.read()


def test_several_processes_answer_alike_and_count_together(process: Callable[..., Process], run: Path):
    one, url = process("--workers", "2", "--learn")
    right = suggest(url, "red cup")
    for _ in range(20):  # each over a connection of its own
        assert suggest(url, "red cup") == right
    text = httpx.get(f"{url}/metrics", timeout=60).text
    assert 'mach_requests_total{operation="suggest",status="200"} 21' in text
    load(run).classes.upvote("red cup", "green hat")
    assert {suggest(url, "red cup")[0]["label"] for _ in range(20)} == {"green hat"}
    one.send_signal(signal.SIGTERM)
    assert one.wait(60) == 0


def test_what_cannot_be_served_is_told_in_a_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # which the command would set for all that follows
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, told in (
            (
                [str(run), "--port", port],
                f"cannot listen at 127.0.0.1 port {port} (Address already in use): choose another --port or --host",
            ),
            ([str(tmp_path)], f"{tmp_path} is not a run directory"),
            ([str(run), "--host", "0.0.0.0"], "--host 0.0.0.0 is reached by others"),
        ):
            done = CliRunner().invoke(main, ["serve", *arguments])
            last = done.stderr.splitlines()[-1]
            assert (done.exit_code, last.startswith("mach: "), told in last) == (2, True, True), done.stderr
            assert "ERROR" not in done.stderr
