"""Benchmarks run here: on small sizes those of other hardware; slow, the ratios that no change may lose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str) -> list[str]:
    """Rows of the table that a benchmark prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("| ")]


def test_the_figures_of_a_gpu_on_small_sizes() -> None:
    assert len(run("benchmarks/gpu.py", "--tiny", "--device", "cpu")) == 23


@pytest.mark.slow
def test_no_ratio_to_a_frozen_baseline_falls_clearly_below_its_bar() -> None:
    assert len(run("benchmarks/ratios.py", "--quick")) == 3  # with the head


@pytest.mark.slow
def test_a_run_that_is_struck_in_every_stage_ends_in_the_undisturbed_bits() -> None:
    command = [sys.executable, "benchmarks/kills.py", "--blows", "6", "--seed", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
