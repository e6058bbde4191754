"""The training of one repetition: what its steps are, and what it writes on the way.

Whoever walks it through its steps makes them: `mach.training.shard`, alone or together with other repetitions.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.config import IDENTITY, Config
from mach.data.batch import read_batch, read_targets
from mach.data.epochs import Epochs
from mach.data.store import Store
from mach.errors import StorageError, TrainingError, TrainingStoppedError
from mach.files.places import HOST, local_copy, short_lived, sweep
from mach.files.tensors import map_tensors
from mach.networks.figures import StepFigures, mean_figures
from mach.networks.inference import stored_weights
from mach.networks.light import LightNetwork
from mach.networks.steps import Steps
from mach.networks.stored import check_stored
from mach.runs.repetition import RepetitionFiles, SignOfLife, Summary
from mach.runs.run import Run
from mach.sketch.hashing import Assignment
from mach.training.notes import Notes
from mach.training.progress import Progress
from mach.training.sockets import refused

if TYPE_CHECKING:
    from mach.networks.batched import Member
    from mach.networks.network import Network

MEASURE_EVERY = 8  # steps: the loss costs a tenth of a step
REPORT_SECONDS = 0.5
SIGN_SECONDS, REMOTE_SIGN_SECONDS = 15.0, 30.0  # between signs of life, but for those at the ends of epochs
SHORT_SECONDS = 1.0  # since what was written last: an epoch that ends sooner writes nothing, unless it is the last
MAX_CHECKPOINT_SHARE = 0.05  # of the time: on a slow disk, checkpoints are rarer than asked
VALIDATION_BATCH = 1024
FEW = 2**20  # entries that are counted at a time
BEST = "best."  # prefix of the best epoch's weights in a state


@dataclass(frozen=True, eq=False)
class Step:
    """The next step of a repetition: its rows, those of the step after in the same epoch, and how to go."""

    rows: NDArray[np.int64]
    ahead: NDArray[np.int64]
    rate: float
    measured: bool


class Pulse:
    """When to stop and when to save, asked once a step for all repetitions that are trained together."""

    def __init__(self, should_stop: Callable[[], bool], checkpoint_seconds: float) -> None:
        self._should_stop, self._checkpoint_seconds = should_stop, checkpoint_seconds
        self._saved, self._pause = time.monotonic(), 0.0
        self.stops = self.saves = False

    def beat(self) -> None:
        """A step was made."""
        self._now = time.monotonic()
        self.stops = self._should_stop()
        self.saves = self._now - self._saved >= max(self._checkpoint_seconds, self._pause)

    def rest(self) -> None:
        """All have saved, if they were to."""
        if self.saves:
            self._saved = time.monotonic()
            self._pause = (self._saved - self._now) / MAX_CHECKPOINT_SHARE


class Trainer:
    """Training of one repetition from wherever its state stands."""

    def __init__(
        self,
        run: Run,
        store: Store,
        files: RepetitionFiles,
        report: Callable[[Progress], None],
        pulse: Pulse,
        device: str,
        threads: int,
        *,
        is_light: bool,
    ) -> None:
        self.store, self.files, self.report, self.pulse, self.threads = store, files, report, pulse, threads
        self.repetition = self.order_of = files.repetition
        self.n_together = 1
        with self._storing():
            self.config: Config = run.config
            manifest, self.counts_K = run.manifest, run.class_counts_K()
            self.assignment: Assignment = run.assignment().select(run.functions([self.repetition]))
        self.training = self.config.training
        # of an older run, which stops as it would have
        self.patience: int | None = run.retired.get("training.patience")
        self.epochs = Epochs(store, self.config)
        self.validation_rows = self.epochs.validation_rows
        self.steps_per_epoch = -(-self.epochs.n_rows // self.training.batch)
        self.n_steps = self.training.epochs * self.steps_per_epoch
        self.how = Steps.of(
            self.config.network,
            n_rows=manifest.n_rows,
            n_buckets=self.assignment.n_buckets,
            dense_input=manifest.dense_input,
            loss=manifest.loss,
            precision=manifest.precision,
            light=is_light,
            has_classes=self.config.hashing.table == IDENTITY,
            retired=run.retired,
        )
        options: dict[str, Any] = {
            "n_features": store.n_features,
            "n_outputs": self.assignment.n_repetitions * self.assignment.n_buckets,
            "loss": manifest.loss,
            "bias": self._log_odds(),
            "seed": int(np.random.SeedSequence([self.training.seed, self.repetition]).generate_state(1)[0]),
            "dither": self.how.dither,
        }
        self.network: Network | Member | LightNetwork
        if is_light:
            half = manifest.precision == "bfloat16"
            self.network = LightNetwork(self.config.network, half=half, **options)
        else:
            self.network = self._heavy_network(run, device, options)
        self.metrics: list[dict[str, Any]] = []
        self.figures: list[StepFigures] = []
        self.worker_seconds = 0.0
        self.saved_step = 0
        self.best_precision, self.best_epoch = -1.0, 0
        self.best: dict[str, NDArray[Any]] = {}  # weights of the best epoch, where training may go on beyond it
        self.sign_seconds = REMOTE_SIGN_SECONDS if files.is_remote else SIGN_SECONDS

    def step(self, wanted: Step) -> list[StepFigures] | None:
        """A step of this repetition alone."""
        network: Any = self.network
        batch, targets = read_batch(self.store, wanted.rows), read_targets(self.store, wanted.rows, self.assignment)
        figures = network.step(batch, targets, wanted.rate, measured=wanted.measured)
        return [figures] if figures else None

    def steps(self) -> Generator[Step, StepFigures | None, None]:
        """Train to the end, or to where another trainer of this repetition is found to have finished it.

        Yields what the next step is, and takes its figures when it was made.
        """
        started = told = signed = time.monotonic()
        epoch_started, epoch_first_step = started, self.network.n_steps
        first_step, worker_seconds = self.network.n_steps, self.worker_seconds
        while self.network.n_steps < self.n_steps and not self._has_converged():
            step = self.network.n_steps
            epoch, offset = divmod(step, self.steps_per_epoch)
            if offset == 0 or step == first_step:
                order = self.epochs.order(epoch, self.order_of)
                epoch_started, epoch_first_step = time.monotonic(), step
            begin, size = offset * self.training.batch, self.training.batch
            figures = yield Step(
                order[begin : begin + size],
                order[begin + size : begin + 2 * size],
                self.how.rate(self.training.rate, step, self.n_steps),
                measured=offset % MEASURE_EVERY == 0,
            )
            self.figures += [figures] if figures else []
            now = time.monotonic()
            self.worker_seconds = worker_seconds + now - started
            speed = (step + 1 - epoch_first_step) * self.training.batch / max(now - epoch_started, 1e-9)
            ends_epoch = offset + 1 == self.steps_per_epoch
            stops, saves = self.pulse.stops, self.pulse.saves
            if (ends_epoch or stops or saves) and self._is_over():
                return
            progress = self._progress(epoch, speed) if ends_epoch or stops or now - told >= REPORT_SECONDS else None
            writes = stops or step + 1 == self.n_steps or (ends_epoch and now - signed >= SHORT_SECONDS)
            if progress is not None and (writes or now - signed >= self.sign_seconds):
                self._sign(progress)
                signed = now
            if ends_epoch:
                self._end_epoch(epoch, speed, writes=writes)
            if progress is not None:
                self.report(replace(progress, validation_precision=self._validated()))
                told = now
            if stops:
                self._try(lambda: self.files.write_metrics(self.metrics))
                self._checkpoint()
                if self._is_over():  # since just now
                    return
                raise TrainingStoppedError(f"repetition {self.repetition} stopped at step {step + 1} of {self.n_steps}")
            if saves:
                self._try(self._checkpoint)
        if not self._is_over():
            self._finish()

    def _log_odds(self) -> NDArray[np.float32]:
        """Log odds of every bucket, taking its classes as exclusive: the loss starts near that of the prior."""
        n_rows = max(1, self.store.n_rows)
        share = np.clip(self._by_output(self.counts_K) / n_rows, 0.1 / n_rows, 0.5)
        return np.log(share / (1.0 - share)).astype(np.float32)

    def _by_output(self, numbers_K: NDArray[Any]) -> NDArray[np.float64]:
        """Numbers of classes, summed over the classes of every bucket of every hash function."""
        buckets_JK = self.assignment.buckets(np.arange(self.store.n_classes))
        return np.concatenate([np.bincount(K, numbers_K, self.assignment.n_buckets) for K in buckets_JK])

    def _heavy_network(self, run: Run, device: str, options: dict[str, Any]) -> Network:
        """One of torch; if it samples its outputs, it knows how often each is a target in the rows of its steps."""
        from mach.networks.network import Network

        how: dict[str, Any] = {"device": device, "sampled": self.how.sampled, "trunk": run.agreed_trunk()}
        how |= {"dense_input": self.store.is_dense, "precision": run.manifest.precision}
        network = Network(self.config.network, **options, **how)
        if network.samples:  # repetitions that are trained together compute all
            expected = self._by_output(self.epochs.counts_K()) / self.epochs.n_rows
            network.expect(np.minimum(expected, 1.0))
        return network

    def _progress(self, epoch: int, speed: float) -> Progress:
        mean = mean_figures(self.figures)
        return Progress(
            repetition=self.repetition,
            step=self.network.n_steps,
            n_steps=self.n_steps,
            epoch=epoch + 1,
            n_epochs=self.training.epochs,
            loss=mean.loss,
            bucket_precision=mean.bucket_precision,
            rows_per_second=speed,
            seconds_left=(self.n_steps - self.network.n_steps) * self.training.batch / speed,
            saved_step=self.saved_step,
            n_together=self.n_together,
        )

    def _end_epoch(self, epoch: int, speed: float, *, writes: bool) -> None:
        mean = mean_figures(self.figures)
        if not math.isfinite(mean.loss):
            raise TrainingError(
                f"repetition {self.repetition} diverged: its loss is {mean.loss} at step {self.network.n_steps}: lower "
                f"training.rate (now {self.training.rate}) in a new run, or look for huge values in the features"
            )
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.network.n_steps}
        row |= asdict(mean) | {"rows_per_second": round(speed, 1)}
        if len(self.validation_rows):
            validation = self._validate()
            row |= {"validation_loss": validation.loss, "validation_bucket_precision": validation.bucket_precision}
            if validation.bucket_precision > self.best_precision:
                self.best_precision, self.best_epoch = validation.bucket_precision, epoch + 1
                if self.patience is not None:
                    self.best = {name: array.copy() for name, array in self._stored_weights().items()}
        self.metrics.append(row)
        self.figures = []
        is_last = self.network.n_steps == self.n_steps or self._has_converged()
        if writes or is_last:
            with contextlib.nullcontext() if is_last else short_lived():  # until the last, a checkpoint knows them
                self._try(lambda: self.files.write_metrics(self.metrics))

    def _sign(self, progress: Progress) -> None:
        told = asdict(progress) | {"pid": os.getpid(), "unix_seconds": time.time(), "device": str(self.network.device)}
        del told["repetition"], told["n_together"], told["validation_precision"]
        if math.isfinite(progress.loss):
            with short_lived():
                self._try(lambda: self.files.write_progress(SignOfLife(**told)))

    def _is_over(self) -> bool:
        """Whether another trainer has finished this repetition; as long as storage does not answer, it has not."""
        with contextlib.suppress(StorageError), self._storing():
            if self.files.is_done:
                self.files.tidy()  # should the other one have died before it could
                return True
        return False

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        """What remote storage opens is no talk between repetitions; local files open nothing and get no licence."""
        with refused("") if self.files.is_remote else contextlib.nullcontext():
            yield

    def _validate(self) -> StepFigures:
        total = np.zeros(2)
        for begin in range(0, len(self.validation_rows), VALIDATION_BATCH):
            rows = self.validation_rows[begin : begin + VALIDATION_BATCH]
            targets = read_targets(self.store, rows, self.assignment)
            figures = self.network.figures(read_batch(self.store, rows), targets)
            total += np.array([figures.loss, figures.bucket_precision]) * len(rows)
        loss, precision = total / len(self.validation_rows)
        return StepFigures(float(loss), float(precision))

    def _validated(self) -> float | None:
        """The share of held-out rows whose best bucket was right at the end of the last epoch."""
        return self.metrics[-1].get("validation_bucket_precision") if self.metrics else None

    def _has_converged(self) -> bool:
        is_watched = self.patience is not None and len(self.validation_rows) > 0
        return is_watched and len(self.metrics) - self.best_epoch >= (self.patience or 0)

    def begin(self, order_of: int) -> None:
        """Go on from the checkpoint; a repetition without one follows the row order of the given repetition."""
        self.order_of = order_of
        with self._storing():
            sweep(self.files.folder)
            if not self.files.is_begun:
                if self.training.start is not None:
                    network: Any = self.network
                    with local_copy(self.files.start) as file:
                        network.load_weights(map_tensors(file)[0])
                return
            try:
                with local_copy(self.files.state) as file:
                    arrays, metadata = map_tensors(file)
                    notes = Notes.of(arrays, metadata, self.files.state)
                    self.network.load_state(arrays)
                    best = {name[len(BEST) :]: a.copy() for name, a in arrays.items() if name.startswith(BEST)}
                    if best:
                        shapes = {name: array.shape for name, array in self.network.weights().items()}
                        check_stored(best, shapes, self.files.state, has_trunk=self.config.network.trunk is not None)
                    self.best = best
            except StorageError:
                if self._is_over():  # and its state has just been removed
                    return
                raise
        self.order_of = self.repetition if notes.order is None else notes.order
        self.metrics, self.worker_seconds, self.figures = list(notes.metrics), notes.worker_seconds, list(notes.figures)
        self.best_precision, self.best_epoch = notes.best_precision, notes.best_epoch
        self.saved_step = self.network.n_steps

    def _checkpoint(self) -> None:
        notes = {
            "metrics": self.metrics,
            "worker_seconds": self.worker_seconds,
            "figures": [asdict(figures) for figures in self.figures],
            "best_precision": self.best_precision,
            "best_epoch": self.best_epoch,
            "order": self.order_of,
        }
        best = {BEST + name: array for name, array in self.best.items()}
        with self._storing():
            self.files.save_state(self.network.state() | best, {"notes": json.dumps(notes)})
        self.saved_step = self.network.n_steps

    def _try(self, write: Callable[[], None]) -> None:
        """A write that fails loses nothing yet: say so and train on, there may be room for the end."""
        try:
            with self._storing():
                write()
        except StorageError as error:
            self.files.note(f"skipped at step {self.network.n_steps}: {error}")

    def _stored_weights(self) -> dict[str, NDArray[Any]]:
        kind, store, rows_D = self.config.network.weights, self.store, None
        if kind == "int4" and not store.is_dense:
            rows_D = np.zeros(store.n_features, np.int64)
            for begin in range(0, len(store.feature_indices), FEW):  # numpy counts by a copy as int64
                rows_D += np.bincount(store.feature_indices[begin : begin + FEW], minlength=store.n_features)
        return stored_weights(self.network.weights(), kind, rows_D)

    def _finish(self) -> None:
        with self._storing():
            digest = self.files.save_weights(self.best or self._stored_weights())
            self.files.finish(
                Summary(
                    repetition=self.repetition,
                    steps=self.network.n_steps,
                    epochs=len(self.metrics),
                    best_epoch=self.best_epoch or None,
                    worker_seconds=round(self.worker_seconds, 2),
                    threads=self.threads,
                    peak_memory_bytes=peak_memory_bytes(),
                    host=HOST,
                    weights_digest=digest,
                )
            )


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far; ``ru_maxrss`` would start at the parent's size."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
