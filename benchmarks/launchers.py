"""Ray against the local launcher, and one worker against several: the same repetitions in turns.

    .venv/bin/python benchmarks/launchers.py configs/gnd-core.toml --repetitions 2 --rounds 3 --write

A cluster of one node of this machine is started before, and each run begins with nothing but the prepared data.
With --write, the table goes to benchmarks/results/launchers-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path

from hardware import commit, processor

from mach.config import Config, LaunchConfig, load_config
from mach.runs.ray import Cluster
from mach.training.launch.launchers import Crew
from mach.training.setup import set_up


def seconds(config: Config, launch: LaunchConfig, folder: Path) -> tuple[float, float, list[str]]:
    """Wall seconds of training, seconds that the workers trained, and the digests of the weights."""
    run, store = set_up(config, folder)
    started = time.perf_counter()
    Crew(launch).train(run, store)
    elapsed = time.perf_counter() - started
    done = [run.repetition(r).summary() for r in run.finished()]
    return elapsed, sum(summary.worker_seconds for summary in done), [summary.weights_digest for summary in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    config = load_config(options.config, [f"hashing.repetitions={options.repetitions}"])
    launches = {
        name: LaunchConfig(launcher=name, workers=options.workers)  # type: ignore[arg-type]
        for name in ("local", "ray")
    }
    launches["one worker"] = LaunchConfig(workers=1)
    walls: dict[str, list[float]] = {name: [] for name in launches}
    worked: dict[str, list[float]] = {name: [] for name in launches}
    digests = set()
    with Cluster(), tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            order = list(launches) if number % 2 == 0 else list(reversed(launches))
            for name in order:
                wall, work, bits = seconds(config, launches[name], Path(folder, f"{name}-{number}"))
                walls[name].append(wall)
                worked[name].append(work)
                digests.add(tuple(bits))
                print(f"round {number}, {name}: {wall:.1f} s wall, {work:.1f} s in the workers", flush=True)
    ratios = [ray / local for ray, local in zip(walls["ray"], walls["local"], strict=True)]
    around = {
        name: [
            wall - work / (launches[name].workers or 1) for wall, work in zip(walls[name], worked[name], strict=True)
        ]
        for name in launches
    }
    efficiencies = [alone / beside for alone, beside in zip(worked["one worker"], worked["local"], strict=True)]
    lines = [
        f"# Ray against the local launcher, {options.config}, R = {options.repetitions}, {options.workers} workers",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. Medians of {options.rounds} rounds in turns;",
        f"`.venv/bin/python benchmarks/launchers.py {options.config} --repetitions {options.repetitions}`.",
        "",
        "| launcher | wall, s | of it not training, s |",
        "|---|---|---|",
        *(
            f"| {name} | {statistics.median(walls[name]):.1f} | {statistics.median(around[name]):.1f} |"
            for name in launches
        ),
        "",
        f"Ray over local, wall: median {statistics.median(ratios):.3f} (rounds: "
        f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}). Weights equal bit for bit: {len(digests) == 1}.",
        f"Seconds that one worker trains over those that {options.workers} train together: median "
        f"{statistics.median(efficiencies):.3f} (rounds: {', '.join(f'{each:.3f}' for each in efficiencies)}).",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        folder_of_results = Path(__file__).parent / "results"
        (folder_of_results / f"launchers-{datetime.date.today()}.md").write_text(text)


if __name__ == "__main__":
    main()
