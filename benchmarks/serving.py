"""`mach serve` under load, over loopback: latency, rows a second, overload, runs and classes that change meanwhile.

    .venv/bin/python benchmarks/serving.py runs/gnd benchmarks/data/gnd-core-text/test.jsonl

Every answer is compared with what the model says offline. The load generator is a process of its own with plain
sockets: it shares the two cores with the server, so rates are those of both together.
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
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np

from mach.model.loading import load
from mach.serving.projects import version_of

K, SECONDS = 10, 6.0
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
        return shares | {"wrong": self.n_wrong, "lost": self.n_lost, "versions": len(self.versions)}


class Connection:
    """One client of HTTP/1.1, which keeps its connection."""

    def __init__(self, port: int) -> None:
        self.port, self.streams = port, None

    async def post(self, path: str, kind: str, body: bytes) -> tuple[int, Any]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
        content = await reader.readexactly(length)
        if "connection: close" in lines:
            writer.close()
            self.streams = None
        return int(lines[0].split()[1]), json.loads(content)


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
) -> Load:
    """Clients that ask again as soon as they are answered; with a rate, requests a second of all of them together."""
    load, begin = Load(), time.perf_counter()
    path = f"/v1/projects/{name}/suggest" + (f"-batch?limit={K}" if rows > 1 else "")

    async def client(c: int) -> None:
        connection, n, generator = Connection(port), 0, np.random.default_rng(c)
        due = begin + c / max(rate, 1e-9) if rate else begin
        while (now := time.perf_counter()) < begin + seconds:
            if rate:
                if now < due:
                    await asyncio.sleep(due - now)
                due += clients / rate
            mine = [texts[i] for i in generator.integers(0, len(texts), rows)]
            n += 1
            if rows == 1:
                kind, body = "application/x-www-form-urlencoded", f"text={quote_plus(mine[0])}&limit={K}".encode()
            else:
                kind, body = "application/json", json.dumps({"documents": [{"text": text} for text in mine]}).encode()
            sent = time.perf_counter()
            try:
                status, answer = await connection.post(path, kind, body)
            except (OSError, asyncio.IncompleteReadError):
                load.n_lost += 1
                connection.streams = None
                continue
            took = time.perf_counter() - sent
            if status == 429:
                load.refused_seconds.append(took)
                if not rate:
                    await asyncio.sleep(0.02)
                continue
            if status != 200:
                load.n_lost += 1
                continue
            load.seconds.append(took)
            load.n_rows += rows
            for text, one in zip(mine, answer if rows > 1 else [answer], strict=True):
                load.versions.add(one["version"])
                load.n_wrong += wrong(wanted, text, one)

    await asyncio.gather(*(client(c) for c in range(clients)))
    load.elapsed = time.perf_counter() - begin
    return load


def wrong(wanted: Wanted, text: str, one: Any) -> int:
    """1 where an answer is not what its version says offline; a version that is not known yet is noted."""
    found = [(result["id"], result["score"]) for result in one["results"]]
    known = wanted.setdefault(one["version"], {}).setdefault(text, found)
    return int(differ(known, found))


def differ(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> bool:
    """Other classes, or probabilities beyond the last digits, which depend on the rows that are answered together."""
    pairs = list(zip(a, b, strict=False))
    return len(a) != len(b) or any(i != j or abs(v - w) > 1e-5 for (i, v), (j, w) in pairs)


def offline(path: Path, texts: list[str]) -> tuple[dict[str, list[tuple[int, float]]], str, float]:
    """What the model answers, its version as the server calls it, and rows a second of a batch."""
    model = load(path)
    model.topk(texts[:64], K, probabilities=True)
    begin = time.perf_counter()
    ids, values = model.topk(texts, K, probabilities=True)
    rate = len(texts) / (time.perf_counter() - begin)
    rows = [
        [(i, v) for i, v in zip(*row, strict=True) if i >= 0] for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return dict(zip(texts, rows, strict=True)), version_of(model), rate


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
    answers, version, rate = offline(path, texts)
    wanted: Wanted = {version: answers}
    table: list[dict[str, Any]] = [{"what": "offline batch", "rows/s": round(rate)}]
    process, port = started(path, *arguments.options)
    how: dict[str, Any] = {"seconds": arguments.seconds}
    try:
        await drive(port, "run", texts, wanted, clients=4, rows=1, seconds=2.0)
        for clients in (1, 8, 64):
            table.append(
                (await drive(port, "run", texts, wanted, clients=clients, rows=1, **how)).row(f"{clients} clients")
            )
        full = await drive(port, "run", texts, wanted, clients=8, rows=32, **how)
        table.append(full.row("8 clients of 32 rows"))
        most = full.n_rows / full.elapsed / 32
        before = resident(process.pid)
        for times in (0.5, 4.0):
            one = await drive(
                port, "run", texts, wanted, clients=int(32 * times * 2), rows=32, rate=times * most, **how
            )
            table.append(one.row(f"{times:g} x that rate, batches of 32"))
        table.append({"what": "memory before and after overload, MB", "rows/s": f"{before} {resident(process.pid)}"})
        table.append(await changing(port, path, folder, texts, wanted, arguments))
        rate = offline(path, texts)[2]
        table.append({"what": "offline batch, again", "rows/s": round(rate)})
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path, help="JSONL with texts")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--reloads", type=int, default=1000)
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
