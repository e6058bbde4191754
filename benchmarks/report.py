"""Tables and plots of docs/results.md from the newest results of the other benchmarks; measures nothing itself.

    .venv/bin/python benchmarks/report.py

Replaces what stands between ``<!-- NAME -->`` and ``<!-- end -->`` in docs/results.md, and writes docs/results-*.svg:
accuracy against processor seconds and bytes of every entrant (peers-*.json), and against R (accuracy-*.json).
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
DATA_SETS = ("gnd-core", "tate-leaf", "tib-gnd", "short", "go-gene2pubmed", "debfiles-name2dir")
SHOWN = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5")
COSTS = {"CPU s": ("train_cpu_seconds", 1), "model MB": ("model_bytes", 1e6), "single, ms": ("single_ms", 1)}
OURS = "mach:"


def newest(kind: str, name: str) -> dict[str, Any] | None:
    """The newest JSON of a benchmark and data set; dates sort as text."""
    files = sorted((HERE / "results").glob(f"{kind}-{name}-20*.json"))
    return json.loads(files[-1].read_text()) if files else None


def median(entrant: dict[str, Any], key: str) -> float | None:
    values = [found[key] for found in entrant["rounds"] if found.get(key) is not None]
    return statistics.median(values) if values else None


def table(entrants: dict[str, Any]) -> str:
    lines = [f"| entrant | {' | '.join([*SHOWN, *COSTS])} |", "|---" * (1 + len(SHOWN) + len(COSTS)) + "|"]
    for name, entrant in sorted(entrants.items(), key=lambda item: -(median(item[1], "P@1") or 0)):
        measures = [f"{100 * (median(entrant, key) or 0):.1f}" for key in SHOWN]
        costs = [f"{(median(entrant, key) or 0) / unit:.{2 if 'ms' in key else 0}f}" for key, unit in COSTS.values()]
        bold = "**" if name.startswith(OURS) else ""
        lines.append(f"| {bold}{name}{bold} | {' | '.join(measures + costs)} |")
    return "\n".join(lines)


def plot_costs(tables: dict[str, dict[str, Any]]) -> None:
    """A panel a data set, at most three a row; the efforts of ours are joined, cheapest first."""
    for key, unit, label, file in (
        ("train_cpu_seconds", 1, "processor seconds of training", "seconds"),
        ("model_bytes", 1e6, "MB of the stored model", "bytes"),
        ("single_ms", 1, "milliseconds of a single query", "queries"),
    ):
        n_columns = min(3, len(tables))
        n_rows = -(-len(tables) // n_columns)
        figure, axes = plt.subplots(n_rows, n_columns, figsize=(4.2 * n_columns, 3.6 * n_rows), squeeze=False)
        for axis in axes.flat[len(tables) :]:
            axis.set_axis_off()
        for axis, (name, entrants) in zip(axes.flat, tables.items(), strict=False):
            points = {
                entrant: (cost / unit, 100 * precision)
                for entrant, found in entrants.items()
                if (cost := median(found, key)) and (precision := median(found, "P@1"))
            }
            ours = sorted(point for entrant, point in points.items() if entrant.startswith(OURS))
            axis.plot(*zip(*ours, strict=True), "-", color="crimson", linewidth=1)
            for entrant, point in points.items():
                color = "crimson" if entrant.startswith(OURS) else "gray"
                axis.plot(*point, "o", color=color)
                axis.annotate(entrant, point, fontsize=7, color=color, xytext=(3, 3), textcoords="offset points")
            axis.set(xscale="log", xlabel=label, ylabel="P@1, %", title=name)
        figure.tight_layout()
        figure.savefig(DOCS / f"results-{file}.svg", metadata={"Date": None})
        plt.close(figure)


def plot_repetitions(curves: dict[str, list[dict[str, Any]]]) -> None:
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for name, rows in curves.items():
        plain = [row for row in rows if not row["reranked"]]
        line = axis.plot([row["n_repetitions"] for row in plain], [row["P@1"] for row in plain], "o-", label=name)
        for row in rows:
            if row["reranked"]:
                axis.plot(row["n_repetitions"], row["P@1"], "*", color=line[0].get_color(), markersize=11)
    axis.set(xlabel="repetitions R (star: re-ranked)", ylabel="P@1")
    axis.legend()
    figure.tight_layout()
    figure.savefig(DOCS / "results-repetitions.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    page = (DOCS / "results.md").read_text()
    tables = {}
    for name in DATA_SETS:
        found = newest("peers", name)
        if found is not None:
            tables[name] = found["entrants"]
            block = f"<!-- {name} -->\n{table(found['entrants'])}\n<!-- end -->"
            page = re.sub(f"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, page, flags=re.S)
    (DOCS / "results.md").write_text(page)
    plot_costs(tables)
    curves = {name: found["rows"] for name in DATA_SETS if (found := newest("accuracy", name)) is not None}
    if curves:
        plot_repetitions(curves)


if __name__ == "__main__":
    main()
