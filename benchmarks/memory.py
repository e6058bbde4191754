"""Memory of a whole training, all processes together: the largest sum of their proportional shares, a line a stage.

    .venv/bin/python benchmarks/memory.py configs/gnd-core-fast.toml
    .venv/bin/python benchmarks/memory.py ../shared/data/tib-gnd/train.csv --effort fast --set data.class_separator=;

A page that several processes map counts once (PSS of /proc/PID/smaps_rollup), looked at five times a second. "own" are
pages that no file backs; the others are of libraries and mapped data, which the system may drop. The last column names
the processes at the peak: d is the one that was asked, w are workers, each with its MB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SECONDS = 0.2
TRAIN = """
import sys
from mach.training import conductor
source, run, *overrides = sys.argv[1:]
config, path = conductor.configuration(source, run, overrides)
conductor.train(config, path, report=lambda stage, fraction: print(stage, flush=True))
"""


class Peak(NamedTuple):
    """The largest sum that was seen, what of it no file backs, and the share of each process."""

    n_bytes: int
    own: int
    processes: list[tuple[str, int]]


def descendants(root: int) -> list[int]:
    """A process and all that it has started, and these."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, ValueError):
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def shares(pid: int) -> tuple[int, int]:
    """Bytes of a process: its share, and what of this no file backs."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["Pss"], sizes["Pss_Anon"]


def look(root: int) -> Peak:
    """All processes as they are now."""
    n_bytes, own, found = 0, 0, []
    for pid in descendants(root):
        with suppress(OSError, KeyError):  # it has ended
            share, anonymous = shares(pid)
            n_bytes, own = n_bytes + share, own + anonymous
            found.append(("d" if pid == root else "w", share))
    return Peak(n_bytes, own, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a configuration, or training rows")
    parser.add_argument("--effort", choices=["fast", "balanced", "best"])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    overrides = options.overrides + ([f"training.effort={options.effort}"] if options.effort else [])
    peaks: dict[str, Peak] = {}
    seconds: dict[str, float] = {}
    at = "begin"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TRAIN, options.source, f"{folder}/run", *overrides]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def follow() -> None:
            nonlocal at
            assert process.stdout is not None
            for line in process.stdout:
                at = line.strip()

        threading.Thread(target=follow, daemon=True).start()
        while process.poll() is None:
            seen = look(process.pid)
            seconds[at] = seconds.get(at, 0.0) + SECONDS
            if at not in peaks or seen.n_bytes > peaks[at].n_bytes:
                peaks[at] = seen
            time.sleep(SECONDS)
    if process.returncode:
        raise SystemExit(process.returncode)
    print(f"{'stage':<28} {'s':>6} {'MB':>6} {'own':>6}  processes")
    whole = max(peaks.values())
    for stage, peak in [*peaks.items(), ("all", whole)]:
        told = " ".join(f"{kind}{share / 1e6:.0f}" for kind, share in peak.processes)
        took = sum(seconds.values()) if stage == "all" else seconds[stage]
        print(f"{stage:<28} {took:6.1f} {peak.n_bytes / 1e6:6.0f} {peak.own / 1e6:6.0f}  {told}")


if __name__ == "__main__":
    main()
