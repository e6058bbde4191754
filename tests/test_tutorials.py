"""Every page of docs/ that says so runs as a test: its blocks from top to bottom, in an empty folder."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

DOCS = Path(__file__).parent.parent / "docs"
MARK = "<!-- runs as a test -->"
SKIP = "<!-- not run -->"  # on the line above a block
LANGUAGES = ("python", "sh")
FENCE = re.compile(rf"^(?P<skip>{re.escape(SKIP)}\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks_of(text: str) -> Iterator[Block]:
    """The blocks to run, each with the line on which its code begins."""
    for found in FENCE.finditer(text):
        if found["language"] in LANGUAGES and not found["skip"]:
            yield Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1)


def marked_pages(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.md") if MARK in path.read_text(encoding="utf-8").splitlines())


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks: Python in one namespace, sh by ``bash -e`` with the ``mach`` of this environment."""
    namespace: dict[str, Any] = {"__name__": "__tutorial__"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "python":
            padded = "\n" * (block.line - 1) + block.code  # errors name the page's own lines
            exec(compile(padded, str(page), "exec"), namespace)
            continue
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", block.code], check=False, cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page.name} line {block.line}: exit code {done.returncode}\n{done.stderr}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a ``mach`` on the path and a cache of its own."""
    programs, folder = tmp_path / "programs", tmp_path / "here"
    programs.mkdir()
    folder.mkdir()
    script = programs / "mach"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m mach.cli "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("page", marked_pages(DOCS), ids=lambda page: page.stem)
def test_page(page: Path, here: Path):
    run_page(page, here)


def test_tutorials_are_marked():
    assert {page.stem for page in DOCS.glob("tutorials/*.md")} <= {page.stem for page in marked_pages(DOCS)}


def test_a_page_that_is_wrong_fails(here: Path, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"# x\n{MARK}\n```python\nn = 1\n```\n\n{SKIP}\n```python\nn = 2\n```\n```toml\nn = 3\n```\n"
                    "```python\nassert n == 1\n```\n```sh\nmach --version\nfalse\ntrue\n```\n")  # fmt: skip
    assert marked_pages(tmp_path) == [page]
    with pytest.raises(AssertionError, match="line 18: exit code 1"):
        run_page(page, here)
    page.write_text("```python\n\nraise KeyError(3)\n```\n")
    with pytest.raises(KeyError) as caught:
        run_page(page, here)
    assert caught.traceback[-1].lineno == 2, "counted from 0"
    assert marked_pages(tmp_path) == []
