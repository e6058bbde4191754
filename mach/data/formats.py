"""The table of file formats: an entry is all that a format needs (CONTRIBUTING.md says how to add one)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal

from mach.config import DOCUMENTS, DataConfig
from mach.data.matrices import Npy, Npz
from mach.data.parquet import Parquet
from mach.data.readers import NumericText
from mach.data.sources import COMPRESSED, STDIN, Format, SourceFile
from mach.data.store import Reference, Store
from mach.data.tables import LABEL, Csv, FastText, JsonLines, Lines
from mach.errors import ConfigError, DataError, MachError
from mach.files.places import place

_ENTRIES: tuple[Format, ...] = (
    NumericText("repository", (".txt",), has_header=True),
    NumericText("svmlight", (".svm", ".svmlight", ".libsvm")),
    Npz("npz", (".npz",)),
    Npy("npy", (".npy",)),
    Csv("csv", (".csv",)),
    Csv("tsv", (".tsv",), separator="\t"),
    FastText("fasttext", (".fasttext", ".ft")),
    JsonLines("jsonl", (".jsonl",)),
    Parquet("parquet", (".parquet",)),
)
FORMATS: dict[str, Format] = {entry.name: entry for entry in _ENTRIES}
BUILTIN = Format("builtin")  # an embedded set
EMBEDDED: dict[str, Literal["train", "test"]] = {"builtin:characters": "train", "builtin:characters-test": "test"}
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


def source_format(config: DataConfig, source: str, like: Store | Reference | None) -> Format:
    """The format of a source: a file, standard input with ``like``, or an embedded set; errors as of `format_of`."""
    if source == "-":
        if like is None:
            raise ConfigError(f"{STDIN} is read as queries of a trained model only: name a file to train on")
        if like.is_dense:
            raise ConfigError(f"{STDIN} holds text or sparse rows, {like.path} has dense ones: name an .npy file")
        return ROWS if like.text_features is None else LINES
    if config.format == "builtin" or source.startswith("builtin:"):
        if source not in (*EMBEDDED, DOCUMENTS) or config.format not in ("auto", "builtin"):
            raise ConfigError(
                f"no embedded set {source!r} of format {config.format}: there are {', '.join([*EMBEDDED, DOCUMENTS])}"
            )
        return BUILTIN
    if place(source).is_dir():
        raise DataError(f"{source} is a directory but no store (no meta.json in it): name a file")
    form = format_of(config.format, source)
    is_unsure = config.format == "auto" and form.name == "repository"
    return FORMATS["fasttext"] if is_unsure and _has_labels(source) else form


def _has_labels(source: str) -> bool:
    """Whether a file begins as fastText's do, which have the ending of many kinds of text."""
    with suppress(MachError, OSError), SourceFile(Path(source)) as opened:
        return opened.file.read(len(LABEL)) == LABEL.encode()
    return False
