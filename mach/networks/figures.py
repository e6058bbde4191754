"""What a training step tells of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Targets
from mach.networks.kernels.loss import n_hits
from mach.networks.kernels.losses import Loss
from mach.networks.kernels.memory import from_bfloat16


@dataclass(frozen=True)
class StepFigures:
    """Of a batch: mean loss a row, and the share of rows whose top bucket is a target; means over the heads.

    A sampled step estimates the loss, and seeks the top among its sample, corrections included.
    """

    loss: float
    bucket_precision: float


def mean_figures(figures: Sequence[StepFigures]) -> StepFigures:
    """Means over steps of as many rows each."""
    return StepFigures(
        float(np.mean([figure.loss for figure in figures])),
        float(np.mean([figure.bucket_precision for figure in figures])),
    )


def figures_of(
    z_BN: NDArray[Any],
    bias_B: NDArray[np.float32],
    targets: Targets,
    loss: Loss,
    slices: Sequence[slice] | None = None,
    weights_B: NDArray[np.float32] | None = None,
) -> StepFigures:
    """Those of logits as `mach.networks.kernels.loss` has them.

    ``slices`` are the outputs of each head, where these are not equally many. With ``weights_B`` the loss of an output,
    which is the binary one, counts so often; that of a target once.
    """
    kernel, total, hits = loss.kernel("loss"), 0.0, 0
    for head in heads(len(z_BN), targets) if slices is None else slices:
        given = z_BN[head], bias_B[head], targets.rows, targets.outputs, head.start
        total, hits = total + (kernel(*given) if weights_B is None else 0.0), hits + n_hits(*given)
    if weights_B is not None:
        logits_BN = from_bfloat16(z_BN) + bias_B[:, None]
        total = float(np.logaddexp(0, logits_BN).sum(axis=1) @ weights_B)
        total -= float(logits_BN[targets.outputs, targets.rows].sum())
    n = max(1, z_BN.shape[1] * targets.n_heads)
    return StepFigures(total / n, hits / n)


def heads(n_outputs: int, targets: Targets) -> list[slice]:
    """The outputs of every head."""
    n_buckets = n_outputs // targets.n_heads
    return [slice(first, first + n_buckets) for first in range(0, n_outputs, n_buckets)]
