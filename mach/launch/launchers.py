"""The launchers by name: each brings the same run to the same bits, in another place."""

from __future__ import annotations

from rich.console import Console

from mach.config import LaunchConfig
from mach.data.store import Store
from mach.launch import local
from mach.launch.schedule import shards_of
from mach.launch.setup import plan_of, sharded
from mach.storage import Run


def train(
    run: Run,
    store: Store,
    launch: LaunchConfig,
    *,
    repetitions: list[int] | None = None,
    console: Console | None = None,
) -> None:
    """Train what lacks DONE where ``launch.launcher`` says; see `mach.launch.driver.train`."""
    launch = sharded(launch, run, store)
    if launch.launcher == "local":
        local.train_locally(run, store, launch, repetitions=repetitions, console=console)
        return
    wanted = range(run.config.hashing.repetitions) if repetitions is None else repetitions
    if all(run.repetition(r).is_done for r in wanted):
        return  # no cluster is needed to find that out
    from mach.launch.cluster import train_on_ray

    n_bytes = launch.memory_bytes or plan_of(run.config, store).ledger.worker_bytes
    launch = launch.model_copy(update={"memory_bytes": n_bytes})
    train_on_ray(run, store, launch, repetitions=repetitions, console=console)


def n_workers(launch: LaunchConfig, n_repetitions: int) -> int:
    """Workers that a run of so many repetitions will ask for."""
    n_shards = len(shards_of(list(range(n_repetitions)), launch.shard))
    most = local.n_workers(launch) if launch.launcher == "local" else launch.workers or n_shards
    return min(most, n_shards)
