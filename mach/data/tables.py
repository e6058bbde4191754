r"""Readers of text with class names: CSV, JSON lines, Parquet, plain lines, as chunks of texts and names.

The text of a row is its text columns joined by blanks. Its classes are a list of names, a string of names with a
separator, or one name; integers are taken as names, empty names and missing values as no class. CSV and JSON lines
are UTF-8 and may be compressed (.gz, .bz2, .xz). Lone surrogates (``"\ud800"`` in JSON), which no output could show,
are read as U+FFFD. Plain lines, the format of standard input, are texts without classes, one a line.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mach.config import DataConfig
from mach.data.readers import BLOCK_BYTES, STDIN, SourceFile, source_errors
from mach.errors import ConfigError, DataError

CHUNK_ROWS = 2**15
Columns: TypeAlias = tuple[list[str], list[str]]  # a row's texts by column, "" where missing, and its class names
Text: TypeAlias = tuple[str, list[str]]
_SURROGATE = re.compile("[\ud800-\udfff]")
_Choose: TypeAlias = Callable[[Collection[str], str], list[str]]  # the columns to read of those there are, and a place


@dataclass(frozen=True)
class TextChunk:
    """Some consecutive rows: their texts, the names of their classes, and the share of the source read so far."""

    texts: list[str]
    class_names: list[list[str]]
    fraction: float = 0.0


def joined(rows: Iterator[Columns]) -> Iterator[Text]:
    """The texts of each row joined by blanks."""
    return ((" ".join(filter(None, texts)), names) for texts, names in rows)


def read_texts(
    path: Path,
    kind: str,
    config: DataConfig,
    block_bytes: int = BLOCK_BYTES,
    classes_optional: bool = False,
    columns: list[str] | None = None,
    made: Callable[[Iterator[Columns]], Iterator[Text]] = joined,
) -> Iterator[TextChunk]:
    """Rows of a table.

    Parameters
    ----------
    path : Path
        The file.
    kind : str
        ``csv``, ``jsonl``, ``parquet`` or ``lines``.
    config : DataConfig
        Names the columns and the separator of class names.
    block_bytes : int
        Characters of text that make a chunk; it ends after 32,768 rows anyway.
    classes_optional : bool
        Whether the class column may be missing: rows without classes.
    columns : list of str, optional
        Those of text, instead of ``config.text_columns``.
    made : callable
        Makes texts of the rows, as many as it likes.

    Raises
    ------
    DataError
        One line that names the file, the line (or the row, for Parquet), the value and what to do.
    ConfigError
        When the separator is empty.
    """
    if config.class_separator == "":
        raise ConfigError("class_separator is empty: give a character, or leave it out where a string is one name")

    of_text, key = (config.text_columns, "text_columns") if columns is None else (columns, "strong_ and weak_columns")

    def choose(there: Collection[str], place: str) -> list[str]:
        absent = classes_optional and config.class_column not in there
        wanted = [*of_text, *([] if absent else [config.class_column])]
        for name in wanted:
            if name not in there:
                raise DataError(
                    f"{place} has no column {name!r}; there are {', '.join(there)}: set {key}, class_column"
                )
        return wanted

    def row(values: list[Any], place: str) -> Columns:
        return _row(values, place, of_text, config)

    if kind == "parquet":
        yield from _parquet(path, choose, lambda rows: made(row(*found) for found in rows), block_bytes)
        return
    with SourceFile(path, STDIN if kind == "lines" else None) as source:
        if kind == "lines":
            rows: Iterator[Text] = ((line.rstrip("\r\n"), []) for line in source.lines())
        else:
            records = (_csv_records if kind == "csv" else _json_records)(source, choose)
            rows = made(row(values, f"{path} line {line}") for line, values in records)
        yield from chunks_of(rows, block_bytes, lambda: source.fraction)


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
        n_characters += len(text)
        if n_characters >= block_bytes or len(texts) == CHUNK_ROWS:
            yield TextChunk(texts, names, fraction())
            texts, names, n_characters = [], [], 0
    if texts:
        yield TextChunk(texts, names, fraction())


def _csv_records(source: SourceFile, choose: _Choose) -> Iterator[tuple[int, list[Any]]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
    reader = csv.reader(source.lines(), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if not header:
            raise DataError(f"{source.path} is empty or lacks a header: its first line must name the columns")
        places = [header.index(name) for name in choose(header, f"{source.path} line 1")]
        line = reader.line_num + 1
        for record in reader:
            if record and len(record) != len(header):
                raise DataError(
                    f"{source.path} line {line}: {len(record)} fields instead of {len(header)}: quote the text that "
                    "holds a comma"
                )
            if record:  # csv yields [] for a blank line
                yield line, [record[place] for place in places]
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source.path} line {line}: no valid CSV ({error}): correct its quotes") from error


def _json_records(source: SourceFile, choose: _Choose) -> Iterator[tuple[int, list[Any]]]:
    for line, text in enumerate(source.lines(), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "too deeply nested")
            raise DataError(
                f"{source.path} line {line}: {text.strip()!r:.40} is no JSON ({reason}): correct it"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{source.path} line {line}: {text.strip()!r:.40} is no JSON object: write one a line")
        yield line, [record[name] for name in choose(record, f"{source.path} line {line}")]


def _parquet(
    path: Path,
    choose: _Choose,
    made: Callable[[Iterator[tuple[list[Any], str]]], Iterator[Text]],
    block_bytes: int,
) -> Iterator[TextChunk]:
    import pyarrow
    import pyarrow.parquet

    n_done = 0
    with source_errors(path):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                wanted = choose(file.schema_arrow.names, str(path))

                def rows() -> Iterator[tuple[list[Any], str]]:
                    nonlocal n_done
                    for batch in file.iter_batches(batch_size=4096, columns=wanted):
                        columns = [batch.column(name).to_pylist() for name in wanted]
                        for values in zip(*columns, strict=True):
                            n_done += 1
                            yield list(values), f"{path} row {n_done - 1}"

                yield from chunks_of(made(rows()), block_bytes, lambda: n_done / max(1, file.metadata.num_rows))
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path} is no Parquet file or is damaged ({reason}): write it again") from error


def _row(values: list[Any], place: str, columns: list[str], config: DataConfig) -> Columns:
    """Texts and class names; ``values`` are those of the text columns and, where there is one, the class column."""
    n_texts = len(columns)
    texts, classes = values[:n_texts], values[n_texts] if len(values) > n_texts else None
    for name, text in zip(columns, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: column {name!r} holds {text!r:.40}, not text: convert it or leave it out")
    names = classes if isinstance(classes, list) else [] if classes is None else [classes]
    if isinstance(classes, str) and config.class_separator:
        names = classes.split(config.class_separator)
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise DataError(
                f"{place}: {name!r:.40} in column {config.class_column!r} is no class name: use strings or integers"
            )
    return [_shown(text or "") for text in texts], [_shown(name) for name in map(str.strip, map(str, names)) if name]


def _shown(text: str) -> str:
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)
