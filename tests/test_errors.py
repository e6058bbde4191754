"""Every error that mach raises on purpose is one line, whatever a file or a user put into its message."""

from __future__ import annotations

import pytest

from mach.errors import LONGEST, MachError

GIVEN = ["a\nb", "a\r\nb", "a\x1b[2Jb", "a\u2028b", "a\x85b", "a\x00b", "a\ud800b", "a\x7fb"]


@pytest.mark.parametrize("given", GIVEN, ids=ascii)
def test_what_is_given_ends_no_line_and_moves_no_terminal(given: str):
    message = str(MachError(f"file {given}: copy it anew"))
    assert message == f"file {ascii(given)[1:-1]}: copy it anew"
    assert message.isprintable()


def test_letters_of_any_script_stay():
    assert str(MachError("Füße.csv, row 3: हिन्दी")) == "Füße.csv, row 3: हिन्दी"


def test_a_long_message_keeps_its_ends():
    message = str(MachError("begin " + "x" * 10 * LONGEST + " end"))
    assert len(message) <= LONGEST
    assert message.startswith("begin x")
    assert message.endswith("x end")
