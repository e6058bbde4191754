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

import numpy as np
from numpy.typing import NDArray

from mach.config import LaunchConfig
from mach.data.store import Store
from mach.data.transfer import fetch_store
from mach.errors import MachError, StorageError
from mach.files.caches import cache_folder
from mach.files.names import named
from mach.files.places import Place, kept
from mach.networks.trunk import for_workers
from mach.runs.ray import Actor, Call, Cluster, Resources, node_name
from mach.runs.run import Run
from mach.training.launch.driver import Message
from mach.training.launch.process import STOP_SECONDS, WorkerProcess
from mach.training.setup import shared_store

BLOCK_BYTES = 2**24  # what the object store holds at a time for a node that fetches
MESSAGES_A_SECOND = 400.0  # what the driver takes without falling behind, from all workers together


class RayPool:
    """Actors of a cluster; a `mach.training.launch.driver.Pool`.

    ``n_workers`` will be asked for: that says how often each may tell of its progress. Ray reserves ``memory_bytes``
    for each; ``job`` is what else their processes are told.
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

    ``job`` is as the process reads it, but for ``store``, an argument of `deliver`; ``server`` is for nodes that do not
    see the store.
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


class StoreServer:
    """Reads the files of a store in a directory; as an actor, its blocks travel through the object store."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def files(self) -> dict[str, int]:
        """Bytes of every file, by its name below the directory."""
        files = (file for file in sorted(self._path.rglob("*")) if file.is_file())
        return {file.relative_to(self._path).as_posix(): file.stat().st_size for file in files}

    def read(self, name: str, begin: int) -> NDArray[np.uint8]:
        """The block of a file that begins at a byte."""
        return np.fromfile(self._path / name, np.uint8, BLOCK_BYTES, offset=begin)


def deliver(path: str, fingerprint: str, url: str | None, server: Actor) -> Path:
    """A store with this fingerprint on this machine, one copy however many workers a node has.

    It is seen where the driver sees it (``path``), fetched from the URL where it lies for all machines, or sent by a
    `StoreServer`. StorageError when it cannot be fetched, or is not what was asked for.
    """
    try:
        if Store.open(path).fingerprint == fingerprint:
            return Path(path)
    except StorageError:
        pass  # not seen from here
    if url is not None:
        return fetch_store(url).path

    def receive(folder: Path) -> None:
        for name, n_bytes in server.call("files").result().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("wb") as file:
                while file.tell() < n_bytes:
                    file.write(server.call("read", name, file.tell()).result())
        if Store.open(folder).compute_fingerprint() != fingerprint:
            raise StorageError(f"store {path} did not arrive whole in {folder}: run the same command again")

    return kept(named(cache_folder(), f"store-{fingerprint}"), receive)


def _absolute(place: Place) -> str:
    return str(place.absolute() if isinstance(place, Path) else place)
