"""What a person sees while a run trains: one live table for all repetitions, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mach.training import Progress


class Display:
    """Live table on a terminal, a line an epoch and event otherwise; a context manager.

    Parameters
    ----------
    console : Console
        Usually on standard error, so that standard output stays free for results.
    repetitions : list of int
        All repetitions of the run.
    finished : list of int
        Those that need no training.
    n_workers : int
        For the time left.
    """

    def __init__(self, console: Console, repetitions: list[int], finished: list[int], n_workers: int) -> None:
        self._console, self._n_workers = console, n_workers
        self._status = {r: "finished before" if r in finished else "waiting" for r in repetitions}
        self._progress: dict[int, Progress] = {}
        self._pace: dict[int, float] = {}  # seconds a step
        self._started = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def started(self, repetition: int, worker: int) -> None:
        self._set(repetition, f"worker {worker}")

    def finished(self, repetition: int) -> None:
        self._set(repetition, "finished")

    def event(self, repetition: int, text: str) -> None:
        """Something out of the ordinary, such as a lost worker."""
        self._set(repetition, text, loud=True)

    def progressed(self, progress: Progress) -> None:
        self._progress[progress.repetition] = progress
        if progress.step < progress.n_steps:
            self._pace[progress.repetition] = progress.seconds_left / (progress.n_steps - progress.step)
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif progress.step * progress.n_epochs == progress.epoch * progress.n_steps:  # the end of an epoch
            self._console.print(
                f"repetition {progress.repetition}: epoch {progress.epoch}/{progress.n_epochs}, "
                f"loss {progress.loss:.3f}, bucket P@1 {100 * progress.bucket_precision:.1f}, "
                f"{progress.rows_per_second:,.0f} rows/s, {_duration(progress.seconds_left)} left",
                highlight=False,
                soft_wrap=True,
            )

    def _set(self, repetition: int, status: str, *, loud: bool = False) -> None:
        self._status[repetition] = status
        if self._live:
            if loud:
                self._live.console.print(f"repetition {repetition}: {status}", highlight=False, soft_wrap=True)
            self._live.update(self._table(), refresh=True)
        else:
            self._console.print(f"repetition {repetition}: {status}", highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=f"training, {_duration(time.monotonic() - self._started)} so far, {self._left()}")
        for name in ("repetition", "where", "epoch", "loss", "bucket P@1", "rows/s", "left"):
            table.add_column(name, justify="left" if name == "where" else "right")
        for repetition, status in self._status.items():
            table.add_row(str(repetition), status, *_cells(self._progress.get(repetition)))
        return table

    def _left(self) -> str:
        """Time left for the whole run: work left over the workers, at the speed seen so far."""
        if not self._pace:
            return "estimating"
        steps_left = sum(p.n_steps - p.step for p in self._progress.values())
        n_waiting = sum(status == "waiting" for status in self._status.values())
        steps_left += n_waiting * next(iter(self._progress.values())).n_steps
        left = steps_left * sum(self._pace.values()) / len(self._pace)
        return f"about {_duration(left / self._n_workers)} left"


def _cells(progress: Progress | None) -> list[str]:
    if progress is None:
        return [""] * 5
    return [
        f"{progress.epoch}/{progress.n_epochs}",
        f"{progress.loss:.3f}",
        f"{100 * progress.bucket_precision:.1f}",
        f"{progress.rows_per_second:,.0f}",
        _duration(progress.seconds_left),
    ]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
