"""What a small table costs: `mach train` of 300 rows with defaults, at first use and later, and `mach query`.

    .venv/bin/python benchmarks/first_use.py --warm 5 --first 3 --write

Every training is a fresh interpreter with an empty folder of prepared data; in a first use the folder of compiled
kernels is empty too. Python keeps its bytecode, as it does unless PYTHONDONTWRITEBYTECODE is set. Seconds of
processors are those of all its processes, which are waited for. With --write, the table goes to
benchmarks/results/first-use-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hardware import commit, processor

RESULTS = Path(__file__).parent / "results"
N_ROWS, N_CLASSES, N_WORDS = 300, 60, 600


def table(path: Path) -> Path:
    """Rows of two words that tell the class and six that do not."""
    rng = random.Random(0)
    lines = ["text,classes"]
    for _ in range(N_ROWS):
        k = rng.randrange(N_CLASSES)
        noise = " ".join(f"w{rng.randrange(N_WORDS)}" for _ in range(6))
        lines.append(f"c{k}a c{k}b {noise},class {k}")
    path.write_text("\n".join(lines) + "\n")
    return path


def cost(verb: list[str], compiled: Path) -> tuple[float, float, str]:
    """Seconds of processors and wall seconds of a command, and what it said."""
    with tempfile.TemporaryDirectory() as cache:
        places = {"MACH_CACHE": cache, "NUMBA_CACHE_DIR": str(compiled), "PYTHONDONTWRITEBYTECODE": ""}
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "mach.cli", *verb]
        said = subprocess.run(command, env=os.environ | places, check=True, capture_output=True, text=True).stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - started, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm", type=int, default=3, help="trainings with compiled kernels")
    parser.add_argument("--first", type=int, default=1, help="trainings without, the first of which is for the others")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    figures: dict[str, list[tuple[float, float, str]]] = {"first use": [], "warm": [], "query": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = str(table(Path(folder, "table.csv")))
        for i in range(options.first):
            figures["first use"].append(cost(["train", rows, f"{folder}/first{i}"], Path(folder, f"compiled{i}")))
        for i in range(options.warm):
            figures["warm"].append(cost(["train", rows, f"{folder}/warm{i}"], Path(folder, "compiled0")))
        query = ["query", f"{folder}/first0", "c1a c1b"]
        cost(query, Path(folder, "compiled0"))  # which compiles what only queries need
        for _ in range(options.warm):
            figures["query"].append(cost(query, Path(folder, "compiled0")))
        n_kernels = len(list(Path(folder, "compiled0").rglob("*.nbc")))
    lines = [
        f"# {N_ROWS} rows, `mach train` with defaults",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}, load {os.getloadavg()[0]:.1f}; medians (least).",
        "",
        "| | n | CPU s | s |",
        "|---|---:|---:|---:|",
    ]
    for name, runs in figures.items():
        used, walls = ([run[i] for run in runs] for i in range(2))
        cells = (f"{statistics.median(column):.1f} ({min(column):.1f})" for column in (used, walls))
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    is_said = "compiling kernels" in figures["first use"][0][2]
    lines += ["", f"{n_kernels} kernels were compiled, which was {'' if is_said else 'not '}said."]
    print("\n".join(lines))
    if options.write:
        (RESULTS / f"first-use-{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
