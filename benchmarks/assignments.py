"""Universal, random, balanced, clustered and learned assignments at equal memory, epochs and seeds, re-ranked or not.

    .venv/bin/python benchmarks/assignments.py --data gnd-core tate-leaf --buckets 512 128 --seeds 0 1 2 --write

A tenth of the training rows is held out (`data.validation_fraction`): no network, table or classifier sees them, but
they choose the re-ranker's weight and prior. Whatever a strategy has to choose was chosen on them with seed 0; the same
models are then judged on all test rows. Every run is one process with one thread, so that its CPU seconds count; what
is measured is appended to --record, and not measured again when the command is repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from hardware import commit, processor

HERE = Path(__file__).parent
KINDS = ("universal", "random", "balanced", "clustered", "learned")
SHOWN = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5")
RECIPE: dict[str, dict[str, Any]] = {
    "hashing": {"repetitions": 2, "heads": 4},
    "network": {"hidden": [256], "dropout": 0.1, "weights": "int8"},
    "training": {"epochs": 6, "batch": 512, "rate": 5e-3},
    "reranking": {"candidates": 100, "iterations": 4},
}


def measure(folder: Path, data: str, n_buckets: int, kind: str, seed: int, *, rerank: bool) -> dict[str, Any]:
    """Train one run in this process and judge it on both sets of rows."""
    import torch
    from scipy.sparse import csr_array

    from mach.config import parse_config
    from mach.data.prepare import prepare
    from mach.data.store import Store, split_rows
    from mach.launch.setup import plan_of, set_up
    from mach.loading import load
    from mach.metrics import evaluate, propensities
    from mach.reranking import RerankerTraining
    from mach.training import ShardJob, train_shard

    torch.set_num_threads(1)
    train, test = (str(folder / data / f"{name}.txt.xz") for name in ("train", "test"))
    tree = {section: dict(values) for section, values in RECIPE.items()}
    tree["data"] = {"train": train, "test": test, "validation_fraction": 0.1, "row_features": 64}
    tree["hashing"] |= {"buckets": n_buckets, "assignment": kind, "seed": seed}
    tree["training"] |= {"seed": seed}
    found: dict[str, Any] = {"data": data, "buckets": n_buckets, "assignment": kind, "seed": seed}
    prepare(parse_config(tree, "benchmark").data, parse_config(tree, "benchmark").text, train)  # not counted
    with tempfile.TemporaryDirectory() as runs:
        started = time.process_time()
        run, store = set_up(parse_config(tree, "benchmark"), f"{runs}/run")
        set_up_seconds = time.process_time() - started
        train_shard(ShardJob(str(run.path), str(store.path), (0, 1)))
        found["cpu_seconds"], found["set_up_seconds"] = time.process_time() - started, set_up_seconds
        if rerank:
            reranker = RerankerTraining(run, store)
            reranker.begin()
            for stage in reranker.stages:
                for part in reranker.parts(stage)[1]:
                    reranker.make(stage, part)
            reranker.finish()
        ledger = plan_of(run.config, store).ledger
        found |= {"bytes": ledger.disk_bytes, "table_bytes": ledger.table_bytes}
        model = load(f"{runs}/run")
        buckets_FK = model.assignment.buckets(np.arange(model.n_classes))
        found["twins"] = model.n_classes - len(np.unique(buckets_FK, axis=1).T)
        same_row = np.diff(np.repeat(np.arange(store.n_rows), np.diff(store.class_indptr))) == 0
        first, second = store.class_ids[:-1][same_row], store.class_ids[1:][same_row]
        found["together"] = float(np.mean(buckets_FK[:, first] == buckets_FK[:, second]))
        weights_K = propensities(run.class_counts_K(), store.n_rows)

        def judge(store: Store, rows: Any) -> dict[str, dict[str, float]]:
            ones = np.ones(len(store.class_ids), np.int8)
            truth = csr_array((ones, store.class_ids, store.class_indptr), shape=(store.n_rows, model.n_classes))[rows]
            queries = store.features(0, store.n_rows)[rows]
            ids: dict[str, list[Any]] = {"plain": [], **({"reranked": []} if rerank else {})}
            for batch, probs_NRB, columns in model.answered(queries):
                for name, found_ids in ids.items():
                    top = model.decode(batch, probs_NRB, columns, 5, rerank=name == "reranked")
                    found_ids.append(top.ids_Nk)
            judged = {
                name: evaluate(np.concatenate(i), truth, ks=(1, 3, 5), propensities=weights_K)
                for name, i in ids.items()
            }
            return {name: {metric: figures[metric] for metric in SHOWN} for name, figures in judged.items()}

        held_out = split_rows(store.n_rows, 0.1, seed)[1]
        test_store = prepare(run.config.data, run.config.text, test, like=run.reference())
        found["validation"] = judge(store, held_out)
        found["test"] = judge(test_store, np.arange(test_store.n_rows))
    return found


def key_of(one: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(one[name] for name in ("data", "buckets", "assignment", "seed"))


def table(found: list[dict[str, Any]], data: str, rows: str) -> list[str]:
    """One line a B, strategy and re-ranking: mean and standard deviation over the seeds, in percent."""
    groups = defaultdict(list)
    for one in found:
        if one["data"] == data:
            groups[-one["buckets"], KINDS.index(one["assignment"])].append(one)
    lines = ["", f"## {data}, {rows} rows", "", "| B | assignment | seeds | " + " | ".join(SHOWN) + " | re-ranked "]
    lines[-1] += " | re-ranked ".join(SHOWN) + " | together | twins | CPU s | MB |"
    lines.append("|---|---|---|" + "---|" * (2 * len(SHOWN) + 4))
    for (minus_buckets, kind), group in sorted(groups.items()):
        cells = [str(-minus_buckets), KINDS[kind], str(len(group))]
        for name in ("plain", "reranked"):
            for metric in SHOWN:
                values = [100 * one[rows][name][metric] for one in group if name in one[rows]]
                spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.1f}{spread}" if values else "–")
        cells.append(f"{100 * np.mean([one['together'] for one in group]):.1f} %")
        cells.append(f"{np.mean([one['twins'] for one in group]):.0f}")
        cells.append(f"{np.mean([one['cpu_seconds'] for one in group]):.0f}")
        cells.append(f"{group[0]['bytes'] / 1e6:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("../shared/data"), help="of the data sets")
    parser.add_argument("--data", nargs="+", default=["gnd-core", "tate-leaf"])
    parser.add_argument("--buckets", nargs="+", type=int, default=[512, 128])
    parser.add_argument("--assignments", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--record", type=Path, default=HERE / "results" / f"assignments-{datetime.date.today()}.json")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--plain", action="store_true", help="without re-ranking, a third of the time")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # DATA B ASSIGNMENT SEED: this process measures it
    options = parser.parse_args()
    if options.one:
        data, n_buckets, kind, seed = options.one
        print(json.dumps(measure(options.folder, data, int(n_buckets), kind, int(seed), rerank=not options.plain)))
        return
    found = json.loads(options.record.read_text()) if options.record.exists() else []
    done = {key_of(one) for one in found if options.plain or "reranked" in one["test"]}
    wanted = [
        (data, n_buckets, kind, seed)
        for seed in options.seeds
        for data in options.data
        for n_buckets in options.buckets
        for kind in options.assignments
    ]
    for key in wanted:
        if key in done:
            continue
        command = [sys.executable, __file__, "--folder", str(options.folder), "--one", *map(str, key)]
        command += ["--plain"] * options.plain
        found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
        found = [one for one in found[:-1] if key_of(one) != key] + found[-1:]
        options.record.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
        precisions = {name: round(100 * figures["P@1"], 1) for name, figures in found[-1]["validation"].items()}
        print(*key, f"validation P@1 {precisions}, {found[-1]['cpu_seconds']:.0f} s", file=sys.stderr)
    lines = [
        "# Assignments of classes to buckets",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}; command: `.venv/bin/python "
        "benchmarks/assignments.py --write`.",
        "R = 2 repetitions of 4 heads, hidden [256], 6 epochs of batch 512, rate 5e-3, dropout 0.1, int8, 64 features",
        "a row. Trained on nine tenths of the training rows; validation rows are the other tenth. Mean ± standard",
        "deviation over seeds (of split, hashing and training). CPU s: set-up and training, one thread, without the",
        "re-ranker; MB: networks and table. Re-ranked: the best 100 classes, weight and prior by validation rows.",
        "Together: how often two neighbouring classes of a row share the bucket of a function (chance: 1 / B). Twins:",
        "classes that share the buckets of all functions with one before them: nothing tells the two apart.",
    ]
    for data in dict.fromkeys(one["data"] for one in found):
        for rows in ("validation", "test"):
            lines += table(found, data, rows)
    print("\n".join(lines))
    if options.write:
        (HERE / "results" / f"assignments-{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
