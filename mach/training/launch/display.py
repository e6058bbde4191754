"""What a person sees while a run trains: one live table for all repetitions, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from mach.training.trainer import Progress

Report = Callable[[str, float], None]  # takes a stage, and the fraction of it that is done


def silence(stage: str, fraction: float) -> None:
    """Report to nobody."""


@contextmanager
def bars(console: Console) -> Iterator[Report]:
    """Progress of stages that no table shows: bars on a terminal, silence elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield silence
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as drawn:
        tasks: dict[str, Any] = {}

        def report(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(stage, total=1.0)
            drawn.update(tasks[stage], completed=fraction)

        yield report


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
    report : callable
        Told how far all of them together are.
    """

    def __init__(self, console: Console, repetitions: list[int], finished: list[int], report: Report = silence) -> None:
        self._console, self._report = console, report
        self._done = {r: float(r in finished) for r in repetitions}
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
        if status == "finished":
            self._tell(repetition, 1.0)

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
        self._tell(progress.repetition, progress.step / max(progress.n_steps, 1))
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

    def _tell(self, repetition: int, fraction: float) -> None:
        self._done[repetition] = fraction
        self._report("training", sum(self._done.values()) / len(self._done))

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


class StageDisplay(Display):
    """One line for a stage of a re-ranker, and one for whatever goes wrong with its parts.

    Parameters
    ----------
    console : Console
    stage : str
    n_parts : int
        To make.
    first : int
        The number of the stage's first part among those of all stages.
    report : callable
    """

    def __init__(self, console: Console, stage: str, n_parts: int, first: int, report: Report = silence) -> None:
        super().__init__(console, [], [], report)
        self._live, self._stage, self._n_parts, self._first = None, stage, n_parts, first
        self.note(f"re-ranker: {stage}, {n_parts} parts to make")

    def set(self, repetition: int, status: str) -> None:
        if status == "finished":
            self._done[repetition] = 1.0
            self._report(f"re-ranker: {self._stage}", len(self._done) / self._n_parts)

    def event(self, repetition: int, text: str) -> None:
        self.note(f"re-ranker: {self._stage}, part {repetition - self._first}: {text}")


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
