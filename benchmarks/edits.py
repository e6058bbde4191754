"""What a model that lives costs and keeps: classes added, removed and taught without training, beside a full retrain.

    .venv/bin/python benchmarks/edits.py --write

10 % of the classes of gnd-core, drawn from those with 3 to 10 training rows, are new: the base run is trained on the
rows that have none of them, the full run on all rows. The base run is then shown 3 rows of each new class. Both runs
are trained through the command line by the recipe (configs/gnd-core.toml), and kept in --work for the next time.
With --write the figures go to benchmarks/results/edits-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import lzma
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hardware import commit, processor
from scipy.sparse import csr_array

import mach
from mach.model.model import MachModel

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "gnd-core"
FEWEST, MOST, N_EXAMPLES, N_UPVOTED = 3, 10, 3, 100

Rows = list[tuple[list[int], str]]


def read(path: Path) -> tuple[Rows, int, int]:
    """Rows of a repository file as classes and the rest of the line; D and K."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        _, D, K = map(int, file.readline().split())
        lines = (line.partition(" ") for line in file)
        return [([int(k) for k in classes.split(",") if k], rest) for classes, _, rest in lines], D, K


def split(rows: Rows, K: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """New classes, new ids of all classes (those of new ones last), and examples: pairs of class and row."""
    counts = np.bincount([k for classes, _ in rows for k in classes], minlength=K)
    pool = np.flatnonzero((counts >= FEWEST) & (counts <= MOST))
    new = np.sort(np.random.default_rng(0).choice(pool, K // 10, replace=False))
    order = np.concatenate([np.setdiff1d(np.arange(K), new), new])
    ids = np.empty(K, np.int64)
    ids[order] = np.arange(K)
    rows_of: dict[int, list[int]] = {k: [] for k in new.tolist()}
    for n, (classes, _) in enumerate(rows):
        for k in classes:
            if k in rows_of:
                rows_of[k].append(n)
    generator, used, examples = np.random.default_rng(1), set[int](), []
    for k in sorted(rows_of, key=lambda k: len(rows_of[k])):  # a row is an example of one class, where possible
        drawn = sorted(generator.permutation(rows_of[k]).tolist(), key=lambda n: n in used)[:N_EXAMPLES]
        examples += [(int(ids[k]), n) for n in drawn]
        used.update(drawn)
    return new, ids, examples


def write(path: Path, rows: Rows, D: int, K: int) -> None:
    lines = [",".join(map(str, sorted(classes))) + " " + rest for classes, rest in rows]
    path.write_text(f"{len(lines)} {D} {K}\n" + "".join(lines))


def train(folder: Path, name: str, settings: list[str]) -> Path:
    """A run by the recipe, through the command line; one that is there goes on, and ends at once where it is done."""
    config = folder / f"{name}.toml"
    config.write_text(f'[data]\ntrain = "{folder / name}.txt"\ntest = "{folder}/test.txt"\n')
    command = [sys.executable, "-c", "from mach.cli import main; main()", "train", str(config), str(folder / name)]
    subprocess.run([*command, *(part for setting in settings for part in ("--set", setting))], check=True)
    return folder / name


def matrix(rows: Rows, D: int) -> csr_array:
    indptr, indices, values = [0], [], []
    for _, rest in rows:
        for pair in rest.split():
            j, _, x = pair.partition(":")
            indices.append(int(j))
            values.append(float(x))
        indptr.append(len(indices))
    return csr_array((np.array(values, np.float32), np.array(indices), np.array(indptr)), shape=(len(rows), D))


def precision(ids: np.ndarray, truth: list[set[int]], k: int, rows: np.ndarray) -> float:
    return 100 * float(np.mean([len(truth[n].intersection(ids[n, :k].tolist())) / k for n in rows]))


def recall(ids: np.ndarray, truth: list[set[int]], first: int) -> float:
    """Share of the pairs of row and new class that are in the row's answer."""
    pairs = [(n, k) for n, classes in enumerate(truth) for k in classes if k >= first]
    return 100 * float(np.mean([k in ids[n] for n, k in pairs]))


def milliseconds(ask: Callable[[int], Any], n: int = 200) -> float:
    for i in range(20):
        ask(i)
    took = []
    for i in range(n):
        begin = time.perf_counter()
        ask(i)
        took.append(time.perf_counter() - begin)
    return 1000 * statistics.median(took)


class Report:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)


def added(report: Report, model: MachModel, full: MachModel, data: dict[str, Any], ids: np.ndarray) -> None:
    """Bar 2: new classes by 3 examples each."""
    X, examples_X, truth, owners = data["X"], data["examples"], data["truth"], data["owners"]
    K0, n_new = model.n_classes, data["n_new"]
    old_rows = np.array([n for n, classes in enumerate(truth) if classes and max(classes) < K0])
    mixed_rows = np.array([n for n, classes in enumerate(truth) if classes and min(classes) < K0])
    before = {rerank: model.topk(X, 10, rerank=rerank)[0] for rerank in (True, False)}
    one = {rerank: milliseconds(lambda i, r=rerank: model.topk(X[[i]], 10, rerank=r)) for rerank in (True, False)}
    model.classes.add("compiled", [examples_X[owners == 0]])
    model.classes.undo()
    alone = []
    for k in range(10):
        begin = time.perf_counter()
        model.classes.add(f"alone {k}", [examples_X[owners == k]])
        alone.append(1000 * (time.perf_counter() - begin))
        model.classes.undo()
    begin, processor_begin = time.perf_counter(), time.process_time()
    given = model.classes.add([f"new {k}" for k in range(n_new)], [examples_X[owners == k] for k in range(n_new)])
    seconds, processor_seconds = time.perf_counter() - begin, time.process_time() - processor_begin
    assert given.tolist() == list(range(K0, K0 + n_new))
    report(
        f"{n_new} classes added in {seconds:.1f} s, {processor_seconds:.1f} s of a processor: "
        f"{1000 * processor_seconds / n_new / model.n_repetitions:.2f} ms of it a class and repetition, writing "
        f"among it. One class alone, where there is no other: {statistics.median(alone):.0f} ms.",
        "",
        "| | re-ranked | plain |",
        "|---|---:|---:|",
    )
    cells: dict[str, list[str]] = {}
    for rerank in (True, False):
        first = model.topk(examples_X, 1, rerank=rerank)[0][:, 0]
        after = model.topk(X, 10, rerank=rerank)[0]
        retrained = ids[full.topk(X, 10, rerank=rerank)[0]]
        values = {
            "new class first on its own examples, %": 100 * float(np.mean(first == K0 + owners)),
            "held-out rows: recall@10 of new classes, %": recall(after, truth, K0),
            "the same by the full retrain, %": recall(retrained, truth, K0),
            "share of the retrain's, %": 100 * recall(after, truth, K0) / recall(retrained, truth, K0),
        }
        for k in (1, 5):
            for name, rows in (("rows without new classes", old_rows), ("all rows", np.arange(len(truth)))):
                change = precision(after, truth, k, rows) - precision(before[rerank], truth, k, rows)
                values[f"P@{k} of {name}, before"] = precision(before[rerank], truth, k, rows)
                values[f"P@{k} of {name}, change in points"] = change
        old_truth = [{k for k in classes if k < K0} for classes in truth]
        values["P@1 by old classes alone, of rows that have one, change"] = precision(
            after, old_truth, 1, mixed_rows
        ) - precision(before[rerank], old_truth, 1, mixed_rows)
        values["the retrain's P@1 of rows without new classes"] = precision(retrained, truth, 1, old_rows)
        values["the retrain's P@5 of rows without new classes"] = precision(retrained, truth, 5, old_rows)
        values["a single query before, ms"] = one[rerank]
        values["a single query after, ms"] = milliseconds(lambda i, r=rerank: model.topk(X[[i]], 10, rerank=r))
        for name, value in values.items():
            cells.setdefault(name, []).append(f"{value:.2f}")
    report(*(f"| {name} | {' | '.join(row)} |" for name, row in cells.items()), "")


def removed(report: Report, model: MachModel, X: csr_array) -> None:
    """Bar 3: removed classes in any answer."""
    popular = np.bincount(model.topk(X, 5)[0].ravel(), minlength=model.n_classes)
    gone = np.argsort(-popular, kind="stable")[:500]
    model.classes.remove(gone)
    allowed = np.ones(model.n_classes, np.bool_)
    ways: dict[str, dict[str, Any]] = {
        "re-ranked": {},
        "plain": {"rerank": False},
        "tail": {"tail": 1.0},
        "plain, tail": {"tail": 1.0, "rerank": False},
        "mask of all": {"allowed": allowed},
        "budget of 500": {"budget": 500, "rerank": False},
        "2 repetitions": {"repetitions": 2},
        "k = 100 candidates": {"k": 100, "rerank": False},
    }
    counts = {name: int(np.isin(model.topk(X, **({"k": 10} | how))[0], gone).sum()) for name, how in ways.items()}
    listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
    report(f"The 500 classes returned most often were removed. Of them returned, in {X.shape[0]:,} rows: {listed}.", "")
    model.classes.undo()


def upvoted(report: Report, model: MachModel, data: dict[str, Any]) -> None:
    """Bar 4: 100 upvoted pairs of rows and classes of theirs that the model did not find."""
    X, truth = data["X"], data["truth"]
    for rerank in (True, False):
        ids = model.topk(X, 10, rerank=rerank)[0]
        missed = [(n, k) for n, classes in enumerate(truth) for k in sorted(classes) if k not in ids[n, :5]]
        chosen = np.random.default_rng(2).permutation(len(missed))[:N_UPVOTED]
        rows, classes = (np.array(part) for part in zip(*(missed[i] for i in chosen), strict=True))
        others = np.setdiff1d(np.arange(len(truth)), rows)
        begin = time.perf_counter()
        model.classes.upvote(X[rows], classes)
        seconds = time.perf_counter() - begin
        after = model.topk(X, 10, rerank=rerank)[0]
        found = 100 * np.mean([k in after[n, :5] for n, k in zip(rows, classes, strict=True)])
        was, now = (precision(answer, truth, 1, others) for answer in (ids, after))
        report(
            f"- {'re-ranked' if rerank else 'plain'}: {len(rows)} pairs not in the top 5, in {seconds:.2f} s: "
            f"{found:.0f} % are now; P@1 of the other {len(others):,} rows {was:.2f} before, {now:.2f} after "
            f"({now - was:+.2f})."
        )
        model.classes.undo()
    report("")


def fewer(report: Report, model: MachModel, data: dict[str, Any]) -> None:
    """Restricted queries and fewer repetitions."""
    X, truth = data["X"], data["truth"]
    report("| a single query, plain | ms |", "|---|---:|")
    report(f"| all classes | {milliseconds(lambda i: model.topk(X[[i]], 10, rerank=False)):.2f} |")
    for n in (10, 1000, 10_000):
        drawn = np.random.default_rng(3).choice(model.n_classes, n, replace=False)
        subset = model.classes.subset(drawn)
        report(
            f"| {n:,} allowed, prepared once | "
            f"{milliseconds(lambda i, s=subset: model.topk(X[[i]], 10, rerank=False, allowed=s)):.2f} |"
        )
    report("", "| repetitions | P@1 | ms |", "|---:|---:|---:|")
    for n in range(1, model.n_repetitions + 1):
        ids = model.topk(X, 1, rerank=True, repetitions=n)[0]
        took = milliseconds(lambda i, n=n: model.topk(X[[i]], 10, repetitions=n))
        report(f"| {n} | {precision(ids, truth, 1, np.arange(len(truth))):.2f} | {took:.2f} |")
    report("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, default=SHARED / "train.txt.xz")
    parser.add_argument("--test", type=Path, default=SHARED / "test.txt.xz")
    parser.add_argument("--work", type=Path, default=Path("runs/edits"))
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    rows, D, K = read(options.train)
    test, _, _ = read(options.test)
    new, ids, examples = split(rows, K)
    is_new = np.isin(np.arange(K), new)
    K0 = K - len(new)
    base = [([int(ids[k]) for k in classes], rest) for classes, rest in rows if not is_new[classes].any()]
    if not (work / "base").exists():
        write(work / "base.txt", base, D, K0)
        write(work / "full.txt", rows, D, K)
        write(work / "test.txt", [([], rest) for _, rest in test], D, K0)
    runs = [train(work, name, options.settings) for name in ("base", "full")]
    full = mach.load(runs[1])
    data: dict[str, Any] = {
        "X": matrix(test, D),
        "truth": [{int(ids[k]) for k in classes} for classes, _ in test],
        "examples": matrix([rows[n] for _, n in examples], D),
        "owners": np.array([k - K0 for k, _ in examples]),
        "n_new": len(new),
    }
    report = Report()
    report(
        "# Classes added, removed and taught without training: gnd-core",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. By `benchmarks/edits.py`: {len(new):,} of {K:,} "
        f"classes are new, drawn from those with {FEWEST} to {MOST} training rows; the base run is trained on the "
        f"{len(base):,} rows without them, the full retrain on all {len(rows):,}. {len(test):,} test rows.",
        "",
        "## Added by 3 examples each",
        "",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        shutil.copytree(runs[0], path, ignore=shutil.ignore_patterns("classes"))
        model = mach.load(path)
        added(report, model, full, data, ids)
        report("## Removed", "")
        removed(report, model, data["X"])
        report("## Upvoted", "")
        upvoted(report, model, data)
        report("## Restricted, and fewer repetitions", "")
        fewer(report, model, data)
        n_bytes = max(file.stat().st_size for file in (path / "classes").glob("*.safetensors"))
        report(f"The largest version has {n_bytes:,} bytes on disk.")
    if options.write:
        target = Path(__file__).parent / "results" / f"edits-{datetime.date.today()}.md"
        target.write_text("\n".join(report.lines) + "\n")


if __name__ == "__main__":
    main()
