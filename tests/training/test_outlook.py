"""The time that is left of a whole training: planted stages under a clock of the test's own."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks.simulation import SimulatedPool
from mach.config import Config
from mach.runs.run import Run
from mach.training.launch.display import Board, Display, bars
from mach.training.launch.driver import Driver
from mach.training.launch.schedule import Schedule
from mach.training.outlook import Outlook, Stage, duration
from mach.training.progress import Progress
from mach.training.setup import set_up
from mach.training.work import BEGUN, Work, stages, stages_of

PLANNED = [
    Stage("training", 40.0, 4, 2),
    Stage("pilot 1: training", 24.0),
    Stage("pilot 1: re-ranker: candidates", 6.0, 8, 2),
    Stage("pilot 1: re-ranker: classifiers", 10.0),
    Stage("re-ranker: candidates", 8.0, 8, 2),
    Stage("re-ranker: classifiers", 12.0),
    Stage("calibrating", 5.0),
]


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def planted(truth: list[Stage], job: Outlook, clock: Clock, n_reports: int) -> Iterator[float]:
    """Do stages that take as long as these say, and tell of them so often; yields twenty times in between each."""
    for stage in truth:
        began = clock.seconds
        job(stage.name, 0.0)
        for report in range(1, n_reports + 1):
            for tick in range(1, 21):
                clock.seconds = began + stage.seconds * (report - 1 + tick / 20) / n_reports
                yield clock.seconds
            job(stage.name, report / n_reports)


@pytest.mark.parametrize("speed", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("n_reports", [1, 8, 100])
@pytest.mark.parametrize("seed", range(4))
def test_after_a_fifth_of_the_time_the_end_is_known_within_30_percent(speed: float, n_reports: int, seed: int):
    """On machines of any speed, whose kinds of stages are each up to 1.3 times faster or slower than was planned."""
    random = np.random.default_rng(seed)
    errors = {stage.kind: float(random.uniform(1 / 1.3, 1.3)) for stage in PLANNED}
    truth = [replace(stage, seconds=stage.seconds * errors[stage.kind] / speed) for stage in PLANNED]
    total = sum(stage.seconds for stage in truth)
    clock = Clock()
    job = Outlook(clock)
    job.expect(replace(stage, parts=1, workers=1) for stage in PLANNED)
    for now in planted(truth, job, clock, n_reports):
        left = job.seconds_left()
        assert left is not None
        if now >= total / 5 and n_reports > 1:
            assert 0.7 * total <= now + left <= 1.3 * total
        elif now >= truth[0].seconds + truth[1].seconds:  # nothing is said within a stage
            assert 0.6 * total <= now + left <= 1.4 * total
    assert job.seconds_left() == 0.0


def test_the_clock_goes_on_while_nobody_tells_anything_and_never_says_that_nothing_is_left():
    clock = Clock()
    job = Outlook(clock)
    job.expect([Stage("training", 10.0)])
    job("training", 0.0)
    said = []
    for clock.seconds in (0.0, 1.0, 5.0, 9.0, 20.0, 100.0):
        said.append((job.seconds_left(), job.line()))
    assert [left for left, _ in said] == [10.0, 9.0, 5.0, 1.0, 2.0, 10.0]
    assert len({line for _, line in said}) == len(said)
    assert "stage 1 of 1, training; 0:00:05 so far, about 0:00:05 left; 50 % of all" in said[2][1]


def test_seconds_of_compiling_are_said_apart_and_are_no_rate():
    clock = Clock()
    job = Outlook(clock)
    job.expect([Stage("training", 10.0), Stage("calibrating", 10.0)])
    job("training", 0.0)
    clock.seconds = 32.0  # 30 of which two workers have compiled, side by side
    job.compiles(0, 7, 30.0)
    job.compiles(1, 5, 20.0)
    job("training", 0.2)
    assert job.seconds_left() == pytest.approx(18.0)
    assert "12 kernels compiled, once, 30 s" in job.line()
    clock.seconds = 40.0
    job("training", 1.0)
    job("calibrating", 0.0)
    clock.seconds = 60.0
    job.compiles(0, 1, 15.0)
    assert job.seconds_left() == pytest.approx(5.0)
    assert "13 kernels compiled, once, 45 s" in job.line()


def test_how_long_workers_take_to_begin_is_no_rate():
    clock = Clock()
    job = Outlook(clock)
    job.expect([Stage("training", 100.0), Stage("calibrating", 10.0)])
    job("training", 0.0)
    clock.seconds = 60.0
    job("training", 0.01)
    assert job.seconds_left() == pytest.approx(109.0)
    clock.seconds = 80.0
    job("training", 0.21)  # a fifth in twenty seconds, as planned
    assert job.seconds_left() == pytest.approx(89.0)


def test_a_stage_takes_as_long_as_those_of_its_kind():
    clock = Clock()
    job = Outlook(clock)
    candidates = "re-ranker: candidates"
    job.expect([Stage(name, 10.0) for name in ("training", f"pilot 1: {candidates}", candidates)])
    for name, seconds in (("training", 10.0), (f"pilot 1: {candidates}", 40.0)):
        job(name, 0.0)
        clock.seconds += seconds
        job(name, 1.0)
    assert job.seconds_left() == pytest.approx(40.0), "four times the plan, whatever the training took"


def test_what_a_worker_has_compiled_the_driver_hears():
    clock = Clock()
    job = Outlook(clock)
    job.expect([Stage("training", 10.0)])
    driver = Driver(Schedule([(0,)]), SimulatedPool([1.0], [1.0]), Display(Console(quiet=True), [0], [], job, job), 1)
    job("training", 0.0)
    clock.seconds = 8.0
    driver._handle(0, {"kind": "compiled", "n_kernels": 3, "seconds": 7.0})
    assert "3 kernels compiled, once, 7 s" in job.line()
    assert job.seconds_left() == pytest.approx(9.0)


def test_as_long_as_no_work_is_known_it_says_so():
    job = Outlook(Clock())
    job("reading", 0.5)
    assert job.seconds_left() is None
    assert "stage 1 of 1, reading, 50 %; 0:00:00 so far, estimating" in job.line()


@pytest.mark.parametrize(
    ("parts", "workers", "fraction", "share"),
    [
        (3, 2, 2 / 3, 0.5),
        (3, 2, 1 / 3, 0.25),
        (3, 2, 5 / 6, 0.75),
        (1, 1, 0.3, 0.3),
        (4, 2, 0.75, 0.75),
        (2, 5, 0.5, 0.5),
    ],
)
def test_the_last_parts_may_be_fewer_than_the_workers(parts, workers, fraction, share):
    assert Stage("training", 1.0, parts, workers, fraction).share == pytest.approx(share)
    assert Stage("training", 1.0, parts, workers, 1.0).share == 1.0


def test_what_a_run_has_to_do_follows_from_its_configuration(config: Config, tmp_path):
    config = config.changed(
        data={"validation_fraction": 0.1}, hashing={"repetitions": 4}, reranking={"candidates": 10, "pilots": 2}
    )
    run, store = set_up(config, tmp_path / "run")
    found = stages_of(run, store, lambda n: min(n, 2), None)
    made = ["training", "re-ranker: candidates", "re-ranker: classifiers", "re-ranker: order"]
    theirs = [f"pilot {pilot}: {stage}" for pilot in (1, 2) for stage in (*made, "teaching")]
    assert [stage.name for stage in found] == [made[0], *theirs, *made[1:], "calibrating"]
    assert (found[0].parts, found[0].workers) == (4, 2)
    assert all(stage.seconds > 0 for stage in found)
    seconds = {stage.name: stage.seconds for stage in found}
    begun = BEGUN / 2  # of two workers
    assert seconds["pilot 1: training"] - begun == pytest.approx(0.4 * (seconds["training"] - begun), rel=1e-3)
    assert [stage.name for stage in stages_of(run, store, lambda n: 1, [0, 1])] == ["training"]
    work = Work.of(run.config.changed(training={"epochs": 2 * run.config.training.epochs}), store)
    doubled = {stage.name: stage.seconds for stage in stages(work, lambda n: 1, 2, [], reranks=False)}
    assert doubled == {
        "training": pytest.approx(BEGUN + 2 * (seconds["training"] - begun)),
        "calibrating": pytest.approx(seconds["calibrating"]),
    }


def test_nothing_is_expected_of_a_finished_run(config: Config, trained: Path):
    run, store = set_up(config, trained)
    assert stages_of(run, store, lambda n: 1, None) == []


def test_where_there_is_no_terminal_lines_are_printed_though_nobody_tells_anything():
    class Told(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.n, self.are_enough = 0, threading.Event()

        def write(self, text: str) -> int:
            self.n += text.count("\n")
            if self.n >= 3:
                self.are_enough.set()
            return super().write(text)

    told = Told()
    clock = Clock()
    job = Outlook(clock)
    job.expect([Stage("training", 600.0, 8, 2)])
    job("training", 0.5)
    clock.seconds = 300.0
    with Board(Console(file=told), job, seconds=0.001):
        assert told.are_enough.wait(60)
    line = "stage 1 of 1, training, 4 of 8; 0:05:00 so far, "
    assert all(text.startswith(line) for text in told.getvalue().splitlines())


def test_on_a_terminal_the_line_stands_above_those_of_the_repetitions():
    told = io.StringIO()
    console = Console(file=told, force_terminal=True, width=160, color_system=None)
    job = Outlook(Clock())
    job.expect([Stage("training", 600.0)])
    with Board(console, job), Display(console, [0, 1], [], job) as display:
        display.progressed(Progress(1, 5, 10, 1, 2, 0.1, 0.99, 1000.0, 1.0, 0, validation_precision=0.57))
        display._lines.refresh()
    shown = told.getvalue()
    assert "stage 1 of 1, training, 25 %; 0:00:00 so far, about" in shown
    assert "repetition 1" in shown
    assert "bucket P@1 of held-out rows 57.0" in shown
    assert "99" not in shown


def test_where_nobody_reads_along_what_others_print_is_seen(capsys: pytest.CaptureFixture[str]):
    """Rows that are left out are told of by warnings meanwhile."""
    console = Console(quiet=True, force_terminal=True)
    with Board(console, Outlook()), bars(console), Display(console, [0], []):
        print("printed")
        print("warned", file=sys.stderr)
    assert capsys.readouterr() == ("printed\n", "warned\n")


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


def test_held_out_rows_are_what_progress_tells_of(config: Config, tmp_path):
    from mach.training.shard import ShardJob, train_shard

    config = config.changed(data={"validation_fraction": 0.1}, training={"epochs": 2}, hashing={"repetitions": 1})
    run, store = set_up(config, tmp_path / "run")
    seen: list[Progress] = []
    train_shard(ShardJob(str(run.path), str(store.path), (0,)), report=seen.append)
    ends = [progress for progress in seen if progress.ends_epoch]
    metrics = Run.open(run.path).repetition(0).read_metrics()
    assert [p.validation_precision for p in ends] == [row["validation_bucket_precision"] for row in metrics]
