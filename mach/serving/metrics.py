"""Counts of what was asked and how long it took, in the text format of Prometheus.

Each process counts in a file of its own, an array that all processes of the server can read: whichever of them is
asked tells the sums. A process that was replaced leaves its file, so counts never fall.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STATUSES = (200, 201, 204, 400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one process, and the sums of all.

    Parameters
    ----------
    operations, projects : sequence of str
        What is counted for each.
    folder : Path, optional
        Where all processes of a server keep their counts; by default this one is alone.

    Examples
    --------
    >>> metrics = Metrics(["suggest"], ["books"])
    >>> metrics.count("suggest", 200, 0.002)
    >>> [line for line in metrics.text(0, {}).splitlines() if line.startswith("mach_requests_total")]
    ['mach_requests_total{operation="suggest",status="200"} 1']
    """

    def __init__(self, operations: Sequence[str], projects: Sequence[str], folder: Path | None = None) -> None:
        self.operations, self.projects, self._folder = list(operations), list(projects), folder
        n = len(self.operations)
        sizes = (n * len(STATUSES), n * (len(SECONDS) + 1), n, len(ROWS) + 1, 1, len(self.projects), 1)
        self._ends = np.cumsum(sizes)
        self._mine: Any = np.zeros(self._ends[-1])
        if folder is not None:
            path = folder / str(os.getpid())
            self._mine = np.memmap(path, np.float64, "w+", shape=(int(self._ends[-1]),))
        self._requests, self._latency, self._total, self._batches, self._batched, self._rows, self._waiting = (
            self._parts(self._mine)
        )

    def count(self, operation: str, status: int, seconds: float) -> None:
        """One request that was answered."""
        o = self.operations.index(operation)
        s = STATUSES.index(status) if status in STATUSES else STATUSES.index(500)
        self._requests[o * len(STATUSES) + s] += 1
        self._latency[o * (len(SECONDS) + 1) + bisect_left(SECONDS, seconds)] += 1
        self._total[o] += seconds

    def batch(self, n_rows: int) -> None:
        """So many rows that were answered together."""
        self._batches[bisect_left(ROWS, n_rows)] += 1
        self._batched[0] += n_rows

    def rows(self, project: str, n_rows: int) -> None:
        """Rows that a project answered."""
        self._rows[self.projects.index(project)] += n_rows

    def text(self, n_waiting: int, versions: dict[str, str]) -> str:
        """All metrics; ``n_waiting`` rows wait in this process, ``versions`` are those that answer, by project."""
        self._waiting[0] = n_waiting
        sums, waiting = np.zeros(int(self._ends[-1])), 0.0
        for is_alive, counts in self._everyone():
            sums += counts
            waiting += counts[-1] if is_alive else 0.0
        return "".join(self._lines(self._parts(sums), waiting, versions))

    def _parts(self, counts: Any) -> list[Any]:
        return np.split(counts, self._ends[:-1])  # views: memory maps stay so

    def _everyone(self) -> Iterator[tuple[bool, Any]]:
        if self._folder is None:
            yield True, self._mine
            return
        for path in self._folder.iterdir():
            counts = np.fromfile(path, np.float64)
            if len(counts) == len(self._mine):
                yield Path("/proc", path.name).exists(), counts

    def _lines(self, parts: list[Any], waiting: float, versions: dict[str, str]) -> Iterator[str]:
        requests, latency, total, batches, batched, rows, _ = parts
        yield from _head("mach_requests_total", "counter", "Requests by operation and status.")
        table = requests.reshape(-1, len(STATUSES))
        for operation, counts in zip(self.operations, table, strict=True):
            for status, n in zip(STATUSES, counts, strict=True):
                if n:
                    yield f'mach_requests_total{{operation="{operation}",status="{status}"}} {n:.0f}\n'
        yield from _head("mach_request_seconds", "histogram", "Seconds from the head of a request to its answer.")
        for operation, counts, seconds in zip(
            self.operations, latency.reshape(-1, len(SECONDS) + 1), total, strict=True
        ):
            if counts.any():
                yield from _histogram("mach_request_seconds", f'operation="{operation}"', SECONDS, counts, seconds)
        yield from _head("mach_rows_total", "counter", "Rows answered by project.")
        for project, n in zip(self.projects, rows, strict=True):
            yield f'mach_rows_total{{project="{project}"}} {n:.0f}\n'
        yield from _head("mach_batch_rows", "histogram", "Rows that were answered together.")
        yield from _histogram("mach_batch_rows", "", ROWS, batches, batched[0])
        yield from _head("mach_queue_rows", "gauge", "Rows that wait.")
        yield f"mach_queue_rows {waiting:.0f}\n"
        yield from _head("mach_run_info", "gauge", "Version that answers.")
        for project, version in versions.items():
            yield f'mach_run_info{{project="{project}",version="{version}"}} 1\n'


def _head(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP {name} {told}\n# TYPE {name} {kind}\n"


def _histogram(name: str, labels: str, bounds: Iterable[float], counts: Any, total: float) -> Iterator[str]:
    up_to = np.cumsum(counts)
    comma = "," if labels else ""
    for bound, n in zip([*bounds, "+Inf"], up_to, strict=True):
        yield f'{name}_bucket{{{labels}{comma}le="{bound}"}} {n:.0f}\n'
    braces = f"{{{labels}}}" if labels else ""
    yield f"{name}_sum{braces} {total:.6f}\n{name}_count{braces} {up_to[-1]:.0f}\n"
