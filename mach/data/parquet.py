"""Parquet files: columns of text and class names, within the limits of `mach.data.limits`.

What Arrow unpacks at a time is bounded before it is asked to: the headers of pages say how large these are, where a
file's own metadata may say anything. Text stays numbers of a dictionary until rows are made of it, since a few bytes
can repeat a long text a million times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mach.data.limits import BATCH_BYTES, BATCH_ROWS, LIST_VALUES, PAGES_BYTES, ROW_BYTES, refuse_expansion
from mach.data.sources import SourceFile, library_errors
from mach.data.tables import Choose, Table
from mach.errors import DataError

READ_BYTES = 2**20
OFFSET_BYTES = 16  # what a store keeps of a row at least
TYPES = "null", "boolean", "integer", "floating", "string", "large_string", "string_view", "binary", "large_binary"
LISTS = "list", "large_list"


class Parquet(Table):
    """Columns of a Parquet file; rows in messages count from 0."""

    is_packed = True

    def records(self, source: SourceFile, choose: Choose) -> Iterator[tuple[str, list[Any]]]:
        import pyarrow.parquet

        path, begin, n_bytes, n_packed = source.path, 0, 0, source.path.stat().st_size
        with library_errors(path, f"{path} is no Parquet file or is damaged", "write it again"):
            with pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
                columns = choose(file.schema_arrow.names, str(path))
                leaves = _leaves(file, path, columns)
                refuse_expansion(path, OFFSET_BYTES * file.metadata.num_rows, n_packed)
            texts = [leaf.path for leaf in leaves if leaf.is_text]
            options = {"read_dictionary": texts, "buffer_size": READ_BYTES, "pre_buffer": False}
            with pyarrow.parquet.ParquetFile(path, **options) as file:
                for batch in _batches(file, _batch_rows(leaves), columns):
                    arrays = [batch.column(name) for name in columns]
                    sizes = sum((_sizes(array) for array in arrays), np.zeros(len(batch), np.int64))
                    if len(batch) and sizes.max() > ROW_BYTES:
                        row = begin + int(np.argmax(sizes > ROW_BYTES))
                        raise DataError(f"{path} row {row} has more than {ROW_BYTES:,} bytes: shorten its text")
                    n_bytes += int(sizes.sum()) + OFFSET_BYTES * len(batch)
                    refuse_expansion(path, n_bytes, n_packed)
                    for first, end in _pieces(sizes):
                        values = [_values(array.slice(first, end - first)) for array in arrays]
                        source.share = (begin + end) / max(1, file.metadata.num_rows)
                        for n, row_values in enumerate(zip(*values, strict=True), begin + first):
                            yield f"{path} row {n}", list(row_values)
                    begin += len(batch)


@dataclass
class _Leaf:
    """A column as it is stored: for each row group its pages' numbers of values and bytes, and the dictionary's."""

    path: str
    is_text: bool
    is_list: bool
    pages: list[tuple[NDArray[np.int64], NDArray[np.int64], int]]

    @property
    def largest(self) -> int:
        """Bytes of the largest page and the largest dictionary."""
        return max((int(n_bytes.max(initial=0)) for _, n_bytes, _ in self.pages), default=0) + self.dictionary

    @property
    def dictionary(self) -> int:
        return max((n for *_, n in self.pages), default=0)

    def bytes_of(self, n_rows: int) -> int:
        """The most bytes that so many rows in a row may have; every page may hold one row of lists only."""
        most = 0
        for n_values, n_bytes, _ in self.pages:
            ends, n_before = np.cumsum(n_values), np.concatenate([[0], np.cumsum(n_bytes)])
            pages = np.arange(len(ends))
            last = pages + n_rows if self.is_list else np.searchsorted(ends, ends + n_rows)
            most = max(most, int((n_before[np.minimum(last + 1, len(ends))] - n_before[pages]).max(initial=0)))
        return most


def _leaves(file: Any, path: Path, columns: Sequence[str]) -> list[_Leaf]:
    """How columns are stored; DataError where one is neither text nor class names, or has pages beyond the limits."""
    import pyarrow.types as kinds

    schema, leaves = file.schema_arrow, []
    for name in columns:
        kind = schema.field(name).type
        is_list = any(getattr(kinds, f"is_{listed}")(kind) for listed in LISTS)
        value = kind.value_type if is_list or kinds.is_dictionary(kind) else kind
        value = value.value_type if kinds.is_dictionary(value) else value
        if not any(getattr(kinds, f"is_{known}", lambda kind: False)(value) for known in TYPES):
            raise DataError(f"{path}: column {name!r:.60} has type {kind!s:.60}, not text or class names: convert it")
        paths = [file.schema.column(n).path for n in range(file.metadata.num_columns)]
        stored = [n for n, at in enumerate(paths) if at == name or at.startswith(f"{name}.")]
        if not stored:
            raise ValueError(f"column {name!r:.60} is not stored")
        for n in stored:
            column = file.schema.column(n)
            leaves.append(_Leaf(column.path, column.physical_type == "BYTE_ARRAY", is_list, []))
            for group in range(file.metadata.num_row_groups):
                # no rows: Arrow looks at the metadata, whose damages end the process where Python asks for it first
                next(file.reader.iter_batches(0, row_groups=[group], column_indices=[n]), None)
                chunk = file.metadata.row_group(group).column(n)
                if is_list and chunk.num_values > LIST_VALUES:
                    raise DataError(
                        f"{path}: column {name!r:.60} has {chunk.num_values:,} values in row group {group}, at most "
                        f"{LIST_VALUES:,} are read at a time: write it with smaller row groups"
                    )
                with path.open("rb") as raw:
                    leaves[-1].pages.append(_pages(raw, chunk))
    if (n_bytes := sum(leaf.largest for leaf in leaves)) > PAGES_BYTES:
        raise DataError(
            f"{path} has pages of {n_bytes:,} bytes, of which {PAGES_BYTES:,} are read at a time: write it with "
            "smaller pages"
        )
    return leaves


def _batches(file: Any, n_rows: int, columns: Sequence[str]) -> Iterator[Any]:
    """Consecutive rows, of one row group each: Arrow cannot join the dictionaries of several inside lists."""
    for group in range(file.metadata.num_row_groups):
        yield from file.iter_batches(n_rows, row_groups=[group], columns=columns, use_threads=False)


def _batch_rows(leaves: Sequence[_Leaf]) -> int:
    """As many rows as surely take no more than `BATCH_BYTES`, or one."""
    n_rows = BATCH_ROWS
    while n_rows > 1 and sum(leaf.bytes_of(n_rows) for leaf in leaves) > BATCH_BYTES:
        n_rows //= 2
    return n_rows


def _sizes(array: Any) -> NDArray[np.int64]:
    """Bytes of every row's text or names, and one for each."""
    import pyarrow.types as kinds
    from pyarrow import compute

    if kinds.is_dictionary(array.type):
        sizes = np.append(_sizes(array.dictionary), 1)
        places = compute.fill_null(array.indices, len(sizes) - 1).to_numpy(zero_copy_only=False)
        return sizes[places]
    if kinds.is_list(array.type) or kinds.is_large_list(array.type):
        lengths = compute.fill_null(compute.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        ends, sums = np.cumsum(lengths), np.concatenate([[0], np.cumsum(_sizes(array.flatten()))])
        return sums[ends] - sums[ends - lengths] + 1
    if (
        kinds.is_integer(array.type)
        or kinds.is_floating(array.type)
        or kinds.is_null(array.type)
        or kinds.is_boolean(array.type)
    ):
        return np.full(len(array), 8, np.int64)
    lengths = compute.fill_null(compute.binary_length(array), 0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64) + 1


def _values(array: Any) -> list[Any]:
    """What rows hold; dictionaries' own conversion is slow."""
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        return list(array.dictionary_decode().to_pylist())
    if types.is_list(array.type) or types.is_large_list(array.type):
        values = iter(_values(array.flatten()))
        lengths = compute.list_value_length(array).to_pylist()
        return [None if n is None else list(islice(values, n)) for n in lengths]
    return list(array.to_pylist())


def _pieces(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Consecutive rows of about a row's most bytes."""
    sums, begin = np.cumsum(sizes), 0
    while begin < len(sizes):
        most = (sums[begin - 1] if begin else 0) + ROW_BYTES
        end = max(begin + 1, int(np.searchsorted(sums, most, side="right")))
        yield begin, end
        begin = end


# --- pages


def _pages(file: IO[bytes], chunk: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Values and bytes of the data pages of a column chunk, and bytes of its dictionary, as the pages' headers say."""
    begin, n_left, dictionary = chunk.data_page_offset, chunk.num_values, 0
    if chunk.dictionary_page_offset is not None:
        begin = min(begin, chunk.dictionary_page_offset)
    file.seek(begin)
    values, sizes = [], []
    while n_left > 0:
        header = _thrift(file)
        n_bytes, n_stored = header[2], header[3]
        if n_bytes < 0 or n_stored < 0:
            raise ValueError("a page of negative size")
        if header[1] == 2:
            dictionary = max(dictionary, n_bytes)
        elif header[1] in (0, 3):  # data pages of versions 1 and 2
            values.append(header[5 if header[1] == 0 else 8][1])
            sizes.append(n_bytes)
            n_left -= values[-1]
            if values[-1] < 0 or n_left < 0:
                raise ValueError("pages hold other numbers of values than their column")
        file.seek(n_stored, 1)
    return np.array(values, np.int64), np.array(sizes, np.int64), dictionary


def _thrift(file: IO[bytes]) -> dict[int, Any]:
    """A structure in Thrift's compact protocol, as headers of pages are: integers, flags and structures by field."""
    fields: dict[int, Any] = {}
    field = 0
    while head := _byte(file):
        kind = head & 15
        field = field + (head >> 4) if head >> 4 else _integer(file)
        if kind in (1, 2):
            fields[field] = kind == 1
        elif kind == 3:
            fields[field] = _byte(file)
        elif kind in (4, 5, 6):
            fields[field] = _integer(file)
        elif kind == 8:  # the least and the largest value of a page
            file.seek(_varint(file), 1)
        elif kind == 12:
            fields[field] = _thrift(file)
        else:
            raise ValueError("a page without a header")
    return fields


def _integer(file: IO[bytes]) -> int:
    number = _varint(file)
    return (number >> 1) ^ -(number & 1)


def _varint(file: IO[bytes]) -> int:
    number = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("a page with a number that has no end")


def _byte(file: IO[bytes]) -> int:
    read = file.read(1)
    if not read:
        raise EOFError("a page lies beyond its end")
    return read[0]
