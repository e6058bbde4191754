"""Ray as the command line starts it on one machine: it listens on loopback alone, and a polite end stays polite."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mach.config import Config, to_toml
from tests.training.test_local import LONGER, run_with, weights

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
LISTEN = "0A"  # the state of a socket in /proc/net/tcp


def listening(mark: str) -> set[str]:
    """Addresses that processes listen on whose environment, or that of whoever started them, holds a mark."""
    addresses: dict[str, str] = {}
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == LISTEN:
                addresses[cells[9]] = cells[1].rpartition(":")[0]
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if mark.encode() in (process / "environ").read_bytes():
                targets = [os.readlink(link) for link in (process / "fd").iterdir()]
                found |= {addresses.get(target.removeprefix("socket:[").removesuffix("]"), "") for target in targets}
    return found - {""}


def is_loopback(address: str) -> bool:
    """Of an address as the kernel writes it: words of 4 bytes, each little-endian."""
    return address.endswith("0100007F") or address == "0" * 24 + "01000000"


def start(folder: Path, config: Config) -> subprocess.Popen[str]:
    (folder / "config.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "mach.cli", "train", "config.toml", "run", "--launcher", "ray"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ray_started_here_is_alone_and_ends_politely(config: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")  # whatever else runs on this machine
    longer = run_with(config, **LONGER)
    monkeypatch.setenv("MARK", mark := f"alone-{os.getpid()}")
    process = start(tmp_path, longer)
    while process.poll() is None and not list(tmp_path.glob("run/repetitions/*/state.safetensors")):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1]
    opened = listening(mark)
    assert opened, "Ray listens somewhere"
    assert [address for address in opened if not is_loopback(address)] == []
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 3, errors
    assert "run the same command again to go on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert "***" not in errors
    assert start(tmp_path, longer).communicate()[1]
    here = tmp_path / "here"
    here.mkdir()
    (here / "config.toml").write_text(to_toml(longer))
    subprocess.run([sys.executable, "-m", "mach.cli", "train", "config.toml", "run"], cwd=here, check=True)
    assert weights(tmp_path / "run") == weights(here / "run")
