"""The learning rate over the steps of a training."""

from __future__ import annotations

import math

from mach.config import TrainingConfig


def rate_at(step: int, n_steps: int, config: TrainingConfig) -> float:
    """Learning rate of a step in ``0..n_steps-1``: linear warm-up, then constant, linear or cosine decay to 0."""
    n_warmup = int(config.warmup * n_steps)
    if step < n_warmup:
        return config.rate * (step + 1) / n_warmup
    if config.schedule == "constant":
        return config.rate
    left = 1.0 - (step - n_warmup) / max(1, n_steps - n_warmup)
    return config.rate * (left if config.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left)))
