"""The run directory, which is the model directory: layout, atomic writes, locks.

::

    config.toml         the resolved configuration
    manifest.json       format number, hash functions, K, D, fingerprints of data and configuration
    assignment.npy      buckets of all classes (where they come from a table)
    class_counts.npy    training rows a class
    class_names.safetensors   UTF-8 and offsets (where the data has names)
    text/               text features (where the data is text)
    repetitions/r000/   weights.safetensors, metrics.jsonl, state.safetensors (only while training), log.txt, DONE

Every file appears whole or not at all: it is written under another name, synced and renamed. A repetition is
finished when its ``DONE`` exists, which is written last; any set of finished repetitions is a model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from mach.config import Config, Section, load_config, to_toml
from mach.data.store import ClassNames, Reference, Store
from mach.data.writer import flush_to_disk
from mach.errors import StorageError
from mach.hashing import Assignment, TableAssignment, from_description
from mach.tensors import map_tensors, write_tensors

if TYPE_CHECKING:
    from mach.data.text import TextFeatures

FORMAT: Literal[1] = 1
Content = TypeVar("Content", bound=Section)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when the block ends well.

    Raises
    ------
    StorageError
        When it cannot be written, for example on a full disk; then nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_to_disk(path.parent)  # names appear in the order in which they were given
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}; what was there before is untouched: make room or give access, "
            "then run the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, kind: type[Content]) -> Content:
    """Read JSON of a known shape; a missing or damaged file is a StorageError."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StorageError(f"{path} is damaged: {where or 'it'}: {first['msg'].splitlines()[0]}") from error


class Manifest(Section):
    """What a run is, beside its configuration: all that a model needs to answer."""

    format: Literal[1] = FORMAT
    mach_version: str
    n_classes: int = Field(ge=1)
    n_features: int = Field(ge=1)
    n_rows: int = Field(ge=1)
    dense_input: bool
    loss: Literal["binary", "softmax"]
    precision: Literal["float32", "bfloat16"]
    data_fingerprint: str
    config_fingerprint: str
    assignment: dict[str, Any]


class Summary(Section):
    """What a finished repetition tells about its training: the content of DONE."""

    repetition: int
    steps: int
    epochs: int
    best_epoch: int | None
    worker_seconds: float
    threads: int
    peak_memory_bytes: int
    peer_bytes: int
    peer_sockets: int
    host: str
    weights_digest: str


class RepetitionFiles:
    """The files of one repetition."""

    def __init__(self, folder: Path, repetition: int) -> None:
        self.repetition = repetition
        self.folder = folder
        self.weights = folder / "weights.safetensors"
        self.best = folder / "best.safetensors"
        self.state = folder / "state.safetensors"
        self.metrics = folder / "metrics.jsonl"
        self.log = folder / "log.txt"
        self.done = folder / "DONE"

    @property
    def is_done(self) -> bool:
        return self.done.exists()

    @property
    def is_locked(self) -> bool:
        """Whether some process is training it now; writes nothing."""
        try:
            with (self.folder / "lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Try to hold the repetition; yields whether it is ours. The lock falls when its process ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("w")
        except OSError as error:
            raise StorageError(f"cannot lock {self.folder}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = True
            except BlockingIOError:
                is_ours = False
            yield is_ours

    def sweep(self) -> None:
        """Remove what writers that were killed left behind; call it under the lock."""
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def save(self, path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
        """Write arrays atomically; return the digest of their bytes."""
        with atomic_file(path) as file:
            return write_tensors(file, arrays, metadata)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        with atomic_file(self.metrics) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        try:
            rows = [json.loads(line) for line in self.metrics.read_bytes().splitlines()]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.metrics} cannot be read ({error}): the file is damaged") from error
        if not all(isinstance(row, dict) for row in rows):
            raise StorageError(f"{self.metrics} holds something else than one JSON object a line: the file is damaged")
        return rows

    def summary(self) -> Summary:
        """What DONE says."""
        return read_json(self.done, Summary)

    def finish(self, summary: Summary) -> None:
        """Mark the repetition as finished and drop what only training needed."""
        write_json(self.done, summary.model_dump())
        for path in (self.state, self.best):
            path.unlink(missing_ok=True)


class Run:
    """A run directory opened for reading or training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run; its format is checked.

        Raises
        ------
        StorageError
            When the folder is no run or of a newer format.
        """
        run = cls(Path(path))
        try:
            found = re.search(rb'"format": *(\d+)', (run.path / "manifest.json").read_bytes())
        except OSError as error:
            raise StorageError(
                f"{path} is not a run directory (manifest.json: {error.strerror}): give one made by `mach train`"
            ) from error
        if found and int(found[1]) != FORMAT:
            raise StorageError(
                f"{path} has format {int(found[1])}, this version reads format {FORMAT}: use the version that made it"
            )
        return run

    @classmethod
    def create(cls, path: str | Path, config: Config, manifest: Manifest, store: Store, assignment: Assignment) -> Run:
        """Lay out a new run beside its place and move it there: it is there whole, or not at all."""
        final = Path(path).resolve()  # "." has no name to put another beside
        run = cls(final.with_name(f".{final.name}.{os.getpid()}.tmp"))
        try:
            (run.path / "repetitions").mkdir(parents=True)
            with atomic_file(run.path / "class_counts.npy") as file:
                np.save(file, store.class_counts())
            if store.class_names is not None:
                with atomic_file(run.class_names_file) as file:
                    write_tensors(file, {"offsets": store.class_names.offsets, "utf8": store.class_names.utf8}, {})
            if store.text_features is not None:
                shutil.copytree(store.path / "text_features", run.text_folder)
                for path_of_copy in run.text_folder.iterdir():
                    flush_to_disk(path_of_copy)
            run.update(config, manifest, assignment)
            run.path.replace(final)  # fails where another process was faster
        except OSError as error:
            raise StorageError(f"cannot create {path}: {error.strerror}") from error
        finally:
            shutil.rmtree(run.path, ignore_errors=True)
        return cls(Path(path))

    def update(self, config: Config, manifest: Manifest, assignment: Assignment) -> None:
        """Replace configuration, manifest and assignment, as when R is raised."""
        if isinstance(assignment, TableAssignment):
            with atomic_file(self.path / "assignment.npy") as file:
                np.save(file, assignment.table_RK)
        with atomic_file(self.path / "config.toml") as file:
            file.write(to_toml(config).encode())
        write_json(self.path / "manifest.json", manifest.model_dump())
        for name in ("config", "manifest"):
            self.__dict__.pop(name, None)

    @cached_property
    def config(self) -> Config:
        return load_config(self.path / "config.toml")

    @cached_property
    def manifest(self) -> Manifest:
        return read_json(self.path / "manifest.json", Manifest)

    def assignment(self) -> Assignment:
        """Assignment of all R repetitions, its checksum verified."""
        table_RK = None
        if self.manifest.assignment.get("family") == "table":
            table_RK = self._array("assignment.npy")
        return from_description(self.manifest.assignment, table_RK)

    def class_counts_K(self) -> NDArray[np.int64]:
        """Training rows of every class."""
        counts_K: NDArray[np.int64] = self._array("class_counts.npy")
        return counts_K

    def _array(self, name: str) -> Any:
        path = self.path / name
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StorageError(f"cannot read {path}: {error}") from error

    @property
    def class_names_file(self) -> Path:
        return self.path / "class_names.safetensors"

    @cached_property
    def class_names(self) -> ClassNames | None:
        """Names by class, mapped; None where the data had none."""
        if not self.class_names_file.exists():
            return None
        arrays = map_tensors(self.class_names_file)[0]
        if arrays.keys() != {"offsets", "utf8"} or len(arrays["offsets"]) != self.manifest.n_classes + 1:
            raise StorageError(
                f"{self.class_names_file} does not name the {self.manifest.n_classes} classes of the run"
            )
        return ClassNames(arrays["offsets"], arrays["utf8"])

    @property
    def text_folder(self) -> Path:
        return self.path / "text"

    @cached_property
    def text_features(self) -> TextFeatures | None:
        """How texts become features, exactly as in training; None where the data was numbers."""
        if not self.text_folder.exists():
            return None
        from mach.data.text import TextFeatures

        return TextFeatures.load(self.text_folder)

    def reference(self) -> Reference:
        """What other rows must agree with to be this model's queries."""
        manifest = self.manifest
        return Reference(
            path=self.path,
            fingerprint=manifest.data_fingerprint,
            n_features=manifest.n_features,
            n_classes=manifest.n_classes,
            is_dense=manifest.dense_input,
            class_names=self.class_names,
            text_features=self.text_features,
        )

    def status(self, repetition: int) -> dict[str, Any]:
        """How far a repetition is, from its files alone."""
        files = self.repetition(repetition)
        metrics = files.read_metrics()
        last = metrics[-1] if metrics else {}
        state = "finished" if files.is_done else "training" if files.is_locked else "stopped" if metrics else "waiting"
        return {
            "repetition": repetition,
            "state": state,
            "epoch": last.get("epoch", 0),
            "n_epochs": self.config.training.epochs,
            "loss": last.get("loss"),
            "bucket_precision": last.get("bucket_precision"),
            "rows_per_second": last.get("rows_per_second"),
        }

    def repetition(self, repetition: int) -> RepetitionFiles:
        return RepetitionFiles(self.path / "repetitions" / f"r{repetition:03d}", repetition)

    def finished(self) -> list[int]:
        """Numbers of the finished repetitions, ascending."""
        return [r for r in range(self.config.hashing.repetitions) if self.repetition(r).is_done]

    def load_weights(self, repetition: int, expected: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
        """Map the weights of a finished repetition; those in ``expected`` must be there in that shape.

        Raises
        ------
        StorageError
            When the file is damaged, belongs to another repetition, or does not fit the configuration.
        """
        path = self.repetition(repetition).weights
        arrays, metadata = map_tensors(path)
        if metadata.get("repetition") != str(repetition):
            raise StorageError(f"{path} holds repetition {metadata.get('repetition')}: copy the right file here")
        for name, shape in expected.items():
            found = arrays[name].shape if name in arrays else "missing"
            if found != shape:
                raise StorageError(f"{path}: {name} is {found}, the run needs {shape}: the file is of another run")
        return arrays
