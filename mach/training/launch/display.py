"""What a person sees while a run trains: a live line for every repetition, plain lines where there is no terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from mach.files.visible import visible

if TYPE_CHECKING:
    from mach.training.progress import Progress

Report = Callable[[str, float], None]  # takes a stage, and the fraction of it that is done


def tell(console: Console, text: str) -> None:
    """Print one line for a person; names and paths in it are shown as they are, whatever they hold."""
    console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


def silence(stage: str, fraction: float) -> None:
    """Report to nobody."""


@contextmanager
def bars(console: Console) -> Iterator[Report]:
    """Progress of stages that no table shows: bars on a terminal, silence elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:
        yield silence
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as drawn:
        tasks: dict[str, Any] = {}

        def report(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(stage, total=1.0)
            drawn.update(tasks[stage], completed=fraction)

        yield report


class Display:
    """Live lines on a terminal, a line an epoch and event otherwise; a context manager.

    ``console`` is usually on standard error, so that standard output stays free for results. ``report`` is told how far
    all repetitions together are; those that are ``finished`` need no training.
    """

    def __init__(self, console: Console, repetitions: list[int], finished: list[int], report: Report = silence) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console, self._report = console, report
        names = ("description", "fields[status]", "fields[figures]")
        texts = [TextColumn(f"{{task.{name}}}", markup=False) for name in names]
        self._lines = Progress(
            *texts, BarColumn(), TimeElapsedColumn(), console=console, disable=not console.is_terminal
        )
        self._all = self._lines.add_task("training", total=len(repetitions), status="", figures="")
        self._tasks = {
            r: self._lines.add_task(f"repetition {r}", total=1, status="waiting", figures="") for r in repetitions
        }
        for r in finished:
            self._lines.update(self._tasks[r], completed=1, status="finished before")

    def __enter__(self) -> Self:
        self._lines.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.stop()

    def set(self, repetition: int, status: str) -> None:
        """Where a repetition is, or that it waits or is finished."""
        self._lines.update(self._tasks[repetition], status=status)
        if not self._console.is_terminal:
            self.note(f"repetition {repetition}: {status}")
        if status == "finished":
            self._tell(repetition, 1.0)

    def note(self, text: str) -> None:
        """Something about the whole run."""
        tell(self._console, text)

    def seconds_left(self, seconds: float | None) -> None:
        """How long the whole run will take from now; None: not known yet."""
        left = "estimating" if seconds is None else f"about {_duration(seconds)} left"
        self._lines.update(self._all, figures=left)

    def event(self, repetition: int, text: str) -> None:
        """Something out of the ordinary, such as a lost worker."""
        self._lines.update(self._tasks[repetition], status=text)
        self.note(f"repetition {repetition}: {text}")

    def progressed(self, progress: Progress) -> None:
        figures = (
            f"epoch {progress.epoch}/{progress.n_epochs}, loss {progress.loss:.3f}, "
            f"bucket P@1 {100 * progress.bucket_precision:.1f}, {progress.rows_per_second:,.0f} rows/s, "
            f"{_duration(progress.seconds_left)} left"
        )
        self._lines.update(self._tasks[progress.repetition], figures=figures)
        self._tell(progress.repetition, progress.step / max(progress.n_steps, 1))
        if progress.ends_epoch and not self._console.is_terminal:
            self.note(f"repetition {progress.repetition}: {figures}")

    def _tell(self, repetition: int, fraction: float) -> None:
        self._lines.update(self._tasks[repetition], completed=fraction)
        n_done = sum(self._lines.tasks[task].completed for task in self._tasks.values())
        self._lines.update(self._all, completed=n_done)
        self._report("training", n_done / len(self._tasks))


class StageDisplay(Display):
    """One line for a stage of a re-ranker, and one for whatever goes wrong with its parts.

    ``first`` is the number of the stage's first part among those of all stages.
    """

    def __init__(self, console: Console, stage: str, n_parts: int, first: int, report: Report = silence) -> None:
        super().__init__(console, [], [], report)
        self._stage, self._n_parts, self._first = f"re-ranker: {stage}", n_parts, first
        self._finished: set[int] = set()
        self.note(f"{self._stage}, {n_parts} {'part' if n_parts == 1 else 'parts'} to make")

    def set(self, repetition: int, status: str) -> None:
        if status == "finished":
            self._finished.add(repetition)
            self._report(self._stage, len(self._finished) / self._n_parts)

    def event(self, repetition: int, text: str) -> None:
        self.note(f"{self._stage}, part {repetition - self._first}: {text}")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"
