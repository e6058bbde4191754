"""Times of several actions that take turns, so that a busy machine is as busy for each of them."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np


def medians(
    actions: dict[Any, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Any, float]:
    """Median seconds of every action over so many rounds; a round before them compiles and warms up.

    With ``clock=time.thread_time`` seconds are those of the processor, and waiting for it is not counted.
    """
    seconds = defaultdict(list)
    for _ in range(rounds + 1):
        for name, action in actions.items():
            start = clock()
            action()
            seconds[name].append(clock() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int = 5) -> float:
    """How many times as long ``slow`` takes, by processor time."""
    times = medians({"slow": slow, "fast": fast}, rounds, time.thread_time)
    return times["slow"] / times["fast"]
