"""How far probabilities can be trusted: reliability of a run's answers on its test rows, before and after calibration.

    mach train configs/calibrated.toml runs/gnd-core    # the file says how for tate-leaf
    .venv/bin/python benchmarks/reliability.py runs/gnd-core runs/tate-leaf --write

Every run needs a calibration (`mach train` with held-out rows, or `mach calibrate`). With --write, tables go to
benchmarks/results/reliability-DATE.md and the plot to docs/reliability.svg.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hardware import commit, processor

import mach
from mach.cli.report import plots
from mach.data.batch import right_of
from mach.data.prepare import prepare
from mach.model.accuracy import evaluate
from mach.model.ask import Ask
from mach.model.classes.answerer import Answerer
from mach.model.curves import TOP, Curve, calibration_error, pairs_of, reliability
from mach.sketch.aggregates import naive

ROOT = Path(__file__).parent.parent
TOPS = (1, 5, TOP)


@dataclass
class Case:
    """The answers of a run to its test rows: probabilities that classes are right, and whether they are."""

    name: str
    curve: Curve
    ranks: np.ndarray
    right: np.ndarray
    probabilities: dict[str, np.ndarray]

    def error(self, kind: str, k: int) -> float:
        is_in = self.ranks < k
        return 100 * calibration_error(self.probabilities[kind][is_in], self.right[is_in])


def cases_of(path: str) -> tuple[list[Case], list[str]]:
    """Plain and re-ranked answers, and what priors and tails do to accuracy."""
    model = mach.load(path)
    config = model.run.config
    store = prepare(config.data, config.text, config.data.test, like=model.run.reference())
    cases = []
    for rerank in (False, True) if model.reranker is not None else (False,):
        found = model.search(store, TOP, rerank=rerank)
        right_Nk = right_of(store, np.arange(store.n_rows), found.ids_Nk)
        scores, right, _ = pairs_of(found.ids_Nk, found.scores_Nk, right_Nk)
        curve = model.curve(rerank=rerank)
        probabilities = {"before": naive(scores, model.aggregate), "after": curve(scores)}
        name = f"{Path(path).name}, {'re-ranked' if rerank else 'plain'}"
        cases.append(Case(name, curve, np.nonzero(found.ids_Nk >= 0)[1], right, probabilities))
    lines, chosen = [], model.prior
    for prior, tail in ((0.0, 0.0), (chosen, 0.0), (chosen, 0.5), (chosen, 1.0)):
        model.classes.answerer = Answerer(model.ensemble, model.reranker, prior, model.classes.edits)
        for row in evaluate(model, store, curve=False, ask=Ask(tail=tail)):
            cells = [f"{100 * row[name]:.1f}" for name in ("P@1", "P@5", "nDCG@5", "PSP@1", "PSP@5")]
            is_new = not row["reranked"] or prior == chosen  # a re-ranker has its own prior
            if is_new:
                kind = "re-ranked" if row["reranked"] else f"prior {prior:g}"
                lines.append(f"| {Path(path).name} | {kind} | {tail:g} | {' | '.join(cells)} |")
    return cases, lines


def plot(cases: list[Case], path: Path) -> None:
    panels = {
        case.name: {
            kind: (reliability(probabilities, case.right), case.error(kind, TOP) / 100)
            for kind, probabilities in case.probabilities.items()
        }
        for case in cases
    }
    with plots.style():
        plots.reliability(panels).savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    cases, accuracy = [], []
    for path in options.runs:
        found, lines = cases_of(path)
        cases += found
        accuracy += lines
    lines = [
        "# Reliability of probabilities",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. All test rows of each run; curves fitted to rows",
        "held out of training. Expected calibration error (ECE) in percent, 15 bins of equal mass over pairs of query",
        "and class of the top k; before: the exponential of the score. Runs of configs/calibrated.toml; command:",
        "`.venv/bin/python benchmarks/reliability.py RUN ...`.",
        "",
        "| run | curve | pairs fitted to | ECE there, cross-validated | "
        + " | ".join(f"ECE@{k} before | after" for k in TOPS)
        + " |",
        "|---|---|---:|---:|" + "---:|---:|" * len(TOPS),
    ]
    for case in cases:
        cells = " | ".join(f"{case.error('before', k):.1f} | {case.error('after', k):.1f}" for k in TOPS)
        curve = case.curve
        lines.append(f"| {case.name} | {curve.method} | {curve.n_pairs:,} | {100 * curve.ece_after:.1f} | {cells} |")
    lines += ["", "Of the first class of every query: mean probability after, and share that is right:", ""]
    for case in cases:
        is_first = case.ranks == 0
        mean, share = case.probabilities["after"][is_first].mean(), case.right[is_first].mean()
        lines.append(f"- {case.name}: {mean:.3f}, {share:.3f}")
    lines += [
        "",
        "Prior (chosen by the same held-out rows; a re-ranker has its own) and tail, accuracy in percent:",
        "",
    ]
    lines += ["| run | scores | tail | P@1 | P@5 | nDCG@5 | PSP@1 | PSP@5 |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    lines += accuracy
    for case in cases:
        lines += [
            "",
            f"{case.name}, k = {TOP}, after:",
            "",
            "| pairs | mean probability | share right |",
            "|---:|---:|---:|",
        ]
        table = reliability(case.probabilities["after"], case.right)
        lines += [f"| {n:,.0f} | {mean:.3f} | {share:.3f} |" for n, mean, share in table]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        (Path(__file__).parent / "results" / f"reliability-{datetime.date.today()}.md").write_text(text)
        plot(cases, ROOT / "docs" / "reliability.svg")


if __name__ == "__main__":
    main()
