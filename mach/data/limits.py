"""How much a source may ask for: every limit of reading, with its reason.

A line says which one was met. Together they bound the memory of `mach.data.prepare.prepare`, whatever a file holds: at
most `PEAK_BYTES` beside the names of classes and the terms of a vocabulary, which are kept.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from mach.errors import DataError

PEAK_BYTES = 2**30  # as measured over hostile files (tests/attacks), Python and its libraries among them

BLOCK_BYTES = 2**23  # read at a time
ROW_BYTES = 2**23  # of a line, a field and the text of a row: more than twice War and Peace
ROW_ENTRIES = 2**22  # features or classes of a row: as many as such a line holds
NAME_CHARACTERS = 2**12  # of a class: it is kept in memory, and what is longer is a text
# A packed file may hold so many times its own bytes, or so many bytes. Tables and sparse rows are packed to a fifth or
# a twentieth, endless repetition to a thousandth.
EXPANSION, EXPANDED_BYTES = 250, 2**24
XZ_BYTES = 2**27  # what an .xz file may ask for to be unpacked: `xz -9` takes half of it
# Of Parquet, the largest pages of all columns that are read, and a batch of rows; DuckDB makes pages of 100 MB.
PAGES_BYTES, BATCH_BYTES, BATCH_ROWS = 2**27, 2**26, 4096
SKOS_BYTES = 2**27  # of a vocabulary in RDF, whose parser wants all of it in memory
LIST_VALUES = 2**25  # in the lists of a row group: all may be one row's, and are unpacked together

# D and K follow the largest index and id, and memory follows D and K: they may be so many, or so many times those that
# occur. Hashed features fill 2**20 columns thinly, and samples of large sets lack most of their classes.
LEAST_IDS, MOST_ABSENT = 2**22, 100


def refuse_irregular(path: Path, name: object = None) -> None:
    """OSError where there is no file, DataError where what is there has no end: a pipe, a device, a socket."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a folder fails by itself
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise DataError(f"{name or path} is {kind}, which may never end: copy its rows into a file")


def refuse_expansion(name: object, n_bytes: int, n_packed: int) -> None:
    """DataError where so many bytes are more than a packed file of ``n_packed`` may hold."""
    most = max(EXPANDED_BYTES, EXPANSION * n_packed)
    if n_bytes > most:
        raise DataError(
            f"{name} has {n_packed:,} bytes and unpacks to more than {most:,}, {EXPANSION} times as many and more than "
            f"{EXPANDED_BYTES:,}: unpack it yourself if you trust it"
        )


def refuse_twice(
    place: str, columns: Collection[str], chosen: Collection[str] | None = None, what: str = "column"
) -> None:
    """DataError where one of the columns that are asked for, by default of all, is there more than once."""
    if len(set(columns)) == len(columns):
        return
    counts = Counter(columns)
    for name in columns if chosen is None else chosen:
        if (n := counts[name]) > 1:
            raise DataError(f"{place} has {n} {what}s {name!r:.60}: rename or remove all but one")
