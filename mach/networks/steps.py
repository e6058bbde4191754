"""What the shape of the data decides about the steps of a training; no configuration names it.

The rules hold for hidden layers over sparse rows, and were found on validation rows (docs/log.md). Networks over dense
rows, linear ones and trunks of the user's own have no warm-up, compute all buckets and round no errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from mach.config import Config, NetworkConfig
from mach.data.store import Store
from mach.errors import ConfigError
from mach.networks.kernels.losses import named

MANY_BUCKETS, SAMPLED = 4096, 0.25
CLASSES_SAMPLED, MOST_SAMPLED = 0.05, 8192  # of buckets that are classes, as of `mach.nn.SampledHead`
DITHER, LIGHT_DITHER = 0.2, 0.1  # 0.1 to 0.5 were alike on validation rows; for few epochs 0.1 is a little better
STEP_FLOPS = 6  # a weight and row: forward, and back by inputs and by weights
LITTLE_FLOPS = 2e10  # of a repetition: a second of one core, at least
GONE = {"network.input_dropout": 0.0, "training.schedule": "linear"}  # keys of before, and the values that are left


@dataclass(frozen=True)
class Steps:
    """Settings of a training's steps.

    - ``warmup``: the rate rises from 0 in this share of all steps: none for 50,000 rows, 10 % for 100,000 and more.
      Without it hidden units end up active in 8 % of the rows instead of 36.
    - ``sampled``: a step computes this share of a head's buckets, those of its rows and random ones; for the softmax
      loss over 4,096 buckets or more, and for both losses where so many classes have a bucket each, 5 % of them, at
      most 8,192. A GPU computes all.
    - ``dither``: errors of buckets (probability less target) below this are rounded at random to 0 or to this, and
      products skip the zeros, for a third to half of the time; for the binary loss where products are float32, as
      errors of a softmax are too small. A GPU rounds none.
    """

    warmup: float = 0.0
    sampled: float = 1.0
    dither: float = 0.0

    @classmethod
    def of(
        cls,
        config: NetworkConfig,
        *,
        n_rows: int,
        n_buckets: int,
        dense_input: bool,
        loss: str,
        precision: str,
        has_classes: bool = False,
        light: bool = False,
        retired: Mapping[str, Any] | None = None,
    ) -> Steps:
        """Settings that follow from N, B, the loss and the precision, and from whether a bucket is a class.

        An older run goes on as its configuration says (`mach.runs.run.Run.retired`); a ConfigError where that is gone.
        """
        steps = cls()
        if not dense_input and config.hidden and config.trunk is None:
            warmup = round(0.1 * min(max(n_rows / 50_000 - 1.0, 0.0), 1.0), 3)
            is_exclusive = named(loss).is_exclusive
            samples = (is_exclusive or has_classes) and n_buckets >= MANY_BUCKETS
            share = min(CLASSES_SAMPLED, MOST_SAMPLED / n_buckets) if has_classes else SAMPLED
            dithers = not is_exclusive and (light or precision == "float32")
            dither = LIGHT_DITHER if light else DITHER
            steps = cls(warmup, share if samples else 1.0, dither if dithers else 0.0)
        retired = retired or {}
        for key, value in GONE.items():
            if retired.get(key, value) != value:
                raise ConfigError(f"{key} = {retired[key]!r}: this run began so, only the version of then can go on")
        names = ("warmup", "sampled", "dither")
        given = {name: retired[f"training.{name}"] for name in names if f"training.{name}" in retired}
        if not named(loss).is_exclusive:
            given.pop("sampled", None)  # only a softmax heeded it
        return replace(steps, **given)

    def rate(self, peak: float, step: int, n_steps: int) -> float:
        """Learning rate of a step in ``0..n_steps-1``: it rises to its peak, then falls to 0, both in a line."""
        n_warmup = int(self.warmup * n_steps)
        if step < n_warmup:
            return peak * (step + 1) / n_warmup
        return peak * (1.0 - (step - n_warmup) / max(1, n_steps - n_warmup))


def repetition_flops(config: Config, store: Store) -> float:
    """Floating-point operations of the training of one repetition, by a configuration that is filled in."""
    n_outputs = config.hashing.heads * (config.hashing.buckets or 0)
    n_inputs = store.n_features if store.is_dense else store.n_nonzeros / max(store.n_rows, 1)
    sizes = [n_inputs, *config.network.hidden, n_outputs]
    n_weights = sum(above * below for above, below in pairwise(sizes))  # that a row meets
    return STEP_FLOPS * n_weights * store.n_rows * config.training.epochs


def can_be_light(config: Config, store: Store) -> bool:
    """Whether `mach.networks.light.LightNetwork` can train a configuration that is filled in."""
    is_plain = not store.is_dense and len(config.network.hidden) == 1 and config.network.trunk is None
    return is_plain and (config.hashing.buckets or 0) < MANY_BUCKETS


def is_little(config: Config, store: Store) -> bool:
    """Whether a repetition is trained in less time than torch takes to be imported."""
    return repetition_flops(config, store) < LITTLE_FLOPS
