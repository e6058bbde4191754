"""Peers and ours on one data set: the same rows, threads and measures, each in a process of its own, in turns.

    .venv/bin/python benchmarks/peers.py --install                    # once: the peers' own environment
    .venv/bin/python benchmarks/peers.py --data ../shared/data/gnd-core --config configs/gnd-core.toml --rounds 3
    .venv/bin/python benchmarks/peers.py --data ../shared/data/gnd-core --only fasttext-hs mach:gnd-core

Without --config peers alone run. The table goes to benchmarks/results/peers-DATASET-DATE.md, the figures of every
round to a .json beside it. With --only some rows are measured anew and the others are taken from the newest .json of
the data set. What takes hours is left out unless --slow or --only asks for it. peer_runner.py says how each
entrant is trained and asked.
"""

from __future__ import annotations

import argparse
import datetime
import json
import lzma
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from hardware import commit, processor
from peer_runner import ENTRANTS, STAGES, TOP, Mach, bytes_on_disk

from mach.config import DataConfig, TextConfig
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import MachError
from mach.sketch.metrics import evaluate, propensities

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
OURS = "mach:"
MEASURES = ("P@1", "P@3", "P@5", "nDCG@3", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "recall@5")
COSTS = {
    "training, s": ("train_seconds", 1, ".1f"),
    "CPU s": ("train_cpu_seconds", 1, ".0f"),
    "peak GB": ("train_peak_bytes", 1e9, ".2f"),
    "model MB": ("model_bytes", 1e6, ".0f"),
    "batch, ms": ("batch_ms", 1, ".2f"),
    "single, ms": ("single_ms", 1, ".2f"),
    "others": ("others_cores", 1, ".1f"),
}
# Versions that work together on Python 3.11. PECOS imports torch; its text models do not know transformers 5.
TORCH = "torch==2.13.0"
TOGETHER = ("numpy==1.26.4", "scipy==1.13.1", "scikit-learn==1.9.1", "transformers==4.49.0", "numba==0.68.1")
PEERS = (
    ("scipy", "scikit-learn"),
    ("omikuji==0.5.2",),
    ("libpecos==1.2.8", "transformers", "torch"),
    ("napkinxc==0.7.2",),
    ("libmultilabel==0.10.0", "sparsekmeans==0.3.1", "liblinear-multicore==2.50.0"),
    ("fasttext-wheel==0.9.2",),
)
POLL_SECONDS = 0.5
WARM = {"NUMBA_CACHE_DIR": str(HERE / ".compiled")}  # our kernels, as peers are compiled before they are measured


class EntrantError(Exception):
    """Why one entrant or the whole benchmark ends; one line."""


def install(environment: Path) -> None:
    """The peers' own environment; one that cannot be installed is named and left out."""
    if not (environment / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    together = environment / "together.txt"
    together.write_text("\n".join([TORCH, *TOGETHER]) + "\n")
    pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in PEERS:
        done = subprocess.run(
            [*pip, "--constraint", str(together), *packages], stderr=subprocess.PIPE, text=True, check=False
        )
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"{packages[0]}: {'installed' if done.returncode == 0 else f'cannot be installed: {reason}'}", flush=True)
    cuda = subprocess.run(
        [str(environment / "bin/python"), "-c", "import torch; print(torch.version.cuda or '')"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if cuda:
        print(f"note: pip chose a torch with CUDA {cuda}; training uses the processor all the same")


def lay_out(data: Path, work: Path, n_test: int | None) -> dict[str, int]:
    """Write the data set as the entrants take it; what it measures."""
    stores: dict[str, Store] = {}
    for part in ("train", "test"):
        text = unpacked(data, part, work)
        config = DataConfig(train=str(text), cache=str(work / "cache"))
        store = stores[part] = prepare(config, TextConfig(), str(text), like=stores.get("train"))
        n_rows = store.n_rows if part == "train" else min(store.n_rows, n_test or store.n_rows)
        indptr = store.class_indptr[: n_rows + 1]
        ids = store.class_ids[: indptr[-1]]
        x = sp.csr_matrix(store.features(0, n_rows))
        y = sp.csr_matrix((np.ones(len(ids), np.float32), ids, indptr), shape=(n_rows, store.n_classes))
        for matrix, name in ((x, "x"), (y, "y")):
            matrix.sort_indices()
            matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
            sp.save_npz(work / f"{part}.{name}.npz", matrix, compressed=False)
        np.save(work / f"{part}.counts.npy", store.class_counts())
        if (data / f"{part}_texts.txt").exists() or (data / f"{part}_texts.txt.xz").exists():
            unpacked(data, f"{part}_texts", work)
    train = stores["train"]
    sizes = {"n_train": train.n_rows, "n_test": stores["test"].n_rows, "n_asked": n_rows}
    return sizes | {"n_features": train.n_features, "n_classes": train.n_classes}


def unpacked(data: Path, stem: str, work: Path) -> Path:
    for name in (f"{stem}.txt", f"{stem}.txt.xz"):
        if (data / name).exists():
            target = work / f"{stem}.txt"
            opened = lzma.open if name.endswith(".xz") else open
            with opened(data / name, "rb") as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            return target
    raise EntrantError(f"{data} holds neither {stem}.txt nor {stem}.txt.xz: give a folder in the repository's format")


def family(pid: int) -> list[int]:
    """A process and all that descend from it, right now."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents.setdefault(int(after_name[1]), []).append(int(entry.parent.name))
    found = [pid]
    for one in found:
        found.extend(parents.get(one, []))
    return found


def memory_bytes(pids: Sequence[int]) -> int:
    """Resident memory of processes together; pages that they share count once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def children_seconds() -> float:
    """Processor time of all that we started and that has ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def busy_seconds() -> float:
    """Processor time of everything on this machine since it started."""
    user, nice, system, _idle, _iowait, irq, softirq = Path("/proc/stat").read_text().split()[1:8]
    return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")


def watched(command: list[str], log: Path, options: argparse.Namespace, environment: dict[str, str]) -> int:
    """Run a command within the limits of time and memory; the peak memory of all its processes, as seen in steps."""
    peak, started = 0, time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | environment
        )
        try:
            while process.poll() is None:
                pids = family(process.pid)
                peak = max(peak, memory_bytes(pids))
                if peak > options.memory:
                    raise EntrantError(f"needs more than {options.memory / 1e9:.3g} GB")
                if time.perf_counter() - started > options.timeout:
                    raise EntrantError(f"needs more than {options.timeout:.3g} s")
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                for pid in family(process.pid):
                    os.kill(pid, signal.SIGKILL)
                process.wait()
    if process.returncode != 0:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise EntrantError(f"ended with {process.returncode}: {said[-1].strip()[:200] if said else 'it said nothing'}")
    return peak


class Benchmark:
    """The entrants of one data set, measured in turns; every finished one is written at once."""

    def __init__(self, options: argparse.Namespace, configs: dict[str, Path], work: Path) -> None:
        self.options, self.configs, self.work = options, configs, work
        self.sizes = lay_out(options.data, work, options.test_rows)
        if configs:
            mach = str(Path(sys.executable).with_name("mach"))
            subprocess.run([mach, "warm-up"], check=True, env=os.environ | {"MACH_CACHE": str(work / "cache"), **WARM})
        truth = sp.load_npz(work / "test.y.npz")
        self.truth = (truth.indptr, truth.indices)
        self.propensities_K = propensities(np.load(work / "train.counts.npy"), self.sizes["n_train"])
        self.name = options.data.resolve().name
        self.entrants = self.kept()

    def kept(self) -> dict[str, Any]:
        """Rows of the newest figures of this data set, where only some are measured anew."""
        files = sorted(self.options.results.glob(f"peers-{self.name}-[0-9]*.json"))
        if not self.options.only or not files:
            return {}
        found = json.loads(files[-1].read_text())
        if found["sizes"] != self.sizes:
            raise EntrantError(f"{files[-1]} was measured on {found['sizes']}, not on {self.sizes}: leave out --only")
        return dict(found["entrants"])

    def run(self, chosen: Sequence[str]) -> None:
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        failed: dict[str, str] = {}
        for number in range(self.options.rounds):
            for name in chosen if number % 2 == 0 else reversed(chosen):
                if name in failed:
                    continue
                try:
                    rounds[name].append(self.measured(name))
                    shown = rounds[name][-1]
                    print(
                        f"round {number}, {name}: P@1 {100 * shown['P@1']:.1f}, {shown['train_seconds']:.1f} s",
                        flush=True,
                    )
                except EntrantError as error:
                    failed[name] = str(error)
                    print(f"round {number}, {name}: {error}", flush=True)
                self.entrants[name] = self.row(name, rounds[name], failed.get(name))
                self.write()

    def row(self, name: str, rounds: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        where = f" ({self.configs[name]})" if name in self.configs else ""
        return {
            "date": str(datetime.date.today()),
            "commit": self.options.commit,
            "hardware": self.options.hardware,
            "threads": self.options.threads,
            "settings": ENTRANTS.get(name, Mach).settings + where,
            "versions": next((figures["versions"] for figures in rounds), {}),
            "rounds": rounds,
            "reason": reason,
        }

    def measured(self, name: str) -> dict[str, Any]:
        """One round of one entrant: trained, then asked by two more processes, with all threads and with one."""
        busy, own, started = busy_seconds(), children_seconds(), time.perf_counter()
        figures = self.trained_here(name) if name in self.configs else self.stage(STAGES[0], name)
        seconds, own = time.perf_counter() - started, children_seconds() - own
        figures["others_cores"] = max(0.0, (busy_seconds() - busy - own) / seconds)
        for stage in STAGES[1:]:
            figures |= self.stage(stage, name)
        ids = np.load(self.work / f"{name}.npy")
        figures |= evaluate(ids, self.truth, ks=(1, 3, TOP), propensities=self.propensities_K)
        remove(self.work / f"{name}.model")
        return figures

    def stage(self, stage: str, name: str) -> dict[str, Any]:
        threads = 1 if stage == "single" else self.options.threads
        python = sys.executable if name in self.configs else str(self.options.environment / "bin/python")
        command = [python, str(HERE / "peer_runner.py"), stage, name, "--work", str(self.work)]
        command += ["--threads", str(threads), "--memory", str(self.options.memory)]
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = dict.fromkeys(variables, str(threads)) | {"MACH_CACHE": str(self.work / "cache"), **WARM}
        polled = watched(command, self.work / f"{name}.{stage}.log", self.options, environment)
        figures = json.loads((self.work / f"{name}.{stage}.json").read_text())
        if "refused" in figures:
            raise EntrantError(figures["refused"])
        return {"polled_peak_bytes": polled, **figures} if stage == "train" else dict(figures)

    def trained_here(self, name: str) -> dict[str, Any]:
        """Ours, through the command line, as a user's would be; nothing prepared before."""
        model, cache = self.work / f"{name}.model", self.work / "cache of training"
        for folder in (model, cache):
            remove(folder)
        measured = self.work / "cache" / "precision.json"  # how fast the processor is, measured once by `mach warm-up`
        if measured.exists():
            cache.mkdir()
            shutil.copy(measured, cache)
        command = [str(Path(sys.executable).with_name("mach")), "train", str(self.configs[name]), str(model)]
        command += ["--workers", str(self.options.threads)]
        before, started = children_seconds(), time.perf_counter()
        peak = watched(command, self.work / f"{name}.train.log", self.options, {"MACH_CACHE": str(cache), **WARM})
        seconds, used = time.perf_counter() - started, children_seconds() - before
        remove(cache)
        return {
            "train_seconds": seconds,
            "train_cpu_seconds": used,
            "train_peak_bytes": peak,
            "model_bytes": bytes_on_disk(model),
        }

    def write(self) -> None:
        stem = self.options.results / f"peers-{self.name}-{datetime.date.today()}"
        figures = {"data": self.name, "sizes": self.sizes, "entrants": self.entrants}
        stem.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(self.name, self.sizes, self.entrants, self.options))


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def median(row: dict[str, Any], figure: str) -> float:
    return statistics.median(float(figures[figure]) for figures in row["rounds"])


def cost(row: dict[str, Any], figure: str, unit: float, style: str) -> str:
    """A figure in its unit; the older of the rows that --only keeps may lack it."""
    return format(median(row, figure) / unit, style) if figure in row["rounds"][0] else "?"


def table(name: str, sizes: dict[str, int], entrants: dict[str, Any], options: argparse.Namespace) -> str:
    measured = [entrant for entrant, row in entrants.items() if row["rounds"]]
    measured.sort(key=lambda entrant: -median(entrants[entrant], "P@1"))
    asked = "All" if sizes["n_asked"] == sizes["n_test"] else f"The first {sizes['n_asked']:,}"
    columns = ["entrant", *MEASURES, *COSTS, "rounds, date"]
    lines = [
        f"# Peers on {name}",
        "",
        f"{datetime.date.today()}, {options.hardware}, commit {options.commit}, {options.threads} threads. {asked} of",
        f"{sizes['n_test']:,} test rows, {sizes['n_train']:,} training rows, D = {sizes['n_features']:,}, "
        f"K = {sizes['n_classes']:,}. Medians of the rounds;",
        f"`.venv/bin/python benchmarks/peers.py --data {options.data}`.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for entrant in measured:
        row = entrants[entrant]
        cells = [f"{100 * median(row, measure):.1f}" for measure in MEASURES]
        cells += [cost(row, *how) for how in COSTS.values()]
        lines.append(f"| {entrant} | " + " | ".join(cells) + f" | {len(row['rounds'])}, {row['date']} |")
    lines += [
        "",
        "Training is the fit alone, without reading and saving, where the entrant's calls allow it (see below). Peak:",
        "resident memory of the training process, rows included; ours: of all its processes together. Batch: all rows",
        "at once, ms a query, all threads; single: one row a call through the Python API, one thread, median. Every",
        "entrant answers from what it saved. Others: cores that other work kept busy during the training; where",
        "it is not near 0, compare processor seconds and not wall time.",
        "",
        *(f"- {entrant}: {described(entrants[entrant], options)}" for entrant in measured),
    ]
    missing = [entrant for entrant in entrants if entrants[entrant]["reason"]]
    if missing:
        lines += ["", "Not finished, or not in every round:", ""]
        lines += [f"- {entrant}: {entrants[entrant]['reason']} ({entrants[entrant]['date']})" for entrant in missing]
    return "\n".join(lines) + "\n"


def described(row: dict[str, Any], options: argparse.Namespace) -> str:
    """Versions and settings, and what differs from the head of the table."""
    said = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    head = {"hardware": options.hardware, "commit": options.commit, "threads": options.threads}
    differing = [f"{name} {row[name]}" for name in head if row[name] != head[name]]
    return "; ".join([said, row["settings"], *differing])


def chosen_entrants(options: argparse.Namespace, configs: dict[str, Path]) -> list[str]:
    known = [*configs, *ENTRANTS]
    for name in options.only:
        if name not in known:
            hint = ": give its --config" if name.startswith(OURS) else f": choose among {', '.join(known)}"
            raise EntrantError(f"there is no entrant {name}{hint}")
    if options.only:
        return [name for name in known if name in options.only]
    return [name for name in known if options.slow or name in configs or not ENTRANTS[name].slow]


def named_configs(words: Sequence[str]) -> dict[str, Path]:
    """``NAME=FILE`` or ``FILE``, under the name that the table shows."""
    configs = {}
    for word in words:
        name, path = word.split("=", 1) if "=" in word else (Path(word).stem, word)
        if not Path(path).is_file():
            raise EntrantError(f"there is no configuration {path}: give --config FILE or --config NAME=FILE")
        if not re.fullmatch(r"[\w-]+", name) or OURS + name in configs:
            raise EntrantError(f"the name {name} of --config must be new and of letters, digits, - and _")
        configs[OURS + name] = Path(path)
    return configs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="make the peers' environment and stop")
    parser.add_argument("--environment", type=Path, default=HERE / ".peers")
    parser.add_argument("--data", type=Path, help="folder with train.txt and test.txt, plain or .xz")
    parser.add_argument("--config", action="append", default=[], metavar="[NAME=]FILE", help="ours; may be repeated")
    parser.add_argument("--only", nargs="+", default=[], metavar="ENTRANT", help="measure these, keep the others")
    parser.add_argument("--slow", action="store_true", help="one-vs-rest as well")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--test-rows", type=int, metavar="N", help="ask the first N test rows only")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="of training, and of answering")
    parser.add_argument("--memory", type=float, default=10, metavar="GB", help="an entrant that takes more is ended")
    parser.add_argument("--work", type=Path, help="folder for large temporary files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def checked(options: argparse.Namespace) -> None:
    if options.data is None:
        raise EntrantError("give --data FOLDER, or --install")
    cores = os.sched_getaffinity(0)
    if not 1 <= options.threads <= len(cores):
        raise EntrantError(f"--threads {options.threads}: this machine has {len(cores)} cores for us")
    if options.rounds < 1 or (options.test_rows is not None and options.test_rows < 1):
        raise EntrantError("--rounds and --test-rows must be at least 1")
    options.hardware, options.commit, options.memory = processor(), commit(), int(options.memory * 1e9)
    os.sched_setaffinity(0, sorted(cores)[: options.threads])  # also for all that we start


def main() -> None:
    options = arguments()
    try:
        if options.install:
            install(options.environment)
            return
        checked(options)
        configs = named_configs(options.config)
        chosen = chosen_entrants(options, configs)
        if any(name in ENTRANTS for name in chosen) and not (options.environment / "bin/python").exists():
            raise EntrantError(f"{options.environment} holds no Python: run benchmarks/peers.py --install first")
        options.results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            benchmark = Benchmark(options, configs, Path(folder))
            benchmark.run(chosen)
            print(table(benchmark.name, benchmark.sizes, benchmark.entrants, options))
    except (EntrantError, MachError, OSError) as error:
        sys.exit(f"peers.py: {error}")


if __name__ == "__main__":
    main()
