"""The real driver and scheduler on simulated workers: laws of the simulation, and what the scheduler promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rich.console import Console

from benchmarks.simulation import SimulatedPool, least_makespan, makespan, static_makespan
from mach.training.launch.display import Display
from mach.training.launch.driver import Driver
from mach.training.launch.schedule import Schedule


def drawn_pool(n_workers: int, n_shards: int, seed: int, *, seconds: float = 600.0, deaths: float = 50.0):
    """Shard times that vary by 3 %, one worker in 50 three times slower, lives of 50 shards."""
    random = np.random.default_rng(seed)
    speeds = np.where(random.random(n_workers) < 0.02, 1 / 3, 1.0)
    times = seconds * (1.0 + 0.03 * random.standard_normal(n_shards))
    return SimulatedPool(
        speeds.tolist(), times.tolist(), report_seconds=seconds / 60, seconds_between_deaths=deaths * seconds, seed=seed
    )


def driven(pool: SimulatedPool, attempts: int = 3) -> Schedule:
    """The schedule after the run."""
    shards = [(r,) for r in range(len(pool.shard_seconds))]
    schedule = Schedule(shards, attempts)
    display = Display(Console(quiet=True), list(range(len(shards))), [])
    Driver(schedule, pool, display, len(pool.speeds)).drive()
    return schedule


@pytest.mark.parametrize("speed", [1.0, 0.5])
def test_one_worker_takes_the_sum_of_the_times_and_its_start(speed):
    pool = SimulatedPool([speed], [40.0, 50.0, 60.0], start_seconds=3.0)
    assert makespan(pool) == pytest.approx(3.0 + 150.0 / speed, abs=0.01)
    assert pool.trained_seconds == pytest.approx(150.0)
    assert least_makespan(pool) == static_makespan(pool) == 150.0 / speed


@pytest.mark.parametrize("seed", range(5))
def test_every_shard_is_finished_once_whatever_dies(seed):
    pool = drawn_pool(6, 20, seed, seconds=40.0, deaths=1.5)
    schedule = driven(pool)
    assert sorted(schedule.finished) == [(r,) for r in range(20)]
    assert not schedule.given_up
    assert pool.n_deaths == schedule.n_deaths > 3
    assert pool.trained_seconds >= sum(pool.shard_seconds) * (1 - 1e-9)
    assert pool.now() >= least_makespan(pool)


@pytest.mark.parametrize("seed", range(5))
def test_a_second_schedule_is_taken_up_by_the_same_workers(seed):
    """Some die, some still train copies of stragglers when the first schedule is over, and one hangs on such a copy."""
    pool = drawn_pool(6, 40, seed, seconds=40.0, deaths=4.0)
    pool.speeds = [1.0, 0.05, *pool.speeds[2:]]
    pool.hang_at = {0: 170.0} if seed % 2 else {}
    display = Display(Console(quiet=True), list(range(40)), [])
    first = Schedule([(r,) for r in range(20)], 3)
    driver = Driver(first, pool, display, 4)
    driver.drive()
    n_started = [life.n_lives for life in pool._lives]
    second = Schedule([(r,) for r in range(20, 40)], 3)
    driver.take_up(second, display, 6)
    driver.drive()
    assert sorted([*first.finished, *second.finished]) == [(r,) for r in range(40)]
    assert n_started[4:] == [0, 0]  # those were asked for now
    again = [life.n_lives - before for life, before in zip(pool._lives, n_started, strict=True)]
    assert min(again[4:]) >= 1
    assert sum(again[:4]) <= pool.n_deaths  # only the dead are started anew


def test_the_same_seed_gives_the_same_run():
    first, second, other = (drawn_pool(8, 30, seed, seconds=40.0, deaths=3.0) for seed in (1, 1, 2))
    assert makespan(first) == makespan(second) != makespan(other)
    assert (first.n_deaths, first.trained_seconds) == (second.n_deaths, second.trained_seconds)


@pytest.mark.parametrize(("n_workers", "seconds"), [*((n, 600.0) for n in range(2, 13)), (4, 40.0)])
def test_one_worker_three_times_slower_costs_little_where_a_fixed_plan_pays_in_full(n_workers, seconds):
    speeds, every = [1 / 3, *[1.0] * (n_workers - 1)], max(0.5, seconds / 300)
    pool = SimulatedPool(speeds, [seconds] * 16, report_seconds=every, start_seconds=0.0)
    taken = makespan(pool)
    assert taken <= 1.10 * least_makespan(pool)
    assert static_makespan(pool) >= 1.3 * taken


@pytest.mark.parametrize("n_workers", [4, 16, pytest.param(64, marks=pytest.mark.slow)])
def test_losses_and_slow_workers_cost_at_most_a_twentieth_while_there_are_four_shards_a_worker(n_workers):
    for seed in range(3):
        pool = drawn_pool(n_workers, 4 * n_workers, seed)
        assert makespan(pool) <= least_makespan(pool) / 0.95


def test_a_worker_that_fails_everything_exhausts_no_attempts():
    pool = SimulatedPool([1.0] * 4, [40.0] * 40, failing=frozenset({0}))
    schedule = driven(pool)
    assert not schedule.given_up
    assert makespan(SimulatedPool([1.0] * 3, [40.0] * 40)) == pytest.approx(pool.now(), rel=0.1)


def test_a_shard_is_given_up_when_everybody_fails_on_it():
    schedule = driven(SimulatedPool([1.0] * 2, [40.0] * 3, failing=frozenset({0, 1})))
    assert not schedule.finished
    assert schedule.given_up[0,].endswith("fails")


@pytest.mark.parametrize(
    "hang_at",
    [{0: 1.0}, {0: 3.1}, {0: 50.0}, {0: 150.0}, {0: 50.0, 1: 60.0}],
    ids=["before it is ready", "before it tells anything", "early", "last shard", "two of them"],
)
def test_hung_workers_are_overtaken(hang_at):
    pool = SimulatedPool([1.0] * 4, [40.0] * 16, hang_at=hang_at)
    schedule = driven(pool)
    assert sorted(schedule.finished) == [(r,) for r in range(16)]
    n_left = 4 - len(hang_at)
    assert pool.now() <= 640.0 / n_left + 2 * 40.0 + 3.0
    assert math.isfinite(pool.trained_seconds)
