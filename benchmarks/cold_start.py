"""Cold start: find a character by a description, by its name alone; beside BM25 over the same names.

    .venv/bin/python benchmarks/cold_start.py --write

Training rows are phrases sampled from the 33,513 class names (configs/cold-start.toml); no description of a training
row is read by anyone. All are asked the same held-out descriptions: of these 44 % lack a word, 46 % have words moved
or abbreviated, 33 % are mistyped. BM25 (k1 = 1.2, b = 0.75) searches the names as bags of words, of n-grams of
characters, or of both; cosine is that of the tf-idf features of the model. The last row trains on the names as a table
of classes (docs/class-texts.md), so that the signal *likeness* orders what the networks propose. The table goes to
benchmarks/results/cold-start-DATE.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from hardware import commit, processor

from mach.config import TextConfig, load_config
from mach.data import characters
from mach.data.text import TextFeatures
from mach.data.words import RULE, words_by
from mach.sketch.metrics import evaluate

TOP, BLOCK_ROWS = 5, 256
K1, B = 1.2, 0.75
HERE = Path(__file__).resolve().parent


def terms_of(text: str, config: TextConfig) -> list[str]:
    """Words and n-grams of characters as `mach.data.text` takes them."""
    terms: list[str] = []
    if config.words:
        terms += words_by(RULE)(text.lower())
    if config.characters:
        shortest, longest = config.characters
        for word in text.lower().split():
            padded = f" {word} "
            terms += [padded[i : i + n] for n in range(shortest, longest + 1) for i in range(len(padded) - n + 1)]
    return terms


def bm25(names: list[str], queries: list[str], config: TextConfig) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Terms of the queries and weights of the names' terms, transposed: their product are the scores."""
    numbers: dict[str, int] = {}
    bags = [Counter(numbers.setdefault(term, len(numbers)) for term in terms_of(name, config)) for name in names]
    indptr = np.cumsum([0, *map(len, bags)])
    ids = np.fromiter((term for bag in bags for term in bag), np.int64, indptr[-1])
    counts = np.fromiter((n for bag in bags for n in bag.values()), np.float64, indptr[-1])
    lengths = np.array([sum(bag.values()) for bag in bags])
    frequencies = np.bincount(ids, minlength=len(numbers))
    idf = np.log(1 + (len(names) - frequencies + 0.5) / (frequencies + 0.5))
    norm = K1 * (1 - B + B * np.repeat(lengths / lengths.mean(), np.diff(indptr)))
    weights = sp.csr_matrix((idf[ids] * counts * (K1 + 1) / (counts + norm), ids, indptr), (len(names), len(numbers)))
    asked = [Counter(numbers[term] for term in terms_of(query, config) if term in numbers) for query in queries]
    asked_ids = [term for bag in asked for term in bag]
    asked_counts = [float(n) for bag in asked for n in bag.values()]
    starts = np.cumsum([0, *map(len, asked)])
    return sp.csr_matrix((asked_counts, asked_ids, starts), (len(queries), len(numbers))), weights.T.tocsr()


def best(queries: sp.csr_matrix, columns: sp.csr_matrix) -> np.ndarray:
    """Ids of the largest products, shape (N, TOP)."""
    found = []
    for begin in range(0, queries.shape[0], BLOCK_ROWS):
        scores = (queries[begin : begin + BLOCK_ROWS] @ columns).toarray()
        top = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
        order = np.argsort(-np.take_along_axis(scores, top, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(top, order, axis=1))
    return np.concatenate(found)


def cosine(names: list[str], queries: list[str], config: TextConfig) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    features = TextFeatures(config).fit(name.lower() for name in names)

    def matrix(texts: list[str]) -> sp.csr_matrix:
        indptr, indices, values = features.transform(texts)
        return sp.csr_matrix((values, indices, indptr), (len(texts), features.n_features))

    return matrix(queries), matrix([name.lower() for name in names]).T.tocsr()


def by_table(names: list[str], queries: list[str], folder: Path) -> tuple[np.ndarray, float, float]:
    """A run of nothing but a table of classes: its answers, milliseconds a query, and processor seconds of training."""
    table, config = folder / "names.csv", folder / "table.toml"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "name"), *((f"c{k}", name) for k, name in enumerate(names))])
    data = f'train = "{table}"\nclasses = "{table}"\ncache = "{folder / "cache"}"\n'
    columns = 'class_column = "id"\nstrong_columns = ["name"]\n'
    config.write_text(f"[data]\n{data}{columns}[text]\nwords = [1, 1]\ncharacters = [3, 4]\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    mach("train", str(config), str(folder / "table"), "--effort", "fast")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    import mach as package

    model = package.load(str(folder / "table"))
    model.topk(queries[:512], TOP)
    started = time.process_time()
    ids, _ = model.topk(queries, TOP)
    milliseconds = 1e3 * (time.process_time() - started) / len(queries)
    return ids, milliseconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def mach(*arguments: str) -> str:
    command = [sys.executable, "-c", "from mach.cli import main; main()", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE.parent / "configs/cold-start.toml")
    parser.add_argument("--run", type=Path, help="keep the run here")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    names = characters.class_names()
    number = {name: k for k, name in enumerate(names)}
    rows = list(characters.rows("test"))
    queries = [text for text, _ in rows]
    pairs = [(n, number[name]) for n, (_, right) in enumerate(rows) for name in right]
    truth = sp.csr_array((np.ones(len(pairs)), tuple(zip(*pairs, strict=True))), (len(rows), len(names)))
    text = load_config(options.config).text
    table: list[tuple[str, dict[str, float]]] = []

    def add(name: str, ids: np.ndarray, milliseconds: float) -> None:
        found = evaluate(ids, truth, ks=(1, 5))
        table.append((name, {"P@1": 100 * found["P@1"], "hit@5": 100 * found["hit@5"], "ms a query": milliseconds}))
        print(table[-1], flush=True)

    kinds: dict[str, Any] = {
        "BM25, words": (bm25, TextConfig()),
        "BM25, n-grams of 3 and 4 characters": (bm25, TextConfig(words=None, characters=[3, 4])),
        "BM25, both": (bm25, TextConfig(characters=[3, 4])),
        "cosine of the model's features": (cosine, text),
    }
    for name, (method, config) in kinds.items():
        matrices = method(names, queries, config)
        started = time.process_time()
        add(name, best(*matrices), 1e3 * (time.process_time() - started) / len(rows))
    with tempfile.TemporaryDirectory() as folder:
        run = str(options.run or Path(folder, "run"))
        overrides = [word for override in options.overrides for word in ("--set", override)]
        mach("train", str(options.config), run, *overrides)
        curve, info = (
            json.loads(mach("evaluate", run, "--at", "1,5", "--json")),
            json.loads(mach("info", run, "--json")),
        )
        import mach as package

        model = package.load(run)
        model.search(queries[:512], TOP)
        started = time.process_time()
        model.search(queries[:2048], TOP)
        milliseconds = 1e3 * (time.process_time() - started) / 2048
    for row in curve:
        name = f"mach, R = {row['n_repetitions']}{', re-ranked' if row['reranked'] else ''}"
        last = row is curve[-1]
        table.append(
            (name, {"P@1": row["P@1"], "hit@5": row["hit@5"]} | ({"ms a query": milliseconds} if last else {}))
        )
    with tempfile.TemporaryDirectory() as folder:
        ids, milliseconds, seconds = by_table(names, queries, Path(folder))
        add(f"mach, names as a table of classes, `--effort fast` ({seconds:.0f} CPU s)", ids, milliseconds)
    lines = [
        "# Cold start: characters by their names alone",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. K = {len(names):,}, {len(rows):,} held-out "
        "descriptions, all of them.",
        f"Command: `.venv/bin/python benchmarks/cold_start.py{''.join(f' --set {o}' for o in options.overrides)}`.",
        "",
        f"Training: {info['worker_seconds']:.0f} s summed over repetitions, on a machine shared with others. Weights "
        f"on disk: {info['weight_bytes'] / 1e6:.0f} MB, re-ranker {(info['reranker_bytes'] or 0) / 1e6:.0f} MB.",
        "Milliseconds are processor time a query in batches; the two stages of mach include reading the text.",
        "",
        "| | P@1 | a right answer in the top 5 | ms a query |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {found['P@1']:.1f} | {found['hit@5']:.1f} | "
        + (f"{found['ms a query']:.2f} |" if "ms a query" in found else "|")
        for name, found in table
    ]
    report = "\n".join(lines) + "\n"
    print(report)
    if options.write:
        (HERE / "results" / f"cold-start-{datetime.date.today()}.md").write_text(report)


if __name__ == "__main__":
    main()
