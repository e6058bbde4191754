"""The table of file formats: an entry is all that a format needs (CONTRIBUTING.md says how to add one)."""

from __future__ import annotations

from pathlib import Path

from mach.data.matrices import Npy, Npz
from mach.data.parquet import Parquet
from mach.data.readers import NumericText
from mach.data.sources import COMPRESSED, Format
from mach.data.tables import Csv, JsonLines, Lines
from mach.errors import ConfigError

_ENTRIES: tuple[Format, ...] = (
    NumericText("repository", (".txt",), has_header=True),
    NumericText("svmlight", (".svm", ".svmlight", ".libsvm")),
    Npz("npz", (".npz",)),
    Npy("npy", (".npy",)),
    Csv("csv", (".csv",)),
    Csv("tsv", (".tsv",), separator="\t"),
    JsonLines("jsonl", (".jsonl",)),
    Parquet("parquet", (".parquet",)),
)
FORMATS: dict[str, Format] = {entry.name: entry for entry in _ENTRIES}
BUILTIN = Format("builtin")  # an embedded set
# standard input, whose lines are texts or numbers as the model has them
LINES, ROWS = Lines("lines"), NumericText("rows", is_stdin=True)


def format_of(name: str, source: str) -> Format:
    """The format of a file, by its name in the configuration, or with ``auto`` by the file's ending.

    Raises ConfigError when the ending is unknown.

    >>> format_of("auto", "train.jsonl.gz").name
    'jsonl'
    """
    if name != "auto":
        return FORMATS[name]
    path = Path(source.lower())
    is_compressed = path.suffix in COMPRESSED
    ending = path.with_suffix("").suffix if is_compressed else path.suffix
    for entry in FORMATS.values():
        if ending in entry.endings and not (is_compressed and entry.is_packed):
            return entry
    endings = ", ".join(ending for entry in FORMATS.values() for ending in entry.endings)
    raise ConfigError(
        f"the ending of {source} tells no format: it may be {endings}, text also with {', '.join(COMPRESSED)}; or set "
        "format"
    )
