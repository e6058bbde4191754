"""`mach serve` under load, over loopback: latency, rows a second, overload, runs and classes that change meanwhile.

    .venv/bin/python benchmarks/serving.py runs/gnd benchmarks/data/gnd-core-text/test.jsonl

Every answer is compared with what the model says offline. The load generator is a process of its own with plain
sockets: it shares the two cores with the server. The column of cores says what the server and the generator took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np

from mach.model.loading import load
from mach.serving.edition import version_of

K, SECONDS, STRANGE_BYTES = 10, 6.0, 10_000_000
CLOSE = 1e-5  # of probabilities that are alike but for rounding
Wanted = dict[str, dict[str, list[tuple[int, float]]]]  # by version and text


@dataclass
class Load:
    """What came back."""

    seconds: list[float] = field(default_factory=list)
    refused_seconds: list[float] = field(default_factory=list)
    n_rows: int = 0
    n_lost: int = 0
    n_wrong: int = 0
    versions: set[str] = field(default_factory=set)
    elapsed: float = 0.0
    own: float = 0.0  # seconds of processors: of the generator, and of the server
    server: float = 0.0

    def row(self, name: str) -> dict[str, Any]:
        """A line of the table."""
        shares: dict[str, Any] = {
            "what": name,
            "requests": len(self.seconds),
            "rows/s": round(self.n_rows / self.elapsed),
        }
        for percent in (50, 99):
            shares[f"p{percent} ms"] = (
                round(1000 * float(np.percentile(self.seconds, percent)), 1) if self.seconds else None
            )
        n = len(self.seconds) + len(self.refused_seconds)
        shares["429 %"] = round(100 * len(self.refused_seconds) / max(n, 1), 1)
        late = self.refused_seconds
        shares["429 p99 ms"] = round(1000 * float(np.percentile(late, 99)), 1) if late else None
        shares |= {"wrong": self.n_wrong, "lost": self.n_lost, "versions": len(self.versions)}
        return shares | {"cores": f"{self.server / self.elapsed:.2f} + {self.own / self.elapsed:.2f}"}


class Connection(asyncio.Protocol):
    """One client of HTTP/1.1, which keeps its connection and the answers as they came."""

    def __init__(self, port: int) -> None:
        self.port, self._transport, self._buffer = port, None, bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    async def post(self, request: bytes) -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            self._buffer.clear()
            self._transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self.port)
        self._answer = loop.create_future()
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n") + 4
        if head < 4 or self._answer is None:
            return
        told = bytes(self._buffer[:head]).lower()
        end = head + int(told.partition(b"content-length:")[2].split(b"\r", 1)[0])
        if len(self._buffer) >= end:
            answer, self._answer = self._answer, None
            answer.set_result((int(told[9:12]), bytes(self._buffer[head:end])))
            del self._buffer[:end]
            if b"connection: close" in told:
                self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError())


def requests_of(texts: list[str], name: str, rows: int) -> list[tuple[list[str], bytes]]:
    """Requests as they are sent, and their texts."""
    generator, made = np.random.default_rng(0), []
    for n in range(len(texts) if rows == 1 else 200):
        if rows == 1:
            mine, path, kind = [texts[n]], "suggest", "application/x-www-form-urlencoded"
            body = f"text={quote_plus(mine[0])}&limit={K}".encode()
        else:
            mine = [texts[i] for i in generator.integers(0, len(texts), rows)]
            path, kind = f"suggest-batch?limit={K}", "application/json"
            body = json.dumps({"documents": [{"text": text} for text in mine]}).encode()
        head = f"POST /v1/projects/{name}/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        made.append((mine, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body))
    return made


async def drive(
    port: int,
    name: str,
    texts: list[str],
    wanted: Wanted,
    *,
    clients: int,
    rows: int,
    seconds: float,
    rate: float = 0.0,
    pid: int | None = None,
) -> Load:
    """Clients that ask again as soon as they are answered; with a rate, requests a second of all of them together.

    Answers are compared afterwards: while it lasts, the generator only sends and receives.
    """
    load, requests = Load(), requests_of(texts, name, rows)
    got: list[tuple[list[str], bytes]] = []
    begin, own, server = time.perf_counter(), time.process_time(), processors(pid)

    async def client(c: int) -> None:
        connection, generator = Connection(port), np.random.default_rng(c)
        due = begin + c / rate if rate else begin
        while (now := time.perf_counter()) < begin + seconds:
            if rate:
                if now < due:
                    await asyncio.sleep(due - now)
                due += clients / rate
            mine, request = requests[int(generator.integers(len(requests)))]
            sent = time.perf_counter()
            try:
                status, answer = await connection.post(request)
            except OSError:
                load.n_lost += 1
                continue
            took = time.perf_counter() - sent
            if status == 429:
                load.refused_seconds.append(took)
                if not rate:
                    await asyncio.sleep(0.02)
            elif status == 200:
                load.seconds.append(took)
                load.n_rows += rows
                got.append((mine, answer))
            else:
                load.n_lost += 1

    await asyncio.gather(*(client(c) for c in range(clients)))
    load.elapsed = time.perf_counter() - begin
    load.own, load.server = time.process_time() - own, processors(pid) - server
    for mine, content in got:
        answer = json.loads(content)
        for text, one in zip(mine, answer if rows > 1 else [answer], strict=True):
            load.versions.add(one["version"])
            load.n_wrong += wrong(wanted, text, one)
    return load


def processors(pid: int | None) -> float:
    """Seconds of processors that a process and its children have used."""
    if pid is None:
        return 0.0
    used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(int, used)) / os.sysconf("SC_CLK_TCK") + sum(processors(int(child)) for child in children)


def wrong(wanted: Wanted, text: str, one: Any) -> int:
    """1 where an answer is not what its version says offline; a version that is not known yet is noted."""
    found = [(result["id"], result["score"]) for result in one["results"]]
    known = wanted.setdefault(one["version"], {}).setdefault(text, found)
    return int(differ(known, found))


def differ(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> bool:
    """Other classes or probabilities, beyond the last digits, which depend on the rows that are answered together.

    So classes that are as likely may change places, and the last one may give its place to another.

    >>> differ([(1, 0.5), (2, 0.3)], [(1, 0.5), (3, 0.3)]), differ([(1, 0.5), (2, 0.3)], [(4, 0.5), (2, 0.3)])
    (False, True)
    """
    if len(a) != len(b) or any(abs(v - w) > CLOSE for (_, v), (_, w) in zip(a, b, strict=True)):
        return True
    ours, theirs, last = dict(a), dict(b), a[-1][1] if a else 0.0
    return any(abs(ours.get(k, last) - theirs.get(k, last)) > CLOSE for k in ours.keys() | theirs.keys())


def offline(path: Path, texts: list[str]) -> tuple[dict[str, list[tuple[int, float]]], str, dict[str, Any]]:
    """What the model answers, its version as the server calls it, and a line of the table: a batch of all texts."""
    model = load(path)
    model.topk(texts[:64], K, probabilities=True)
    begin, used = time.perf_counter(), time.process_time()
    ids, values = model.topk(texts, K, probabilities=True)
    elapsed, used = time.perf_counter() - begin, time.process_time() - used
    line = {"what": "offline batch", "rows/s": round(len(texts) / elapsed), "cores": f"{used / elapsed:.2f}"}
    rows = [
        [(i, v) for i, v in zip(*row, strict=True) if i >= 0] for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return dict(zip(texts, rows, strict=True)), version_of(model), line


def started(path: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-m", "mach.cli", "serve", f"run={path}", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "serving at" in line:
            return process, int(line.split("http://127.0.0.1:")[1].split(";")[0])
    raise SystemExit("the server did not start")


def resident(pid: int) -> int:
    """MB of a process, without mapped files."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon"))) // 1024


async def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    path, texts = folder / "run", arguments.texts
    answers, version, before = offline(path, texts)
    wanted: Wanted = {version: answers}
    table: list[dict[str, Any]] = [before]
    process, port = started(path, *arguments.options)
    how: dict[str, Any] = {"seconds": arguments.seconds, "pid": process.pid}
    try:
        await drive(port, "run", texts, wanted, clients=4, rows=1, seconds=2.0)
        for clients in (1, 8, 64):
            table.append(
                (await drive(port, "run", texts, wanted, clients=clients, rows=1, **how)).row(f"{clients} clients")
            )
        full = await drive(port, "run", texts, wanted, clients=8, rows=32, **how)
        table.append(full.row("8 clients of 32 rows"))
        after = offline(path, texts)[2]
        table.append(after)
        rate, late = full.n_rows / full.elapsed, []
        whole = (before["rows/s"] + after["rows/s"]) / 2
        table.append({"what": "share of the offline rate, %", "rows/s": round(100 * rate / whole)})
        memory = resident(process.pid)
        for times in (0.5, 4.0):
            one = await drive(
                port, "run", texts, wanted, clients=int(32 * times * 2), rows=32, rate=times * rate / 32, **how
            )
            table.append(one.row(f"{times:g} x that rate, batches of 32"))
            late.append(float(np.percentile(one.seconds, 99)))
        table.append({"what": "p99 of that to half load", "p99 ms": f"{late[1] / late[0]:.1f} x"})
        table.append({"what": "memory before and after overload, MB", "rows/s": f"{memory} {resident(process.pid)}"})
        table.append(await beset(port, texts, wanted, max(arguments.seconds, 12.0), process.pid))
        if arguments.reloads:
            table.append(await changing(port, path, folder, texts, wanted, arguments))
    finally:
        process.terminate()
        process.wait()
    return table


async def changing(
    port: int, path: Path, folder: Path, texts: list[str], wanted: Wanted, arguments: Any
) -> dict[str, Any]:
    """Reloads and class edits under load; answers of one version must agree, those of the last offline too."""
    other = folder / "other"
    shutil.copytree(path, other)
    load(other).classes.upvote(texts[0], 5)
    few = texts[:50]
    n_reloads, n_edits = arguments.reloads, arguments.edits

    def change() -> None:
        for n in range(n_reloads):
            path.rename(folder / "aside")
            other.rename(path)
            (folder / "aside").rename(other)
            if n_edits and n % max(n_reloads // n_edits, 1) == 0:
                model = load(path)
                model.classes.upvote(few[n % 50], n % model.n_classes)
                if n % 2:
                    model.classes.undo()
            time.sleep(arguments.pause)

    task = asyncio.create_task(asyncio.to_thread(change))
    total = Load()
    begin = time.perf_counter()
    while not task.done():
        one = await drive(port, "run", few, wanted, clients=4, rows=1, seconds=2.0)
        total.seconds += one.seconds
        total.refused_seconds += one.refused_seconds
        total.versions |= one.versions
        total.n_rows, total.n_lost, total.n_wrong = (
            total.n_rows + one.n_rows,
            total.n_lost + one.n_lost,
            total.n_wrong + one.n_wrong,
        )
    await task
    total.elapsed = time.perf_counter() - begin
    for place in (path, other):
        answers, version, _ = offline(place, few)
        total.n_wrong += sum(differ(found, answers.get(text, found)) for text, found in wanted.get(version, {}).items())
    return total.row(f"{n_reloads} reloads, {n_edits} edits")


async def beset(port: int, texts: list[str], wanted: Wanted, seconds: float, pid: int) -> dict[str, Any]:
    """Strangers send ten million random bytes and heads that never end; others are answered meanwhile."""
    is_over, n_bytes = asyncio.Event(), 0

    async def dawdle() -> None:
        while not is_over.is_set():
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /v1/projects/run/suggest HTTP/1.1\r\nX: ")
                while not is_over.is_set() and not writer.is_closing():
                    writer.write(b"x")
                    await asyncio.sleep(1)
                writer.close()

    async def babble(n: int) -> None:
        nonlocal n_bytes
        generator, heads = (
            np.random.default_rng(n),
            [b"", b"POST /v1/projects/run/suggest HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n\r\n"],
        )
        while n_bytes < STRANGE_BYTES:
            data = generator.bytes(int(generator.integers(1, 2**15)))
            n_bytes += len(data)
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(heads[int(generator.integers(3))] + data)
                writer.write_eof()
                await reader.read(2**16)
                writer.close()

    tasks = [asyncio.create_task(dawdle()) for _ in range(200)]
    strange = asyncio.gather(*(babble(n) for n in range(4)))
    one = await drive(port, "run", texts, wanted, clients=4, rows=1, seconds=seconds, pid=pid)
    await strange
    is_over.set()
    await asyncio.gather(*tasks)
    return one.row(f"4 clients beside {n_bytes / 1e6:.0f} MB of noise and 200 endless heads")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path, help="JSONL with texts")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--reloads", type=int, default=1000, help="0 leaves them out")
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("options", nargs="*", help="of mach serve, after --")
    arguments = parser.parse_args()
    with arguments.data.open() as file:
        texts = list(dict.fromkeys(json.loads(next(file))["text"] for _ in range(arguments.rows)))
    arguments.texts = texts
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(arguments.run, Path(folder, "run"))
        table = asyncio.run(measure(arguments, Path(folder)))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {len(texts)} texts")
    columns = list(dict.fromkeys(name for row in table for name in row))
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in table:
        print("| " + " | ".join("" if row.get(name) is None else str(row[name]) for name in columns) + " |")


if __name__ == "__main__":
    main()
