"""What reaches a terminal: names of strangers do not act there, any encoding will do, and closing it is polite."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import mach
from mach.cli import main

ESCAPES = ["\x1b]0;owned\x07red", "\u202etxt.exe", "\x9b31mcyan", "[bold]loud[/bold]", "naïve 😀"]
TWICE = """
import sys
from mach.cli import main
for options in [], ["--json"]:
    main(["query", sys.argv[1], "word4", "-k", "5", *options], standalone_mode=False)
"""
ACTING = ("\x1b", "\x07", "\u202e", "\x9b")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose folder and classes have names that act on a terminal."""
    folder = tmp_path_factory.mktemp("hostile") / "\x1b[31m"
    folder.mkdir()
    lines = [json.dumps({"text": f"word{k}", "classes": [name]}) for k, name in enumerate(ESCAPES)]
    (folder / "rows.jsonl").write_text("\n".join(20 * lines) + "\n")
    tree = {
        "data": {"train": str(folder / "rows.jsonl"), "cache": str(folder), "validation_fraction": 0.0},
        "hashing": {"repetitions": 1, "buckets": 5, "heads": 1},
        "network": {"hidden": [8], "dropout": 0.0},
        "training": {"epochs": 6, "batch": 8, "rate": 0.05},
        "reranking": {"candidates": 0},
    }
    mach.train(tree, folder / "run", launcher="here")
    return folder / "run"


def mach_says(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_names_and_paths_do_not_act(run: Path):
    for arguments in (
        ["query", run, "word0", "word1", "word2", "-k", 5],
        ["query", run, "word0", "--json"],
        ["predict", run, run.parent / "rows.jsonl"],
        ["info", run],
        ["classes", "list", "--all", run],
        ["query", run, "\x1b[2J word0"],
    ):
        done = mach_says(*arguments)
        assert done.exit_code == 0, done.stderr
        assert not any(character in done.stdout + done.stderr for character in ACTING), arguments
    assert "\\u001b]0;owned\\u0007red" in mach_says("query", run, "word0", "-k", 5).stdout


def test_errors_do_not_act(run: Path):
    for arguments in (["query", run.parent / "no\x1b[0m run", "x"], ["classes", "remove", run, "\x1b[2J"]):
        done = mach_says(*arguments)
        assert done.exit_code == 2
        assert not any(character in done.stderr for character in ACTING)
        assert len(done.stderr.splitlines()) == 1


def test_brackets_in_a_path_are_no_style(run: Path, tmp_path: Path):
    (tmp_path / "[bold]").mkdir()
    again = mach_says("train", run.parent / "rows.jsonl", tmp_path / "[bold]" / "run", "--set", "hashing.repetitions=1",
                  "--set", "hashing.buckets=5", "--set", "training.epochs=1", "--launcher", "here")  # fmt: skip
    assert again.exit_code == 0, again.stderr
    assert "[bold]/run: 1 of 1 repetition finished" in again.stderr


def test_a_terminal_that_lacks_characters_shows_their_numbers(run: Path):
    lines = subprocess.run(
        [sys.executable, "-c", TWICE, str(run)],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        encoding="latin-1",
        check=True,
    ).stdout.splitlines()
    assert any("\\U0001f600" in line for line in lines)
    assert sorted(json.loads(lines[-1])["names"]) == sorted(ESCAPES)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_closes_ends_a_verb_politely(run: Path, number: int):
    command = [sys.executable, "-m", "mach.cli", "query", str(run), "-"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("word0\n")
    process.stdin.flush()
    assert process.stdout.readline().split() == ["score", "id", "class"]
    assert "word0" in process.stdout.readline()  # it waits for more
    process.send_signal(number)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (3, "mach: stopped; nothing is half-written: run the same command again\n")


def test_training_that_is_stopped_says_so_at_once():
    code = (
        "import signal; from mach.cli.shell import end_politely; "
        "signal.signal(2, signal.default_int_handler); end_politely('stopping'); signal.raise_signal(2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.startswith("mach: stopping\nTraceback")


def test_nohup_is_heard(run: Path):
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from mach.cli.shell import end_politely; "
    code += "end_politely(); print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
