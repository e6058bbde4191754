"""Preparation: any source becomes a store, once.

A prepared store lies in the cache under the digest of everything it depends on, so that a second call opens it
without a look at the source. Two processes that prepare the same source at once both do the work; the store of
the first to finish stays and the other uses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from mach.config import DOCUMENTS, DataConfig, TextConfig
from mach.data import phrases
from mach.data.matrices import class_file
from mach.data.readers import COMPRESSED, STDIN, Shape, SourceFile, read_chunks, read_shape, source_errors
from mach.data.store import FORMAT, Chunk, Reference, Store
from mach.data.tables import Columns, Text, TextChunk, chunks_of, read_texts
from mach.data.transfer import fetch_source, fetch_store, is_store, upload_store
from mach.data.writer import StoreWriter, storage_errors
from mach.errors import ConfigError, DataError, StorageError
from mach.places import Place, cache_folder, place, state_of

if TYPE_CHECKING:
    from mach.data.text import TextFeatures

Report = Callable[[str, float], None]
AnyChunk = TypeVar("AnyChunk", Chunk, TextChunk)

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
_TEXT = ("csv", "jsonl", "parquet", "lines", "builtin")
_STDIN = ("lines", "rows")
_BUILTIN: dict[str, Literal["train", "test"]] = {"builtin:characters": "train", "builtin:characters-test": "test"}


def prepare(
    config: DataConfig,
    text: TextConfig,
    source: str,
    destination: Place | None = None,
    *,
    like: Store | Reference | None = None,
    grows: bool = False,
    report: Report | None = None,
) -> Store:
    """Turn a source into a store, or open the one that an earlier call made of it.

    Text formats: features are fitted on this source, ids of class names go by first appearance unless
    ``config.class_names`` lists them; then names it lacks are dropped and counted, and their rows stay.
    Where ``config`` names strong or weak columns of documents, features are fitted on these, and rows are phrases
    sampled from them (`mach.data.phrases`).
    Numeric formats: features and classes are taken as they stand, ``config.class_names`` names the classes.
    With ``like`` classes are optional: a missing class column or array means rows without classes, and
    ``config.class_names`` is not looked at. With ``grows`` as well the rows are for training: they need classes, and
    those that ``like`` does not know come after its own. ``config.class_names`` may then list all, its own first.

    Parameters
    ----------
    config, text : DataConfig, TextConfig
        How to read; ``config.train`` and ``config.test`` are not looked at.
    source : str
        A file, the directory of a store (opened as it is), the URL of either (fetched into the cache once),
        ``builtin:characters``, ``builtin:characters-names``, ``builtin:characters-test``, or with ``like`` ``-``:
        standard input, one row a line, which is a text or else ``k1,k2 f:v f:v`` (classes may be missing). Its key is
        made of its content.
    destination : Path or URL, optional
        Directory of the store; by default one in ``config.cache``, else ``$MACH_CACHE``, else ``~/.cache/mach``. To a
        URL the store is copied, and opened here.
    like : Store or Reference, optional
        The training store, or what a model remembers of it, for test rows: its text features, class names, D and
        K hold for them as well.
    grows : bool
        Whether classes may come to those of ``like``.
    report : callable, optional
        Called with a stage (``"making rows"`` of an embedded set, ``"fitting text"``, ``"reading"``) and the fraction
        done, about once a chunk and with 1.0 at the end of the stage.

    Returns
    -------
    Store
        Cost O(source) once, O(1) afterwards; memory is bounded by the chunks and, for text, the vocabulary.

    Raises
    ------
    DataError
        When the source is malformed or does not fit ``like``: one line with file, line, value and repair.
    ConfigError
        When its format is unknown, a destination or class names are given for what is a store already, or standard
        input without ``like``.
    StorageError
        When the store cannot be written, or ``destination`` holds something else.
    """
    with source_errors(source):
        needs_nothing = is_store(place(source))
    if needs_nothing:
        if destination is not None:
            raise ConfigError(f"{source} is a store already and used as it is: leave out the destination {destination}")
        if config.class_names is not None and like is None:
            raise ConfigError(
                f"{source} is a store already and used as it is: prepare its source with class_names = "
                f"{config.class_names}, or leave them out"
            )
        return _fitting(fetch_store(source, config.cache), like, grows)
    kind = _format(config, source, like)
    if config.has_documents and kind not in _TEXT and (like is None or grows):
        raise ConfigError(f"strong_columns and weak_columns name text of documents, {source} has the format {kind}")
    with _file(config, source) as file:
        name = STDIN if source == "-" else source
        task = _Task(config, text, name, file, kind, like, grows, report or (lambda stage, fraction: None))
        key = task.key()
        path = destination if isinstance(destination, Path) else cache_folder(config.cache) / f"{_stem(name)}-{key}"
        with storage_errors(path):
            is_there = path.exists()
        if not is_there:
            try:
                if kind in _TEXT:
                    task.write_text(path, key)
                else:
                    task.write_numbers(path, key)
            except StorageError:
                if not path.exists():  # otherwise another process was faster
                    raise
    store = Store.open(path)
    if store.meta["key"] != key:
        raise StorageError(f"{path} was not prepared from {name} with these options: choose another destination")
    if destination is not None and not isinstance(destination, Path):
        upload_store(store, destination)
    return store


def texts_of(config: DataConfig, source: str, rows: Sequence[int], like: Store | Reference) -> list[str] | None:
    """Texts of some rows of a source that `prepare` has read; None where it is a store or holds numbers.

    Parameters
    ----------
    config : DataConfig
    source : str
        As of `prepare`, but not standard input, which is gone.
    rows : sequence of int
        The source is read up to the last of them.
    like : Store or Reference
        As of `prepare`.
    """
    if source == "-" or is_store(place(source)):
        return None
    kind = _format(config, source, like)
    if kind not in _TEXT:
        return None
    found: dict[int, str] = {}
    wanted, begin = set(rows), 0
    with _file(config, source) as file:
        if kind == "builtin":
            from mach.data import characters

            chunks = chunks_of(characters.rows(_BUILTIN[source]))
        else:
            chunks = read_texts(file, kind, config, classes_optional=True)
        for chunk in chunks:
            found |= {row: chunk.texts[row - begin] for row in wanted if begin <= row < begin + len(chunk.texts)}
            begin += len(chunk.texts)
            if len(found) == len(wanted):
                break
    return [found[row] for row in rows]


@dataclass(frozen=True)
class _Task:
    """The arguments of `prepare` and what is done with them."""

    config: DataConfig
    text: TextConfig
    source: str  # as messages call it
    path: Path
    kind: str
    like: Store | Reference | None
    grows: bool
    report: Report

    def key(self) -> str:
        """Digest of everything that the store depends on."""
        on: dict[str, Any] = {"store": FORMAT, "kind": self.kind, "like": self.like and self.like.fingerprint}
        if self.kind == "builtin":
            from mach.data import characters

            on["source"] = self.source, _stamp(Path(characters.__file__)), unicodedata.unidata_version
        elif self.kind in _STDIN:
            with source_errors(STDIN), self.path.open("rb") as file:
                on["source"] = hashlib.file_digest(file, "blake2b").hexdigest()
        else:
            classes = class_file(self.path, self.kind, self.is_query) if self.kind == "npy" else None
            source = place(self.source)
            on["source"] = [_stamp(source.with_name(path.name)) for path in (self.path, classes) if path]
        if self.grows:
            on["grows"] = True
        if self.config.class_names is not None and not self.is_query:
            on["class_names"] = _stamp(place(self.config.class_names))
        if self.kind in _TEXT:
            on["columns"] = self.config.text_columns, self.config.class_column, self.config.class_separator
            on["text"] = self.text.model_dump()
        if self.has_documents:
            config = phrases.filled(self.config)
            on["documents"] = config.strong_columns, config.weak_columns, config.phrases, config.word_dropout
            on["phrases"] = config.typos, config.phrase_seed, _stamp(Path(phrases.__file__))
        if self.row_features:
            on["row_features"] = self.row_features
        return hashlib.blake2b(json.dumps(on, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def row_features(self) -> int:
        """Most features to keep of a row; queries are read as the training rows were."""
        return self.config.row_features if self.like is None else self.like.row_features

    @property
    def is_query(self) -> bool:
        """Whether the rows are for a model that is trained: classes are optional."""
        return self.like is not None and not self.grows

    @property
    def has_documents(self) -> bool:
        """Whether the rows are to be sampled from documents."""
        return self.config.has_documents and not self.is_query

    def write_numbers(self, path: Path, key: str) -> None:
        names = self.class_names()
        stated = read_shape(self.path, self.kind, self.is_query)
        shape = _limited(self.source, stated, self.kind, self.like, names, self.grows)
        dense, (_, n_features, n_classes) = self.kind == "npy", shape
        with StoreWriter(
            path,
            source=self.source,
            key=key,
            dense=dense,
            n_features=n_features,
            n_classes=n_classes,
            row_features=self.row_features,
        ) as writer:
            writer.class_names = names
            chunks = read_chunks(self.path, self.kind, shape, classes_optional=self.is_query)
            for chunk in self.reported("reading", chunks):
                writer.append(chunk)
            writer.serve(0 if self.like is None else self.like.n_classes)
            self.refuse_empty(writer)

    def write_text(self, path: Path, key: str) -> None:
        names = self.class_names()
        if self.like is not None and (self.like.text_features is None or names is None):
            raise DataError(
                f"{self.source} holds text, but the training store {self.like.path} was made of numbers: "
                "give the same kind"
            )
        known = _numbered(names or [], self.config)
        is_open = names is None or (self.grows and self.config.class_names is None)
        chunks = self.text_source()
        features = (self.like and self.like.text_features) or self.fitted(self.text_source(whole=True)())
        n_classes = None if is_open else len(known)
        with StoreWriter(
            path,
            source=self.source,
            key=key,
            n_features=features.n_features,
            n_classes=n_classes,
            row_features=self.row_features,
        ) as writer:
            for chunk in self.reported("reading", chunks()):
                indptr, ids, n_unknown = _class_ids(chunk.class_names, known, grow=is_open)
                writer.append(Chunk(indptr, ids, features.transform(chunk.texts)))
                writer.n_unknown_classes += n_unknown
            writer.serve(len(known))
            self.refuse_empty(writer)
            writer.class_names, writer.text_features = list(known), features

    def class_names(self) -> Sequence[str] | None:
        """The names that the training store, the configuration or the embedded set gives to classes 0, 1, ..."""
        listed = self.config.class_names
        if self.like is not None and (listed is None or not self.grows):
            return self.like.class_names
        if listed is not None:
            with source_errors(listed):
                file = fetch_source(listed, self.config.cache)
            with SourceFile(file, listed) as lines:
                names = [line.rstrip("\r\n") for line in lines.lines()]
            known = list((self.like and self.like.class_names) or [])
            if self.like is not None and names[: len(known)] != known:
                raise DataError(f"{listed} does not begin with the class names of {self.like.path}: list those first")
            return names
        if self.kind == "builtin":
            from mach.data import characters

            return characters.class_names()
        return None

    def text_source(self, whole: bool = False) -> Callable[[], Iterable[TextChunk]]:
        """What gives the chunks anew for each pass: a file is read again, the embedded set is kept.

        Of documents these are phrases, or with ``whole`` the documents as they are.
        """
        config = phrases.filled(self.config) if self.has_documents else self.config

        def made(rows: Iterator[Columns]) -> Iterator[Text]:
            for document in phrases.documents_of(rows, config, self.source):
                for text in [document.text] if whole else phrases.phrases(document, config):
                    yield text, [document.name]

        if self.kind != "builtin" and self.has_documents:
            columns = [*(config.strong_columns or []), *(config.weak_columns or [])]
            return lambda: read_texts(self.path, self.kind, config, columns=columns, made=made)
        if self.kind != "builtin":
            return lambda: read_texts(self.path, self.kind, config, classes_optional=self.is_query)
        from mach.data import characters

        if self.source == DOCUMENTS:
            return lambda: chunks_of(made(([name.lower()], [name]) for name in characters.class_names()))
        rows = list(characters.rows(_BUILTIN[self.source], report=partial(self.report, "making rows")))

        def chunks() -> Iterator[TextChunk]:
            left = iter(rows)
            return chunks_of(left, fraction=lambda: 1 - length_hint(left) / len(rows))

        return chunks

    def reported(self, stage: str, chunks: Iterable[AnyChunk]) -> Iterator[AnyChunk]:
        """The chunks, with a report after each and at the end."""
        for chunk in chunks:
            yield chunk
            self.report(stage, chunk.fraction)
        self.report(stage, 1.0)

    def fitted(self, chunks: Iterable[TextChunk]) -> TextFeatures:
        from mach.data.text import TextFeatures

        def texts() -> Iterator[str]:
            for chunk in self.reported("fitting text", chunks):
                yield from chunk.texts

        features = TextFeatures(self.text)
        if self.text.tfidf or not self.text.hashing:  # otherwise there is nothing to learn
            features.fit(texts())
        return features

    def refuse_empty(self, writer: StoreWriter) -> None:
        for what, n in (("rows", writer.n_rows), ("features", writer.n_features), ("classes", writer.n_classes)):
            if n == 0:
                raise DataError(f"{self.source} holds no {what}: give a file with at least one")


def _limited(
    source: str,
    shape: Shape,
    kind: str,
    like: Store | Reference | None,
    names: Sequence[str] | None,
    grows: bool = False,
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
        if n_classes is not None and n_classes > like.n_classes and not grows:
            raise DataError(
                f"{source} has K = {n_classes} classes, the training store {like.path} has K = {like.n_classes}: "
                "prepare both in the same way"
            )
        n_features = like.n_features
        if not grows:
            n_classes = like.n_classes
        elif n_classes is not None:
            n_classes = max(n_classes, like.n_classes)
    if names is not None and grows:
        if n_classes is not None and n_classes > len(names):
            raise DataError(
                f"{source} has K = {n_classes} classes, {len(names)} have names: set data.class_names to a file that "
                "names all"
            )
        n_classes = len(names)
    elif names is not None:
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


def _fitting(store: Store, like: Store | Reference | None, grows: bool = False) -> Store:
    """A store given as the source, after a check that its features and classes mean what those of ``like`` do."""
    if like is None or store.fingerprint == like.fingerprint:
        return store
    kind = "npy" if store.is_dense else "store"
    _limited(str(store.path), Shape(store.n_rows, store.n_features, store.n_classes), kind, like, None, grows)
    names, names_of_like = store.class_names, like.class_names
    if store.meta["text_features"] != (like.text_features and like.text_features.fingerprint()):
        raise DataError(f"store {store.path} has other text features than {like.path}: prepare its source with `like`")
    if grows:
        if names is None and names_of_like is not None and store.n_classes > like.n_classes:
            raise DataError(
                f"store {store.path} has K = {store.n_classes} classes without names, {like.path} names its "
                f"{like.n_classes}: prepare its source with class_names"
            )
    elif names is not None and names_of_like is not None and list(names) != list(names_of_like):
        raise DataError(f"store {store.path} has other class names than {like.path}: prepare its source with `like`")
    return store


def _format(config: DataConfig, source: str, like: Store | Reference | None) -> str:
    if source == "-":
        if like is None:
            raise ConfigError(f"{STDIN} is read as queries of a trained model only: name a file to train on")
        if like.is_dense:
            raise ConfigError(f"{STDIN} holds text or sparse rows, {like.path} has dense ones: name an .npy file")
        return "rows" if like.text_features is None else "lines"
    if config.format == "builtin" or source.startswith("builtin:"):
        if source not in (*_BUILTIN, DOCUMENTS) or config.format not in ("auto", "builtin"):
            raise ConfigError(
                f"no embedded set {source!r} of format {config.format}: there are {', '.join([*_BUILTIN, DOCUMENTS])}"
            )
        return "builtin"
    if place(source).is_dir():
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


@contextmanager
def _file(config: DataConfig, source: str) -> Iterator[Path]:
    """The source's file; for standard input a temporary copy, since its key is made of all its content."""
    if source != "-":
        with source_errors(source):
            file = fetch_source(source, config.cache)
        yield file
        return
    with source_errors(STDIN):
        copy = tempfile.NamedTemporaryFile(prefix="mach-")  # noqa: SIM115  # errors of the block are not its own
    with copy:
        with source_errors(STDIN):
            if sys.stdin is not None:  # None: it was closed before Python began
                shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.flush()
        yield Path(copy.name)


def _stamp(where: Place) -> tuple[str, int, int] | tuple[str, str]:
    with source_errors(where):
        if not isinstance(where, Path):
            return str(where), state_of(where)
        status = where.stat()
        return str(where.resolve()), status.st_size, status.st_mtime_ns


def _stem(name: str) -> str:
    """What tells people whose store it is: the beginning of the source's name."""
    stem = Path(name.replace("builtin:", "").replace(" ", "-")).name.partition(".")[0]
    return os.fsencode(stem)[:64].decode(errors="ignore")
