"""What the names of classes are worth: the same rows with classes that are numbers, and with classes that have names.

    .venv/bin/python benchmarks/names.py tib-gnd --effort fast --write

Rows are the texts of ../shared/data/NAME, shuffled; test rows are all of its test. Both runs have the same settings,
features of the same words and networks of their own. Unseen are uses of classes without a training row. Times are
processor time, of training as a whole and of a query in a batch. With
--english a third run has the English names of gnd-core's vocabulary, which is part of tib-gnd's, as alternatives. The
table goes to benchmarks/results/names-NAME-EFFORT-DATE.md. A run that is there is not trained again, and its CPU
seconds are near 0.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import lzma
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from hardware import commit, processor

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared/data"
NAMES = {"tib-gnd": "label_names", "gnd-core": "label_names_en", "tate-leaf": "labels"}
FOLDER = HERE / "data/names"
FILES = {"numbers": "numbers.txt", "names": "names.csv", "english": "english.csv"}  # of the classes, by kind of run
PRECISIONS = ("P@1", "P@3", "P@5")


def lines(data_set: str, name: str) -> list[str]:
    with lzma.open(DATA / data_set / f"{name}.txt.xz", "rt", encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def write(data_set: str, folder: Path, share: float) -> None:
    """Rows as JSON lines, classes as a table with names and as a plain list of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    names = lines(data_set, NAMES[data_set])
    with (folder / "names.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "name"], *([f"class{k}", name] for k, name in enumerate(names))])
    if data_set == "tib-gnd":
        english = dict(zip(lines("gnd-core", "labels"), lines("gnd-core", "label_names_en"), strict=True))
        others = [english.get(key, key) for key in lines(data_set, "labels")]  # the id where there is no English name
        table = zip(names, ("" if other.startswith("gnd:") else other for other in others), strict=True)
        with (folder / "english.csv").open("w", encoding="utf-8", newline="") as file:
            rows = ([f"class{k}", *row] for k, row in enumerate(table))
            csv.writer(file).writerows([["id", "name", "alternatives"], *rows])
    (folder / "numbers.txt").write_text("".join(f"class{k}\n" for k in range(len(names))))
    for split in ("train", "test"):
        rows = list(zip(lines(data_set, f"{split}_texts"), lines(data_set, split)[1:], strict=True))
        if split == "train":
            random.Random(0).shuffle(rows)
            rows = rows[: round(share * len(rows))]
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for text, row in rows:
                classes = [f"class{k}" for k in row.partition(" ")[0].split(",") if k]
                file.write(json.dumps({"text": text, "classes": classes}, ensure_ascii=False) + "\n")


def train(folder: Path, kind: str, effort: str, overrides: list[str]) -> float:
    """Train one of the runs, unless it is there; processor seconds."""
    config = folder / f"{kind}.toml"
    classes = folder / FILES[kind]
    config.write_text(
        f'[data]\ntrain = "{folder / "train.jsonl"}"\ntest = "{folder / "test.jsonl"}"\nclasses = "{classes}"\n'
        f'cache = "{folder / "cache"}"\n[text]\nmin_rows = 2\nsublinear = true\n[training]\neffort = "{effort}"\n'
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(Path(sys.executable).with_name("mach")), "train", str(config), str(folder / f"{kind}-{effort}")]
    subprocess.run(command + [word for one in overrides for word in ("--set", one)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(run: Path) -> dict[str, float]:
    """P@k, recall of unseen classes, and milliseconds of a query."""
    import mach
    from mach.data.batch import read_classes, right_of
    from mach.data.prepare import prepare

    model = mach.load(run)
    config = model.run.config
    store = prepare(config.data, config.text, config.data.test, like=model.run.reference())
    model.topk(store.features(0, 64), 5)
    started = time.process_time()
    ids_N5, _ = model.topk(store, 5)
    milliseconds = 1e3 * (time.process_time() - started) / store.n_rows
    rows = np.arange(store.n_rows)
    right_N5 = right_of(store, rows, ids_N5)
    is_unseen_K = model.run.class_counts_K() == 0
    n_unseen = int(is_unseen_K[read_classes(store, rows)[0]].sum())
    found = {f"P@{k}": 100 * float(right_N5[:, :k].mean()) for k in (1, 3, 5)}
    found["unseen"] = 100 * float((right_N5 & is_unseen_K[ids_N5]).sum()) / max(n_unseen, 1)
    return found | {"ms": milliseconds, "MB": model.info()["reranker_bytes"] / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_set", choices=NAMES)
    parser.add_argument("--effort", default="best", choices=("fast", "balanced", "best"))
    parser.add_argument("--share", type=float, default=1.0, help="of the training rows")
    parser.add_argument("--english", action="store_true", help="of tib-gnd: a third run, with gnd-core's English names")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    folder = FOLDER / f"{options.data_set}-{options.share:g}"
    write(options.data_set, folder, options.share)
    table = [
        f"# Names of classes: {options.data_set}, `--effort {options.effort}`",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. Command: `.venv/bin/python benchmarks/names.py "
        f"{' '.join(sys.argv[1:])}`.",
        "",
        "| classes | P@1 / 3 / 5 | recall@5 of unseen | CPU s | ms a query | re-ranker MB |",
        "|---|---|---|---|---|---|",
    ]
    for kind in list(FILES)[: 3 if options.english else 2]:
        seconds = train(folder, kind, options.effort, options.overrides)
        found = measure(folder / f"{kind}-{options.effort}")
        precisions = " / ".join(f"{found[name]:.1f}" for name in PRECISIONS)
        table.append(
            f"| {kind} | {precisions} | {found['unseen']:.1f} | {seconds:.0f} | {found['ms']:.2f} | {found['MB']:.0f} |"
        )
        print(table[-1], flush=True)
    report = "\n".join(table) + "\n"
    print(report)
    if options.write:
        name = f"names-{options.data_set}-{options.effort}-{datetime.date.today()}.md"
        (HERE / "results" / name).write_text(report)


if __name__ == "__main__":
    main()
