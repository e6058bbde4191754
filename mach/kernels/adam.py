"""Adam (Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015) of dense layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit
from numpy.typing import NDArray

from mach.kernels.memory import narrow, widen

if TYPE_CHECKING:
    from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def adam_step(
    weight: NDArray[np.float32],
    gradient: NDArray[np.float32],
    mean: NDArray[np.float32],
    square: NDArray[np.float32],
    rate: float,
    step: int,
) -> None:
    """Move 1-D weights and both moments in place; ``step`` counts from 1. Reads and writes 28 bytes a weight."""
    beta1, beta2 = np.float32(BETA1), np.float32(BETA2)
    gain1, gain2 = np.float32(1.0 - BETA1), np.float32(1.0 - BETA2)
    scale = np.float32(rate / (1.0 - BETA1**step))
    unbias = np.float32(1.0 / np.sqrt(1.0 - BETA2**step))
    epsilon = np.float32(EPSILON)
    for i in range(len(weight)):
        g = gradient[i]
        m = beta1 * mean[i] + gain1 * g
        v = beta2 * square[i] + gain2 * g * g
        mean[i] = m
        square[i] = v
        weight[i] -= scale * m / (np.sqrt(v) * unbias + epsilon)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def adam_step_half(
    weight: NDArray[np.float32],
    half: NDArray[np.uint16],
    gradient: NDArray[np.uint16],
    scale: float,
    mean: NDArray[np.float32],
    square: NDArray[np.float32],
    rate: float,
    step: int,
) -> None:
    """`adam_step` by a bfloat16 gradient times ``scale``, which also renews the bfloat16 copy of the weights."""
    beta1, beta2 = np.float32(BETA1), np.float32(BETA2)
    gain1, gain2 = np.float32(1.0 - BETA1), np.float32(1.0 - BETA2)
    pace = np.float32(rate / (1.0 - BETA1**step))
    unbias = np.float32(1.0 / np.sqrt(1.0 - BETA2**step))
    epsilon = np.float32(EPSILON)
    by = np.float32(scale)
    for i in range(len(weight)):
        g = widen(gradient[i]) * by
        m = beta1 * mean[i] + gain1 * g
        v = beta2 * square[i] + gain2 * g * g
        mean[i] = m
        square[i] = v
        w = weight[i] - pace * m / (np.sqrt(v) * unbias + epsilon)
        weight[i] = w
        half[i] = narrow(w)


def adam_step_of_tensors(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, step: int
) -> None:
    """`adam_step` in tensor operations, for tensors that are not in main memory."""
    mean.mul_(BETA1).add_(gradient, alpha=1.0 - BETA1)
    square.mul_(BETA2).addcmul_(gradient, gradient, value=1.0 - BETA2)
    unbiased = square.sqrt().div_((1.0 - BETA2**step) ** 0.5).add_(EPSILON)
    weight.addcdiv_(mean, unbiased, value=-rate / (1.0 - BETA1**step))
