"""What a small table costs: `mach train` of 300 rows with defaults, at first use and later, and `mach query`.

    .venv/bin/python benchmarks/first_use.py --warm 5 --first 3 --write
    .venv/bin/python benchmarks/first_use.py --wheel --write    # an empty environment, the wheel, the first answer

With --wheel, this clone's wheel is built (not timed), installed into an empty environment with the versions of
constraints.txt, and trains the table and answers a query there, with no compiled kernel; wheels of others come from
pip's index, or from its cache where it has one.

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
from typing import Any

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
    """Seconds of processors and wall seconds of a verb, and what it said."""
    with tempfile.TemporaryDirectory() as cache:
        places = {"MACH_CACHE": cache, "NUMBA_CACHE_DIR": str(compiled), "PYTHONDONTWRITEBYTECODE": ""}
        return cost_of([sys.executable, "-m", "mach.cli", *verb], env=os.environ | places)


def cost_of(command: list[str], **how: Any) -> tuple[float, float, str]:
    """As `cost`, of any command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    said = subprocess.run(command, check=True, capture_output=True, text=True, **how).stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - started, said


def from_wheel() -> list[str]:
    """Lines of a table: what each step takes from an empty environment to the first answer."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(root)]
        subprocess.run(build, check=True)
        [wheel] = Path(folder).glob("*.whl")
        rows, program = str(table(Path(folder, "table.csv"))), f"{folder}/empty/bin"
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "NUMBA_CACHE_DIR")}
        how = {"env": kept | {"MACH_CACHE": f"{folder}/cache"}, "cwd": folder}
        steps = {
            "an empty environment": [sys.executable, "-m", "venv", f"{folder}/empty"],
            "pip install": [f"{program}/pip", "install", "-q", "-c", str(root / "constraints.txt"), str(wheel)],
            "mach train": [f"{program}/mach", "train", rows, f"{folder}/run"],
            "mach query, first": [f"{program}/mach", "query", f"{folder}/run", "c1a c1b"],
            "mach query, again": [f"{program}/mach", "query", f"{folder}/run", "c1a c1b"],
        }
        figures = {name: cost_of(command, **how)[:2] for name, command in steps.items()}
    first = [sum(figures[name][i] for name in ("mach train", "mach query, first")) for i in range(2)]
    whole = [sum(figures[name][i] for name in ("an empty environment", "pip install")) + first[i] for i in range(2)]
    figures |= {
        "to the first answer, installed": tuple(first),
        "to the first answer, with the installation": tuple(whole),
    }
    return ["| | CPU s | s |", "|---|---:|---:|", *(f"| {n} | {u:.1f} | {w:.1f} |" for n, (u, w) in figures.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm", type=int, default=3, help="trainings with compiled kernels")
    parser.add_argument("--first", type=int, default=1, help="trainings without, the first of which is for the others")
    parser.add_argument("--wheel", action="store_true", help="by the wheel in an empty environment, once")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.wheel:
        tell([f"# {N_ROWS} rows by the wheel", "", today(), "", *from_wheel()], "first-use-wheel", options.write)
        return
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
        f"{today()}; medians (least).",
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
    tell(lines, "first-use", options.write)


def today() -> str:
    """When, where and of what the figures are."""
    return f"{datetime.date.today()}, {processor()}, commit {commit()}, load {os.getloadavg()[0]:.1f}"


def tell(lines: list[str], name: str, writes: bool) -> None:
    """Print lines, and keep them if wanted."""
    print("\n".join(lines))
    if writes:
        (RESULTS / f"{name}-{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
