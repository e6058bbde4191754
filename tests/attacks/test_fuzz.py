"""Some of the cheapest cases of benchmarks/fuzz.py; another seed makes others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[2] / "benchmarks/fuzz.py"


def test_some_hundred_folders_end_well():
    """Every one answers or is refused in a line; the table on standard output says how many did."""
    command = [sys.executable, str(FUZZ), "--models", "200", "--seed", "20261130"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(cell) for cell in done.stdout.splitlines()[2].split()[1:]]
    assert sum(counts[:2]) == sum(counts) == 200
    assert min(counts[:2]) > 20  # they are nearly right


def test_a_case_is_a_function_of_its_number():
    command = [sys.executable, str(FUZZ), "--only", "models:7", "--seed", "3"]
    found = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len({one.split("/case/")[-1] for one in found}) == 1
