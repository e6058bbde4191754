"""A budget of minutes: the most effort that fits it, by the planned work and a rate that is measured first."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mach.config import Config, Effort
from mach.data.store import Store
from mach.errors import TrainingStoppedError, counted
from mach.networks.trunk import Trunk
from mach.runs.run import Run
from mach.training.launch.launchers import n_workers
from mach.training.outlook import duration
from mach.training.progress import Progress
from mach.training.setup import resolve
from mach.training.work import Work, stages

MEASURED_SECONDS = 2.0  # of steps, once the first was made
USED = 0.9  # of the minutes: what is planned
# From the most to the least: an effort, and below what its other choices are kept.
FEW, ONE = {"training.epochs": 2}, {"hashing.repetitions": 1}
LADDER: list[tuple[Effort, dict[str, int]]] = [
    ("best", {}),
    ("best", {"reranking.pilots": 1}),
    ("balanced", {}),
    ("balanced", {"hashing.repetitions": 2}),
    ("fast", {}),
    ("fast", FEW),
    ("fast", FEW | ONE),
    ("fast", FEW | ONE | {"reranking.candidates": 0}),
    ("fast", {"training.epochs": 1} | ONE | {"reranking.candidates": 0}),
]


class Choice(NamedTuple):
    """A configuration, how it came about, and the seconds that it is planned to take."""

    config: Config
    seconds: float
    text: str


def choices(config: Config, work_of: Callable[[Config], Work], rate: float) -> list[Choice]:
    """What may be chosen for a configuration, from the most to the least; keys that it gives stay.

    ``work_of`` tells the work of a choice, which it fills in; ``rate`` what a planned second takes here.
    """
    found: list[Choice] = []
    efforts = [effort for effort, _ in LADDER]
    for effort, most in LADDER[efforts.index(config.training.effort or "best") :]:
        chosen = config.changed(training={"effort": effort})
        work = work_of(chosen)
        less: dict[str, dict[str, Any]] = {}
        for key, value in most.items():
            section, _, name = key.partition(".")
            is_open = name not in getattr(config, section).model_fields_set
            if is_open and getattr(getattr(work.config, section), name) > value:
                less.setdefault(section, {})[name] = value
        if less:
            chosen = chosen.changed(**less)
            work = work_of(chosen)
        done, reranking = work.config, work.config.reranking

        def workers(n: int, launch: Any = done.launch) -> int:
            return n_workers(launch, n)

        n_repetitions, pilots = done.hashing.repetitions, range(reranking.pilots)
        planned = stages(work, workers, n_repetitions, pilots, reranks=reranking.candidates > 0)
        text = (
            f"effort {effort}, {counted(n_repetitions, 'repetition')}, {counted(done.training.epochs, 'epoch')}, "
            f"{counted(reranking.pilots, 'pilot')}, {'' if reranking.candidates else 'no '}re-ranker"
        )
        if not found or text != found[-1].text:
            found.append(Choice(chosen, rate * sum(stage.seconds for stage in planned), text))
    return found


def within(
    config: Config,
    store: Store,
    minutes: float,
    say: Callable[[str], None],
    trunk: Trunk | None,
    so_far: Callable[[], float],
) -> Config:
    """The choice of most effort that is planned to end within some minutes; ``so_far`` are seconds that are gone.

    Nothing is refused: where not even the least fits, it is taken. What was chosen is said, and what it leaves out.
    """

    def work_of(chosen: Config) -> Work:
        return Work.of(resolve(chosen, store, trunk=trunk)[0], store)

    rate = measured(config.changed(training={"effort": config.training.effort or "fast"}), store, trunk)
    found = choices(config, work_of, rate)
    left = USED * 60 * minutes - so_far()
    best = next((i for i, choice in enumerate(found) if choice.seconds <= left), len(found) - 1)
    chosen = found[best]
    say(f"{counted(minutes, 'minute')}: {chosen.text}; about {duration(chosen.seconds)} from now")
    if chosen.seconds > left:
        say(f"{counted(minutes, 'minute')}: too few, no less can be chosen, but by keys that the configuration gives")
    elif best:
        _, seconds, text = found[best - 1]
        say(f"{counted(minutes, 'minute')}: left out {text}, as it takes about {duration(seconds)}")
    return chosen.config


def measured(config: Config, store: Store, trunk: Trunk | None) -> float:
    """What a planned second takes on this machine: some steps of a network are made, and thrown away."""
    from mach.training.shard import ShardJob, train_shard

    resolved, manifest, assignment = resolve(config, store, trunk=trunk)
    seen: list[Progress] = []
    began: list[float] = []

    def is_over() -> bool:
        began.append(time.monotonic())  # once the first step was made, which may have compiled
        return began[-1] - began[0] >= MEASURED_SECONDS

    work = Work.of(resolved, store)
    with TemporaryDirectory(prefix="mach-") as folder:
        run = Run.create(Path(folder, "run"), resolved, manifest, store, assignment, trunk=trunk)
        job = ShardJob(str(run.path), str(store.path), (0,), resolved.launch.threads, trunk=run.trunk)
        with contextlib.suppress(TrainingStoppedError):
            train_shard(job, seen.append, is_over, is_alone=False)
    n_steps, seconds = len(began) - 1, began[-1] - began[0]
    n_rows = n_steps * resolved.training.batch
    return seconds / n_rows / work.row_seconds() if n_rows else 1.0
