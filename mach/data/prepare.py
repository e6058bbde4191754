"""Preparation: any source becomes a store, once.

A prepared store lies in the cache under the digest of everything it depends on, so that a second call opens it
without a look at the source. Of several processes of a machine one makes it, and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mach.config import DOCUMENTS, DataConfig, TextConfig
from mach.data import characters, phrases
from mach.data.agreement import agreed_shape, agreed_store
from mach.data.class_table import ClassTable, options_of, read_classes
from mach.data.formats import BUILTIN, EMBEDDED, LINES, ROWS, source_format
from mach.data.gaps import refuse_gaps
from mach.data.meta import FORMAT
from mach.data.names import class_name, ids_by_name, numbered, without_codes
from mach.data.omissions import Cells, Unknown
from mach.data.skos import Skos
from mach.data.soundness import sound
from mach.data.sources import STDIN, Format, Numbers, SourceFile, source_errors
from mach.data.store import Chunk, Reference, Store
from mach.data.tables import Columns, Table, Text, TextChunk, chunks_of, ids_of, listing
from mach.data.transfer import fetch_store, is_store, source_file, stamp, upload_store
from mach.data.words import RULE
from mach.data.writer import StoreWriter
from mach.errors import ConfigError, DataError, StorageError, did_you_mean
from mach.files.caches import cache_folder
from mach.files.places import Place, kept, place

if TYPE_CHECKING:
    from mach.data.text import TextFeatures

Report = Callable[[str, float], None]
AnyChunk = TypeVar("AnyChunk", Chunk, TextChunk)


def prepare(
    config: DataConfig,
    text: TextConfig,
    source: str,
    destination: Place | None = None,
    *,
    like: Store | Reference | None = None,
    grows: bool = False,
    former: Reference | None = None,
    check: Callable[[Store], None] = lambda store: None,
    report: Report | None = None,
) -> Store:
    """Turn a source into a store, or open the one that an earlier call made of it.

    Text formats: features are fitted on this source, ids of class names go by first appearance unless
    ``config.classes`` lists them; then names it lacks are dropped and counted, and their rows stay.
    Where ``config`` names strong or weak columns of documents, features are fitted on these, and rows are phrases
    sampled from them (`mach.data.phrases`).
    Numeric formats: features and classes are taken as they stand, ``config.classes`` names the classes.

    Parameters
    ----------
    config, text : DataConfig, TextConfig
        How to read; ``config.train`` and ``config.test`` are not looked at.
    source : str
        A file, the directory of a store (opened as it is), the URL of either (fetched into the cache once),
        ``builtin:characters``, ``builtin:characters-names``, ``builtin:characters-test``, or with ``like`` ``-``:
        standard input, one row a line, which is a text or else ``k1,k2 f:v f:v`` (classes may be missing).
    destination : Path or URL, optional
        Directory of the store; by default one in ``config.cache``, else ``$MACH_CACHE``, else ``~/.cache/mach``. To a
        URL the store is copied, and opened here.
    like : Store or Reference, optional
        The training store, or what a model remembers of it: its text features, class names, D and K hold for these rows
        as well. Their classes may be missing, and ``config.classes`` is not looked at.
    grows : bool
        With ``like``: whether the rows are for training. They need classes, and those that ``like`` does not know come
        after its own; ``config.classes`` may list all, its own first.
    former : Reference, optional
        Of a run that these rows were read for before: they are read as then, by its rule of words and its spelling of
        names, so that they come to the same bits.
    check : callable, optional
        Raises an error at a store that is not wanted, such as `mach.data.omissions.refuse`; then none is made of them.
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
    if is_store(place(source)):
        if destination is not None:
            raise ConfigError(f"{source} is a store already and used as it is: leave out the destination {destination}")
        if config.classes is not None and like is None:
            raise ConfigError(
                f"{source} is a store already and used as it is: prepare its source with classes = "
                f"{config.classes}, or leave them out"
            )
        store = agreed_store(sound(fetch_store(source, config.cache)), like, grows)
        if like is None or grows:
            refuse_gaps(store, source, n_known=_n_known(store.class_names, like))
        return store
    form = source_format(config, source, like)
    if config.has_documents and isinstance(form, Numbers) and (like is None or grows):
        raise ConfigError(
            f"strong_columns and weak_columns name text of documents, {source} has the format {form.name}"
        )
    with source_file(source, config.cache) as file:
        name = STDIN if source == "-" else source
        task = _Task(config, text, name, file, form, like, grows, report or (lambda stage, fraction: None), former)
        stem = Path(name.replace("builtin:", "").replace(" ", "-")).name.partition(".")[0]
        stem = os.fsencode(stem)[:64].decode(errors="ignore")
        path = destination if isinstance(destination, Path) else cache_folder(config.cache) / f"{stem}-{task.key}"

        def make(path: Path) -> None:
            (task.write_numbers if isinstance(form, Numbers) else task.write_text)(path)
            check(Store.open(path))

        store = Store.open(kept(path, make))
    if store.meta["key"] != task.key:
        raise StorageError(f"{path} was not prepared from {name} with these options: choose another destination")
    check(store)
    if destination is not None and not isinstance(destination, Path):
        upload_store(store, destination)
    return store


def texts_of(config: DataConfig, source: str, rows: Sequence[int], like: Store | Reference) -> list[str] | None:
    """Texts of some rows of a source that `prepare` has read; None where it is a store, standard input or of numbers.

    The source is read up to the last of the rows.
    """
    if source == "-" or is_store(place(source)):
        return None
    form = source_format(config, source, like)
    if isinstance(form, Numbers):
        return None
    asked = set(rows)
    with source_file(source, config.cache) as file:
        task = _Task(config, TextConfig(), source, file, form, like, False, lambda stage, fraction: None)
        texts = islice((text for chunk in task.text_source()() for text in chunk.texts), max(asked, default=-1) + 1)
        found = {row: text for row, text in enumerate(texts) if row in asked}
    return [found[row] for row in rows]


def column_of(config: DataConfig, source: str, name: str) -> Iterator[str | int | float | None]:
    """Values of a column of a table, in the order of its rows: what names them, such as a key of a database.

    ConfigError where the source is no table, DataError where it has no such column.
    """
    form = None if source == "-" or is_store(place(source)) else source_format(config, source, None)
    if not isinstance(form, Table):
        raise ConfigError(f"{source} is no table with a column {name!r}: give CSV, TSV, JSON lines or Parquet")

    def chosen(there: Collection[str], where: str) -> list[str]:
        if name not in there:
            raise DataError(f"{where} has no column {name!r}{did_you_mean(name, there)}; there are {listing(there)}")
        return [name]

    with source_file(source, config.cache) as file, SourceFile(file, form.source_name or source) as opened:
        for _, [value] in form.records(opened, chosen):
            yield value if isinstance(value, str | int | float) or value is None else str(value)


@dataclass(frozen=True)
class _Task:
    """One source on its way to a store."""

    config: DataConfig
    text: TextConfig
    source: str  # as messages call it
    path: Path
    form: Format
    like: Store | Reference | None
    grows: bool
    report: Report
    former: Reference | None = None

    @cached_property
    def key(self) -> str:
        """Digest of everything that the store depends on; constants stand where keys of the configuration were."""
        on: dict[str, Any] = {"store": FORMAT, "kind": self.form.name, "like": self.like and self.like.fingerprint}
        if self.form is BUILTIN:
            on["source"] = self.source, stamp(Path(characters.__file__)), unicodedata.unidata_version
        elif self.form in (LINES, ROWS):
            with source_errors(STDIN), self.path.open("rb") as file:
                on["source"] = hashlib.file_digest(file, "blake2b").hexdigest()
        else:
            beside = self.form.beside(self.path, self.is_query) if isinstance(self.form, Numbers) else []
            source = place(self.source)
            on["source"] = [stamp(source.with_name(path.name)) for path in (self.path, *beside)]
        if self.grows:
            on["grows"] = True
        if self.config.classes is not None and not self.is_query:
            on["class_names"] = stamp(place(Skos.path_of(self.config.classes)))
            if options := options_of(self.config.classes, self.config.class_separator):
                on["classes"] = options
        if not isinstance(self.form, Numbers):
            on["columns"] = self.config.text_columns, self.config.class_column, self.config.class_separator
            on["text"] = self.text.model_dump() | {"tfidf": True}
            if self.rule > 1 and self.like is None:
                on["words"] = self.rule
            if self.reads_list:
                on["listed"] = True
            if self.is_query:
                on["names"] = 1  # the version of `class_name`
        if self.has_documents:
            columns = self.config.strong_columns, self.config.weak_columns
            on["documents"] = *columns, phrases.PHRASES, phrases.WORD_DROPOUT
            on["phrases"] = phrases.TYPOS, 0, stamp(Path(phrases.__file__))
        if self.row_features:
            on["row_features"] = self.row_features
        return hashlib.blake2b(json.dumps(on, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def row_features(self) -> int:
        """Most features to keep of a row; queries are read as the training rows were."""
        return self.config.row_features if self.like is None else self.like.row_features

    @property
    def rule(self) -> int:
        """How words are cut where text features are fitted."""
        features = self.former and self.former.text_features
        return features.rule if features else RULE

    @property
    def reads_list(self) -> bool:
        """Whether words of a plain list of names join the vocabulary; runs of earlier versions were made without."""
        classes = self.config.classes
        features = None if self.former is None else self.former.text_features
        is_list = classes is not None and options_of(classes, self.config.class_separator) is None
        return is_list and self.like is None and (features is None or features.reads_list)

    def spelt(self, names: list[str] | None) -> list[str] | None:
        """Names as the run spells them that these rows were read for before, where it means the same."""
        former = list((self.former and self.former.class_names) or [])
        return former if names is not None and names == list(map(class_name, former)) else names

    @property
    def is_query(self) -> bool:
        """Whether the rows are for a model that is trained: classes are optional."""
        return self.like is not None and not self.grows

    @property
    def has_documents(self) -> bool:
        """Whether the rows are to be sampled from documents."""
        return self.config.has_documents and not self.is_query

    def write_numbers(self, path: Path) -> None:
        assert isinstance(self.form, Numbers)
        names, stated = self.class_names(), self.form.shape(self.path, self.is_query)
        shape = agreed_shape(self.source, stated, self.form.is_dense, self.like, names, self.grows)
        self.refuse_empty(features=shape.n_features, classes=shape.n_classes)
        with self.writer(path, *shape[1:]) as writer:
            writer.class_names = names if names is None else self.spelt(list(names))
            writer.class_texts = self.listed.texts
            writer.notes = self.listed.notes
            writer.serve(0 if self.like is None else self.like.n_classes)
            for chunk in self.reported("reading", self.form.chunks(self.path, shape, classes_optional=self.is_query)):
                writer.append(chunk)
        if not self.is_query:
            refuse_gaps(Store.open(path), self.source, n_known=_n_known(names, self.like))

    def write_text(self, path: Path) -> None:
        names = self.class_names()
        if self.like is not None and (self.like.text_features is None or names is None):
            raise DataError(
                f"{self.source} holds text, but the training store {self.like.path} was made of numbers: "
                "give the same kind"
            )
        is_open = names is None or (self.grows and self.config.classes is None)
        is_of_like = self.like is not None and (is_open or self.is_query)
        texts = self.like.class_texts if self.like is not None and is_of_like else self.listed.texts
        if texts is not None:
            ids = texts.ids(names or [])
        else:
            ids = ids_by_name(names or []) if is_of_like else numbered(names or [], self.config.classes)
        names = list(names or [])
        cells, unknown = Cells(self.config.class_separator), Unknown()
        chunks = self.text_source(cells)
        features = self.like.text_features if self.like is not None else None
        if features is None:
            has_phrases = self.has_documents or self.source == DOCUMENTS
            features = self.fitted((self.text_source(cells, whole=True) if has_phrases else chunks)())
        with self.writer(path, features.n_features, None if is_open else len(names)) as writer:
            for chunk in self.reported("reading", chunks()):
                indptr, class_ids = ids_of(chunk.class_names, ids, names if is_open else None, unknown)
                writer.append(Chunk(indptr, class_ids, features.transform(chunk.texts)))
            writer.serve(len(names))
            writer.class_names, writer.text_features = self.spelt(names), features
            writer.class_texts = self.listed.texts
            if not is_open:
                cells.blank_words.clear()  # a list says what is a class
            writer.n_unknown_classes, writer.notes = unknown.n, unknown.notes() | cells.notes() | self.listed.notes

    @contextmanager
    def writer(self, path: Path, n_features: int | None, n_classes: int | None) -> Iterator[StoreWriter]:
        """A writer of the store, which may not end without rows, features or classes."""
        sizes: dict[str, Any] = {"n_features": n_features, "n_classes": n_classes, "row_features": self.row_features}
        with StoreWriter(path, source=self.source, key=self.key, dense=self.form.is_dense, **sizes) as writer:
            yield writer
            self.refuse_empty(rows=writer.n_rows, features=writer.n_features, classes=writer.n_classes)

    def class_names(self) -> Sequence[str] | None:
        """The names that the training store, the configuration or the embedded set gives to classes 0, 1, ..."""
        source = self.config.classes
        if self.like is not None and (source is None or not self.grows):
            return self.like.class_names
        if source is not None:
            names = self.listed.keys
            known = [class_name(name) for name in (self.like and self.like.class_names) or []]
            if self.like is not None and names[: len(known)] != known:
                raise DataError(f"{source} does not begin with the class names of {self.like.path}: list those first")
            return names
        return characters.class_names() if self.form is BUILTIN else None

    @cached_property
    def listed(self) -> ClassTable:
        """What the configuration's file of classes holds."""
        config, are_numbered = self.config, isinstance(self.form, Numbers)
        if config.classes is None or self.is_query:
            return ClassTable()
        return read_classes(config.classes, config.cache, config.class_separator, are_numbered=are_numbered)

    def text_source(self, cells: Cells | None = None, whole: bool = False) -> Callable[[], Iterable[TextChunk]]:
        """What gives the chunks anew for each pass; of documents phrases, or with ``whole`` these as they are."""
        config = self.config

        def texts(rows: Iterator[Columns]) -> Iterator[Text]:
            for document in phrases.documents_of(rows, config, self.source):
                for text in [document.text] if whole else phrases.phrases(document):
                    yield text, [document.name]

        if isinstance(self.form, Table):
            if not self.has_documents:
                return partial(self.form.texts, self.path, config, classes_optional=self.is_query, cells=cells)
            columns = [*(config.strong_columns or []), *(config.weak_columns or [])]
            return partial(self.form.texts, self.path, config, columns=columns, make=texts)
        if self.source == DOCUMENTS:
            return lambda: chunks_of(texts(([name.lower()], [name]) for name in characters.class_names()))
        rows = list(characters.rows(EMBEDDED[self.source], report=partial(self.report, "making rows")))

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
            n_rows = 0
            for chunk in self.reported("fitting text", chunks):
                yield from chunk.texts
                n_rows += len(chunk.texts)
            self.refuse_empty(rows=n_rows)

        known, names = self.listed.texts, self.listed.keys if self.reads_list else []
        class_texts = map(without_codes, names) if known is None else map(known.whole, range(len(known)))
        features = TextFeatures(self.text, self.rule, reads_list=self.reads_list)
        return features.fit(texts(), class_texts, self.source)

    def refuse_empty(self, **counts: int | None) -> None:
        for what, n in counts.items():
            if n == 0:
                raise DataError(f"{self.source} holds no {what}: give a file with at least one")


def _n_known(names: Sequence[str] | None, like: Store | Reference | None) -> int | None:
    """Classes that need not occur in the rows: None for all, where they have names."""
    return None if names is not None else 0 if like is None else like.n_classes
