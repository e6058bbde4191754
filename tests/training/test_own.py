"""Little work is done by this process itself: the same bits, the same words when it stops or fails."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mach.config import Config, LaunchConfig
from mach.errors import IncompleteRunError
from mach.networks.figures import StepFigures
from mach.runs.run import Run
from mach.training.conductor import configuration, train
from mach.training.launch.capacity import is_little_work
from mach.training.launch.interrupts import interrupts_noted
from mach.training.launch.launchers import Crew
from mach.training.setup import set_up
from mach.training.trainer import Step, Trainer
from tests.training.test_local import run_with, weights


def open_to(config: Config, **sections: dict) -> Config:
    """The same training by workers that nobody asked for."""
    return run_with(config, **sections).model_copy(update={"launch": LaunchConfig()})


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: dict, *given: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("mach.training.launch.local.WorkerProcess", refuse)


def test_little_work_starts_no_process_and_comes_to_the_same_bits(
    config: Config, trained: Path, tmp_path: Path, no_process: None
):
    told: list[tuple[str, float]] = []
    train(open_to(config), tmp_path / "run", report=lambda *stage: told.append(stage))
    assert weights(tmp_path / "run") == weights(trained)
    assert ("training", 1.0) in told


def test_how_far_this_process_is_it_tells_while_it_works(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    n_steps, told = 0, []

    def step(trainer: Trainer, wanted: Step) -> list[StepFigures] | None:
        nonlocal n_steps
        n_steps += 1
        return whole_step(trainer, wanted)

    whole_step = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    one = open_to(config, hashing={"repetitions": 1})
    train(one, tmp_path / "run", report=lambda stage, fraction: told.append((stage, fraction, n_steps)))
    fractions = {fraction: steps for stage, fraction, steps in told if stage == "training"}
    epochs = [epoch / config.training.epochs for epoch in range(config.training.epochs + 1)]
    assert fractions.keys() >= set(epochs)
    assert [fractions[epoch] for epoch in epochs] == [round(376 * epoch) for epoch in epochs]


WITHOUT_TORCH = """
import sys
import mach
from mach.networks import steps
folder, launcher = sys.argv[1:]
with open(folder + "/fruits.csv", "w") as file:
    file.write("text,classes\\n" + 100 * "sour green apple,apple\\nlong ripe yellow banana,banana\\n")
if launcher == "local":
    steps.LITTLE_FLOPS = 0.0  # here, not in the worker: the precision is measured
config = {"data": {"train": folder + "/fruits.csv", "cache": folder}, "training": {"epochs": 2}}
model = mach.train(config, folder + "/run", launcher=launcher, workers=1)
assert model.reranker is not None
print(model.names(model.topk("a green apple", k=1)[0]), "torch" in sys.modules)
"""


@pytest.mark.parametrize("launcher", ["here", "local"])
def test_the_process_that_was_asked_needs_no_torch(launcher: str, tmp_path: Path):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path), launcher]
    assert subprocess.check_output(command, text=True) == "['apple'] False\n"


def test_processes_that_are_asked_for_are_started(config: Config, tmp_path: Path, no_process: None):
    for launch in (LaunchConfig(workers=1), LaunchConfig(launcher="local")):
        with pytest.raises(AssertionError, match="a process was started"):
            train(config.model_copy(update={"launch": launch}), tmp_path / "run")


def test_much_work_and_a_trunk_whose_work_is_unknown_are_not_little(config: Config, tmp_path: Path):
    run, store = set_up(config, tmp_path / "run")
    assert is_little_work(run.config, store)
    for sections in ({"training": {"epochs": 100_000}}, {"network": {"trunk": "a:B"}}):
        assert not is_little_work(run_with(run.config, **sections), store)


def test_ctrl_c_saves_the_step_at_hand_and_the_run_goes_on_to_the_same_bits(
    config: Config, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = 0

    def step(trainer: Trainer, wanted: Step) -> list[StepFigures] | None:
        nonlocal steps
        steps += 1
        if steps == 500:  # of 3 x 376
            os.kill(os.getpid(), signal.SIGINT)
        return whole_step(trainer, wanted)

    whole_step = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(IncompleteRunError, match="stopped with 1 of 3 repetitions finished and 1 begun and saved"):
            train(open_to(config), tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == 500
    train(open_to(config), tmp_path / "run")
    assert steps == 3 * 376
    assert weights(tmp_path / "run") == weights(trained)


def test_what_fails_is_logged_tried_again_and_reported_while_the_others_finish(config: Config, tmp_path: Path):
    run, store = set_up(open_to(config), tmp_path / "run")
    run.repetition(1).folder.mkdir(parents=True)
    run.repetition(1).state.write_bytes(b"\xff" * 64)
    with pytest.raises(IncompleteRunError, match="1 of 3 repetitions failed.*repetition 1: .*damaged"):
        Crew(LaunchConfig()).train(run, store)
    assert Run.open(tmp_path / "run").finished() == [0, 2]
    assert run.repetition(1).log.read_text().count("Traceback") == 3


def test_whoever_hands_out_work_needs_no_torch():
    """Importing it takes longer than all else that a driver does."""
    code = "import sys, mach.training.conductor; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_a_run_that_is_named_alone_goes_on_here_as_it_began(config: Config, tmp_path: Path, no_process: None):
    train(open_to(config), tmp_path / "run", repetitions=[0])
    said = io.StringIO()
    train(tmp_path / "run", console=Console(file=said)).close()
    assert said.getvalue().startswith(f"{tmp_path / 'run'}: 1 of 3 repetitions finished before; going on\n")
    asked = configuration(tmp_path / "run", overrides=["launch.launcher=local"])[0].launch
    assert "launcher" in asked.model_fields_set


def test_what_ctrl_c_says_is_said_at_once_and_a_second_one_ends_the_work():
    heard = []

    def interrupt(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with interrupts_noted() as came:
            signal.raise_signal(signal.SIGINT)
            assert (heard, came()) == ([signal.SIGINT], True)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
