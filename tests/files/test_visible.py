"""Texts of strangers on a terminal: every character of theirs is seen, none acts."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from mach.files.visible import json_line, visible

ACTING = {"Cc", "Cs", "Zl", "Zp"}
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@given(st.text(st.characters()))
def test_nothing_acts_and_nothing_else_changes(text: str):
    shown = visible(text)
    for character in shown:
        assert unicodedata.category(character) not in ACTING
        assert unicodedata.bidirectional(character) not in BIDI
    shown.encode()
    assert visible(shown) == shown
    harmless = [c for c in text if unicodedata.category(c)[0] in "LMNPS" or c == " "]
    assert [c for c in harmless if c not in shown] == []


@given(st.recursive(st.text(st.characters()) | st.integers() | st.none(), st.lists))
def test_a_line_of_json_is_one_and_means_the_same(value):
    for ascii_only in (False, True):
        line = json_line(value, ascii_only=ascii_only)
        assert json.loads(line) == value
        assert len(line.splitlines()) == 1
        assert line.isascii() or not ascii_only


def test_letters_of_any_script_stay():
    for text in ("हिन्दी", "עִבְרִית", "👩‍🚀", "e\u0301", "می‌خواهم", "[bold]x[/bold]"):
        assert visible(text) == text
