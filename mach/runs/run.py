"""The run directory, which is the model directory: layout, atomic writes, locks.

::

    config.toml         the resolved configuration
    manifest.json       format number, hash functions, K, D, fingerprints of data and configuration
    assignment.npy      buckets of all classes (where they come from a table)
    class_counts.npy    training rows a class
    class_names.safetensors   UTF-8 and offsets (where the data has names)
    class_texts.safetensors   what classes say of themselves (where the data has it), `mach.data.class_texts`
    text/               text features (where the data is text)
    repetitions/r000/   weights.safetensors, metrics.jsonl, log.txt, DONE, and while it is trained
                        state.safetensors and progress.json
    reranker.safetensors   what orders the best classes anew (where [reranking] asks for it), see `mach.reranking.model`
    RERANKED            what they were trained from and with, written after them
    calibration.json    probabilities of scores, by rows held out or given (`mach.model.calibration`)
    classes/            CURRENT and 0001.safetensors, ...: changes of the classes since (`mach.model.classes.versions`)
    curve.json          accuracy with fewer repetitions, as last measured (`mach.runs.manifest`)
    reranking/          log.txt, and while they are trained plan.json, finished parts of rows (rows000.safetensors:
                        candidates, int32 (n, C)) and of classes (classes000.safetensors: offsets, features, weights,
                        biases; those of a further set follow its name), and what pilots taught (examples0.safetensors)
    pilots/             runs that teach the order of candidates, while they are trained (`mach.training.pilot`)
    store/              the training data (only in remote runs, and only until all repetitions are finished)

It is a folder of this machine or below any URL that fsspec knows. Every file appears whole or not at all
(`mach.files.places`). A repetition is finished when its ``DONE`` exists, which is written last; any set of finished
repetitions is a model. A remote run exists when its ``manifest.json`` does, which is written last as well.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.config import Config, DataConfig, load_run_config, to_toml
from mach.data import class_texts
from mach.data.class_names import ClassNames
from mach.data.class_texts import ClassTexts
from mach.data.names import ids_by_name
from mach.data.store import Reference, Store
from mach.errors import ConfigError, StorageError
from mach.files.arrays import array_form, read_array
from mach.files.caches import cache_folder
from mach.files.names import named
from mach.files.places import (
    Place,
    atomic_file,
    fetch,
    fetch_folder,
    is_there,
    kept,
    local_copy,
    place,
    read_bytes,
    temporary_name,
    upload_folder,
)
from mach.files.records import read_json, write_json
from mach.files.regular import open_regular
from mach.files.tensors import map_tensors, write_tensors
from mach.networks.stored import TABLE, check_stored
from mach.networks.trunk import Trunk, agreed
from mach.runs.manifest import FORMAT, Manifest
from mach.runs.repetition import RepetitionFiles
from mach.sketch.hashing import Assignment
from mach.sketch.tables import TableAssignment, from_description

if TYPE_CHECKING:
    from mach.data.text import TextFeatures


class Run:
    """A run directory, here or below a URL, opened for reading or training.

    ``trunk`` is what the caller passed as the class of its networks (`mach.networks.trunk`); reading files needs
    none.
    """

    def __init__(self, path: Place, trunk: Trunk | None = None) -> None:
        self.path, self.trunk = path, trunk
        self.class_names_file, self.text_folder = path / "class_names.safetensors", path / "text"
        self.class_texts_file = path / class_texts.FILE
        self.reranker_file, self.reranking_folder = path / "reranker.safetensors", path / "reranking"
        self.reranked = path / "RERANKED"  # the mark of a finished re-ranker
        self.calibration_file, self.curve_file = path / "calibration.json", path / "curve.json"

    @classmethod
    def open(cls, path: str | Place, trunk: Trunk | None = None) -> Run:
        """Open an existing run; StorageError when the folder is no run or of a newer format."""
        run = cls(place(path), trunk)
        try:
            found = re.search(rb'"format": *(\d{1,9})', read_bytes(run.path / "manifest.json"))
        except OSError as error:
            raise StorageError(
                f"{path} is not a run directory (manifest.json: {error.strerror}): give one made by `mach train`"
            ) from error
        if found and int(found[1]) != FORMAT:
            raise StorageError(
                f"{path} has format {int(found[1])}, this version reads format {FORMAT}: use the version that made it"
            )
        return run

    @staticmethod
    def is_at(path: str | Place) -> bool:
        """Whether a run is there."""
        return is_there(place(path) / "manifest.json")

    @classmethod
    def create(
        cls,
        path: str | Place,
        config: Config,
        manifest: Manifest,
        store: Store,
        assignment: Assignment,
        counts_K: NDArray[np.int64] | None = None,
        weights: Mapping[int, Path] | None = None,
        last: Callable[[Run], None] = lambda run: None,
        trunk: Trunk | None = None,
    ) -> Run:
        """Lay out a new run: it is there whole, or not at all. Of two creators at once, one fails or both agree.

        ``counts_K`` are the rows of every class where they are not those of the store, ``weights`` the files that
        repetitions start from; ``last`` may write more into a folder that nobody sees yet, unless it is remote.
        """
        final = place(path)
        try:
            with _laid_out(final) as folder:
                run = cls(folder)
                with atomic_file(folder / "class_counts.npy") as file:
                    np.save(file, store.class_counts() if counts_K is None else counts_K)
                if store.class_names is not None:
                    with atomic_file(run.class_names_file) as file:
                        write_tensors(file, {"offsets": store.class_names.offsets, "utf8": store.class_names.utf8}, {})
                if (texts := store.class_texts) is not None and class_texts.FILE in store.meta["bytes"]:
                    with atomic_file(run.class_texts_file) as file:
                        texts.write(file)
                if store.text_features is not None:
                    upload_folder(store.path / "text_features", run.text_folder)
                for r, source in (weights or {}).items():
                    run.repetition(r).save_start(source)
                run.update(config, manifest, assignment)
                last(run)
        except OSError as error:
            raise StorageError(f"cannot create {path}: {error.strerror}") from error
        return cls(final, trunk)

    def update(self, config: Config, manifest: Manifest, assignment: Assignment) -> None:
        """Replace configuration, manifest and assignment, as when R is raised."""
        if isinstance(assignment, TableAssignment):
            with atomic_file(self.path / "assignment.npy") as file:
                np.save(file, assignment.table_RK)
        with atomic_file(self.path / "config.toml") as file:
            file.write(to_toml(config, self.retired if Run.is_at(self.path) else None).encode())
        write_json(self.path / "manifest.json", manifest.model_dump())
        for name in ("_configured", "manifest"):
            self.__dict__.pop(name, None)

    @property
    def config(self) -> Config:
        """What it was made with, as far as this version knows the keys."""
        return self._configured[0]

    @property
    def retired(self) -> dict[str, Any]:
        """Values of keys that are gone since (`mach.config.RETIRED`), such as ``{"hashing.assignment": "learned"}``."""
        return self._configured[1]

    @cached_property
    def _configured(self) -> tuple[Config, dict[str, Any]]:
        return load_run_config(self.path / "config.toml")

    @property
    def reading(self) -> DataConfig:
        """How rows for this run are read. Its maker's cache is not used: a stranger's run would say where to write."""
        return self.config.data.changed(cache=None)

    def agreed_trunk(self) -> Trunk | None:
        """The trunk that the caller passed, once it is seen to be the one that the run names; else a ConfigError."""
        return agreed(self.config.network.trunk, self.trunk, self.path / "config.toml")

    @cached_property
    def manifest(self) -> Manifest:
        return read_json(self.path / "manifest.json", Manifest)

    def assignment(self) -> Assignment:
        """Assignment by all hash functions of all R repetitions, its checksum verified."""
        is_table = self.manifest.assignment["family"] == "table"
        table_RK = self._array("assignment.npy") if is_table else None
        try:
            found = from_description(self.manifest.assignment, table_RK)
        except StorageError as error:
            raise StorageError(f"{self.path / ('assignment.npy' if is_table else 'manifest.json')}: {error}") from None
        n_functions = self.config.hashing.repetitions * self.config.hashing.heads
        if found.n_classes != self.manifest.n_classes or found.n_repetitions < n_functions:
            raise StorageError(
                f"{self.path / 'manifest.json'}: the assignment is of K = {found.n_classes} classes by "
                f"{found.n_repetitions} hash functions, the run has K = {self.manifest.n_classes} and {n_functions} "
                "functions: the file is of another run"
            )
        return found

    def functions(self, repetitions: Sequence[int]) -> list[int]:
        """Numbers of the hash functions of given repetitions, among those of `assignment`."""
        n_heads = self.config.hashing.heads
        return [r * n_heads + j for r in repetitions for j in range(n_heads)]

    def trained_assignment(self, repetitions: Sequence[int]) -> Assignment:
        """Assignment by which finished repetitions answer: the learned tables where they have some.

        Those of a remote run are fetched with the weights, once a machine.
        """
        if not self.has_learned_tables:
            return self.assignment().select(self.functions(repetitions))
        tables = [self._learned_table(r) for r in repetitions]
        try:
            return TableAssignment.from_table(np.concatenate(tables), self.manifest.n_buckets)
        except ConfigError as error:
            raise StorageError(f"{self.path}: assignment of repetitions {list(repetitions)}: {error}") from None

    def _learned_table(self, repetition: int) -> NDArray[Any]:
        files = self.repetition(repetition)
        found = {name: array for name, array in map_tensors(files.weights_file())[0].items() if name == TABLE}
        check_stored(found, self.table_shapes, files.weights, has_trunk=False)
        return found[TABLE]

    @property
    def table_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the table beside each repetition's weights; empty where there is none."""
        return {TABLE: (self.config.hashing.heads, self.manifest.n_classes)} if self.has_learned_tables else {}

    @property
    def assignment_kind(self) -> str:
        """Where buckets come from: "universal", "table", or what earlier versions had beside."""
        if self.config.hashing.table:
            return "table"
        return str(self.retired.get("hashing.assignment", self.manifest.assignment["family"]))

    @property
    def has_learned_tables(self) -> bool:
        """Whether repetitions moved classes while they trained, as earlier versions could; the tables are read only."""
        return self.retired.get("hashing.assignment") == "learned"

    def class_counts_K(self) -> NDArray[np.int64]:
        """Training rows of every class."""
        counts_K: NDArray[np.int64] = self._array("class_counts.npy")
        self._refuse_counts(counts_K.shape, counts_K.dtype)
        if counts_K.min() < 0 or counts_K.max() >= 2**48:
            raise StorageError(f"{self.path}/class_counts.npy holds {counts_K.min()} to {counts_K.max()}: copy it anew")
        return counts_K

    def _refuse_counts(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if shape != (self.manifest.n_classes,) or dtype != np.int64:
            raise StorageError(
                f"{self.path}/class_counts.npy is {dtype} of shape {shape}: need int64 of shape "
                f"({self.manifest.n_classes},), an entry a class: the file is of another run"
            )

    def _array(self, name: str) -> Any:
        path = self.path / name
        try:
            with local_copy(path) as file:
                return read_array(file)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error

    def check(self) -> None:
        """Compare the files that are read later with the manifest; a StorageError where they disagree.

        Of a remote run that is done once they are fetched. Cost: offsets of names, and the beginnings of files.
        """
        if not isinstance(self.path, Path):
            return
        path = self.path / "class_counts.npy"
        try:
            with open_regular(path) as file:
                shape, _, dtype = array_form(file, path)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        self._refuse_counts(shape, dtype)
        self.class_texts  # noqa: B018 - names and texts are compared where they are opened
        if is_there(self.text_folder):
            from mach.data.text import TextFeatures

            self._refuse_features(TextFeatures.described(self.path / "text")[0])

    def _refuse_features(self, n_features: int) -> None:
        if n_features != self.manifest.n_features or self.manifest.dense_input:
            raise StorageError(
                f"{self.text_folder} makes {n_features} sparse features, the networks take {self.manifest.n_features}"
                f"{' dense' if self.manifest.dense_input else ''} ones: the folder is of another run"
            )

    @cached_property
    def class_names(self) -> ClassNames | None:
        """Names by class, mapped; None where the data had none."""
        path = self._here(self.class_names_file, fetch)
        if path is None:
            return None
        arrays = map_tensors(path)[0]
        if arrays.keys() != {"offsets", "utf8"} or arrays["offsets"].shape != (self.manifest.n_classes + 1,):
            raise StorageError(
                f"{self.class_names_file} does not name the {self.manifest.n_classes} classes of the run"
            )
        return ClassNames.of_file(arrays["offsets"], arrays["utf8"], self.class_names_file)

    @cached_property
    def class_texts(self) -> ClassTexts | None:
        """Texts by class: names alone where the data had no more, None where it had no names."""
        path, names = self._here(self.class_texts_file, fetch), self.class_names
        if path is None:
            return None if names is None else ClassTexts.of(names)
        return ClassTexts.read(path, self.manifest.n_classes, self.class_texts_file)

    @cached_property
    def class_ids(self) -> dict[str, int]:
        """Trained classes by what rows call them (`mach.data.class_texts.ClassTexts.ids`)."""
        names = self.class_names or ()
        return ids_by_name(names) if self.class_texts is None else self.class_texts.ids(names)

    @cached_property
    def text_features(self) -> TextFeatures | None:
        """How texts become features, exactly as in training; None where the data was numbers."""
        folder = self._here(self.text_folder, fetch_folder)
        if folder is None:
            return None
        from mach.data.text import TextFeatures

        features = TextFeatures.load(folder)
        self._refuse_features(features.n_features)
        return features

    def _here(self, where: Place, fetched: Callable[[Any, Path], None]) -> Path | None:
        """A file or folder of the data on this machine, fetched once if it is remote; None where the run has none."""
        if not is_there(where):
            return None
        if isinstance(where, Path):
            return where
        path = named(cache_folder() / "runs", self.manifest.data_fingerprint) / where.name
        return kept(path, lambda temporary: fetched(where, temporary))

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
            row_features=manifest.row_features,
            class_texts=self.class_texts,
        )

    def repetition(self, repetition: int) -> RepetitionFiles:
        return RepetitionFiles(self.path / "repetitions" / f"r{repetition:03d}", repetition, self.path)

    def finished(self) -> list[int]:
        """Numbers of the finished repetitions, ascending."""
        return [r for r in range(self.config.hashing.repetitions) if self.repetition(r).is_done]

    def load_weights(self, repetition: int, expected: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
        """Map the weights of a finished repetition, which must be exactly those ``expected``, as matrices are stored.

        StorageError when the file is damaged, belongs to another repetition, or does not fit the configuration.
        """
        files = self.repetition(repetition)
        path = files.weights
        arrays, metadata = map_tensors(files.weights_file())
        if metadata.get("repetition") != str(repetition):
            raise StorageError(f"{path} holds repetition {metadata.get('repetition')!s:.40}: copy the right file here")
        check_stored(arrays, expected, path, has_trunk=self.config.network.trunk is not None)
        return arrays


@contextlib.contextmanager
def _laid_out(final: Place) -> Iterator[Place]:
    """A folder to write a new run into: of this machine, one beside it that is moved there in the end."""
    if not isinstance(final, Path):
        yield final
        return
    final = final.resolve()  # "." has no name to put another beside
    folder = temporary_name(final)
    try:
        (folder / "repetitions").mkdir(parents=True)
        yield folder
        folder.replace(final)  # fails where another process was faster
    finally:
        shutil.rmtree(folder, ignore_errors=True)
