"""What a person sees while a run trains: a live line for every repetition, plain lines where there is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

from mach.errors import counted
from mach.files.visible import visible

if TYPE_CHECKING:
    from rich.text import Text

    from mach.training.outlook import Outlook
    from mach.training.progress import Progress

LINE_SECONDS = 30.0  # between plain lines of the whole job, or of a repetition
Report = Callable[[str, float], None]  # takes a stage, and the fraction of it that is done


def tell(console: Console, text: str) -> None:
    """Print one line for a person; names and paths in it are shown as they are, whatever they hold."""
    console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


def stage_name(stage: str) -> str:
    """What a stage of the re-ranker is called."""
    return f"re-ranker: {stage}"


def silence(stage: str, fraction: float) -> None:
    """Report to nobody."""


def both(one: Report, other: Report) -> Report:
    """Report to two."""

    def report(stage: str, fraction: float) -> None:
        one(stage, fraction)
        other(stage, fraction)

    return report


def is_live(console: Console) -> bool:
    """Whether lines are drawn anew in place; a silent console must not be: rich hides what others print meanwhile."""
    return console.is_terminal and not console.quiet


@contextmanager
def bars(console: Console) -> Iterator[Report]:
    """Progress of stages that no table shows: bars on a terminal, silence elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not is_live(console):
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


class Board:
    """One line of the whole job that never stands still; a context manager, below whose line all else is shown.

    Where there is no terminal it is a plain line, now and then, which a thread of its own prints.
    """

    def __init__(self, console: Console, outlook: Outlook, seconds: float = LINE_SECONDS) -> None:
        from rich.live import Live

        self._console, self._outlook, self._seconds = console, outlook, seconds
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)
        self._live = Live(console=console, get_renderable=self._line, transient=True)

    def __enter__(self) -> Self:
        if is_live(self._console):
            self._live.start()
        elif not self._console.quiet:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        if is_live(self._console):
            self._live.stop()
        elif not self._console.quiet:
            self._thread.join()

    def _line(self) -> Text:
        from rich.text import Text

        return Text(visible(self._outlook.line()), no_wrap=True, overflow="ellipsis")

    def _print(self) -> None:
        while not self._is_over.wait(self._seconds):
            tell(self._console, self._outlook.line())


class Display:
    """A line a finished repetition and event; on a terminal, live lines of them all below; a context manager.

    ``console`` is usually on standard error, so that standard output stays free for results. ``report`` is told how far
    all repetitions together are; those that are ``finished`` need no training. ``outlook`` is told of compiling.
    """

    def __init__(
        self,
        console: Console,
        repetitions: list[int],
        finished: list[int],
        report: Report = silence,
        outlook: Outlook | None = None,
    ) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console, self._report, self._outlook = console, report, outlook
        names = ("description", "fields[status]", "fields[figures]")
        texts = [TextColumn(f"{{task.{name}}}", markup=False) for name in names]
        how: dict[str, Any] = {"console": console, "disable": not is_live(console), "transient": True}
        self._lines = Progress(*texts, BarColumn(), TimeElapsedColumn(), **how)
        self._all = self._lines.add_task("training", total=len(repetitions), status="", figures="")
        self._tasks = {
            r: self._lines.add_task(f"repetition {r}", total=1, status="waiting", figures="") for r in repetitions
        }
        self._figures: dict[int, str] = {}
        self._told = dict.fromkeys(repetitions, time.monotonic())
        for r in finished:
            self._lines.update(self._tasks[r], completed=1, status="finished before")

    def __enter__(self) -> Self:
        self._lines.start()
        if self._tasks:
            self._report("training", self._fraction)
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.stop()

    @property
    def _fraction(self) -> float:
        return sum(self._lines.tasks[task].completed for task in self._tasks.values()) / len(self._tasks)

    def set(self, repetition: int, status: str, by: str = "") -> None:
        """Where a repetition is, or that it waits or is finished, by whom."""
        self._lines.update(self._tasks[repetition], status=status)
        if status == "finished":
            self._tell(repetition, 1.0)
            told = [f"repetition {repetition}: {status}{f' by {by}' if by else ''}", self._figures.get(repetition)]
            self.note(", ".join(filter(None, told)))

    def note(self, text: str) -> None:
        """Something about the whole run."""
        tell(self._console, text)

    def compiles(self, worker: int, n_kernels: int, seconds: float) -> None:
        """A worker has compiled kernels, or waited for them."""
        if self._outlook is not None:
            self._outlook.compiles(worker, n_kernels, seconds)

    def event(self, repetition: int, text: str) -> None:
        """Something out of the ordinary, such as a lost worker."""
        self._lines.update(self._tasks[repetition], status=text)
        self.note(f"repetition {repetition}: {text}")

    def progressed(self, progress: Progress) -> None:
        held = progress.validation_precision  # of training rows it would say how well they are known by heart
        figures = f"epoch {progress.epoch}/{progress.n_epochs}, loss {progress.loss:.3f}"
        figures += "" if held is None else f", bucket P@1 of held-out rows {100 * held:.1f}"
        figures += f", {progress.rows_per_second:,.0f} rows/s"
        r, now = progress.repetition, time.monotonic()
        self._figures[r] = figures
        self._lines.update(self._tasks[r], figures=figures)
        self._tell(r, progress.step / max(progress.n_steps, 1))
        is_between = progress.ends_epoch and progress.epoch < progress.n_epochs  # the last is told once it is stored
        if is_between and now - self._told[r] >= LINE_SECONDS and not is_live(self._console):
            self._told[r] = now
            self.note(f"repetition {r}: {figures}")

    def _tell(self, repetition: int, fraction: float) -> None:
        self._lines.update(self._tasks[repetition], completed=fraction)
        self._lines.update(self._all, completed=self._fraction * len(self._tasks))
        self._report("training", self._fraction)


class StageDisplay(Display):
    """One line for a stage of a re-ranker, and one for whatever goes wrong with its parts.

    ``first`` is the number of the stage's first part among those of all stages.
    """

    def __init__(
        self,
        console: Console,
        stage: str,
        n_parts: int,
        first: int,
        report: Report = silence,
        outlook: Outlook | None = None,
    ) -> None:
        super().__init__(console, [], [], report, outlook)
        self._stage, self._n_parts, self._first = stage_name(stage), n_parts, first
        self._finished: set[int] = set()
        if not is_live(console):
            self.note(f"{self._stage}, {counted(n_parts, 'part')}")
        report(self._stage, 0.0)

    def set(self, repetition: int, status: str, by: str = "") -> None:
        if status == "finished":
            self._finished.add(repetition)
            self._report(self._stage, len(self._finished) / self._n_parts)

    def event(self, repetition: int, text: str) -> None:
        self.note(f"{self._stage}, part {repetition - self._first}: {text}")
