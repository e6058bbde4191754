"""What stands in place of a file of a run and never ends, or cannot be read: one line, at once."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mach
from mach.errors import MachError, StorageError
from mach.files.arrays import read_array
from mach.files.places import read_bytes
from mach.files.tensors import map_tensors
from mach.runs.run import Run
from mach.runs.status import status
from tests.attacks.hostile import Hostile, refusal

SECONDS = 20  # until a hang is one
FILES = [
    *(
        "manifest.json",
        "config.toml",
        "class_counts.npy",
        "class_names.safetensors",
        "reranker.safetensors",
        "RERANKED",
    ),
    *("calibration.json", "curve.json", "classes/CURRENT", "classes/0007.safetensors", "text/text.json"),
    *("text/terms.txt", "text/idf.npy", "repetitions/r001/DONE", "repetitions/r001/weights.safetensors"),
]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def itself(path: Path) -> None:
    path.symlink_to(path.name)


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    path.mkdir()


def sparse(path: Path) -> None:
    """A file that takes no room on the disk and says that it has 8 TiB."""
    with path.open("wb") as file:
        file.truncate(2**43)


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    def ring(*arguments: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", [fifo, zeros, itself, listening, folder, sparse], ids=lambda kind: kind.__name__)
def test_what_is_no_file_is_one_line(kind: Callable[[Path], None], file: str, tmp_path: Path):
    run = Hostile(tmp_path / "run")
    (run / file).unlink(missing_ok=True)
    kind(run / file)
    line = refusal(run.path)
    assert str(run / file) in line or (file == "manifest.json" and "is not a run directory (manifest.json" in line)


def test_other_readers_refuse_as_well(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    for read in (read_bytes, read_array, map_tensors):
        with pytest.raises((MachError, OSError), match="no regular file"):
            read(tmp_path / "fifo")


@pytest.mark.parametrize("file", ["progress.json", "metrics.jsonl", "lock"])
def test_status_does_not_wait(file: str, tmp_path: Path):
    run = Hostile(tmp_path / "run")
    (run / "repetitions/r001/DONE").unlink()
    (run / "repetitions/r001" / file).unlink(missing_ok=True)
    os.mkfifo(run / "repetitions/r001" / file)
    if file == "metrics.jsonl":
        with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be read \(it is no regular file\)"):
            status(Run.open(run.path), 1)
    else:
        assert status(Run.open(run.path), 1)["state"] == "stopped"


def test_a_disk_of_holes_takes_no_memory(tmp_path: Path):
    """Weights of the right shape, whose other bytes are holes: nothing is read that no query needs."""
    path = tmp_path / "holes.npy"
    np.save(path, np.zeros(0, np.int64))
    with path.open("r+b") as file:
        file.truncate(2**43)
    started = time.perf_counter()
    with pytest.raises(MachError, match="claims int64"):
        read_array(path)
    assert time.perf_counter() - started < SECONDS


def test_a_good_run_answers(tmp_path: Path):
    assert mach.load(Hostile(tmp_path / "run").path).topk("red cup", 1)[0].shape == (1,)
