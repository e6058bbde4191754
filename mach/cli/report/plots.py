"""Plots of a report, drawn by matplotlib: as SVG to stand in a page of any colours, and as PNG.

matplotlib is optional (``pip install 'mach-classifier[report]'``). Figures are made without pyplot, so that no window
system and no state of the caller is touched.
"""

from __future__ import annotations

import colorsys
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mach.cli.report.diagnosis import BucketLoad, Reliability
from mach.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE = "#222222", "#cccccc"  # of text and of grids; in a page they take its colours
COLOURS = ("#3b82c4", "#d9772b", "#2a9d77", "#b45fb4", "#c9474f", "#8f8a2c")
BEFORE, AFTER = "#d1495b", "#3b82c4"
MOST_NAMED = 8  # repetitions that a legend names
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mach",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.titlesize": 10.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.markersize": 4.0,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


def style() -> AbstractContextManager[None]:
    """The block within which figures are drawn and saved; ConfigError when matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(f"plots need matplotlib ({error}): pip install 'mach-classifier[report]'") from error
    return mpl.rc_context(_STYLE)


def training(metrics_R: Sequence[list[dict[str, Any]]]) -> Figure:
    """Loss, bucket precision and rows a second by epoch, a line a repetition's ``metrics.jsonl``; validation dashed."""
    panels = {
        "loss": ("loss", "validation_loss"),
        "bucket precision, %": ("bucket_precision", "validation_bucket_precision"),
        "rows a second": ("rows_per_second",),
    }
    figure, axes = _figure(len(panels))
    colours = shades(len(metrics_R))
    for panel, (title, keys) in zip(axes, panels.items(), strict=True):
        for r, rows in enumerate(metrics_R):
            for key, dashes in zip(keys, ("-", "--"), strict=False):
                points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    epochs, values = np.array(points, dtype=float).T
                    values = 100 * values if "%" in title else values
                    label = f"repetition {r}" if key == "loss" and len(metrics_R) <= MOST_NAMED else None
                    panel.plot(epochs, values, dashes, marker=".", color=colours[r], label=label)
        panel.set(title=title, xlabel="epoch")
        _whole_numbers(panel)
    if any("validation_loss" in row for rows in metrics_R for row in rows):
        axes[0].plot([], [], "--", color=INK, label="validation rows")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend()
    axes[-1].yaxis.set_major_formatter("{x:,.0f}")
    return figure


def repetitions(curve: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy by the number of repetitions, a curve of `mach.model.accuracy.evaluate`; a star is re-ranked."""
    measures = ("P", "nDCG", "PSP")
    cuts = [int(name.partition("@")[2]) for name in curve[0] if name.startswith("P@")]
    figure, axes = _figure(len(measures))
    plain = [row for row in curve if not row["reranked"]]
    for panel, measure in zip(axes, measures, strict=True):
        for colour, k in zip(COLOURS, cuts, strict=False):
            key = f"{measure}@{k}"
            sizes = [row["n_repetitions"] for row in plain]
            panel.plot(sizes, [100 * row[key] for row in plain], "o-", color=colour, label=key)
            for row in curve:
                if row["reranked"]:
                    panel.plot(row["n_repetitions"], 100 * row[key], "*", color=colour, markersize=11)
        panel.set(title=f"{measure}, %", xlabel="repetitions R")
        panel.set_ylim(top=min(panel.get_ylim()[1], 100.5))
        _whole_numbers(panel)
        panel.legend()
    return figure


def reliability(panels: Mapping[str, Reliability]) -> Figure:
    """Share that is right by probability, before and after calibration, a panel a title; the diagonal is perfect."""
    figure, axes = _figure(len(panels), width=3.6, height=3.5)
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        panel.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.5)
        for kind, (bins, error) in curves.items():
            _, mean, share = bins.T
            label = f"{kind}: ECE {100 * error:.1f} %"
            panel.plot(mean, share, "o-", color=BEFORE if kind == "before" else AFTER, label=label)
        panel.set(title=title, xlabel="probability", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
        panel.legend()
    return figure


def load(buckets: BucketLoad) -> Figure:
    """How many buckets hold so many classes, and so many training rows, a line a hash function."""
    figure, axes = _figure(2, width=4.6)
    colours = shades(len(buckets.functions))
    panels = {"classes of a bucket": buckets.classes_RB, "training rows of a bucket": buckets.rows_RB}
    for panel, (title, counts_RB) in zip(axes, panels.items(), strict=True):
        edges, scale = _edges(counts_RB)
        for colour, counts_B in zip(colours, counts_RB, strict=True):
            heights, _ = np.histogram(counts_B, edges)
            panel.stairs(heights, edges, color=colour, linewidth=1.2)
        panel.set(title=title, ylabel="buckets", xscale=scale)
        if scale == "linear":
            _whole_numbers(panel)
        panel.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def recall(groups: Sequence[dict[str, Any]], k: int) -> Figure:
    """Recall@k of classes by their training rows, in groups of `mach.cli.report.diagnosis.ClassRecall`."""
    figure, (panel,) = _figure(1, width=max(3.6, 0.58 * len(groups) + 1))
    values = [100 * group["recall"] for group in groups]
    bars = panel.bar([f"{group['least']:,}+" for group in groups], values, color=COLOURS[0], width=0.7)
    panel.bar_label(bars, [f"{value:.0f}" for value in values], color=INK, fontsize=8)
    panel.set(title=f"recall@{k}, %", xlabel="training rows of the class", ylim=(0, 105))
    panel.grid(visible=False, axis="x")
    return figure


def compared(curves: Mapping[str, Sequence[dict[str, Any]]], cuts: Sequence[int]) -> Figure:
    """P@k by the number of repetitions, a panel a cut-off and a line a run; stars are re-ranked."""
    figure, axes = _figure(len(cuts))
    for panel, k in zip(axes, cuts, strict=True):
        for colour, (label, curve) in zip(shades(len(curves)), curves.items(), strict=True):
            points = [(row["n_repetitions"], 100 * row[f"P@{k}"]) for row in curve if not row["reranked"]]
            panel.plot(*np.array(points).T, "o-", color=colour, label=label)
            for row in curve:
                if row["reranked"]:
                    panel.plot(row["n_repetitions"], 100 * row[f"P@{k}"], "*", color=colour, markersize=11)
        panel.set(title=f"P@{k}, %", xlabel="repetitions R")
        panel.set_ylim(top=min(panel.get_ylim()[1], 100.5))
        _whole_numbers(panel)
        panel.legend()
    return figure


def recalls(groups: Mapping[str, Sequence[dict[str, Any]]], k: int) -> Figure:
    """Recall@k of classes by their training rows, a line a run."""
    figure, (panel,) = _figure(1, width=5.5)
    for colour, (label, rows) in zip(shades(len(groups)), groups.items(), strict=True):
        points = [(max(row["least"], 0.5), 100 * row["recall"]) for row in rows]
        panel.plot(*np.array(points).T, "o-", color=colour, label=label)
    panel.set(title=f"recall@{k}, %", xlabel="training rows of the class, at least", ylim=(0, 105))
    panel.set_xscale("log", base=2)  # as the groups are
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.legend()
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as ``<svg>`` elements for an HTML page, one a panel, in the page's own ink.

    The name goes before the ids that the element refers to: those of several figures in a page must differ.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.S)  # styles would hold for the whole page
    text = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace(LINE, "var(--line)").strip()
    inside = text[text.index(">") + 1 : text.rindex("</svg>")].strip()
    n_panels, (width, height) = len(figure.subfigs), 72 * figure.get_size_inches()
    width /= n_panels
    views = "".join(
        f'<svg viewBox="{i * width:g} 0 {width:g} {height:g}"><use href="#{name}-all"></use></svg>'
        for i in range(n_panels)
    )
    return f'<svg class="all" width="0" height="0"><g id="{name}-all">{inside}</g></svg>{views}'


def png(figure: Figure) -> bytes:
    """The figure as a PNG file on white, 150 dots an inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def shades(n: int) -> list[tuple[float, float, float]]:
    """Colours of n lines, of one lightness, so that all are seen on white and on black."""
    return [colorsys.hls_to_rgb((0.58 + 0.85 * i / max(n, 1)) % 1.0, 0.52, 0.55) for i in range(n)]


def _figure(n_panels: int, width: float = 3.5, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_panels, height), layout="constrained")
    panels = figure.subfigures(1, n_panels, squeeze=False)[0]  # of equal widths, so that a page can set them anew
    return figure, [panel.subplots() for panel in panels]


def _whole_numbers(panel: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def _edges(counts_RB: NDArray[np.int64]) -> tuple[NDArray[Any], Literal["linear", "log"]]:
    """Edges of at most 40 bins and their scale: of whole numbers, or of equal ratios where few buckets hold most."""
    low, high = int(counts_RB.min()), int(counts_RB.max())
    if high > 10 * max(np.median(counts_RB), 1):
        return np.geomspace(max(low, 1) * 0.99, high * 1.01, 41), "log"
    width = -(-(high - low + 1) // 40)
    return np.arange(low, high + width + 1, width) - 0.5, "linear"
