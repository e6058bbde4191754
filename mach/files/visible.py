"""Texts of strangers as a terminal and a page may show them: nothing in them moves a cursor or turns the reading."""

from __future__ import annotations

import json
import re
from typing import Any

# Control characters (of C0, C1 and DEL), line and paragraph separators, marks that turn the direction of reading
# (Unicode Standard Annex 9), and surrogates, which no encoding can write.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""A text of which every character is seen: those that act instead stand as ``\uXXXX``.

    Examples
    --------
    >>> print(visible("\x1b[31mred\u202e"))
    \u001b[31mred\u202e
    """
    return _UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def json_line(value: Any, *, ascii_only: bool = False) -> str:
    r"""A value as one line of JSON, which a terminal may show as well.

    Examples
    --------
    >>> print(json_line({"name": "é\u202e"}), json_line("é", ascii_only=True))
    {"name": "é\u202e"} "\u00e9"
    """
    return visible(json.dumps(value, ensure_ascii=ascii_only))
