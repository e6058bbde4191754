"""Fine-tune on the last fifth of a data set, with classes that the first four fifths do not have.

    .venv/bin/python benchmarks/finetune.py --data ../shared/data/tate-leaf --write

Classes are drawn as new until their rows make up a sixth of the training rows; these and others, to a fifth, are the
new data. A run is trained on the rest and fine-tuned on the new data in several ways; another is trained on all rows
from scratch. Test rows without any new class tell what is kept, those with one what is learned: recall@5 of new classes
alone. Every row goes through the same test rows. The table goes to benchmarks/results/finetune-NAME-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import lzma
import tempfile
from pathlib import Path

import numpy as np
from hardware import commit, processor
from rich.console import Console

from mach.config import Config, parse_config
from mach.data.batch import right_of
from mach.data.prepare import prepare
from mach.model.loading import load
from mach.runs.run import Run
from mach.training.conductor import train

NEW_SHARE, TUNING_SHARE = 1 / 6, 1 / 5
QUIET = Console(quiet=True)


def read(path: Path) -> tuple[list[list[int]], list[str], list[int]]:
    """Classes and features of every row, and the header's numbers."""
    with lzma.open(path, "rt") as file:
        header = [int(word) for word in file.readline().split()]
        lines = [line.rstrip("\n").partition(" ") for line in file]
    return [[int(k) for k in classes.split(",") if k] for classes, _, _ in lines], [line[2] for line in lines], header


def write(path: Path, rows: list[tuple[list[int], str]], n_features: int, n_classes: int) -> str:
    lines = [f"{','.join(map(str, sorted(classes)))} {features}" for classes, features in rows]
    path.write_text(f"{len(rows)} {n_features} {n_classes}\n" + "\n".join(lines) + "\n")
    return str(path)


def lay_out(data: Path, folder: Path, seed: int) -> tuple[dict[str, str], int, str]:
    """Files of old, new and all training rows and of test rows, new classes numbered last; how many are old."""
    generator = np.random.default_rng(seed)
    classes, features, (n_rows, n_features, n_classes) = read(data / "train.txt.xz")
    rows_of: list[list[int]] = [[] for _ in range(n_classes)]
    for n, row in enumerate(classes):
        for k in row:
            rows_of[k].append(n)
    is_tuning_N, is_new_K = np.zeros(n_rows, bool), np.zeros(n_classes, bool)
    for k in generator.permutation(n_classes):
        n_after = is_tuning_N.sum() + sum(not is_tuning_N[n] for n in rows_of[k])
        if rows_of[k] and n_after <= NEW_SHARE * n_rows and len(rows_of[k]) < 0.01 * n_rows:
            is_tuning_N[rows_of[k]], is_new_K[k] = True, True
    others = np.flatnonzero(~is_tuning_N)
    is_tuning_N[generator.choice(others, round(TUNING_SHARE * n_rows) - is_tuning_N.sum(), replace=False)] = True
    number_K = np.argsort(np.argsort(is_new_K, kind="stable"), kind="stable")
    n_old = int((~is_new_K).sum())

    def renumbered(rows: list[list[int]]) -> list[list[int]]:
        return [[int(number_K[k]) for k in row] for row in rows]

    rows = list(zip(renumbered(classes), features, strict=True))
    test_classes, test_features, _ = read(data / "test.txt.xz")
    files = {
        "old": write(folder / "old.txt", [rows[n] for n in np.flatnonzero(~is_tuning_N)], n_features, n_old),
        "new": write(folder / "new.txt", [rows[n] for n in np.flatnonzero(is_tuning_N)], n_features, n_classes),
        "all": write(folder / "all.txt", rows, n_features, n_classes),
    }
    known = [[k for k in row if k < n_old] for row in renumbered(test_classes)]
    files["test"] = write(
        folder / "test.txt", list(zip(renumbered(test_classes), test_features, strict=True)), n_features, n_classes
    )
    files["test-old"] = write(folder / "test-old.txt", list(zip(known, test_features, strict=True)), n_features, n_old)
    told = (
        f"{n_rows:,} training rows, of them {is_tuning_N.sum():,} new data; K = {n_classes:,}, of them "
        f"{is_new_K.sum():,} new classes, which stand in {sum(any(is_new_K[k] for k in r) for r in classes):,} rows."
    )
    return files, n_old, told


def measure(run: Run, files: dict[str, str], n_old: int, rerank: bool) -> dict[str, float]:
    """Percent: P@1 of test rows with old classes alone, P@1 of rows with a new one, recall@5 of new classes."""
    model, config = load(run.path), run.config
    source = files["test" if model.n_classes > n_old else "test-old"]
    test = prepare(config.data, config.text, source, like=run.reference())
    whole = prepare(config.data, config.text, files["test"])
    ids_Nk = model.search(test, 5, rerank=rerank).ids_Nk
    right_Nk = right_of(whole, np.arange(whole.n_rows), ids_Nk)
    is_new = whole.class_ids >= n_old
    row_of = np.repeat(np.arange(whole.n_rows), np.diff(whole.class_indptr))
    n_new_N = np.bincount(row_of[is_new], minlength=whole.n_rows)
    return {
        "P@1 all": 100 * right_Nk[:, 0].mean(),
        "P@1 old": 100 * right_Nk[n_new_N == 0, 0].mean(),
        "P@5 old": 100 * right_Nk[n_new_N == 0].mean(),
        "P@1 new": 100 * right_Nk[n_new_N > 0, 0].mean(),
        "new R@5": 100 * (right_Nk & (ids_Nk >= n_old)).sum() / n_new_N.sum(),
    }


def learn(config: Config, path: Path) -> tuple[Run, float]:
    """A finished run and the seconds of its workers."""
    run = train(config, path).run
    return run, sum(run.repetition(r).summary().worker_seconds for r in run.finished())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="keep files and runs here")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--quick", action="store_true", help="defaults, no replay and a full training only")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files, n_old, told = lay_out(options.data, folder, options.seed)
        print(told, flush=True)
        base = {"data": {"cache": str(folder / "cache")}, "launch": {"workers": options.workers}}

        def config(source: str, overrides: list[str]) -> Config:
            tree = {"data": base["data"] | {"train": source}, "launch": base["launch"]}
            return parse_config(tree, "benchmark", overrides)

        before, _ = learn(config(files["old"], options.overrides), folder / "before")
        rate, epochs = before.config.training.rate, before.config.training.epochs
        start = [f"training.start={before.path}"]

        def tuned(share: float, n_epochs: int, replay: float) -> list[str]:
            return [*start, f"training.rate={rate * share}", f"training.epochs={n_epochs}", f"training.replay={replay}"]

        ways: dict[str, tuple[str, list[str]]] = {
            "before": (files["old"], options.overrides),
            "fine-tuned (defaults)": (files["new"], start),
            "fine-tuned, no replay": (files["new"], [*start, "training.replay=0"]),
            "all rows from scratch": (files["all"], options.overrides),
        }
        if not options.quick:
            choices = [(1.0, 1.0, 1.0), (1 / 3, 1.0, 1.0), (1 / 10, 1.0, 1.0), (1.0, 0.5, 1.0), (1 / 3, 0.5, 1.0)]
            choices += [(1.0, 1.0, 0.0), (2 / 3, 1.0, 0.3), (2 / 3, 1.0, 3.0)]
            for share, part, replay in choices:
                n_epochs = max(1, round(part * epochs))
                name = f"rate x {share:.2g}, {n_epochs} epochs, replay {replay:g}"
                ways[name] = (files["new"], tuned(share, n_epochs, replay))
        rows = []
        for number, (name, (source, overrides)) in enumerate(ways.items()):
            path = folder / ("before" if name == "before" else f"run{number}")
            run, seconds = learn(config(source, overrides), path)
            for rerank in [False, True] if run.config.reranking.candidates else [False]:
                figures = measure(run, files, n_old, rerank)
                rows.append((name + (", re-ranked" if rerank else ""), figures, seconds))
                shown = " ".join(f"{key} {value:.1f}" for key, value in figures.items())
                print(f"{rows[-1][0]:45} {shown}  {seconds:.0f} s", flush=True)
    names = list(rows[0][1])
    lines = [
        f"# Fine-tuning on {options.data.name}",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. Command: `.venv/bin/python benchmarks/finetune.py "
        f"--data ../shared/data/{options.data.name}{''.join(f' --set {o}' for o in options.overrides)}`.",
        "",
        told,
        f"R = {before.config.hashing.repetitions}, J = {before.config.hashing.heads}, "
        f"B = {before.config.hashing.buckets}, hidden {before.config.network.hidden}, rate {rate:g}, {epochs} epochs.",
        "Old: test rows without a new class; new: with one. R@5: recall of the new classes alone. Seconds are summed",
        "over repetitions, on a machine shared with others.",
        "",
        "| | " + " | ".join(names) + " | worker s |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{figures[n]:.1f}" for n in names) + f" | {seconds:.0f} |"
        for name, figures, seconds in rows
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        name = f"finetune-{options.data.name}-{datetime.date.today()}.md"
        (Path(__file__).parent / "results" / name).write_text(text)


if __name__ == "__main__":
    main()
