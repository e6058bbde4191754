"""Preparation: any source becomes a store, once.

A prepared store lies in the cache under the digest of everything it depends on, so that a second call opens it
without a look at the source. Two processes that prepare the same source at once both do the work; the store of
the first to finish stays and the other uses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mach.config import DataConfig, TextConfig
from mach.data.matrices import classes_beside
from mach.data.readers import COMPRESSED, Shape, SourceFile, read_chunks, read_shape, source_errors
from mach.data.store import FORMAT, Chunk, Reference, Store
from mach.data.tables import TextChunk, chunks_of, read_texts
from mach.data.writer import StoreWriter
from mach.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from mach.data.text import TextFeatures

Report = Callable[[str, float], None]

_FORMATS = {
    ".txt": "repository",
    ".svm": "svmlight",
    ".svmlight": "svmlight",
    ".libsvm": "svmlight",
    ".npz": "npz",
    ".npy": "npy",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}
_TEXT = ("csv", "jsonl", "parquet", "builtin")
_BUILTIN: dict[str, Literal["train", "test"]] = {"builtin:characters": "train", "builtin:characters-test": "test"}


def prepare(
    config: DataConfig,
    text: TextConfig,
    source: str,
    destination: Path | None = None,
    *,
    like: Store | Reference | None = None,
    report: Report | None = None,
) -> Store:
    """Turn a source into a store, or open the one that an earlier call made of it.

    Text formats: features are fitted on this source, ids of class names go by first appearance unless
    ``config.class_names`` lists them; then names it lacks are dropped and counted, and their rows stay.
    Numeric formats: features and classes are taken as they stand, ``config.class_names`` names the classes.

    Parameters
    ----------
    config, text : DataConfig, TextConfig
        How to read; ``config.train`` and ``config.test`` are not looked at.
    source : str
        A file, the directory of a store (opened as it is), ``builtin:characters`` or ``builtin:characters-test``.
    destination : Path, optional
        Directory of the store; by default one in ``config.cache``, else ``$MACH_CACHE``, else ``~/.cache/mach``.
    like : Store or Reference, optional
        The training store, or what a model remembers of it, for test rows: its text features, class names, D and
        K hold for them as well.
    report : callable, optional
        Called with a stage (``"fitting text"``, ``"reading"``) and the fraction done, about once a chunk.

    Returns
    -------
    Store
        Cost O(source) once, O(1) afterwards; memory is bounded by the chunks and, for text, the vocabulary.

    Raises
    ------
    DataError
        When the source is malformed or does not fit ``like``: one line with file, line, value and repair.
    ConfigError
        When its format is unknown, or a destination is given for what is a store already.
    StorageError
        When the store cannot be written, or ``destination`` holds something else.
    """
    if Path(source, "meta.json").exists():
        if destination is not None:
            raise ConfigError(f"{source} is a store already and used as it is: leave out the destination {destination}")
        return _fitting(Store.open(source), like)
    kind = _format(config, source)
    task = _Task(config, text, source, kind, like, report or (lambda stage, fraction: None))
    key = task.key()
    path = destination or _cache(config) / f"{_stem(source)}-{key}"
    if not path.exists():
        try:
            if kind in _TEXT:
                task.write_text(path, key)
            else:
                task.write_numbers(path, key)
        except StorageError:
            if not path.exists():
                raise
            # otherwise another process was faster
    store = Store.open(path)
    if store.meta["key"] != key:
        raise StorageError(f"{path} was not prepared from {source} with these options: choose another destination")
    return store


@dataclass(frozen=True)
class _Task:
    """The arguments of `prepare` and what is done with them."""

    config: DataConfig
    text: TextConfig
    source: str
    kind: str
    like: Store | Reference | None
    report: Report

    def key(self) -> str:
        """Digest of everything that the store depends on."""
        on: dict[str, Any] = {"store": FORMAT, "kind": self.kind, "like": self.like and self.like.fingerprint}
        if self.kind == "builtin":
            from mach.data import characters

            on["source"] = self.source, _stamp(Path(characters.__file__)), unicodedata.unidata_version
        else:
            path = Path(self.source)
            on["source"] = [_stamp(p) for p in ([path, classes_beside(path)] if self.kind == "npy" else [path])]
        if self.config.class_names is not None:
            on["class_names"] = _stamp(Path(self.config.class_names))
        if self.kind in _TEXT:
            on["columns"] = self.config.text_columns, self.config.class_column, self.config.class_separator
            on["text"] = self.text.model_dump()
        return hashlib.blake2b(json.dumps(on, sort_keys=True).encode(), digest_size=16).hexdigest()

    def write_numbers(self, path: Path, key: str) -> None:
        source, names = Path(self.source), self.class_names()
        shape = _limited(self.source, read_shape(source, self.kind), self.kind, self.like, names)
        dense, (_, n_features, n_classes) = self.kind == "npy", shape
        with StoreWriter(
            path, source=self.source, key=key, dense=dense, n_features=n_features, n_classes=n_classes
        ) as writer:
            writer.class_names = names
            for chunk in read_chunks(source, self.kind, shape):
                writer.append(chunk)
                self.report("reading", chunk.fraction)
            self.refuse_empty(writer)

    def write_text(self, path: Path, key: str) -> None:
        names = self.class_names()
        if self.like is not None and (self.like.text_features is None or names is None):
            raise DataError(
                f"{self.source} holds text, but the training store {self.like.path} was made of numbers: "
                "give the same kind"
            )
        known = _numbered(names or [], self.config)
        chunks = self.text_source()
        features = (self.like and self.like.text_features) or self.fitted(chunks())
        n_classes = None if names is None else len(names)
        with StoreWriter(
            path, source=self.source, key=key, n_features=features.n_features, n_classes=n_classes
        ) as writer:
            for chunk in chunks():
                indptr, ids, n_unknown = _class_ids(chunk.class_names, known, grow=names is None)
                writer.append(Chunk(indptr, ids, features.transform(chunk.texts)))
                writer.n_unknown_classes += n_unknown
                self.report("reading", chunk.fraction)
            self.refuse_empty(writer)
            writer.class_names, writer.text_features = list(known), features

    def class_names(self) -> Sequence[str] | None:
        """The names that the training store, the configuration or the embedded set gives to classes 0, 1, ..."""
        if self.like is not None and (self.like.class_names is not None or self.kind in _TEXT):
            return self.like.class_names
        if self.config.class_names is not None:
            with SourceFile(Path(self.config.class_names)) as names:
                return [line.rstrip("\r\n") for line in names.lines()]
        if self.kind == "builtin":
            from mach.data import characters

            return characters.class_names()
        return None

    def text_source(self) -> Callable[[], Iterable[TextChunk]]:
        """What gives the chunks anew for each pass: a file is read again, the embedded set is kept."""
        if self.kind != "builtin":
            return lambda: read_texts(Path(self.source), self.kind, self.config)
        from mach.data import characters

        chunks = list(chunks_of(characters.rows(_BUILTIN[self.source])))
        return lambda: chunks

    def fitted(self, chunks: Iterable[TextChunk]) -> TextFeatures:
        from mach.data.text import TextFeatures

        def texts() -> Iterator[str]:
            for chunk in chunks:
                yield from chunk.texts
                self.report("fitting text", chunk.fraction)

        features = TextFeatures(self.text)
        if self.text.tfidf or not self.text.hashing:  # otherwise there is nothing to learn
            features.fit(texts())
        return features

    def refuse_empty(self, writer: StoreWriter) -> None:
        if writer.n_rows == 0:
            raise DataError(f"{self.source} holds no rows: give a file with at least one")


def _limited(
    source: str, shape: Shape, kind: str, like: Store | Reference | None, names: Sequence[str] | None
) -> Shape:
    """The shape that the store shall have: that of the training store, or with as many classes as names."""
    _, n_features, n_classes = shape
    if like is not None:
        dense = kind == "npy"
        wider = n_features is not None and n_features > like.n_features
        if wider or like.is_dense != dense or (dense and n_features != like.n_features):
            raise DataError(
                f"{source} has {_features(dense, n_features)}, the training store {like.path} has "
                f"{_features(like.is_dense, like.n_features)}: prepare both in the same way"
            )
        if n_classes is not None and n_classes > like.n_classes:
            raise DataError(
                f"{source} has K = {n_classes} classes, the training store {like.path} has K = {like.n_classes}: "
                "prepare both in the same way"
            )
        n_features, n_classes = like.n_features, like.n_classes
    if names is not None:
        if n_classes is not None and len(names) != n_classes:
            raise DataError(f"class_names has {len(names)} names, {source} has K = {n_classes} classes: name each once")
        n_classes = len(names)
    return Shape(shape.n_rows, n_features, n_classes)


def _features(dense: bool, n_features: int | None) -> str:
    kind = "dense" if dense else "sparse"
    return f"{kind} features" if n_features is None else f"D = {n_features} {kind} features"


def _class_ids(
    names_of_rows: list[list[str]], known: dict[str, int], grow: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """Ascending ids of the rows' names as a CSR pair, and how many names were unknown; ``known`` may grow."""
    ids: list[int] = []
    indptr, n_unknown = [0], 0
    for names in names_of_rows:
        if grow:
            for name in names:
                known.setdefault(name, len(known))
        ids_of_row = {known[name] for name in names if name in known}
        n_unknown += sum(name not in known for name in names)
        ids += sorted(ids_of_row)
        indptr.append(len(ids))
    return np.array(indptr, dtype=np.int64), np.array(ids, dtype=np.int32), n_unknown


def _numbered(names: Sequence[str], config: DataConfig) -> dict[str, int]:
    known: dict[str, int] = {}
    for k, name in enumerate(names):
        if known.setdefault(name, k) != k:
            raise DataError(
                f"{config.class_names} line {k + 1}: class {name!r:.60} stands on line {known[name] + 1} too"
            )
    return known


def _fitting(store: Store, like: Store | Reference | None) -> Store:
    """A store given as the source, after a check that its features and classes mean what those of ``like`` do."""
    if like is None or store.fingerprint == like.fingerprint:
        return store
    kind = "npy" if store.is_dense else "store"
    _limited(str(store.path), Shape(store.n_rows, store.n_features, store.n_classes), kind, like, None)
    names, names_of_like = store.class_names, like.class_names
    if store.meta["text_features"] != (like.text_features and like.text_features.fingerprint()):
        raise DataError(f"store {store.path} has other text features than {like.path}: prepare its source with `like`")
    if names is not None and names_of_like is not None and list(names) != list(names_of_like):
        raise DataError(f"store {store.path} has other class names than {like.path}: prepare its source with `like`")
    return store


def _fingerprint(features: TextFeatures | None) -> str | None:
    return None if features is None else features.fingerprint()


def _format(config: DataConfig, source: str) -> str:
    if config.format == "builtin" or source.startswith("builtin:"):
        if source not in _BUILTIN or config.format not in ("auto", "builtin"):
            raise ConfigError(f"no embedded set {source!r} of format {config.format}: there are {', '.join(_BUILTIN)}")
        return "builtin"
    if Path(source).is_dir():
        raise DataError(f"{source} is a directory but no store (no meta.json in it): name a file")
    if config.format != "auto":
        return config.format
    path = Path(source.lower())
    compressed = path.suffix in COMPRESSED
    kind = _FORMATS.get(path.with_suffix("").suffix if compressed else path.suffix)
    if kind is None or (compressed and kind in ("npz", "npy", "parquet")):
        raise ConfigError(
            f"the ending of {source} tells no format: it may be {', '.join(_FORMATS)}, text also with "
            f"{', '.join(COMPRESSED)}; or set format"
        )
    return kind


def _stamp(path: Path) -> tuple[str, int, int]:
    with source_errors(path):
        status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _cache(config: DataConfig) -> Path:
    folder = config.cache or os.environ.get("MACH_CACHE") or "~/.cache/mach"
    return Path(folder).expanduser()


def _stem(source: str) -> str:
    return Path(source.replace("builtin:", "")).name.partition(".")[0]
