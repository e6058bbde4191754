"""The command line over hostile runs, in processes of its own: one line, exit code 2, and an end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.attacks.hostile import WEIGHTS, Hostile

SECONDS = 120  # a hang, even where the machine is busy


def mach(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mach.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)


def pipe(run: Hostile) -> None:
    (run / "class_counts.npy").unlink()
    os.mkfifo(run / "class_counts.npy")


@pytest.mark.parametrize(
    ("verb", "change", "said"),
    [
        (["query", "RUN", "red cup"], lambda run: run.set(WEIGHTS, trunk__layers__0__weight=np.ones((99, 7))), WEIGHTS),
        (["evaluate", "RUN"], pipe, "class_counts.npy: it is no regular file"),
        (["info", "RUN"], lambda run: run.json("RERANKED", settings={}), "RERANKED is damaged: settings.candidates"),
        (
            ["report", "RUN"],
            lambda run: (run / "config.toml").write_bytes(b"a" + b".a" * 50_000 + b"=1"),
            "config.toml",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_verb_ends_by_a_line(verb: list[str], change: Callable[[Hostile], Any], said: str, tmp_path: Path):
    run = Hostile(tmp_path / "run")
    change(run)
    done = mach(*(run.path if word == "RUN" else word for word in verb))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("mach: ")
    assert said in done.stderr
    assert not done.stdout
