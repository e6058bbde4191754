"""The file that ``mach classes add --from`` takes: a JSON object a line, each a class."""

from __future__ import annotations

from pydantic import Field, ValidationError

from mach.config import Section
from mach.errors import DataError
from mach.files.places import place, read_bytes


class Entry(Section):
    """One line."""

    name: str
    examples: list[str] = Field(default=[])
    texts: list[str] = Field(default=[])


def read_entries(source: str) -> list[Entry]:
    """The lines of a file, here or behind a URL.

    Raises
    ------
    DataError
        When it cannot be read, or a line is none.
    """
    try:
        lines = read_bytes(place(source)).decode().splitlines()
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(Entry.model_validate_json(line))
            except ValidationError as error:
                need = '{"name": "...", "examples": ["..."], "texts": ["..."]}'
                raise DataError(f"{source} line {number}: need {need}, got {line:.60}") from error
    if not entries:
        raise DataError(f"{source} has no line: write one JSON object a class")
    return entries
