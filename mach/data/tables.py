r"""Text with class names: CSV, JSON lines, fastText's and plain lines, as chunks of texts and names.

Parquet is read by `mach.data.parquet`.

The text of a row is its text columns joined by blanks. Its classes are a list of names, a string of names with a
separator, or one name; integers are taken as names, and what is missing (`mach.data.missing`) as no class. CSV and
JSON lines are UTF-8 and may be compressed (.gz, .bz2, .xz). Lone surrogates (``"\ud800"`` in JSON), which no output
could show, are read as U+FFFD.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mach.config import DataConfig
from mach.data.limits import BLOCK_BYTES, NAME_CHARACTERS, ROW_BYTES, refuse_twice
from mach.data.missing import is_missing
from mach.data.names import class_name, shown
from mach.data.omissions import Cells, Unknown
from mach.data.sources import STDIN, Format, SourceFile
from mach.errors import DataError, counted, did_you_mean, one_line

CHUNK_ROWS = 2**15
LABEL = "__label__"
Columns: TypeAlias = tuple[list[str], list[str]]  # a row's texts by column, "" where missing, and its class names
Text: TypeAlias = tuple[str, list[str]]
Choose: TypeAlias = Callable[[Collection[str], str], list[str]]  # the columns to read, of those there are at a place


@dataclass(frozen=True)
class TextChunk:
    """Some consecutive rows: their texts, the names of their classes, and the share of the source read so far."""

    texts: list[str]
    class_names: list[list[str]]
    fraction: float = 0.0


def joined(rows: Iterator[Columns]) -> Iterator[Text]:
    """The texts of each row joined by blanks."""
    return ((" ".join(filter(None, texts)), names) for texts, names in rows)


def chunks_of(
    rows: Iterable[Text], block_bytes: int = BLOCK_BYTES, fraction: Callable[[], float] = lambda: 0.0
) -> Iterator[TextChunk]:
    """Gather rows of (text, class names) into chunks of bounded size."""
    texts: list[str] = []
    names: list[list[str]] = []
    n_characters = 0
    for text, names_of_row in rows:
        texts.append(text)
        names.append(names_of_row)
        n_characters += len(text) + sum(map(len, names_of_row)) + len(names_of_row)
        if n_characters >= block_bytes or len(texts) == CHUNK_ROWS:
            yield TextChunk(texts, names, fraction())
            texts, names, n_characters = [], [], 0
    if texts:
        yield TextChunk(texts, names, fraction())


class Table(Format, ABC):
    """A format whose rows have columns of text, and one of class names."""

    source_name: ClassVar[str | None] = None  # of its file in messages, instead of the path
    only_columns: ClassVar[Sequence[str] | None] = None  # those of text, whatever the configuration says

    @abstractmethod
    def records(self, source: SourceFile, choose: Choose) -> Iterator[tuple[str, list[Any]]]:
        """Of every row its place, as messages call it, and its values in the columns that ``choose`` gives.

        Raises DataError: one line that names the file, the line (or the row), the value and what to do.
        """

    def texts(
        self,
        path: Path,
        config: DataConfig,
        block_bytes: int = BLOCK_BYTES,
        classes_optional: bool = False,
        columns: Sequence[str] | None = None,
        make: Callable[[Iterator[Columns]], Iterator[Text]] = joined,
        cells: Cells | None = None,
    ) -> Iterator[TextChunk]:
        """Texts of the rows and the names of their classes, as ``config`` names the columns; errors as of `records`.

        A chunk has about ``block_bytes`` characters of text. With ``classes_optional`` the class column may be missing.
        ``columns`` are those of text instead of ``config.text_columns``, and ``make`` makes texts of the rows. Strings
        of classes are counted into ``cells``.
        """
        key = "text_columns" if columns is None else "strong_ and weak_columns"
        repair = f"set {key}, class_column (mach train --text, --classes)"
        if classes_optional:
            repair = "name its columns as those of the training rows"
        for_classes = ", or give --class-table for classes alone"
        named = self.only_columns or columns or config.text_columns

        def choose(there: Collection[str], place: str) -> list[str]:
            absent = classes_optional and config.class_column not in there
            chosen = [*named, *([] if absent else [config.class_column])]
            for name in chosen:
                if name not in there:
                    raise DataError(
                        f"{place} has no column {name!r}{did_you_mean(name, there)}; there are {listing(there)}: "
                        f"{repair}{'' if classes_optional or 'name' not in there else for_classes}"
                    )
            refuse_twice(place, there, chosen)
            return chosen

        if cells is not None:
            cells.clear()
        with SourceFile(path, self.source_name) as source:
            rows = make(_row(values, place, named, config, cells) for place, values in self.records(source, choose))
            yield from chunks_of(rows, block_bytes, lambda: source.fraction)


@dataclass(frozen=True)
class Csv(Table):
    """Lines of fields below a header; a field in quotes may hold separators and line ends.

    A header without a comma is parted by the sign in it that others use: a semicolon, as spreadsheets write in many
    countries, a tab or a bar.
    """

    separator: str = ","

    def records(self, source: SourceFile, choose: Choose) -> Iterator[tuple[str, list[Any]]]:
        csv.field_size_limit(ROW_BYTES)  # the default refuses texts of more than 128 KiB
        n_left = ROW_BYTES

        def lines() -> Iterator[str]:
            nonlocal n_left
            for text in source.lines():
                n_left -= len(text)
                if n_left < 0:
                    raise csv.Error(f"a row of more than {ROW_BYTES:,} characters")
                yield text

        line, separator = 1, self.separator
        try:
            rest = lines()
            first = next(rest, "")
            if separator == "," and "," not in first:
                separator = max(";\t|", key=first.count) if any(sign in first for sign in ";\t|") else ","
            reader = csv.reader(chain([first], rest), strict=True, delimiter=separator)
            header = next(reader, [])
            if not header:
                raise DataError(f"{source.path} is empty or lacks a header: its first line must name the columns")
            places = [header.index(name) for name in choose(header, f"{source.path} line 1")]
            line = reader.line_num + 1
            for record in reader:
                if record and len(record) != len(header):
                    raise DataError(
                        f"{source.path} line {line}: {counted(len(record), 'field')} instead of {len(header)}: "
                        f"quote the text that holds {separator!r}"
                    )
                if record:  # csv yields [] for a blank line
                    yield f"{source.path} line {line}", [record[place] for place in places]
                line, n_left = reader.line_num + 1, ROW_BYTES
        except csv.Error as error:
            raise DataError(
                f"{source.path} line {line}: no valid {self.name.upper()} ({one_line(error)}): correct its quotes"
            ) from error


class JsonLines(Table):
    """An object a line."""

    def records(self, source: SourceFile, choose: Choose) -> Iterator[tuple[str, list[Any]]]:
        for line, text in enumerate(source.lines(), 1):
            if not text.strip():
                continue
            place = f"{source.path} line {line}"
            try:
                record = json.loads(text, object_pairs_hook=_unique)
            except RecursionError as error:
                raise DataError(f"{place}: {text.strip()!r:.40} is no JSON (too deeply nested): correct it") from error
            except ValueError as error:
                reason = getattr(error, "msg", one_line(error))
                raise DataError(f"{place}: {text.strip()!r:.40} is no JSON ({reason}): correct it") from error
            if not isinstance(record, dict):
                raise DataError(f"{place}: {text.strip()!r:.40} is no JSON object: write one a line")
            yield place, [record[name] for name in choose(record, place)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no name may stand twice: the first would be lost in silence."""
    record = dict(pairs)
    if len(record) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r:.60} stands in it twice")
    return record


class FastText(Table):
    """A text a line; its words that begin with ``__label__`` are its classes."""

    only_columns = ("text",)

    def records(self, source: SourceFile, choose: Choose) -> Iterator[tuple[str, list[Any]]]:
        for line, text in enumerate(source.lines(), 1):
            if text.strip():
                words = text.split()
                names = [word.removeprefix(LABEL) for word in words if word.startswith(LABEL)]
                row = {"text": " ".join(word for word in words if not word.startswith(LABEL)), "classes": names}
                place = f"{source.path} line {line}"
                yield place, [row[name] for name in choose(row, place)]

    def texts(self, path: Path, config: DataConfig, *more: Any, **options: Any) -> Iterator[TextChunk]:
        """As of `Table`; there is no column to name."""
        return super().texts(path, config.changed(class_column="classes"), *more, **options)


class Lines(Table):
    """Standard input: a text a line, without classes."""

    source_name = STDIN
    only_columns = ("line",)

    def records(self, source: SourceFile, choose: Choose) -> Iterator[tuple[str, list[Any]]]:
        return ((source.name, [line.rstrip("\r\n")]) for line in source.lines())


def ids_of(
    names_of_rows: list[list[str]], ids: dict[str, int], names: list[str] | None, unknown: Unknown
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ascending ids of the rows' names as a CSR pair; those without one are added to ``names`` if given, or counted."""
    class_ids: list[int] = []
    indptr = [0]
    for names_of_row in names_of_rows:
        for name in names_of_row:
            if name not in ids:
                if names is None:
                    unknown.count(name)
                else:
                    ids[name] = len(names)
                    names.append(name)
        class_ids += sorted({ids[name] for name in names_of_row if name in ids})
        indptr.append(len(class_ids))
    return np.array(indptr, dtype=np.int64), np.array(class_ids, dtype=np.int32)


def _row(values: list[Any], place: str, columns: Sequence[str], config: DataConfig, cells: Cells | None) -> Columns:
    """Texts and class names; ``values`` are those of the text columns and, where there is one, the class column."""
    n_texts = len(columns)
    classes = values[n_texts] if len(values) > n_texts else None
    texts = [
        "\n".join(v) if isinstance(v, list) and all(isinstance(s, str) for s in v) else v for v in values[:n_texts]
    ]
    for name, text in zip(columns, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: column {name!r} holds {text!r:.40}, not text: convert it or leave it out")
    names = classes if isinstance(classes, list) else [classes]
    if isinstance(classes, str):
        if config.class_separator:
            names = classes.split(config.class_separator)
        if cells is not None and classes.strip():
            cells.count(classes.strip())
    kept = [_name(name, place, config.class_column) for name in names if not is_missing(name)]
    if cells is not None:
        cells.named(kept)
    return [shown(text or "") for text in texts], kept


def _name(name: Any, place: str, column: str) -> str:
    """A class's name as it is kept."""
    if isinstance(name, float) and name.is_integer():  # integers of a column that lacks some
        name = int(name)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise DataError(f"{place}: {name!r:.40} in column {column!r} is no class name: use strings or integers")
    kept = class_name(str(name))
    if len(kept) > NAME_CHARACTERS:
        raise DataError(
            f"{place}: {kept!r:.40}... in column {column!r} has {len(kept):,} characters, a class name may have "
            f"{NAME_CHARACTERS:,}: set class_column, class_separator"
        )
    return kept


def listing(names: Collection[str], most: int = 20) -> str:
    """Names of columns, on one line of bounded length."""
    first = [f"{name:.40}" if name.isprintable() else f"{name!r:.40}" for name in islice(names, most)]
    return ", ".join(first) + (f" and {len(names) - most} more" if len(names) > most else "")
