"""Train a configuration, evaluate it on all its test rows and record figures, cost and hardware.

    .venv/bin/python benchmarks/accuracy.py configs/gnd-core.toml --write

Training runs through the command line as a user's would. With --write, the table goes to
benchmarks/results/accuracy-NAME-DATE.md, the figures to a .json beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hardware import commit, processor

SHOWN = ("P@1", "P@3", "P@5", "nDCG@3", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "recall@5")
MACH = str(Path(sys.executable).with_name("mach"))


def mach(*arguments: str) -> str:
    return subprocess.run([MACH, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def reranking_lines(run: str, info: dict) -> list[str]:
    """What the re-ranker cost, and what it adds to a query: processor time of a batch, median time of single ones."""
    import numpy as np

    import mach as package
    from mach.data.prepare import prepare

    model = package.load(run)
    config = model.run.config
    store = prepare(config.data, config.text, config.data.test, like=model.run.reference())
    batch, milliseconds = store.features(0, min(2000, store.n_rows)), {}
    for rerank in (False, True):
        model.search(batch, 5, rerank=rerank)  # compiled and mapped
        started = time.process_time()
        model.search(batch, 5, rerank=rerank)
        milliseconds["batch", rerank] = 1e3 * (time.process_time() - started) / batch.shape[0]
        seconds = []
        for n in range(300):
            row, started = batch[n : n + 1], time.perf_counter()
            model.search(row, 5, rerank=rerank)
            seconds.append(time.perf_counter() - started)
        milliseconds["single", rerank] = 1e3 * float(np.median(seconds))
    return [
        f"Re-ranker: {info['reranker_cpu_seconds']:.0f} s CPU, {info['reranker_weights'] / 1e6:.1f} M weights in "
        f"{info['reranker_bytes'] / 1e6:.0f} MB, C = {info['reranker_candidates']},",
        "its order learned from pilots."
        if info["reranker_learned"]
        else f"weight {info['reranker_weight']}, prior {info['reranker_prior']}, repeats {info['reranker_repeats']}.",
        f"A query takes {milliseconds['single', True]:.2f} ms with it and {milliseconds['single', False]:.2f} without, "
        f"in a batch {milliseconds['batch', True]:.2f} and {milliseconds['batch', False]:.2f} ms.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--run", type=Path, help="keep the run here")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = str(options.run or Path(folder, "run"))
        overrides = [word for override in options.overrides for word in ("--set", override)]
        started = time.perf_counter()
        mach("train", str(options.config), run, *overrides)
        seconds = time.perf_counter() - started
        cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        curve, info = json.loads(mach("evaluate", run, "--json")), json.loads(mach("info", run, "--json"))
        reranking = reranking_lines(run, info) if info["reranker_bytes"] else []
    lines = [
        f"# Accuracy of {options.config} {' '.join(options.overrides)}".rstrip(),
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. All test rows; command:",
        f"`.venv/bin/python benchmarks/accuracy.py {options.config}`.",
        "",
        f"K = {info['n_classes']:,}, D = {info['n_features']:,}, B = {info['n_buckets']:,}, "
        f"R = {info['n_repetitions']}.",
        f"Reading and training: {seconds:.0f} s wall, {cpu_seconds:.0f} s CPU, {info['worker_seconds']:.0f} s summed",
        f"over repetitions. Peak memory of a worker: {info['peak_worker_bytes'] / 1e9:.2f} GB. Weights on disk:",
        f"{info['weight_bytes'] / 1e6:.0f} MB. Exchanged between repetitions: {info['peer_bytes']} bytes.",
        *reranking,
        "",
        "| R | " + " | ".join(SHOWN) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    lines += [
        f"| {row['n_repetitions']}{' re-ranked' if row['reranked'] else ''} | "
        + " | ".join(f"{row[name]:.1f}" for name in SHOWN)
        + " |"
        for row in curve
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        name = f"accuracy-{options.config.stem}-{datetime.date.today()}"
        (folder / f"{name}.md").write_text(text)
        (folder / f"{name}.json").write_text(json.dumps({"rows": curve, "info": info}, indent=1) + "\n")


if __name__ == "__main__":
    main()
