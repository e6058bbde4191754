"""What sampling the buckets of a step costs in accuracy and saves in time: one repetition by several shares.

    .venv/bin/python benchmarks/shapes.py quarter ../shared/data/debfiles-name2dir /tmp/shapes/quarter
    .venv/bin/python benchmarks/sampling.py /tmp/shapes/quarter --write          # some 20 minutes

The set is repository text of rows of one class each; all but the share is the recipe's, without re-ranking. Training
runs in this process, one repetition after the other, so that seconds compare; accuracy is on all test rows.
The floor is the FLOPs of the output layer's three products over the rate of torch's own 2048^3 product on one thread,
in the run's precision and measured just after.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accuracy import mach
from hardware import commit, processor

from mach.config import load_config
from mach.networks import steps
from mach.runs.run import Run
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard

SIDE = 2048


def product_flops(half: bool) -> float:
    """FLOPs a second of a square product on one thread, median of five."""
    torch.set_num_threads(1)
    operand, seconds = torch.ones(SIDE, SIDE, dtype=torch.bfloat16 if half else torch.float32), []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(operand, operand)
        seconds.append(time.perf_counter() - started)
    return 2 * SIDE**3 / float(np.median(seconds[1:]))


def floor_seconds(run: Run, share: float) -> float:
    """Of all steps of one repetition, by their products alone."""
    config = run.config
    n_outputs = share * config.hashing.heads * (config.hashing.buckets or 0)
    flops = 6 * config.network.hidden[0] * n_outputs * config.training.epochs * run.manifest.n_rows
    return flops / product_flops(run.manifest.precision == "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train.txt and test.txt")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25, 0.125])
    parser.add_argument("--buckets", type=int, default=4096)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "run.toml")
        config.write_text(f'[data]\ntrain = "{options.data / "train.txt"}"\ntest = "{options.data / "test.txt"}"\n')
        for share in options.shares:
            run = str(Path(folder, f"run-{share}"))
            keys = [f"hashing.buckets={options.buckets}", "hashing.repetitions=1"]
            keys += ["reranking.candidates=0", "data.validation_fraction=0.0"]
            made, store = set_up(load_config(config, keys), run)
            steps.MANY_BUCKETS, steps.SAMPLED = 0, share  # whatever B is
            train_shard(ShardJob(str(made.path), str(store.path), (0,)))
            info, last = json.loads(mach("info", run, "--json")), json.loads(mach("evaluate", run, "--json"))[-1]
            rows.append((share, info["worker_seconds"], floor_seconds(Run.open(Path(run)), share), last))
            print(f"share {share}: {info['worker_seconds']:.0f} s, P@1 {last['P@1']:.1f}", flush=True)
    lines = [
        f"# Sampled buckets on {options.data.name}",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. K = {info['n_classes']:,}, B = {options.buckets}, "
        "R = 1, no re-ranking;",
        f"`.venv/bin/python benchmarks/sampling.py {options.data.name}`.",
        "",
        "| share of a head's buckets | worker seconds | floor | times faster | P@1 | P@3 | P@5 |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {share:g} | {seconds:.0f} | {floor:.0f} | {rows[0][1] / seconds:.2f} | "
            + " | ".join(f"{last[name]:.2f}" for name in ("P@1", "P@3", "P@5"))
            + " |"
            for share, seconds, floor, last in rows
        ),
    ]
    print("\n".join(lines))
    if options.write:
        name = f"sampling-{options.data.name}-{datetime.date.today()}.md"
        (Path(__file__).parent / "results" / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
