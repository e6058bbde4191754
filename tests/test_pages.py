"""Every block of README and docs/ runs: a page's in their order, in a copy of one small folder with a trained run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import sys
import tomllib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from mach.cli import main
from mach.config import parse_config
from mach.serving.server import Settings
from tests.pages import LANGUAGES, SKIP, arguments, blocks_of, run_page
from tests.serving.conftest import serving

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    if DOCS / "api" not in path.parents
}
WATCHING = "docs/guides/watching.md"
START = "docs/start.md"  # it makes the tables and the run that other pages go on with
SHOWN = {"", "dockerfile", "ini", "json", "text", "toml", "{toctree}"}  # languages of what is no program
NOT_RUN = {  # how often, by page and reason: a further one is written down here
    ("README.md", "it installs packages"): 1,
    ("README.md", "it takes minutes"): 1,
    ("docs/annif.md", "it needs Annif, in an environment of its own"): 2,
    ("docs/gpu.md", "it needs a GPU"): 1,
    ("docs/guides/hub.md", "it uploads"): 1,
    ("docs/performance.md", "it takes minutes"): 1,
    ("docs/pytorch.md", "it names a module of your own"): 1,
    ("docs/scaling.md", "it needs a cluster"): 2,
    ("docs/start.md", "it installs packages"): 1,
}


class Commands:
    """Commands ``mach ...`` in this process, which has all imported; a server is started in a thread of it."""

    def __init__(self, servers: ExitStack, port: int) -> None:
        self.servers, self.port = servers, port

    def __call__(self, line: str) -> int:
        verb, *rest = arguments(line)
        if verb == "serve":
            runs = tuple(word for word in rest if not word.startswith("--"))
            self.servers.enter_context(serving(Settings(runs, learn="--learn" in rest), self.port))
            return 0
        return int(main.main([verb, *rest], "mach", standalone_mode=False) or 0)


def settle(folder: Path, programs: Path, patch: pytest.MonkeyPatch) -> None:
    """Work in a folder, with a ``mach`` on the path and a cache that knows nothing yet."""
    programs.mkdir()
    script = programs / "mach"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m mach.cli "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    patch.chdir(folder)
    patch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    patch.setenv("MACH_CACHE", str(programs / "cache"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the first page: its tables, and a run that every other page goes on with."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as servers:
        settle(folder, folder.with_name("programs"), patch)
        run_page(PAGES[START], folder, Commands(servers, 0))
    return folder


@pytest.fixture
def here(tmp_path: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(begun, folder)
    settle(folder, tmp_path / "programs", monkeypatch)
    return folder


@pytest.fixture
def loggers(monkeypatch: pytest.MonkeyPatch) -> dict[str, MagicMock]:
    """Two programs that are shown figures, of which the suite needs no more than that they were."""
    found = {name: MagicMock() for name in ("torch.utils.tensorboard", "mlflow")}
    for name, fake in found.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return found


@pytest.mark.parametrize("name", [name for name in PAGES if name not in (START, WATCHING)])
def test_page(name: str, here: Path, tmp_path: Path):
    text = PAGES[name].read_text(encoding="utf-8")
    if not any(block.language in LANGUAGES for block in blocks_of(text)):
        return
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    page = tmp_path / PAGES[name].name
    page.write_text(text.replace(":8000", f":{port}"))
    with ExitStack() as servers:
        run_page(page, here, Commands(servers, port))


def test_loggers_are_told_every_epoch(here: Path, loggers: dict[str, MagicMock]):
    run_page(PAGES[WATCHING], here)
    n_epochs = sum(len(file.read_text().splitlines()) for file in here.glob("runs/watched/repetitions/*/metrics.jsonl"))
    writer = loggers["torch.utils.tensorboard"].SummaryWriter.return_value.__enter__.return_value
    assert writer.add_scalar.call_count == 4 * n_epochs > 0
    assert loggers["mlflow"].log_metric.call_count == n_epochs


def test_the_first_page(begun: Path):
    assert (begun / "runs/books").is_dir()


def test_what_does_not_run_is_listed():
    skipped = Counter[tuple[str, str]]()
    for name, path in PAGES.items():
        for block in blocks_of(path.read_text(encoding="utf-8")):
            assert block.language in {*LANGUAGES, *SHOWN}, f"{name} line {block.line}"
            if block.language in LANGUAGES and block.note.startswith(SKIP):
                skipped[name, block.note.removeprefix(SKIP)] += 1
            elif block.language not in LANGUAGES:
                assert not re.search(r"^(mach|pip|import) ", block.code, re.M), f"{name} line {block.line}: call it sh"
    assert skipped == NOT_RUN


def test_configurations_that_are_shown_are_valid():
    for name, path in PAGES.items():
        for block in blocks_of(path.read_text(encoding="utf-8")):
            if block.language == "toml":
                parse_config(tomllib.loads(block.code), name)


def test_a_page_that_is_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settle(tmp_path, tmp_path / "programs", monkeypatch)
    page = tmp_path / "page.md"
    page.write_text(f"# x\n```python\nn = 1\n```\n\n<!-- {SKIP}why -->\n```python\nn = 2\n```\n```toml\nn = 3\n```\n"
                    "```python\nassert n == 1\n```\n```sh\nmach --version\nfalse\ntrue\n```\n")  # fmt: skip
    with pytest.raises(AssertionError, match="line 17: exit code 1"):
        run_page(page, tmp_path)
    page.write_text("```python\n\nraise KeyError(3)\n```\n")
    with pytest.raises(KeyError) as caught:
        run_page(page, tmp_path)
    assert caught.traceback[-1].lineno == 2, "counted from 0"


def test_plain_commands_need_no_shell(tmp_path: Path):
    told = list[str]()
    page = tmp_path / "page.md"
    page.write_text("<!-- rows of t.csv -->\n```text\na\nb\n```\n```sh\nmach train t.csv --separator \"|\"  # a > b\n"
                    "cat > x <<END\nmach in a file\nEND\nmach query a > b || true\nmach info r\n```\n")  # fmt: skip

    def mach(line: str) -> int:
        told.append(line)
        return 0

    run_page(page, tmp_path, mach)
    assert [arguments(line) for line in told] == [["train", "t.csv", "--separator", "|"], ["info", "r"]]
    assert (tmp_path / "x").read_text() == "mach in a file\n"
    assert (tmp_path / "t.csv").read_text() == "a\n" + 10 * "b\n"
