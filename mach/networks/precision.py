"""The precision that suits this processor; torch is imported only where there is a choice, and in a process of its own.

What was found is kept in the cache, so that the process that drives a training needs no torch.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from mach.errors import StorageError
from mach.files.caches import cache_folder
from mach.files.records import find_json, write_json
from mach.networks.kernels.losses import named

Precision = Literal["float32", "bfloat16"]
SKIPPING = 3.0  # times as fast must bfloat16 be where products of float32 skip the zeros of two in three


class Found(BaseModel):
    """What the cache holds: how a kind of processor multiplies with a release of torch."""

    model_config = ConfigDict(extra="forbid", strict=True)

    processor: str
    torch: str
    gain: float


def native_precision() -> Precision:
    """bfloat16 where the processor has instructions for it and multiplies it faster than float32, else float32.

    The answer is stored in the run's manifest, so that all its workers agree.
    """
    return "bfloat16" if bfloat16_gain() > 1 else "float32"


def suits_light(loss: str) -> bool:
    """Whether this processor trains without torch as soon: its float32 skips most of what errors near 0 multiply."""
    return bfloat16_gain() < (1.0 if named(loss).is_exclusive else SKIPPING)


def bfloat16_gain() -> float:
    """How many times as fast as float32 this processor multiplies bfloat16; 0 where it has no instructions for it.

    Instructions may be there and yet be slow, as in virtual machines: a product of each is timed in turns, once a
    machine.
    """
    from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

    features = get_host_cpu_features()
    if not (features.get("avx512bf16") or features.get("amx-bf16")):
        return 0.0
    flags = ",".join(sorted(name for name, has in features.items() if has))
    here = {"processor": f"{get_host_cpu_name()} {flags}", "torch": version("torch")}
    file = cache_folder() / "precision.json"
    with contextlib.suppress(StorageError):
        found = find_json(file, Found)
        if found is not None and (found.processor, found.torch) == (here["processor"], here["torch"]):
            return found.gain
    gain = measured_gain() if "torch" in sys.modules else _asked()
    with contextlib.suppress(StorageError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, Found(**here, gain=gain).model_dump())
    return gain


def measured_gain() -> float:
    """The seconds of a product in float32 over those in bfloat16, in 50 ms; imports torch."""
    import torch

    operands = torch.ones(512, 512), torch.ones(512, 512, dtype=torch.bfloat16)
    seconds_2T = np.empty((2, 6))
    for turn in range(6):
        for i, operand in enumerate(operands):
            start = time.perf_counter()
            torch.mm(operand, operand)
            seconds_2T[i, turn] = time.perf_counter() - start
    full, half = seconds_2T.min(axis=1)
    return float(full / half)


def _asked() -> float:
    """`measured_gain` of another process; of this one where that fails, so that its reason is told."""
    code = "from mach.networks.precision import measured_gain; print(measured_gain())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    try:
        return float(done.stdout)
    except ValueError:
        return measured_gain()
