"""Who does the work of a run: this process, processes of this machine, or a Ray cluster; all come to the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from mach.config import LaunchConfig
from mach.data.store import Store
from mach.errors import IncompleteRunError, counted
from mach.reranking.fitting import RerankerTraining, fitting_bytes
from mach.reranking.parts import STAGES
from mach.runs.run import Run
from mach.training.launch.capacity import is_little_work, plan_of, refuse_too_large, repetitions_together
from mach.training.launch.display import Display, Report, StageDisplay, silence, tell
from mach.training.launch.driver import Driver, Pool
from mach.training.launch.local import LocalPool, n_processes
from mach.training.launch.nursery import Nursery
from mach.training.launch.own import OwnPool
from mach.training.launch.schedule import Schedule, Shard, shards_of
from mach.training.outlook import Outlook


@dataclass(frozen=True)
class Crew:
    """Those who work, and whom they tell of it: a person at the console, and ``report`` of the fraction of a stage.

    ``device`` is of this process, where it does the work itself; by default the first GPU where ``launch.gpus`` is set.
    """

    launch: LaunchConfig
    device: str | None = None
    console: Console = field(default_factory=lambda: Console(quiet=True))
    report: Report = silence
    outlook: Outlook | None = None  # is told of compiling
    nursery: Nursery | None = None  # of processes of this machine, which begin sooner by it

    def say(self, text: str) -> None:
        """Tell the person one thing."""
        tell(self.console, text)

    def train(self, run: Run, store: Store, repetitions: list[int] | None = None) -> None:
        """Train what lacks DONE of some repetitions, by default of all.

        ConfigError when ray is not installed, or a GPU is too small. IncompleteRunError when a repetition was given up,
        the cluster cannot be reached, or on KeyboardInterrupt (the command line makes one of SIGTERM too), which stays
        what it is where this process trains; everything finished or checkpointed is kept.
        """
        wanted = list(range(run.config.hashing.repetitions)) if repetitions is None else repetitions
        finished = [r for r in wanted if run.repetition(r).is_done]
        missing = [r for r in wanted if r not in finished]
        if not missing:
            return  # no worker is needed to find that out
        ledger = plan_of(run.config, store)
        refuse_too_large(ledger, self.launch)
        size, host_memory = repetitions_together(self.launch, run, store)
        shards = shards_of(missing, size)
        with Display(self.console, wanted, finished, self.report, self.outlook) as display:
            if self.launch.launcher == "here":
                self._train_here(run, store, shards, host_memory, display)
                return
            schedule, n = Schedule(shards), self.n_workers(run, store, len(shards))
            n_bytes = ledger.worker_bytes
            try:
                with self._workers(run, store, self.launch, n, n_bytes, display, host_memory=host_memory) as pool:
                    Driver(schedule, pool, display, n).drive()
            except KeyboardInterrupt:
                done = [r for r in wanted if run.repetition(r).is_done]
                saved = [r for r in wanted if r not in done and run.repetition(r).state.exists()]
                raise IncompleteRunError(
                    f"stopped with {len(done)} of {counted(len(wanted), 'repetition')} finished and {len(saved)} begun "
                    f"and saved in {run.path}: run the same command again to go on"
                ) from None
        if schedule.n_deaths:
            lost = counted(schedule.n_deaths, "worker"), counted(schedule.n_lost_steps, "step")
            self.say(f"{lost[0]} lost, {lost[1]} trained again")
        if schedule.given_up:
            shard, cause = min(schedule.given_up.items())
            n_failed = sum(map(len, schedule.given_up))
            named = str(shard[0]) if len(shard) == 1 else f"{shard[0]}-{shard[-1]}"
            raise IncompleteRunError(
                f"{n_failed} of {len(wanted)} repetitions failed, {len(wanted) - n_failed} are finished; repetition "
                f"{named}: {cause} (log: {run.repetition(shard[0]).log}); run the same command again to retry"
            )

    def make_parts(self, training: RerankerTraining) -> None:
        """Make the missing parts of a re-ranker, one stage after the other, on the same workers.

        In each stage the schedule hands parts to whichever worker is free, and the part of a lost worker goes to
        another. Parts are files, so whoever begins again makes only what is missing. IncompleteRunError when a part was
        given up.
        """
        driver, run, store = None, training.run, training.store
        launch = self.launch.changed(gpus=0.0)  # nothing here would use one
        with contextlib.ExitStack() as stack:
            for stage in STAGES:
                numbers, missing = training.parts(stage)
                if not missing:
                    continue
                first = numbers[0]
                display = StageDisplay(self.console, stage, len(missing), first, self.report, self.outlook)
                if launch.launcher == "here":
                    for number in missing:
                        training.make(number)
                        display.set(number, "finished")
                    continue
                schedule = Schedule(shards_of(missing, 1))
                n = self.n_workers(run, store, len(missing))
                if driver is None:
                    n_bytes = plan_of(run.config, store).worker_bytes + fitting_bytes(run, store)
                    pool = self._workers(run, store, launch, n, n_bytes, display, parts="all")
                    driver = Driver(schedule, stack.enter_context(pool), display, n)
                else:
                    driver.take_up(schedule, display, n)
                driver.drive()
                if schedule.given_up:
                    (number, *_), cause = next(iter(schedule.given_up.items()))
                    raise IncompleteRunError(
                        f"the re-ranker failed: {stage}, part {number - first} of {len(numbers)}: {cause} (log: "
                        f"{training.files.log}); the repetitions are finished and answer without it; run the same "
                        "command again to retry"
                    )

    def _train_here(self, run: Run, store: Store, shards: list[Shard], host_memory: str, display: Display) -> None:
        from mach.training.shard import ShardJob, train_shard

        device = self.device or ("cuda:0" if self.launch.gpus else "cpu")
        options: dict[str, Any] = {"threads": self.launch.threads, "device": device, "host_memory": host_memory}
        here = f"this process, {device}"
        for shard in shards:
            for r in shard:
                display.set(r, here)
            job = ShardJob(str(run.path), str(store.path), shard, trunk=run.trunk, **options)
            train_shard(job, report=display.progressed, is_alone=False)
            for r in shard:
                display.set(r, "finished", here)

    def _is_sooner_here(self, run: Run, store: Store) -> bool:
        """Whether this process does the work of processes that nobody asked for, as it is little."""
        is_open = not {"launcher", "workers"} & self.launch.model_fields_set and not self.launch.gpus
        return is_open and is_little_work(run.config, store)

    def n_workers(self, run: Run, store: Store, n_shards: int) -> int:
        """How many will work on so many shards, or parts."""
        return 1 if self._is_sooner_here(run, store) else n_workers(self.launch, n_shards)

    @contextlib.contextmanager
    def _workers(
        self, run: Run, store: Store, launch: LaunchConfig, n: int, n_bytes: int, display: Display, **job: str
    ) -> Iterator[Pool]:
        """A pool of the launcher's workers, each of so many bytes, that is stopped in the end, however it comes."""
        with contextlib.ExitStack() as stack:
            pool: Pool
            if self._is_sooner_here(run, store):
                pool = OwnPool(run, store, launch, display.progressed, **job)
            elif launch.launcher == "local":
                pool = LocalPool(run, store, launch, self.nursery, **job)
            else:
                from mach.runs.ray import Cluster
                from mach.training.launch.cluster import RayPool

                cluster = stack.enter_context(Cluster(launch.address))
                pool = RayPool(cluster, run, store, launch, n, n_bytes, **job)
            stack.callback(pool.stop)
            yield pool


def n_workers(launch: LaunchConfig, n_shards: int) -> int:
    """Workers that so many shards will ask for."""
    if launch.launcher == "here":
        return 1
    most = n_processes(launch) if launch.launcher == "local" else launch.workers or n_shards
    return min(most, n_shards)
