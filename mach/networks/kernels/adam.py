"""Adam (Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015) of dense layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.networks.kernels.memory import narrow_like, wide_vectors, widen

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@kernel(error_model="numpy", fastmath={"contract"})
def adam_step(
    weight: Array,
    gradient: Array,
    mean: Array,
    square: Array,
    rate: float,
    step: int,
    scale: float = 1.0,
    half: Array | None = None,
) -> None:
    """Move 1-D weights and both moments in place, by a float32 or bfloat16 gradient times ``scale``.

    ``step`` counts from 1. ``half`` becomes the bfloat16 copy of the weights. Reads and writes 28 bytes a weight.
    """
    wide_vectors()
    pace, by = np.float32(rate / (1.0 - BETA1**step)), np.float32(scale)  # both moments began at 0
    root = np.float32(1.0 / np.sqrt(1.0 - BETA2**step))
    for i in range(len(weight)):
        g: Any = widen(gradient[i]) * by
        m = np.float32(BETA1) * mean[i] + np.float32(1.0 - BETA1) * g
        v = np.float32(BETA2) * square[i] + np.float32(1.0 - BETA2) * g * g
        mean[i], square[i] = m, v
        weight[i] -= pace * m / (np.sqrt(v) * root + np.float32(EPSILON))
        if half is not None:
            half[i] = narrow_like(half[i], weight[i])


@kernel(error_model="numpy")
def adam_rows(
    weight_BH: Array,
    gradient_BH: Array,
    mean_BH: Array,
    square_BH: Array,
    rate: float,
    steps_B: Array,
    scale: float,
    half_BH: Array | None = None,
) -> None:
    """`adam_step` of rows that have been moved as often as ``steps_B`` says, this time included."""
    for b in range(len(weight_BH)):
        row = weight_BH[b], gradient_BH[b], mean_BH[b], square_BH[b]
        if half_BH is None:
            adam_step(row[0], row[1], row[2], row[3], rate, steps_B[b], scale)
        else:
            adam_step(row[0], row[1], row[2], row[3], rate, steps_B[b], scale, half_BH[b])


def adam(
    weight: Tensor,
    half: Tensor | None,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rate: float,
    scale: float,
    step: int,
) -> None:
    """`adam_step` of tensors of any shape on any device; the gradient may be lost."""
    from mach.networks.buffers import flat_array

    if weight.is_cpu:
        by = gradient.mul_(scale) if half is None and scale != 1.0 else gradient
        flat = [flat_array(tensor.contiguous()) for tensor in (weight, by, mean, square)]
        if half is None:
            adam_step(flat[0], flat[1], flat[2], flat[3], rate, step)
        else:
            adam_step(flat[0], flat[1], flat[2], flat[3], rate, step, scale, flat_array(half))
        return
    by = gradient.float() * scale
    mean.mul_(BETA1).add_(by, alpha=1.0 - BETA1)
    square.mul_(BETA2).addcmul_(by, by, value=1.0 - BETA2)
    unbiased = square.sqrt().div_((1.0 - BETA2**step) ** 0.5).add_(EPSILON)
    weight.addcdiv_(mean, unbiased, value=-rate / (1.0 - BETA1**step))
    if half is not None:
        half.copy_(weight)
