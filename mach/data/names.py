"""Names of classes: one spelling each, wherever they come from, and files that list them.

Where names tell which class a row has (tables, edits, queries), those that differ only in blanks around them or in
Unicode's form are one class: rows join them, a list that has both is refused. Where numbers do, names are what the
classes are called: equal ones may stand in a list, and a name means the first of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from mach.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")  # no output could show them
_NUMBER = re.compile(r"\s*[0-9]{1,10}\s*")


def class_name(text: str) -> str:
    r"""The one spelling of a class name: without blanks around it, in Unicode's NFC, lone surrogates as U+FFFD.

    >>> class_name(" Cafe\u0301 ") == "Café"
    True
    """
    text = text.strip()
    return text if text.isascii() else unicodedata.normalize("NFC", shown(text))


def shown(text: str) -> str:
    """Text with lone surrogates as U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def ids_by_name(names: Sequence[str]) -> dict[str, int]:
    """Ids 0, 1, ... of names as they are written and as `class_name` writes them; of equal ones the first.

    >>> ids_by_name(["a", " b", "b", "a"])
    {'a': 0, ' b': 1, 'b': 2}
    """
    ids: dict[str, int] = {}
    for k, name in enumerate(names):
        ids.setdefault(name, k)
    for name, k in list(ids.items()):
        ids.setdefault(class_name(name), k)
    return ids


def numbered(names: Sequence[str], file: object) -> dict[str, int]:
    """Ids of class names that a file lists, from 0; DataError where one stands there twice."""
    ids: dict[str, int] = {}
    for k, name in enumerate(names):
        if ids.setdefault(name, k) != k:
            raise DataError(f"{file} line {k + 1}: class {name!r:.60} stands on line {ids[name] + 1} too")
    return ids


def listed(lines: Sequence[str], file: object) -> list[str]:
    r"""Names in a file of one a line, line 1 names class 0; or of ``id<TAB>name``, if most lines have a tab.

    Raises DataError where lines are of the second kind, and one of them is not, or their ids are not 0 to K - 1.

    >>> listed(["1\tpear", "0\tapple"], "names.txt"), listed(["apple ", "pear"], "names.txt")
    (['apple', 'pear'], ['apple', 'pear'])
    """
    if 2 * sum("\t" in line.strip() for line in lines) <= len(lines):
        return [class_name(line) for line in lines]
    rows = {n: line for n, line in enumerate(lines, 1) if line.strip()}
    names: dict[int, str] = {}
    for n, line in rows.items():
        number, tab, name = line.partition("\t")
        if not tab or not _NUMBER.fullmatch(number):
            raise DataError(
                f"{file} line {n}: {line!r:.60} is no id<TAB>name, and most lines have a tab: write one name a line, "
                "or numbers from 0, a tab and names"
            )
        k = int(number)
        if k >= len(rows) or k in names:
            problem = "stands on another line too" if k in names else f"is outside 0..{len(rows) - 1}"
            raise DataError(
                f"{file} line {n}: id {k} of {name.strip()!r:.60} {problem}: number the {len(rows)} classes from 0, "
                "each once, or write names alone"
            )
        names[k] = class_name(name)
    return [names[k] for k in range(len(rows))]


def without_codes(name: str) -> str:
    """A name without what holds digits: a list may as well hold codes, which no text mentions.

    >>> without_codes("Wars 1914-1918"), without_codes("gnd:4113456-4")
    ('Wars', '')
    """
    return " ".join(word for word in name.split() if not any(map(str.isdigit, word)))
