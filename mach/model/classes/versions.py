"""Versions of a run's classes on disk: ``classes/NNNN.safetensors``, each whole by itself, and ``classes/CURRENT``.

A version is written once and never changed. ``CURRENT`` says which one holds and what was done so far, and is written
last. So whoever dies in between leaves the old version, readers keep the one that they have opened, and undoing is
pointing at the version before. Editors of a folder of this machine take turns by a lock. Behind a URL nothing can be
locked: there an editor looks whether ``CURRENT`` is still what it began from, before it writes and after, and is
refused where it is not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mach.config import Section
from mach.data.class_names import ClassNames
from mach.data.store import Reference
from mach.errors import ConfigError, StorageError
from mach.files.names import named
from mach.files.places import Place, atomic_file, sweep
from mach.files.records import Digest, find_json, locked, write_json
from mach.files.tensors import digest_of, local_tensors, map_tensors, write_tensors
from mach.model.classes.catalogue import Catalogue
from mach.model.classes.edits import FORMAT, Edits
from mach.runs.run import Run

LOCK_SECONDS = 60.0  # an editor waits so long for another one


class Step(Section):
    """One change: the version that it made, of which version, and what was done."""

    version: int = Field(ge=1, lt=2**31)
    parent: int = Field(ge=0, lt=2**31)
    verb: str
    what: str
    digest: Digest
    unix_seconds: float


class Current(Section):
    """The content of CURRENT."""

    format: Literal[1] = 1
    version: int = Field(default=0, ge=0, lt=2**31)
    steps: list[Step] = Field(default=[])

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.version and self.step(self.version) is None:
            raise ValueError(f"version {self.version} is none that a step made")
        return self

    def step(self, version: int) -> Step | None:
        """What made a version; None for version 0 and for those that are not known."""
        return next((step for step in self.steps if step.version == version), None)


class Versions:
    """The versions of a run's classes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.folder: Place = run.path / "classes"

    def current(self) -> Current:
        """Which version holds, version 0 where nothing was ever changed; a StorageError when CURRENT is damaged."""
        return find_json(self.folder / "CURRENT", Current) or Current()

    def load(self, version: int | None = None, current: Current | None = None) -> Edits:
        """A version, by default the one that holds; mapped.

        Raises ConfigError when there is no such version, StorageError when its file is damaged.
        """
        current, manifest = current or self.current(), self.run.manifest
        version = current.version if version is None else version
        if version == 0:
            return Edits(manifest.n_classes)
        step = current.step(version)
        if step is None:
            known = ", ".join(map(str, [0, *(step.version for step in current.steps)]))
            raise ConfigError(f"{self.run.path} has no version {version} of its classes: choose one of {known}")
        where = self.file(version, step.digest)
        arrays, metadata = map_tensors(local_tensors(where, step.digest))
        if metadata.get("format") != FORMAT or digest_of(arrays) != step.digest:
            raise StorageError(f"{where} is damaged or not the version that CURRENT names: copy it anew, or undo it")
        counts = {"n_features": manifest.n_features, "n_buckets": manifest.n_buckets}
        try:
            return Edits.from_arrays(arrays, version=version, n_trained=manifest.n_classes, **counts)
        except StorageError as error:
            raise StorageError(f"{where} is damaged: {error}: copy it anew, or undo it") from None

    def reference(self, edits: Edits) -> Reference:
        """What other rows must agree with to be queries by one of the versions, with its added and renamed classes."""
        trained = self.run.reference()
        if not (edits.n_added or edits.renamed):
            return trained
        names, catalogue = trained.class_names, Catalogue(edits, self.run)
        if names is not None:
            names = ClassNames.of(map(catalogue.key, range(edits.n_classes)))
        step = self.current().step(edits.version)
        fingerprint = f"{trained.fingerprint}-{step.digest if step else ''}"
        texts = None if names is None else catalogue.texts
        named: dict[str, Any] = {"class_names": names, "class_texts": texts}
        return replace(trained, n_classes=edits.n_classes, fingerprint=fingerprint, **named)

    def file(self, version: int, digest: str) -> Place:
        """Behind a URL the name holds the digest as well, so that two editors never write the same file."""
        name = f"{version:04d}" if isinstance(self.folder, Path) else f"{version:04d}-{digest[:8]}"
        return named(self.folder, name, ".safetensors")

    @contextlib.contextmanager
    def turn(self) -> Iterator[Current]:
        """Be the only editor for the length of the block, as far as locks reach; what holds now, to begin from.

        Raises StorageError when another editor does not finish within a minute, or the folder cannot be written.
        """
        if not isinstance(self.folder, Path):
            yield self.current()
            return
        end = time.monotonic() + LOCK_SECONDS
        while True:
            with locked(self.folder, self.folder.parent) as is_ours:
                if is_ours:
                    sweep(self.folder)
                    yield self.current()
                    return
            if time.monotonic() > end:
                raise StorageError(f"{self.folder} is being changed by another process: try again")
            time.sleep(0.01)

    def write(self, begun: Current, edits: Edits, verb: str, what: str) -> Edits:
        """Make the next version, and the one that holds; returns it with its number.

        ``begun`` is that of our `turn`, ``verb`` and ``what`` tell what was done. Raises StorageError when another
        editor was faster, or the files cannot be written; then the old version holds.
        """
        number = 1 + max((step.version for step in begun.steps), default=0)
        arrays = edits.to_arrays()
        digest = digest_of(arrays)
        with atomic_file(self.file(number, digest)) as file:
            metadata = {"format": FORMAT, "version": str(number), "data": self.run.manifest.data_fingerprint}
            write_tensors(file, arrays, metadata)
        now = round(time.time(), 3)
        step = Step(version=number, parent=begun.version, verb=verb, what=what, digest=digest, unix_seconds=now)
        self._point(begun, Current(version=number, steps=[*begun.steps, step]))
        return replace(edits, version=number)

    def undo(self, begun: Current) -> tuple[Edits, Step]:
        """Go back to the version that the present one was made of; returns it and what was undone."""
        step = begun.step(begun.version)
        if step is None:
            raise ConfigError(f"{self.run.path}: the classes are as trained: there is nothing to undo")
        edits = self.load(step.parent, begun)
        self._point(begun, Current(version=step.parent, steps=begun.steps))
        return edits, step

    def _point(self, begun: Current, current: Current) -> None:
        where = self.folder / "CURRENT"
        lost = StorageError(f"{where} was changed by another editor meanwhile: load the model anew and try again")
        is_shared = not isinstance(where, Path)
        if is_shared and self.current() != begun:
            raise lost
        write_json(where, current.model_dump())
        if is_shared and self.current() != current:
            raise lost
