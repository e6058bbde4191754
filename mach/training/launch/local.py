"""Workers that are processes of this machine."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import wait

from mach.config import LaunchConfig
from mach.data.store import Store
from mach.networks.trunk import for_workers
from mach.runs.run import Run
from mach.training.launch.driver import Message
from mach.training.launch.nursery import Nursery
from mach.training.launch.process import STOP_SECONDS, WorkerProcess


def n_processes(launch: LaunchConfig) -> int:
    """How many of them: by default one for every ``threads`` cores that we may use, or as many as share one GPU."""
    if launch.gpus and not launch.workers:
        return int(1 / launch.gpus)
    return launch.workers or len(os.sched_getaffinity(0)) // launch.threads or 1


class LocalPool:
    """Processes of this machine, each at the end of a socket pair; a `mach.training.launch.driver.Pool`."""

    def __init__(
        self, run: Run, store: Store, launch: LaunchConfig, nursery: Nursery | None = None, **job: str
    ) -> None:
        self._job: Message = {"run": str(run.path), "store": str(store.path), "threads": launch.threads}
        self._job |= job | for_workers(run.agreed_trunk())
        self._gpus, self._nursery = launch.gpus, nursery
        self._needs_torch = "parts" not in job and not (run.manifest.light and not launch.gpus)
        self._workers: dict[int, WorkerProcess] = {}

    def start(self, worker: int) -> None:
        device = f"cuda:{int(worker * self._gpus)}" if self._gpus else "cpu"  # halves: workers 0 and 1 share the first
        job = self._job | {"where": f"worker {worker} {device}", "device": device}
        self._workers[worker] = WorkerProcess(job, self._nursery, needs_torch=self._needs_torch)

    def send(self, worker: int, order: Message) -> None:
        if worker in self._workers:
            self._workers[worker].channel.send(order)

    def receive(self, timeout_seconds: float) -> list[tuple[int, Message]]:
        wait([process.channel.fileno() for process in self._workers.values()], timeout_seconds)
        messages: list[tuple[int, Message]] = []
        for worker, process in list(self._workers.items()):
            if process.channel.has_message():
                messages += [(worker, message) for message in process.messages(f"worker {worker}")]
                if messages[-1][1]["kind"] == "lost":
                    del self._workers[worker]
        return messages

    def now(self) -> float:
        return time.monotonic()

    def stop(self) -> None:
        for process in self._workers.values():
            process.channel.send({"stop": True})
        deadline = time.monotonic() + STOP_SECONDS
        while self._workers:
            self._workers.popitem()[1].leave(deadline)
