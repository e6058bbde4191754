"""Every speed that is promised as a ratio to a frozen baseline, in one process; what CI watches.

    python benchmarks/ratios.py            # all, about a minute
    python benchmarks/ratios.py --quick    # the first of each kind, as in CI

Both sides take turns on one thread and are timed by the processor's clock, so that a busy machine slows both. Exit code
1 and a line each where a ratio is below half of its bar: a machine may be unlike ours, a slip of a factor of two is not
its fault. Baselines are the plain PyTorch step of training.py and the compiled gather of decoding.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import decoding
import torch
import training
from turns import ratio

CLEARLY_BELOW = 0.5


@dataclass(frozen=True)
class Promise:
    """What is faster than what, how many times at least, and how to measure it."""

    name: str
    bar: float
    measure: Callable[[], float]
    quick: bool = False


def step(name: str) -> float:
    shape = training.SHAPES[name]
    return ratio(training.PlainStep(shape), training.MachStep(shape), rounds=9)


def promises() -> list[Promise]:
    small, large = training.SHAPES
    sharp, few = "sharp: 12 related classes, 0.95 to 0.03", "few: 5 classes, 0.95 to 0.3, k = 10"
    return [
        Promise(f"training step, {small}", 2.5, lambda: step(small), quick=True),
        Promise(f"training step, {large}", 2.5, lambda: step(large)),
        Promise(f"top 10, hashed, {sharp}", 10, lambda: decoding.Case(sharp).ratio("implicit"), quick=True),
        Promise(f"top 10, table, {sharp}", 10, lambda: decoding.Case(sharp).ratio("table")),
        Promise(f"top 10, hashed, {few}", 10, lambda: decoding.Case(few).ratio("implicit")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    fallen = []
    print("| what | times faster than its baseline | bar |\n|---|---:|---:|", flush=True)
    for promise in promises():
        if quick and not promise.quick:
            continue
        found = promise.measure()
        if found < CLEARLY_BELOW * promise.bar:
            time.sleep(5)  # a neighbour may have emptied the cache just then: once more
            found = max(found, promise.measure())
        print(f"| {promise.name} | {found:.1f} | {promise.bar:g} |", flush=True)
        if found < CLEARLY_BELOW * promise.bar:
            fallen.append(f"{promise.name}: {found:.2f} times, below half of {promise.bar:g}")
    sys.exit("\n".join(fallen) or 0)


if __name__ == "__main__":
    main()
