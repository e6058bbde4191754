"""Whole queries of trained runs, single and in batches: from a text or a row of features to names or ids of classes.

    python benchmarks/queries.py RUN[=ROWS] ... [--write]

ROWS is repository text; by default the test rows that the run's configuration names. The run on characters is asked by
texts, others by rows of features. Single queries: one call each, wall time; median and 99th percentile over queries, of
each the best of three turns, as other work on the machine is not ours; and processor time of a query's parts. Batches:
all rows in one call. Each run is also opened in three fresh processes. --write: benchmarks/results/queries-<date>.md.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from hardware import commit, processor
from turns import medians

import mach
from mach.data.characters import rows as characters
from mach.data.prepare import prepare

N, K_TOP, TURNS = 300, 5, 3
OPEN = """
import sys, time
start = time.perf_counter(); import mach; mach.load
imported = time.perf_counter(); model = mach.load(sys.argv[1])
loaded = time.perf_counter(); model.topk(model.parse(sys.argv[2]), 5)
print(imported - start, loaded - imported, time.perf_counter() - loaded)
"""
DATA_SETS = {26_296: "gnd-core", 15_015: "tate-leaf", 259_299: "go-gene2pubmed"}  # by K, which runs keep
TREES = ("omikuji-parabel", "omikuji-bonsai", "pecos-xrlinear", "napkinxc-plt")
RESULTS = Path(__file__).parent / "results"


def trees(n_classes):
    """Median of each tree's single queries in the newest results that time it, as a cell of the table."""
    cells = {}
    for path in sorted(RESULTS.glob(f"peers-{DATA_SETS.get(n_classes)}-*.json")):
        for name, entrant in json.loads(path.read_text())["entrants"].items():
            times = [each["single_ms"] for each in entrant["rounds"] if each.get("single_ms")]
            if name in TREES and times:
                cells[name] = f"{name} {median(times):.2f}"
    return ", ".join(cells.values())


def queries_of(model, source):
    config = model.run.config
    if model.run.text_features is not None:
        return [text for text, _ in islice(characters("test"), N)]
    store = prepare(config.data, config.text, source or config.data.test, like=model.run.reference())
    rows = store.features(0, min(N, store.n_rows))
    return [rows[n : n + 1] for n in range(rows.shape[0])]


def answer(model, query, rerank):
    ids, _ = model.topk(query, K_TOP, rerank=rerank)
    names = model.name_function()
    return names(ids) if names else ids


def single(model, queries, rerank):
    """Median and 99th percentile of the queries' wall time in ms, each query's the least of its turns."""
    seconds = np.empty((TURNS, len(queries)))
    for turn in seconds:
        for n, query in enumerate(queries):
            start = time.perf_counter()
            answer(model, query, rerank)
            turn[n] = time.perf_counter() - start
    return 1e3 * np.quantile(seconds.min(axis=0), [0.5, 0.99])


def parts(model, queries):
    """Milliseconds of processor a query: features, bucket scores, decoding of 5 and of C, re-ranking."""
    read = [next(model.ensemble.read(query, 1)) for query in queries]
    probs = [model.ensemble.scored(batch).probs_NRB for batch in read]
    columns = tuple(range(model.n_repetitions))
    n_candidates = model.reranker.candidates if model.reranker else K_TOP
    tops = [model.ensemble.topk(p, columns, n_candidates) for p in probs]
    actions = {
        "features": lambda: [next(model.ensemble.read(query, 1)) for query in queries],
        "scores": lambda: [model.ensemble.scored(batch) for batch in read],
        "decode": lambda: [model.ensemble.topk(p, columns, K_TOP) for p in probs],
        "candidates": lambda: [model.ensemble.topk(p, columns, n_candidates) for p in probs],
    }
    if model.reranker:
        actions["rerank"] = lambda: [
            model.reranker.rerank(b, t, K_TOP, p) for b, t, p in zip(read, tops, probs, strict=True)
        ]
    return {name: 1e3 * s / len(queries) for name, s in medians(actions, 3, time.thread_time).items()}


def opened(path, line):
    """Milliseconds to import mach, to load the run, and of the first query; the least of three fresh processes."""
    command = [sys.executable, "-c", OPEN, str(path), line]
    times = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    return 1e3 * np.array(times, float).min(axis=0)


def report(arguments):
    yield (
        "| run | K, R J, B | plain: p50 · p99 ms | batch | re-ranked: p50 · p99 | batch | of it features · scores · "
        "decoding · candidates · re-ranking | import · load · first query, ms | peers, p50 |"
    )
    yield "|---|" + "---:|" * 8
    for argument in arguments:
        path, _, source = argument.partition("=")
        model = mach.load(path)
        queries = queries_of(model, source)
        batch = queries if isinstance(queries[0], str) else model_rows(queries)
        cells = []
        for rerank in (False, True):
            if rerank and model.reranker is None:
                cells.append("– | –")
                continue
            single(model, queries[:20], rerank)
            p50, p99 = single(model, queries, rerank)
            whole = medians({"batch": lambda b=batch, r=rerank: answer(model, b, r)}, 3)["batch"]  # noqa: B023
            cells.append(f"{p50:.2f} · {p99:.2f} | {1e3 * whole / len(queries):.2f}")
        each = parts(model, queries)
        line = "black chess queen" if isinstance(queries[0], str) else "1:1 5:1 9:0.5"
        shape = f"{model.n_classes:,}, {model.assignment.n_repetitions}, {model.n_buckets:,}"
        yield (
            f"| {Path(path).name} | {shape} | {' | '.join(cells)} "
            f"| {' · '.join(f'{each[name]:.2f}' for name in each)} "
            f"| {' · '.join(f'{ms:.0f}' for ms in opened(path, line))} | {trees(model.n_classes)} |"
        )


def model_rows(queries):
    from scipy.sparse import vstack

    return vstack(queries, format="csr")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN[=ROWS]")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    lines = [
        f"# Queries, {datetime.date.today()}",
        "",
        f"`python benchmarks/queries.py {' '.join(Path(run.partition('=')[0]).name for run in arguments.runs)}`: best "
        f"{K_TOP} classes of {N} queries, one thread. Peers: single queries of rows of features in their own "
        "processes on the same machine, the newest of benchmarks/results/peers-*.json.",
        f"{processor()}, commit {commit()}, load {os.getloadavg()[0]:.1f}.",
        "",
    ]
    print("\n".join(lines), flush=True)
    for line in report(arguments.runs):
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        path = RESULTS / f"queries-{datetime.date.today()}.md"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
