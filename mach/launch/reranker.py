"""Train a run's re-ranker on the workers of a launcher: orders are as for repetitions, their numbers are parts.

Pilots come first where an order is learned, then the stages of `mach.reranking` one after the other; in each, the
schedule hands parts to whichever worker is free, and the part of a lost worker goes to another. Parts are files, so a
driver that begins again makes only what is missing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console

from mach.config import LaunchConfig
from mach.data.store import Store
from mach.errors import IncompleteRunError
from mach.launch import local
from mach.launch.display import Display
from mach.launch.driver import Driver, Pool
from mach.launch.launchers import train
from mach.launch.pilot import teach
from mach.launch.schedule import Schedule, shards_of
from mach.launch.setup import plan_of
from mach.repetition import RepetitionFiles
from mach.reranking.fitting import RerankerTraining, fitting_bytes
from mach.reranking.parts import STAGES
from mach.reranking.record import is_due
from mach.reranking.settings import FitSettings
from mach.storage import Run

LOCK_SECONDS = 0.2


def train_reranker(
    run: Run,
    store: Store,
    launch: LaunchConfig,
    *,
    console: Console | None = None,
    settings: FitSettings | None = None,
) -> None:
    """Train the re-ranker if one is due (`mach.reranking.record.is_due`); another driver of this machine is waited for.

    With ``settings``, classifiers are fitted as these say, as pilots' are as those of their run.

    Raises
    ------
    IncompleteRunError
        When parts were given up, or on KeyboardInterrupt; what is finished is kept.
    """
    if not is_due(run):
        return
    console = console or Console(stderr=True)
    training = RerankerTraining(run, store)
    try:
        with _held(training.files):
            if not is_due(run):  # another driver made it meanwhile
                return
            training.begin(settings)
            teach(training, lambda pilot, rows: _train_pilot(pilot, rows, launch, console, training.settings), console)
            _make_parts(training, launch, console)
            summary = training.finish()
    except KeyboardInterrupt:
        raise IncompleteRunError(
            f"stopped while the re-ranker was trained; all repetitions and its finished parts are in {run.path}: run "
            "the same command again to go on"
        ) from None
    console.print(
        f"re-ranker: {summary.n_weights:,} weights, {summary.n_bytes:,} bytes, {summary.cpu_seconds:.0f} s of "
        f"processors; {summary.formula}" + (", chosen by held-out rows" if summary.validated else ""),
        highlight=False,
        soft_wrap=True,
    )
    if summary.repeats < 0 and not summary.learned:
        console.print(
            "re-ranker: classes that a training row with the same features has are put last, as held-out rows hardly "
            "ever repeat one: asked for a training row, the run answers with other classes (reranking.repeats = 0 and "
            "`--no-rerank` do not)",
            highlight=False,
            soft_wrap=True,
        )


def _train_pilot(pilot: Run, rows: Store, launch: LaunchConfig, console: Console, settings: FitSettings) -> None:
    train(pilot, rows, launch, console=console)
    train_reranker(pilot, rows, launch, console=console, settings=settings)


class _StageDisplay(Display):
    """One line a stage, and one for whatever goes wrong in it."""

    def __init__(self, console: Console, stage: str, n_parts: int, first: int) -> None:
        super().__init__(console, [], [])
        self._live, self._stage, self._first = None, stage, first
        self.note(f"re-ranker: {stage}, {n_parts} parts to make")

    def set(self, repetition: int, status: str) -> None:
        pass

    def event(self, repetition: int, text: str) -> None:
        self.note(f"re-ranker: {self._stage}, part {repetition - self._first}: {text}")


def _make_parts(training: RerankerTraining, launch: LaunchConfig, console: Console) -> None:
    """Make the missing parts of one stage after the other, on the same workers."""
    driver = None
    with contextlib.ExitStack() as stack:
        for stage in STAGES:
            n_parts, missing = training.parts(stage)
            if not missing:
                continue
            first = training.number_of(stage, 0)
            schedule = Schedule(shards_of([first + part for part in missing], 1), launch.attempts)
            display = _StageDisplay(console, stage, len(missing), first)
            n_workers = min(_n_workers(launch, len(missing)), len(missing))
            if driver is None:
                driver = Driver(schedule, stack.enter_context(_pool(training, launch)), display, n_workers)
            else:
                driver.take_up(schedule, display, n_workers)
            driver.drive()
            if schedule.given_up:
                (number, *_), cause = next(iter(schedule.given_up.items()))
                raise IncompleteRunError(
                    f"the re-ranker failed: {stage}, part {number - first} of {n_parts}: {cause} (log: "
                    f"{training.files.log}); the repetitions are finished and answer without it; run the same command "
                    "again to retry"
                )


def _n_workers(launch: LaunchConfig, n_parts: int) -> int:
    return (
        local.n_workers(launch.model_copy(update={"gpus": 0.0}))
        if launch.launcher == "local"
        else launch.workers or n_parts
    )


@contextlib.contextmanager
def _pool(training: RerankerTraining, launch: LaunchConfig) -> Iterator[Pool]:
    """Workers of the launcher that make parts; stopped in the end."""
    run, store = training.run, training.store
    launch = launch.model_copy(update={"gpus": 0.0})  # nothing here would use one
    with contextlib.ExitStack() as stack:
        pool: Pool
        if launch.launcher == "local":
            pool = local.LocalPool(run, store, launch, parts="all")
        else:
            from mach.launch.cluster import RayPool
            from mach.launch.ray import Cluster

            n_bytes = launch.memory_bytes or plan_of(run.config, store).ledger.worker_bytes + fitting_bytes(run, store)
            launch = launch.model_copy(update={"memory_bytes": n_bytes})
            cluster = stack.enter_context(Cluster(launch.address))
            pool = RayPool(cluster, run, store, launch, launch.workers or 1, parts="all")
        try:
            yield pool
        finally:
            pool.stop()


@contextlib.contextmanager
def _held(files: RepetitionFiles) -> Iterator[None]:
    """Hold the re-ranker's lock; while another process does, wait for it."""
    while True:
        with files.locked() as is_ours:
            if is_ours:
                yield
                return
        time.sleep(LOCK_SECONDS)
