"""The files of one repetition: weights, checkpoint, metrics, sign of life, and the DONE that is written last."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mach.config import Section
from mach.errors import StorageError, TrainingStoppedError
from mach.files.caches import cache_folder
from mach.files.places import HOST, Place, atomic_file, is_there, read_bytes, remove
from mach.files.records import Digest, locked, parse_json, read_json, write_json
from mach.files.regular import create, open_regular
from mach.files.tensors import local_tensors, write_tensors

LOCK_SECONDS = 0.2
SILENCE_SECONDS = 120.0  # a trainer that was not heard of for so long is taken for dead, where no lock can tell


class Summary(Section):
    """What a finished repetition tells about its training: the content of DONE."""

    repetition: int
    steps: int
    epochs: int
    best_epoch: int | None
    worker_seconds: float
    threads: int
    peak_memory_bytes: int
    peer_bytes: int = 0  # versions until 2026 counted them; now no socket can be opened (`mach.training.sockets`)
    peer_sockets: int = 0
    host: str
    weights_digest: Digest


class SignOfLife(Section):
    """What a trainer last told about itself: the content of progress.json."""

    host: str = HOST
    pid: int
    device: str = "cpu"
    step: int
    n_steps: int
    epoch: int
    n_epochs: int
    loss: float | None
    bucket_precision: float | None
    rows_per_second: float
    seconds_left: float
    saved_step: int
    unix_seconds: float

    @property
    def age_seconds(self) -> float:
        return max(0.0, time.time() - self.unix_seconds)


class RepetitionFiles:
    """The files of one repetition, in a folder of this machine or below a URL; the ``run`` is what that lies in."""

    def __init__(self, folder: Place, repetition: int, run: Place) -> None:
        self.repetition, self.folder, self.run = repetition, folder, run
        self.weights = folder / "weights.safetensors"
        self.start = folder / "start.safetensors"
        self.state = folder / "state.safetensors"
        self.metrics = folder / "metrics.jsonl"
        self.sign = folder / "progress.json"
        self.log = folder / "log.txt"
        self.done = folder / "DONE"

    @property
    def is_remote(self) -> bool:
        return not isinstance(self.folder, Path)

    @property
    def is_done(self) -> bool:
        return is_there(self.done)

    @property
    def is_begun(self) -> bool:
        """Whether a checkpoint is there to go on from."""
        return is_there(self.state)

    @property
    def is_trained_now(self) -> bool:
        """Whether some process is training it; writes nothing. A lock tells, or where there is none, its last word."""
        if not isinstance(self.folder, Path):
            sign = self.progress()
            return sign is not None and sign.age_seconds < SILENCE_SECONDS
        try:
            with open_regular(self.folder / "lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def locked(self) -> contextlib.AbstractContextManager[bool]:
        """Try to hold the repetition; yields whether it is ours. The lock falls when its process ends.

        Remote folders have no locks, and it is always ours: work that is done twice ends in the same bits.
        """
        if not isinstance(self.folder, Path) or not isinstance(self.run, Path):
            return contextlib.nullcontext(True)
        return locked(self.folder, self.run)

    @contextlib.contextmanager
    def held(self, should_stop: Callable[[], bool] = lambda: False, exclusive: bool = True) -> Iterator[None]:
        """Hold the repetition; while another process does, wait: it may finish it, or be about to die.

        TrainingStoppedError when ``should_stop`` says so before. Without ``exclusive`` nobody is waited for.
        """
        while True:
            with self.locked() as is_ours:
                if is_ours or not exclusive:
                    yield
                    return
            if should_stop():
                raise TrainingStoppedError(f"stopped while another process trained repetition {self.repetition}")
            time.sleep(LOCK_SECONDS)

    def save_weights(self, arrays: Mapping[str, NDArray[Any]]) -> str:
        """Write the weights; return the digest of their bytes."""
        return self.save(self.weights, arrays, {"repetition": str(self.repetition)})

    def save(self, where: Place, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
        """Write arrays atomically; return the digest of their bytes."""
        with atomic_file(where) as file:
            return write_tensors(file, arrays, metadata)

    def save_state(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
        """Write a checkpoint; behind the DONE of another trainer nothing of it remains."""
        self.save(self.state, arrays, metadata)
        if self.is_done:
            self.tidy()

    def save_start(self, weights: Path) -> None:
        """Copy the weights of another run to start from."""
        if isinstance(self.folder, Path):
            self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.start) as file, open_regular(weights) as source:
            shutil.copyfileobj(source, file, 2**24)

    def write_progress(self, sign: SignOfLife) -> None:
        """Tell whoever looks that and how training goes on."""
        write_json(self.sign, sign.model_dump())
        if self.is_done:
            self.tidy()

    def progress(self) -> SignOfLife | None:
        """What the trainer last told; None when nothing is known, as when DONE tells more."""
        try:
            return read_json(self.sign, SignOfLife)
        except StorageError:
            return None

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write one row an epoch, unless another trainer of this repetition has come further."""
        with contextlib.suppress(StorageError):
            if len(self.read_metrics()) > len(rows):
                return
        with atomic_file(self.metrics) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """One row an epoch, as far as training is; StorageError when the file is damaged."""
        try:
            lines = read_bytes(self.metrics).splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"{self.metrics} cannot be read ({error.strerror})") from error
        rows = [parse_json(line, f"{self.metrics}, line {n}") for n, line in enumerate(lines, 1)]
        for n, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise StorageError(f"{self.metrics}, line {n} is no JSON object: the file is damaged")
            for name, value in row.items():
                if value is not None and not isinstance(value, int | float):
                    raise StorageError(f"{self.metrics}, line {n}: {name!r:.40} is no number: the file is damaged")
        return rows

    def summary(self) -> Summary:
        """What DONE says."""
        return read_json(self.done, Summary)

    def finish(self, summary: Summary) -> None:
        """Mark the repetition as finished and drop what only training needed."""
        write_json(self.done, summary.model_dump())
        self.tidy()

    def tidy(self) -> None:
        """Remove what only training needed."""
        try:
            for where in (self.state, self.sign, self.start):
                remove(where)
        except OSError as error:
            raise StorageError(f"cannot remove {self.state}: {error.strerror}") from error

    def weights_file(self) -> Path:
        """The weights as a file of this machine; remote ones are fetched once a machine, and compared with DONE.

        StorageError when what is stored is not what training wrote.
        """
        return local_tensors(self.weights, self.summary().weights_digest if self.is_remote else "")

    @property
    def local_log(self) -> Path:
        """Where this machine's processes append to the log; `keep_log` takes it to a remote run."""
        if isinstance(self.log, Path):
            return self.log
        name = hashlib.blake2b(str(self.log).encode(), digest_size=8).hexdigest()
        return cache_folder() / "logs" / f"{name}.txt"

    def note(self, line: str) -> None:
        """Append a line to the log."""
        with contextlib.suppress(OSError):
            self.local_log.parent.mkdir(parents=True, exist_ok=True)
            with create(self.local_log, os.O_APPEND) as log:
                log.write(f"{line}\n".encode())

    def keep_log(self) -> None:
        """Put what was logged here beside the other files of a remote run; a log that fails is no failure."""
        if self.is_remote:
            with contextlib.suppress(OSError, StorageError):
                if content := self.local_log.read_bytes():
                    with atomic_file(self.log) as file:
                        file.write(content)
