"""Adam (Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015) of dense layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from mach.networks.kernels.memory import narrow, wide_vectors, widen

if TYPE_CHECKING:
    from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


FLAGS: Any = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(**FLAGS)
def _paces(rate: float, step: int) -> Any:
    """Step length and factor of the root of the second moment, both with Adam's correction of the start at 0."""
    return np.float32(rate / (1.0 - BETA1**step)), np.float32(1.0 / np.sqrt(1.0 - BETA2**step))


@njit(**FLAGS)
def _moved(w: Any, g: Any, mean: NDArray[np.float32], square: NDArray[np.float32], i: int, paces: Any) -> Any:
    """Weight i after its step by gradient g, which its moments take in."""
    m = np.float32(BETA1) * mean[i] + np.float32(1.0 - BETA1) * g
    v = np.float32(BETA2) * square[i] + np.float32(1.0 - BETA2) * g * g
    mean[i], square[i] = m, v
    return w - paces[0] * m / (np.sqrt(v) * paces[1] + np.float32(EPSILON))


@njit(**FLAGS)
def adam_step(
    weight: NDArray[np.float32],
    gradient: NDArray[np.float32],
    mean: NDArray[np.float32],
    square: NDArray[np.float32],
    rate: float,
    step: int,
) -> None:
    """Move 1-D weights and both moments in place; ``step`` counts from 1. Reads and writes 28 bytes a weight."""
    wide_vectors()
    paces = _paces(rate, step)
    for i in range(len(weight)):
        weight[i] = _moved(weight[i], gradient[i], mean, square, i, paces)


@njit(**FLAGS)
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
    wide_vectors()
    paces, by = _paces(rate, step), np.float32(scale)
    for i in range(len(weight)):
        weight[i] = _moved(weight[i], widen(gradient[i]) * by, mean, square, i, paces)
        half[i] = narrow(weight[i])


def adam_step_of_tensors(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, rate: float, step: int
) -> None:
    """`adam_step` in tensor operations, for tensors that are not in main memory."""
    mean.mul_(BETA1).add_(gradient, alpha=1.0 - BETA1)
    square.mul_(BETA2).addcmul_(gradient, gradient, value=1.0 - BETA2)
    unbiased = square.sqrt().div_((1.0 - BETA2**step) ** 0.5).add_(EPSILON)
    weight.addcdiv_(mean, unbiased, value=-rate / (1.0 - BETA1**step))
