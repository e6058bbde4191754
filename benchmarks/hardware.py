"""What a benchmark result names beside its figures: the processor and the commit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else "unknown processor"
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
