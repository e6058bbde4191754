"""How a run of R repetitions scales to W workers: the real driver and scheduler on simulated workers.

    .venv/bin/python benchmarks/scaling.py --write

Only the workers are simulated (`simulation.py`); about two minutes on one core. Shard times are drawn around
measured ones: with --run RUN those in the DONE files of a run, else those of gnd-core. With --write, the tables go to
benchmarks/results/scaling-DATE.md and the plots to docs/scaling-efficiency.svg and docs/scaling-speedup.svg.
"""

from __future__ import annotations

import argparse
import datetime
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from hardware import commit, processor
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from simulation import SimulatedPool, least_makespan, makespan, static_makespan

from mach.runs.run import Run

SLOW_SHARE, SLOWNESS = 0.02, 3.0  # of the workers
LIFE = 50  # shard times between two deaths of a worker, on average
START_SECONDS, CHECKPOINT_SECONDS, SAVE_SECONDS = 3.0, 30.0, 1.0
REPETITIONS = (32, 64, 128, 256, 1024)
WORKERS = (1, 4, 16, 64, 256, 1024)
MANY = 256  # workers: from here on one seed is enough, and affordable
SEEDS = 3
BAR = 0.95  # efficiency while there are at least four shards a worker
ROOT = Path(__file__).parent.parent
SERIES = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f")
INK, GREY = "#222222", "#8a8a8a"


@dataclass
class Case:
    name: str
    seconds: float
    deviation: float


@dataclass
class Outcome:
    case: Case
    n_workers: int
    n_repetitions: int
    efficiency: list[float]
    n_deaths: float
    repeated: float  # share of the work
    speed_up: float  # over one worker of speed 1 that never dies and needs no start

    @property
    def mean(self) -> float:
        return float(np.mean(self.efficiency))


def drawn(case: Case, n_workers: int, n_repetitions: int, seed: int) -> SimulatedPool:
    random = np.random.default_rng([seed, n_workers, n_repetitions])
    speeds = np.where(random.random(n_workers) < SLOW_SHARE, 1.0 / SLOWNESS, 1.0)
    times = case.seconds * np.maximum(0.1, 1.0 + case.deviation * random.standard_normal(n_repetitions))
    return SimulatedPool(
        speeds.tolist(),
        times.tolist(),
        start_seconds=START_SECONDS,
        save_seconds=SAVE_SECONDS,
        checkpoint_seconds=CHECKPOINT_SECONDS,
        report_seconds=max(0.5, n_workers / 400, case.seconds / 40),
        seconds_between_deaths=LIFE * case.seconds,
        seed=seed,
    )


def simulate(case: Case, n_workers: int, n_repetitions: int) -> Outcome:
    found = []
    for seed in range(1 if n_workers >= MANY else SEEDS):
        pool = drawn(case, n_workers, n_repetitions, seed)
        seconds, work = makespan(pool), sum(pool.shard_seconds)
        found.append((least_makespan(pool) / seconds, pool.n_deaths, pool.trained_seconds / work - 1.0, work / seconds))
    means = np.mean(found, axis=0)
    return Outcome(
        case, n_workers, n_repetitions, [e for e, *_ in found], float(means[1]), float(means[2]), float(means[3])
    )


def measured(run: str) -> Case:
    """The times in the DONE files of a run."""
    opened = Run.open(run)
    seconds = [opened.repetition(r).summary().worker_seconds for r in opened.finished()]
    return Case(Path(run).name, float(np.mean(seconds)), float(np.std(seconds) / np.mean(seconds)))


def table_of(outcomes: list[Outcome]) -> list[str]:
    lines = [
        "| workers | R | R/W | efficiency, mean | least | deaths | work repeated | speed-up |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for o in outcomes:
        ratio = o.n_repetitions / o.n_workers
        lines.append(
            f"| {o.n_workers:,} | {o.n_repetitions:,} | {ratio:g} | {o.mean:.3f} | {min(o.efficiency):.3f} | "
            f"{o.n_deaths:.1f} | {100 * o.repeated:.1f} % | {o.speed_up:.1f} |"
        )
    return lines


def verdict(outcomes: list[Outcome]) -> str:
    """Whether the bar is met."""
    enough = [o for o in outcomes if o.n_repetitions >= 4 * o.n_workers]
    short = [o for o in enough if o.mean < BAR]
    worst = min(enough, key=lambda o: o.mean)
    line = (
        f"Efficiency >= {BAR} while R >= 4 W: {len(enough) - len(short)} of {len(enough)} rows; worst {worst.mean:.3f}"
    )
    return f"{line} (W = {worst.n_workers}, R = {worst.n_repetitions})."


def slow_worker_table(cases: list[Case]) -> list[str]:
    """16 equal shards, one of W workers three times slower."""
    lines = [
        "| W | " + " | ".join(f"over the bound, {c.seconds:.0f} s | static / ours" for c in cases) + " |",
        "|---:|" + "---:|---:|" * len(cases),
    ]
    for n_workers in range(2, 17):
        cells = []
        for case in cases:
            pool = SimulatedPool(
                [1.0 / SLOWNESS, *[1.0] * (n_workers - 1)], [case.seconds] * 16, START_SECONDS, report_seconds=0.5
            )
            seconds = makespan(pool)
            static = START_SECONDS + static_makespan(pool)
            cells.append(f"{seconds / least_makespan(pool):.2f} | {static / seconds:.2f}")
        lines.append(f"| {n_workers} | " + " | ".join(cells) + " |")
    return lines


def plot_efficiency(outcomes: list[Outcome], cases: list[Case]) -> Figure:
    figure, panels = pyplot.subplots(1, len(cases), figsize=(8.2, 3.4), sharey=True)
    labels = {16: ("R = 16 W", (5, 6)), 4: ("R = 4 W", (7, -4)), 1: ("R = W", (7, -3))}
    for axes, case in zip(panels, cases, strict=True):
        axes.axhline(BAR, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(f"{BAR}", (1750, BAR), (0, 3), textcoords="offset points", color=GREY)
        for (ratio, (text, offset)), colour in zip(labels.items(), SERIES, strict=False):
            points = [o for o in outcomes if o.case is case and o.n_repetitions == ratio * o.n_workers]
            axes.plot([o.n_workers for o in points], [o.mean for o in points], "o-", color=colour, markersize=4)
            end = (points[-1].n_workers, points[-1].mean)
            axes.annotate(text, end, offset, textcoords="offset points", color=colour)
        axes.set_title(f"simulated, shards of {case.seconds:.0f} s", loc="left", color=INK)
        finish(axes)
        axes.set_xlim(2.5, 3600)
        axes.set_ylim(0.45, 1.06)
        axes.set_yticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    panels[0].set_ylabel("efficiency: lower bound / time taken")
    figure.tight_layout()
    return figure


def plot_speed_up(outcomes: list[Outcome], case: Case) -> Figure:
    figure, axes = pyplot.subplots(figsize=(5.6, 4.2))
    axes.plot([1, 1024], [1, 1024], color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate("ideal", (420, 420), (-32, 6), textcoords="offset points", color=GREY)
    for n_repetitions, colour in zip((1024, 256, 64), SERIES, strict=False):
        points = [o for o in outcomes if o.case is case and o.n_repetitions == n_repetitions]
        axes.plot([o.n_workers for o in points], [o.speed_up for o in points], "o-", color=colour, markersize=4)
        last = points[-1]
        axes.annotate(
            f"R = {n_repetitions:,}", (last.n_workers, last.speed_up), (7, -3), textcoords="offset points", color=colour
        )
    axes.plot([25], [28], "D", color=INK, markersize=6)
    axes.annotate(
        "published MACH, measured:\n7 h on 1 GPU, 15 min on 25 (28 times)",
        (25, 28),
        (1.25, 150),
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
        color=INK,
    )
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"])
    axes.set_ylabel("speed-up over one worker")
    axes.set_title(f"simulated, shards of {case.seconds:.0f} s", loc="left", color=INK)
    finish(axes)
    axes.set_xlim(0.85, 3400)
    figure.tight_layout()
    return figure


def finish(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(WORKERS, [f"{n:,}" for n in WORKERS])
    axes.minorticks_off()
    axes.set_xlabel("workers")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure: Figure, name: str, preview: Path | None) -> None:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mach"}):
        figure.savefig(ROOT / "docs" / f"{name}.svg", metadata={"Date": None})
    if preview:
        figure.savefig(preview / f"{name}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="take the shard times from this run's DONE files")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--preview", type=Path, help="also write the plots as PNG into this folder")
    options = parser.parse_args()
    began = time.perf_counter()
    first = measured(options.run) if options.run else Case("gnd-core", 40.0, 0.03)
    cases = [first, Case("long", 600.0, 0.03)]
    combinations = sorted(
        {(w, r) for w in WORKERS for r in REPETITIONS} | {(w, n * w) for n in (1, 4, 16) for w in WORKERS}
    )
    outcomes = [simulate(case, w, r) for case in cases for w, r in combinations if max(w, 32) <= r <= 1024]
    lines = [
        "# Scaling, simulated",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. The real driver and scheduler, simulated workers:",
        "`.venv/bin/python benchmarks/scaling.py`.",
        "",
        f"Drawn: shard times normal around the mean; {100 * SLOW_SHARE:g} % of the workers {SLOWNESS:g} times slower;",
        f"every worker dies after exponentially distributed times, on average {LIFE} shard times;",
        f"{START_SECONDS:g} s to start, also after a death; a checkpoint every {CHECKPOINT_SECONDS:g} s (its",
        "cost is in the shard's time),",
        f"{SAVE_SECONDS:g} s to save a shard that moves. Means of {SEEDS} seeds, one from {MANY} workers on.",
        "Efficiency is the lower bound over the time taken; the bound, max(all work / all speed, longest shard /",
        "fastest worker), knows of no start and no death, so that no scheduler reaches 1. Speed-up is over one worker",
        "of full speed that never dies.",
    ]
    for case in cases:
        mine = [o for o in outcomes if o.case is case]
        lines += [
            "",
            f"## Shards of {case.seconds:.0f} s, standard deviation {100 * case.deviation:.1f} % ({case.name})",
        ]
        lines += ["", verdict(mine), "", *table_of(mine)]
    lines += [
        "",
        "## 16 equal shards, one of W workers three times slower",
        "",
        "Time taken over the lower bound, and the time of a fixed plan (as many shards for each) over ours.",
        "",
        *slow_worker_table(cases),
    ]
    print("\n".join(lines))
    print(f"\n{time.perf_counter() - began:.0f} s")
    if options.write or options.preview:
        mpl.rcParams.update({"font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9})
        save(plot_efficiency(outcomes, cases), "scaling-efficiency", options.preview)
        save(plot_speed_up(outcomes, cases[1]), "scaling-speedup", options.preview)
    if options.write:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"scaling-{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
