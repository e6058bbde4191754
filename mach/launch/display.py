"""What a person sees while a run trains: one live table for all repetitions, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from mach.trainer import Progress


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
    """

    def __init__(self, console: Console, repetitions: list[int], finished: list[int]) -> None:
        self._console = console
        self._status = {r: "finished before" if r in finished else "waiting" for r in repetitions}
        self._progress: dict[int, Progress] = {}
        self._seconds_left: float | None = None
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

    def set(self, repetition: int, status: str) -> None:
        """Where a repetition is, or that it waits or is finished."""
        self._set(repetition, status)

    def note(self, text: str) -> None:
        """Something about the whole run."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def seconds_left(self, seconds: float | None) -> None:
        """How long the whole run will take from now; None: not known yet."""
        self._seconds_left = seconds

    def event(self, repetition: int, text: str) -> None:
        """Something out of the ordinary, such as a lost worker."""
        self._set(repetition, text, loud=True)

    def progressed(self, progress: Progress) -> None:
        self._progress[progress.repetition] = progress
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
        running = [p for r, p in self._progress.items() if self._status[r] not in ("waiting", "finished")]
        speed = f"{sum(p.rows_per_second for p in running):,.0f} rows/s, " if running else ""
        return speed + ("estimating" if self._seconds_left is None else f"about {_duration(self._seconds_left)} left")


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
