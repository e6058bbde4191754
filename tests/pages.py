"""Pages of the documentation as programs: their blocks of Python and of the shell, run from top to bottom."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

LANGUAGES = ("python", "sh")
FENCE = re.compile(r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<language>\S*)\n(?P<code>.*?)^```$", re.M | re.S)
SKIP = "not run: "  # how the note above a block begins that does not run; its reason follows
FILE, ROWS, TIMES = "file ", "rows of ", 10  # a table that is shown: as it is, or each row so often


class Block(NamedTuple):
    language: str
    code: str
    line: int
    note: str


def blocks_of(text: str) -> Iterator[Block]:
    """All blocks, each with the line on which its code begins and the note above it."""
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(found["language"], found["code"], line, found["note"] or "")


def run_page(page: Path, folder: Path, mach: Callable[[str], int] | None = None) -> None:
    """Run all blocks: Python in one namespace, the shell's by ``bash -e``.

    ``mach`` is told each plain command of that name, in place of bash, and returns its exit code.
    """
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.note.startswith((FILE, ROWS)):
            header, *rows = block.code.splitlines(keepends=True)
            times = TIMES if block.note.startswith(ROWS) else 1
            Path(folder, block.note.removeprefix(ROWS).removeprefix(FILE)).write_text("".join([header, *rows * times]))
        elif block.language not in LANGUAGES or block.note.startswith(SKIP):
            continue
        elif block.language == "python":
            padded = "\n" * (block.line - 1) + block.code  # errors name the page's own lines
            exec(compile(padded, str(page), "exec"), namespace)
        else:
            for code, is_plain in _parts(block.code) if mach else [(block.code, False)]:
                done = mach(code) if mach and is_plain else _bash(code, folder)
                assert done == 0, f"{page.name} line {block.line}: exit code {done} of {code}"


def arguments(line: str) -> list[str]:
    """What follows ``mach`` on a line of the shell."""
    return shlex.split(line, comments=True)[1:]


def _bash(code: str, folder: Path) -> int:
    return subprocess.run(["bash", "-e", "-o", "pipefail", "-c", code], check=False, cwd=folder).returncode


def _parts(code: str) -> Iterator[tuple[str, bool]]:
    """Plain commands ``mach ...``, one each, and what stands between them."""
    until, told = "", []
    for line in code.splitlines(keepends=True):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
        told.append((line, not until and line.startswith("mach ") and not re.search(r"[|&;<>$`*\\]", bare)))
        if line.strip() == until:
            until = ""
        elif found := re.search(r"<<'?(\w+)", line):
            until = found[1]
    for is_plain, lines in groupby(told, key=lambda each: each[1]):
        texts = [line for line, _ in lines]
        yield from ((text, True) for text in texts) if is_plain else [("".join(texts), False)]
