"""The precision that suits this processor; torch is imported only where there is a choice."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np


def native_precision() -> Literal["float32", "bfloat16"]:
    """bfloat16 where the processor has instructions for it and multiplies it faster than float32, else float32.

    Instructions may be there and yet be slow, as in virtual machines: a product of each is timed in turns, 5 ms in
    all. The answer is stored in the run's manifest, so that all its workers agree.
    """
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    if not (features.get("avx512bf16") or features.get("amx-bf16")):
        return "float32"
    import torch

    operands = torch.ones(256, 256), torch.ones(256, 256, dtype=torch.bfloat16)
    seconds_2T = np.empty((2, 6))
    for turn in range(6):
        for i, operand in enumerate(operands):
            start = time.perf_counter()
            torch.mm(operand, operand)
            seconds_2T[i, turn] = time.perf_counter() - start
    full, half = seconds_2T.min(axis=1)
    return "bfloat16" if half < full else "float32"
