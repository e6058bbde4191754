"""The file of the classes that ``data.classes`` names: a plain list, a table of classes with texts, or SKOS.

=========== =====================================================================================================
a list      one name a line, or ``id<TAB>name`` with the numbers from 0 (`mach.data.names.listed`)
a table     CSV, TSV, JSON lines or Parquet with a column ``id`` or ``name``, and if need be ``alternatives``, ``text``,
            ``uri`` and ``parents`` (ids or names of classes in the file; others are left out)
SKOS        Turtle, RDF/XML or N-Triples (`mach.data.skos`)
=========== =====================================================================================================

Rows call a class by its id; where that is no class's, by its address or its name, if no two have it. In a table without
ids the name is the id. Where rows hold class numbers, ids that are numbers say which class a line is of, and else the
first line is of class 0.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mach.data.class_texts import ClassTexts
from mach.data.formats import format_of
from mach.data.limits import NAME_CHARACTERS, refuse_twice
from mach.data.missing import is_missing
from mach.data.names import class_name, listed, shown
from mach.data.skos import Skos
from mach.data.sources import SourceFile, source_errors
from mach.data.tables import Csv, Table
from mach.data.transfer import fetch_source
from mach.errors import ConfigError, DataError

COLUMNS = ("id", "name", "alternatives", "text", "uri", "parents")
SEPARATOR = "|"  # of alternatives and parents in one string, where data.class_separator says no other
VERSION = 1  # of what is made of a table, for the key of a store


@dataclass
class ClassTable:
    """Classes in the order of a file: what rows call them, and what they say of themselves; None of a plain list."""

    keys: list[str] = field(default_factory=list)
    texts: ClassTexts | None = None

    @property
    def notes(self) -> dict[str, Any]:
        """For a store's record: whether a table says which classes there are."""
        return {} if self.texts is None else {"lists_classes": True}


def read_classes(source: str, cache: str | None, separator: str | None, *, are_numbered: bool) -> ClassTable:
    """Read the file of the classes; ``are_numbered`` says that rows hold class numbers.

    Raises DataError of one line where it is damaged, two classes have one id, or ids are not as rows need them.
    """
    skos = Skos.of(source)
    with source_errors(source):
        file = fetch_source(Skos.path_of(source), cache)
    if skos is not None:
        return ClassTable(*skos.read(file))
    form = _table(source, file)
    if form is None:
        with SourceFile(file, source) as lines:
            return ClassTable(listed([line.rstrip("\r\n") for line in lines.lines()], source))
    return _read(form, file, separator or SEPARATOR, are_numbered)


def of_classes_alone(source: str) -> dict[str, Any]:
    """Keys of a configuration that learns from a table of classes and nothing else: its texts are the documents.

    Words may be mistyped or inflected, as few texts spell them. A DataError where the file is no table of classes.
    """
    with source_errors(source):
        file = fetch_source(source)
        form = _table(source, file)
    if form is None:
        raise DataError(f"{source} is no table with a column id or name: --class-table needs one of its classes")
    there = set(COLUMNS)
    for _, row in _rows(form, file, SEPARATOR):
        there &= row.keys()  # lines of JSON may lack a column, and documents must not
    strong: list[str] = [name for name in ("name", "alternatives") if name in there] or ["id"]
    keys: dict[str, Any] = {"data.classes": source, "data.class_column": "id" if "id" in there else "name"}
    keys |= {"data.strong_columns": strong} | ({"data.weak_columns": ["text"]} if "text" in there else {})
    return keys | {"text.words": [1, 1], "text.characters": [3, 4]}


def options_of(source: str, separator: str | None) -> tuple[Any, ...] | None:
    """Beside the file's state, what decides what is read of it; None for a plain list."""
    skos = Skos.of(source)
    if skos is not None:
        return VERSION, skos.language
    with suppress(ConfigError):
        if isinstance(format_of("auto", source), Table):
            return VERSION, separator
    return None


def _table(source: str, file: Path) -> Table | None:
    """The format of a table; None of a plain list: one name a line has no header that names columns."""
    try:
        form = format_of("auto", source)
    except ConfigError:
        return None
    if isinstance(form, Csv):
        with SourceFile(file, source) as lines:
            line = next(lines.lines(), "")
        fields = next(csv.reader([line], delimiter=form.separator), [])
        is_list = len(fields) < 2 or form.name == "tsv"
        return None if is_list and not {"id", "name"} & set(fields) else form
    return form if isinstance(form, Table) else None


def _read(form: Table, file: Path, separator: str, are_numbered: bool) -> ClassTable:
    places: dict[str, str] = {}  # of every id
    rows: list[dict[str, Any]] = []
    for place, row in _rows(form, file, separator):
        key = row["id"] if "id" in row else row["name"]
        if not key:
            raise DataError(f"{place}: a class without {'id' if 'id' in row else 'name'}: give it one, or leave it out")
        if key in places and ("id" in row or not are_numbered):
            raise DataError(f"{place}: class {key!r:.60} stands at {places[key]} too: leave one out, or give them ids")
        places[key] = place
        rows.append({"id": key, "name": "", "text": "", "uri": "", "alternatives": [], "parents": []} | row)
    if not rows:
        raise DataError(f"{file} lists no class: give a file with at least one")
    keys = [row["id"] for row in rows]
    if are_numbered and all(key.isdecimal() for key in keys):
        rows = _in_order(rows, places)
        keys = [row["name"] or row["id"] for row in rows]
    names = [row["name"] for row in rows]
    texts = ClassTexts.of(
        names,
        [tuple(dict.fromkeys(name for name in row["alternatives"] if name != row["name"])) for row in rows],
        [row["text"] for row in rows],
        [row["uri"] for row in rows],
    )
    ids = texts.ids([row["id"] for row in rows])
    parents = [tuple(sorted({ids[name] for name in row["parents"] if name in ids} - {k})) for k, row in enumerate(rows)]
    return ClassTable(keys, ClassTexts.of(names, texts.alternatives, texts.texts, texts.uris, parents))


def _rows(form: Table, file: Path, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of every class its place, as messages call it, and what the columns that are there hold."""
    columns: list[str] = []

    def choose(there: Collection[str], place: str) -> list[str]:
        columns[:] = [name for name in COLUMNS if name in there]
        if not {"id", "name"} & set(columns):
            raise DataError(f"{place} has no column id and none called name: a table of classes needs one of them")
        refuse_twice(place, there, columns)
        return columns

    with SourceFile(file) as source:
        for place, values in form.records(source, choose):
            row: dict[str, Any] = {}
            for name, value in zip(columns, values, strict=True):
                if name in ("alternatives", "parents"):
                    parts = value if isinstance(value, list) else _text(value, place, name).split(separator)
                    row[name] = [part for part in (_name(part, place, name) for part in parts) if part]
                else:
                    row[name] = _text(value, place, name) if name == "text" else _name(value, place, name)
            yield place, row


def _in_order(rows: list[dict[str, Any]], places: dict[str, str]) -> list[dict[str, Any]]:
    """Rows by the class numbers that they have as ids."""
    by_number: dict[int, dict[str, Any]] = {}
    for row in rows:
        k = int(row["id"]) if len(row["id"]) <= 10 else len(rows)
        if k >= len(rows) or k in by_number:
            raise DataError(
                f"{places[row['id']]}: id {row['id']:.20} of {row['name']!r:.60} is outside 0..{len(rows) - 1}, or "
                f"there twice: rows hold class numbers, so number the {len(rows)} classes from 0, each once"
            )
        by_number[k] = row
    return [by_number[k] for k in range(len(rows))]


def _text(value: Any, place: str, column: str) -> str:
    """What a cell says, "" where it is missing."""
    if is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():  # integers of a column that lacks some
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{place}: {value!r:.40} in column {column!r} is no text: write strings, or rename the column")
    return shown(str(value)).strip()


def _name(value: Any, place: str, column: str) -> str:
    """A name on one line, as `mach.data.names.class_name` writes it."""
    name = class_name(" ".join(_text(value, place, column).split()))
    if len(name) > NAME_CHARACTERS:
        raise DataError(
            f"{place}: {name!r:.40}... in column {column!r} has {len(name):,} characters, at most {NAME_CHARACTERS:,} "
            "may stand there: shorten it, or put it into the column text"
        )
    return name
