"""Train one shard: the unit of work that a launcher places somewhere.

`train_shard` reads the run directory and the store, and writes the repetitions' own files; it knows nothing of
other shards. Where and when it runs, and how often it is interrupted, never changes a bit of the weights: row
order and dropout are functions of (seed, repetition, epoch, step), and a checkpoint holds everything else. On a GPU
the repetitions of a shard are trained together, as one batched network, on the same rows in the same order, that of the
first; a checkpoint says whose order it follows, so that it goes on so anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mach.config import NetworkConfig
from mach.data.store import Store
from mach.data.transfer import fetch_store
from mach.errors import MachError, TrainingError, TrainingStoppedError
from mach.files.places import local_copy
from mach.files.tensors import map_tensors
from mach.networks.blas import blas_threads
from mach.networks.steps import can_be_light, is_little
from mach.networks.trunk import Trunk
from mach.runs.repetition import RepetitionFiles
from mach.runs.run import Run
from mach.sketch.ledger import HostMemory
from mach.training.notes import Notes
from mach.training.progress import Progress
from mach.training.sockets import refused
from mach.training.trainer import Pulse, Step, Trainer

if TYPE_CHECKING:
    from mach.networks.figures import StepFigures


@dataclass(frozen=True)
class ShardJob:
    """What a worker needs to know.

    ``run`` and ``store`` are paths or URLs; a store behind a URL is fetched once a machine. An ``exclusive`` job waits
    for another process of this machine that trains a repetition. Without it both train, the first to finish counts, and
    nothing else is different: they write the same bits.
    """

    run: str
    store: str
    repetitions: tuple[int, ...]
    threads: int = 1
    exclusive: bool = True
    device: str = "cpu"  # of the networks' dense parts: "cpu" or "cuda:N"
    together: bool | None = None  # as one batched network, where their kind allows it; by default on a GPU
    host_memory: HostMemory | None = None  # what of such a network stays in main memory
    trunk: Trunk | None = None  # what the caller of the training passed (`mach.networks.trunk`)


def train_shard(
    job: ShardJob,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    is_alone: bool = True,
) -> None:
    """Train every repetition of the job that is not finished, resuming from its last checkpoint.

    ``report`` is called about twice a second and at the end of every epoch. With ``is_alone`` no thread of this process
    can open a socket meanwhile.

    Raises
    ------
    TrainingStoppedError
        Once ``should_stop``, which is asked between steps, says yes; the state is saved.
    StorageError
        When finished weights cannot be written.
    ConfigError
        When the device is not there, or lacks memory; when the run has a trunk that the job does not name.
    TrainingError
        When the loss is no longer finite, or a socket is opened.
    """
    run = Run.open(job.run, job.trunk)
    missing = [files for r in job.repetitions if not (files := run.repetition(r)).is_done]
    if not missing:
        return
    store = fetch_store(job.store)
    config = run.config  # kept, as the manifest: those of a remote run are read before sockets are refused
    light = job.device == "cpu" and not job.together and _is_light(run, store)
    with _numpy(job) if light else _torch(job, store, config.network) as together:
        for unit in [missing] if together else [[files] for files in missing]:
            try:
                with contextlib.ExitStack() as stack:
                    for files in unit:
                        stack.enter_context(files.held(should_stop, job.exclusive))
                    if is_alone:
                        stack.enter_context(
                            refused(f"repetition {' or '.join(str(files.repetition) for files in unit)}")
                        )
                    for group in _groups(unit) if together else [unit]:
                        pulse = Pulse(should_stop, config.training.checkpoint_seconds)
                        device = "cpu" if together else job.device
                        trainers = (
                            Trainer(run, store, files, report, pulse, device, job.threads, is_light=light)
                            for files in group
                        )
                        if together:
                            _train_together(trainers, len(group), store, job, pulse)
                        else:
                            trainer = next(trainers)
                            trainer.begin(order_of=trainer.repetition)
                            _walk([trainer], trainer.step, pulse)
            finally:
                for files in unit:
                    files.keep_log()


def _is_light(run: Run, store: Store) -> bool:
    """Whether a processor trains the networks of a run without torch."""
    config, manifest = run.config, run.manifest
    if not can_be_light(config, store):
        return False
    return manifest.precision == "float32" and is_little(config, store) if manifest.light is None else manifest.light


@contextlib.contextmanager
def _numpy(job: ShardJob) -> Iterator[bool]:
    """Have numpy train as the job says; repetitions are not trained together."""
    with blas_threads(job.threads):
        yield False


@contextlib.contextmanager
def _torch(job: ShardJob, store: Store, network: NetworkConfig) -> Iterator[bool]:
    """Have torch train as the job says; tells whether all repetitions are trained together.

    What this changes in torch is given back: its threads, its random numbers, and how this thread takes tiny numbers.
    """
    import torch

    from mach.networks.batched import can_be_batched
    from mach.networks.network import refuse_missing

    refuse_missing(job.device)
    together = job.device != "cpu" if job.together is None else job.together
    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(job.threads)
    torch.set_flush_denormal(True)  # denormal Adam moments cost a hundredfold
    try:
        yield together and can_be_batched(network, dense_input=store.is_dense)
    finally:
        torch.set_flush_denormal(False)
        torch.set_rng_state(state)
        torch.set_num_threads(n_threads)


def _groups(unit: list[RepetitionFiles]) -> list[list[RepetitionFiles]]:
    """Repetitions that can be trained together from here: at the same step, on the same rows."""
    groups: dict[Any, list[RepetitionFiles]] = {}
    for files in unit:
        if files.is_done:  # by another process that we waited for
            continue
        standing = None
        if files.is_begun:
            with local_copy(files.state) as file:
                arrays, metadata = map_tensors(file)
                order = Notes.of(arrays, metadata, files.state).order
                standing = (int(arrays["n_steps"][0]), files.repetition if order is None else order)
        groups.setdefault(standing, []).append(files)
    return list(groups.values())


def _train_together(trainers: Iterator[Trainer], n: int, store: Store, job: ShardJob, pulse: Pulse) -> None:
    """Train n repetitions as one network on a device; their own networks are needed one at a time to begin with."""
    from mach.networks.batched import BatchedNetwork
    from mach.networks.feed import Feed
    from mach.networks.network import Network

    begun: list[Trainer] = []
    with contextlib.ExitStack() as stack:
        for trainer in trainers:
            begun.append(trainer)
            trainer.n_together = n
            trainer.begin(order_of=begun[0].repetition)
            assert isinstance(trainer.network, Network)
            if len(begun) == 1:
                where: dict[str, Any] = {"device": job.device, "host_memory": job.host_memory or "none"}
                network = BatchedNetwork(trainer.network, trainer.config.network, n_repetitions=n, **where)
                feed = Feed(store, network.device, network.view, network.host)
                stack.enter_context(contextlib.closing(feed))
            trainer.network = network.adopt(trainer.network, trainer.assignment)

        def step(wanted: Step) -> list[StepFigures] | None:
            return network.step(feed.batch(wanted.rows, wanted.ahead), wanted.rate, measured=wanted.measured)

        _walk(begun, step, pulse)


def _walk(trainers: list[Trainer], step: Callable[[Step], list[StepFigures] | None], pulse: Pulse) -> None:
    """Let trainers walk side by side, each to its end; one that fails leaves the others alone."""
    walks = [trainer.steps() for trainer in trainers]
    wanted = [next(walk, None) for walk in walks]
    errors: list[MachError] = []
    while (lead := next((each for each in wanted if each is not None), None)) is not None:
        figures = step(lead)
        pulse.beat()
        for i, walk in enumerate(walks):
            if wanted[i] is not None:
                try:
                    wanted[i] = walk.send(figures[i] if figures else None)
                except StopIteration:
                    wanted[i] = None
                except (TrainingError, TrainingStoppedError) as error:
                    wanted[i] = None
                    errors.append(error)
        pulse.rest()
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # an error knows this frame: a circle, which would hold the networks
