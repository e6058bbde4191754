"""Workers on a Ray cluster: an actor a worker, a process below each.

An actor only carries messages between the driver and its process, which is the one that `mach.training.launch.local`
starts: it has no socket to any other machine, its threads and its device are set before its first import, and it dies
alone. The driver asks for as many actors as it has use for; Ray places them as processors become free, so nodes that
join get work as soon as their actors live.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mach.config import LaunchConfig
from mach.data.store import Store
from mach.errors import MachError
from mach.files.places import Place
from mach.networks.trunk import for_workers
from mach.runs.ray import Actor, Call, Cluster, Resources, node_name
from mach.runs.run import Run
from mach.training.launch.delivery import StoreServer, deliver
from mach.training.launch.driver import Message
from mach.training.launch.process import STOP_SECONDS, WorkerProcess
from mach.training.setup import shared_store

MESSAGES_A_SECOND = 400.0  # what the driver takes without falling behind, from all workers together


class RayPool:
    """Actors of a cluster; a `mach.training.launch.driver.Pool`.

    Parameters
    ----------
    cluster : Cluster
    run : Run
    store : Store
    launch : LaunchConfig
    n_workers : int
        How many will be asked for: it says how often each may tell of its progress.
    memory_bytes : int
        What Ray reserves for each.
    **job
        What else their processes are told.
    """

    def __init__(
        self,
        cluster: Cluster,
        run: Run,
        store: Store,
        launch: LaunchConfig,
        n_workers: int,
        memory_bytes: int,
        **job: str,
    ) -> None:
        self._cluster = cluster
        self._resources = Resources(
            cpus=launch.threads,
            gpus=launch.gpus,
            memory_bytes=memory_bytes,
            custom=launch.resources,
        )
        self._job = {
            "run": _absolute(run.path),
            "store": _absolute(store.path),
            "store_url": None if isinstance(run.path, Path) else shared_store(run, store),
            "fingerprint": store.fingerprint,
            "threads": launch.threads,
            "device": "cuda:0" if launch.gpus else "cpu",
            "report_seconds": n_workers / MESSAGES_A_SECOND,
            **job,
            **for_workers(run.agreed_trunk()),
        }
        self._server = cluster.start(StoreServer, str(store.path), resources=Resources(cpus=0), here=True)
        self._actors: dict[int, Actor] = {}
        self._alive: set[int] = set()
        self._calls: dict[Call, int] = {}

    def start(self, worker: int) -> None:
        actor = self._cluster.start(Worker, self._job, self._server, resources=self._resources)
        self._actors[worker] = actor
        self._calls[actor.call("begin")] = worker

    def send(self, worker: int, order: Message) -> None:
        if worker in self._actors:
            self._actors[worker].call("order", order)

    def receive(self, timeout_seconds: float) -> list[tuple[int, Message]]:
        if not self._calls:
            time.sleep(timeout_seconds)
        messages: list[tuple[int, Message]] = []
        for call in self._cluster.wait(self._calls, timeout_seconds):
            worker = self._calls.pop(call)
            try:
                told = call.result()
            except (MachError, OSError) as error:  # lost, or it could not begin
                told = [{"kind": "lost", "cause": f"worker {worker}: {error}"}]
            messages += [(worker, message) for message in told]
            if told and told[-1]["kind"] == "lost":
                self._alive.discard(worker)
                self._actors.pop(worker).kill()
            else:
                self._alive.add(worker)
                self._calls[self._actors[worker].call("messages")] = worker
        return messages

    def now(self) -> float:
        return time.monotonic()

    def stop(self) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        leaving = [actor.call("leave") for worker, actor in self._actors.items() if worker in self._alive]
        while leaving and time.monotonic() < deadline:
            ended = self._cluster.wait(leaving, deadline - time.monotonic())
            leaving = [call for call in leaving if call not in ended]
        for actor in [*self._actors.values(), self._server]:
            actor.kill()
        self._actors, self._calls = {}, {}


class Worker:
    """The actor: one training process on its node, and the messages between it and the driver.

    Parameters
    ----------
    job : dict
        As the process reads it, but for ``store``, a `mach.training.launch.delivery.deliver` argument.
    server : Actor
        For nodes that do not see the store.
    """

    def __init__(self, job: dict[str, Any], server: Actor) -> None:
        self._job, self._server = job, server
        self._process: WorkerProcess | None = None

    def begin(self) -> list[Message]:
        """Bring the store here and start the process; there is nothing to tell yet."""
        job = dict(self._job)
        where, fingerprint = job.pop("store"), job.pop("fingerprint")
        job["store"] = str(deliver(where, fingerprint, job.pop("store_url"), self._server))
        job["where"] = f"{node_name()} {job['device']}"
        self._process = WorkerProcess(job)
        return []

    def messages(self) -> list[Message]:
        """What the process has to tell, as soon as there is something; its end is told last."""
        assert self._process is not None
        return self._process.messages(f"the process on {node_name()}")

    def order(self, order: Message) -> None:
        """Pass an order to the process."""
        assert self._process is not None
        self._process.channel.send(order)

    def leave(self) -> None:
        """Let the process save its state and go."""
        if self._process is not None:
            self._process.channel.send({"stop": True})
            self._process.leave()


def _absolute(place: Place) -> str:
    return str(place.absolute() if isinstance(place, Path) else place)
