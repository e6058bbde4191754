"""Tables and plots of docs/results.md from the newest results of the other benchmarks; measures nothing itself.

    .venv/bin/python benchmarks/report.py

Replaces what stands between ``<!-- NAME -->`` and ``<!-- end -->`` in docs/results.md, and writes docs/results-*.svg:
accuracy against processor seconds, bytes and query time of ours and peers (peers-*.json), and against R
(accuracy-*.json).
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
from matplotlib.ticker import LogLocator

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
DATA_SETS = ("gnd-core", "tate-leaf", "tib-gnd", "short", "go-gene2pubmed", "debfiles-name2dir")
SHOWN = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5")
COSTS = {"CPU s": ("train_cpu_seconds", 1), "model MB": ("model_bytes", 1e6), "single, ms": ("single_ms", 1)}
OURS = "mach:"
FRONT = ("gnd-core", "tate-leaf", "tib-gnd", "short")  # that are drawn
MARKERS = {  # of the peers that are drawn
    "omikuji-parabel": "s",
    "omikuji-parabel-1": "<",
    "omikuji-bonsai": "D",
    "pecos-xrlinear": "o",
    "pecos-xrlinear-beam-50": ">",
    "pecos-xrlinear-3-trees": "^",
    "libmultilabel-tree": "v",
    "napkinxc-plt": "x",
}


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
    """A panel a data set that `front.py` measures; the efforts of ours are joined, cheapest first."""
    for key, unit, label, file in (
        ("train_cpu_seconds", 1, "processor seconds of training", "seconds"),
        ("model_bytes", 1e6, "MB of the stored model", "bytes"),
        ("single_ms", 1, "milliseconds of a single query", "queries"),
    ):
        figure, axes = plt.subplots(1, len(tables), figsize=(3.1 * len(tables), 3.6), squeeze=False)
        for axis, (name, entrants) in zip(axes.flat, tables.items(), strict=True):
            points = {
                entrant: (cost / unit, 100 * precision)
                for entrant, found in entrants.items()
                if (cost := median(found, key)) and (precision := median(found, "P@1"))
            }
            ours = sorted(point for entrant, point in points.items() if entrant.startswith(OURS))
            axis.plot(*zip(*ours, strict=True), "o-", color="crimson", label="mach: fast, balanced, best")
            for entrant, marker in MARKERS.items():
                if entrant in points:
                    axis.plot(*points[entrant], marker, color="gray", fillstyle="none", label=entrant)
            axis.set(xscale="log", xlabel=label, ylabel="P@1, %" if axis is axes.flat[0] else "", title=name)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
        shown = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.tight_layout(rect=(0, 0.14, 1, 1))
        figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=5, fontsize=8, frameon=False)
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
    plot_costs({name: found for name, found in tables.items() if name in FRONT})
    curves = {name: found["rows"] for name in DATA_SETS if (found := newest("accuracy", name)) is not None}
    if curves:
        plot_repetitions(curves)


if __name__ == "__main__":
    main()
