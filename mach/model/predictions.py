"""Predictions as JSONL, CSV, Parquet or npz, chosen by the file's ending."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mach.errors import ConfigError
from mach.files.places import atomic_file, place
from mach.files.visible import json_line

Part = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]  # ids and scores, (n, k) each, known rows
BLOCK_ROWS = 10_000  # of a Parquet file
RowIds = Iterator[Any] | None
Kind = tuple[str, str]  # what one score and many are called
Texts = Callable[[NDArray[np.int64]], list[Any]] | None  # what gives those of classes
Columns = dict[str, Callable[[NDArray[np.int64]], list[Any]]]


def write_predictions(
    destination: str,
    parts: Iterable[Part],
    names: Texts,
    kind: tuple[str, str] = ("score", "scores"),
    row_ids: RowIds = None,
    uris: Texts = None,
) -> None:
    """Write ids, scores and (where there are) names and addresses of rows; ``-`` is standard output as JSONL.

    ``kind`` says what one score and many are called. ``row_ids`` stand in place of the numbers of rows. ``known`` says
    of every row whether the model knows any of its features (`mach.model.ask.Answer`). ConfigError when the ending is
    none of .jsonl, .csv, .parquet and .npz; StorageError when the file cannot be written, and then nothing is left of
    it.
    """
    writer = writer_of(destination)
    columns = {name: texts_of for name, texts_of in (("names", names), ("uris", uris)) if texts_of is not None}
    if destination == "-":
        writer(sys.stdout.buffer, parts, columns, kind, row_ids)
        return
    with atomic_file(place(destination)) as file:
        writer(file, parts, columns, kind, row_ids)


def writer_of(destination: str) -> Callable[..., None]:
    """What writes a file of that ending; ConfigError where nothing does, before rows are read for it."""
    writers = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet, ".npz": _write_npz}
    writer = _write_jsonl if destination == "-" else writers.get(Path(destination).suffix.lower())
    if writer is None:
        raise ConfigError(f"--output {destination}: the ending must be one of {', '.join(writers)}, or - for JSONL")
    return writer


def _write_jsonl(file: BinaryIO, parts: Iterable[Part], columns: Columns, kind: Kind, row_ids: RowIds) -> None:
    for row in _rows(parts, columns, kind[1], row_ids):
        file.write((json_line(row) + "\n").encode())


def _write_csv(file: BinaryIO, parts: Iterable[Part], columns: Columns, kind: Kind, row_ids: RowIds) -> None:
    """One line a (row, rank)."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(["row", "rank", "id", kind[0], *[name[:-1] for name in columns], "known"])
    for row in _rows(parts, columns, kind[1], row_ids):
        cells_of = [row[name] for name in ("ids", kind[1], *columns)]
        known = "true" if row["known"] else "false"
        writer.writerows([row["row"], rank, *cells, known] for rank, cells in enumerate(zip(*cells_of, strict=True), 1))
    text.detach()  # the file below is closed by its owner


def _write_parquet(file: BinaryIO, parts: Iterable[Part], columns: Columns, kind: Kind, row_ids: RowIds) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [
        ("row", pa.int64() if row_ids is None else pa.string()),
        ("ids", pa.list_(pa.int64())),
        (kind[1], pa.list_(pa.float32())),
    ]
    schema = pa.schema([*fields, *[(name, pa.list_(pa.string())) for name in columns], ("known", pa.bool_())])
    with pq.ParquetWriter(file, schema) as writer:
        rows = _rows(parts, columns, kind[1], row_ids)
        while block := list(islice(rows, BLOCK_ROWS)):
            if row_ids is not None:
                block = [row | {"row": None if row["row"] is None else str(row["row"])} for row in block]
            writer.write_table(pa.Table.from_pylist(block, schema))


def _write_npz(file: BinaryIO, parts: Iterable[Part], columns: Columns, kind: Kind, row_ids: RowIds) -> None:
    ids, scores, known = map(np.concatenate, zip(*parts, strict=True))
    arrays: dict[str, Any] = {"ids": ids, kind[1]: scores, "known": known}
    if row_ids is not None:
        arrays["row"] = np.array([str(value) for value in islice(row_ids, len(ids))])
    np.savez_compressed(file, **arrays)


def _rows(parts: Iterable[Part], columns: Columns, kinds: str, row_ids: RowIds) -> Iterator[dict[str, Any]]:
    """One dictionary a row, padding left out."""
    rows = (row for part in parts for row in zip(*part, strict=True))
    numbers = count() if row_ids is None else row_ids
    for ids, scores, known in rows:
        is_there = ids >= 0
        row = {
            "row": next(numbers, None),
            "ids": ids[is_there].tolist(),
            kinds: [round(float(s), 6) for s in scores[is_there]],
        }
        told = {name: texts_of(ids[is_there]) for name, texts_of in columns.items()}
        yield row | told | {"known": bool(known)}
