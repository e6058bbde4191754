"""Accuracy of all aggregates over the same bucket probabilities of trained runs, without re-ranking or prior.

    .venv/bin/python benchmarks/aggregates.py runs/gnd-core runs/tate-leaf --write

With --write the table goes to benchmarks/results/aggregates-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import numpy as np
from hardware import commit, processor

import mach
from mach.data.prepare import prepare
from mach.sketch.aggregates import AGGREGATES
from mach.sketch.decoder import Decoder
from mach.sketch.metrics import evaluate

CUTS = (1, 3, 5)


def rows_of(path: str) -> list[str]:
    model = mach.load(path)
    config = model.run.config
    store = prepare(config.data, config.text, config.data.test, like=model.run.reference())
    decoders = {name: Decoder(model.assignment, name) for name in AGGREGATES}
    found: dict[str, list[np.ndarray]] = {name: [] for name in decoders}
    for _, probs_NRB, _ in model.ensemble.answered(store):
        for name, decoder in decoders.items():
            found[name].append(decoder.topk(probs_NRB, max(CUTS)).ids_Nk)
    truth = store.class_indptr, store.class_ids
    lines = []
    for name, parts in found.items():
        measured = evaluate(np.concatenate(parts), truth, ks=CUTS)
        cells = " | ".join(f"{100 * measured[f'P@{k}']:.1f}" for k in CUTS)
        run = f"{Path(path).name}, {model.assignment.n_repetitions} functions, {store.n_rows:,} rows"
        lines.append(f"| {run} | {name} | {cells} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = [
        "# Aggregates",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. All test rows, the same networks for every",
        "aggregate, no re-ranking, no prior; percent. Command:",
        "`.venv/bin/python benchmarks/aggregates.py RUN ... --write`.",
        "",
        "| run | aggregate | P@1 | P@3 | P@5 |",
        "|---|---|---:|---:|---:|",
        *(line for path in options.runs for line in rows_of(path)),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        (Path(__file__).parent / "results" / f"aggregates-{datetime.date.today()}.md").write_text(text)


if __name__ == "__main__":
    main()
