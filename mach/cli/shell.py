"""What people type into a shell and read there: lists of numbers, sizes, queries; tables, JSON, progress, warnings."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click

from mach.errors import ConfigError, DataError, DegradedWarning
from mach.evaluation.report.numbers import shown
from mach.files.places import Place, place


class _PlaceType(click.ParamType[Any]):
    """A path or URL; click's own type takes ``s3://bucket`` for a path of three parts."""

    name = "path or url"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Place:
        return place(value)


PLACE = _PlaceType()
trunk_option = click.option(
    "--trunk",
    metavar="PACKAGE.MODULE:CLASS",
    help="The torch module that network.trunk names; it is code of its maker, so say that you trust it.",
)


def read_lines(queries: tuple[str, ...]) -> Iterator[str]:
    """The queries themselves; for ``-``, or without any, the lines of standard input that are not blank."""
    for text in queries or ("-",):
        if text != "-":
            yield text
            continue
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                query = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"standard input line {number} is not UTF-8: {error.reason}") from error
            if query.strip():
                yield query


def parse_numbers(text: str) -> list[int]:
    """Numbers of ``0-3,5``, ascending."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        begin = parse_integer(first, "--repetitions")
        chosen |= set(range(begin, (parse_integer(last, "--repetitions") if dash else begin) + 1))
    if not chosen:
        raise ConfigError(f"--repetitions {text}: no number in it: write them ascending, such as 0-3,5")
    return sorted(chosen)


def parse_integer(text: str, where: str) -> int:
    """A number of digits alone."""
    if not text.strip().isdecimal():
        raise ConfigError(f"{where}: {text!r} is no number: write numbers separated by commas")
    return int(text)


def parse_bytes(text: str, option: str) -> int:
    """Bytes of ``200MB``."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.rstrip("BKMGTbkmgt ")
    try:
        return int(float(number) * units[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{option} {text}: write a number and B, KB, MB, GB or TB, such as 200MB") from None


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """Names and values below each other."""
    if as_json:
        click.echo(json.dumps(values, ensure_ascii=False))
        return
    width = max(map(len, values))
    for name, value in values.items():
        click.echo(f"{name:<{width}}  {shown(value)}")


def print_rows(rows: Iterable[tuple[str, Any, str]], as_json: bool) -> None:
    """Lines of name, value and unit."""
    if as_json:
        click.echo(json.dumps({name: value for name, value, _ in rows}))
        return
    for name, value, unit in rows:
        click.echo(f"{name:<44} {shown(value):>18} {unit}".rstrip())


def print_table(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A column a key, named by those of the first row."""
    if as_json:
        click.echo(json.dumps(rows))
        return
    names = list(rows[0])
    cells = [names] + [[shown(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        click.echo("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """What the model warns of, as lines like all other talk."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, DegradedWarning):
            click.echo(f"mach: {message}", err=True)
        else:
            show_others(message, category, *where, **more)

    with warnings.catch_warnings():
        show_others, warnings.showwarning = warnings.showwarning, show  # type: ignore[assignment]
        yield


def progress() -> AbstractContextManager[Callable[[str, float], None]]:
    """Progress of reading and predicting: bars on a terminal, silence elsewhere."""
    from rich.console import Console

    from mach.training.launch.display import bars

    return bars(Console(stderr=True))
