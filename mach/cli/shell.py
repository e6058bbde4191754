"""What verbs read from standard input, and how they print tables, JSON, progress and warnings."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mach.cli.report.numbers import shown
from mach.data.limits import ROW_BYTES
from mach.errors import DataError, DegradedWarning, OmissionWarning
from mach.files.visible import json_line, visible

if TYPE_CHECKING:
    from mach.model.explanation import Explanation


def say(text: Any, *, err: bool = False) -> None:
    """Print one line; what others wrote in it cannot act on the terminal."""
    click.echo(visible(str(text)), err=err)


def end_politely(said: str = "") -> None:
    """Let SIGTERM, and SIGHUP of a terminal that is closed, end this process as Ctrl-C does, and say a line at once."""

    def interrupt(number: int, frame: Any) -> None:
        if said:
            with suppress(OSError):
                os.write(2, f"mach: {said}\n".encode())  # no stream: this may come amid its work
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, interrupt)


def say_json(value: Any) -> None:
    """Print one line of JSON, in characters that standard output has."""
    click.echo(json_line(value, ascii_only=(sys.stdout.encoding or "").lower().replace("-", "") != "utf8"))


def read_lines(queries: tuple[str, ...]) -> Iterator[str]:
    """The queries themselves; for ``-``, or without any, the lines of standard input that are not blank."""
    for [query] in read_batches(queries, 1):
        yield query


def read_batches(queries: tuple[str, ...], most: int) -> Iterator[list[str]]:
    """As `read_lines`, where lines that have come by now are together, at most so many; nobody waits for more.

    A UsageError where there is no query at all: none is given, and standard input is a terminal or holds none.
    """
    if queries:
        for text in queries:
            yield from _typed(most) if text == "-" else [[text]]
        return
    context = click.get_current_context(silent=True)
    if sys.stdin.isatty():
        raise click.UsageError("give a query, or - to type some", context)
    batch = None
    for batch in _typed(most):
        yield batch
    if batch is None:
        raise click.UsageError("standard input is empty: give a query", context)


def _typed(most: int) -> Iterator[list[str]]:
    """The batches of standard input."""
    number, batch = 0, list[str]()
    for lines in _arrived():
        for line in lines:
            number += 1
            try:
                query = _query(number, line)
            except DataError:
                if batch:
                    yield batch
                raise
            if query.strip():
                batch.append(query)
            if len(batch) == most:
                yield batch
                batch = []
        if batch:
            yield batch
            batch = []


def _arrived() -> Iterator[list[bytes]]:
    """Lines of standard input, those together that one read brings: of a terminal, each by itself."""
    parts = list[bytes]()  # of a line whose end has not come
    stdin: Any = sys.stdin.buffer  # which waits for something, and no longer
    while read := stdin.read1(2**16):
        *lines, last = read.split(b"\n")
        if lines:
            yield [b"".join([*parts, lines[0]]), *lines[1:]]
            parts.clear()
        parts.append(last)
        if sum(map(len, parts)) > ROW_BYTES:
            break
    yield [b"".join(parts)]


def _query(number: int, line: bytes) -> str:
    if len(line) > ROW_BYTES:
        raise DataError(f"standard input line {number} has more than {ROW_BYTES:,} bytes: shorten the query")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input line {number} is not UTF-8: {error.reason}") from error


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """Names and values below each other."""
    if as_json:
        say_json(values)
        return
    width = max(map(len, values))
    for name, value in values.items():
        say(f"{name:<{width}}  {shown(value)}")


def print_rows(rows: Iterable[tuple[str, Any, str]], as_json: bool, before: str = "") -> None:
    """Lines of name, value and unit, each behind something."""
    if as_json:
        say_json({name: value for name, value, _ in rows})
        return
    for name, value, unit in rows:
        say(f"{before}{name:<44} {shown(value):>18} {unit}".rstrip())


def print_table(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A column a key, named by those of the first row."""
    if as_json:
        say_json(rows)
        return
    names = list(rows[0])
    cells = [names] + [[visible(shown(row[name])) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        say("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


@dataclass
class Printer:
    """Prints queries and their classes, above the first of which it says what stands in the columns.

    ``kind`` is what one value and many are called.
    """

    kind: tuple[str, str]
    threshold: float | None
    as_json: bool
    has_head: bool = False

    def answer(
        self,
        line: str,
        ids: list[int],
        values: list[float],
        told: dict[str, list[Any] | None],
        why: list[Explanation] | None = None,
        *,
        is_known: bool,
    ) -> None:
        """``told`` are names and uris of the classes, where there are some, and ``why`` is if asked for."""
        if not is_known:
            say(f"mach: query {line!r:.60} has no feature that the run knows: the answer says nothing of it", err=True)
        if self.as_json:
            answer = {"query": line, "ids": ids, self.kind[1]: [round(value, 6) for value in values], "known": is_known}
            explained = {} if why is None else {"explanations": [one.to_dict() for one in why]}
            say_json(answer | {name: column for name, column in told.items() if column} | explained)
            return
        if not self.has_head:
            say(f"  {self.kind[0]:>11}  {'id':>9}  {'' if told['names'] is None else 'class'}".rstrip())
            self.has_head = True
        say(line)
        for n, (id_, value, name) in enumerate(zip(ids, values, told["names"] or [""] * len(ids), strict=True)):
            say(f"  {value:11.4f}  {id_:>9}  {name}".rstrip())
            for reason in why[n].lines() if why else ():
                say(f"{' ' * 26}{reason}")
        if not ids:
            say(
                f"  no class has a {self.kind[0]} of {self.threshold:g}" if self.threshold is not None else "  no class"
            )


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """What the model warns of, as lines like all other talk."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, DegradedWarning | OmissionWarning):
            say(f"mach: {message}", err=True)
        else:
            show_others(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", OmissionWarning)
        show_others, warnings.showwarning = warnings.showwarning, show  # type: ignore[assignment]
        yield


def progress() -> AbstractContextManager[Callable[[str, float], None]]:
    """Progress of reading and predicting: bars on a terminal, silence elsewhere."""
    from rich.console import Console

    from mach.training.launch.display import bars

    return bars(Console(stderr=True))
