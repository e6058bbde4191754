"""The sparse input layer of a network in training."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch
from mach.networks.buffers import Buffers
from mach.networks.inference import NO_SCALE, wide_matrix
from mach.networks.kernels.adam import adam_step
from mach.networks.kernels.dense import draw
from mach.networks.kernels.memory import aligned_empty, stretches, to_bfloat16
from mach.networks.kernels.sparse import sparse_backward, sparse_forward, transpose_batch

WEIGHT_SCALE = 0.05
ROUNDING_STRIDE = 40_014  # of the seed of random rounding, a step


class SparseInput:
    """Input layer over sparse features: weight (D, H) with row-wise RMSprop, bias (H,) with Adam.

    With ``half`` the weights are bfloat16 (as uint16), rounded at random after each step, rather than float32.
    """

    def __init__(self, n_features: int, width: int, seed: int, *, half: bool) -> None:
        self.seed = seed
        self.weight_DH = aligned_empty((n_features, width), np.uint16 if half else np.float32)
        normal = NormalDist(0.0, WEIGHT_SCALE)
        quantiles = np.array([normal.inv_cdf((i + 0.5) / 4096) for i in range(4096)], np.float32)
        draw(to_bfloat16(quantiles) if half else quantiles, seed, self.weight_DH.reshape(-1))
        self.square_D = np.zeros(n_features, np.float32)
        self.bias, self.bias_mean, self.bias_square = (np.zeros(width, np.float32) for _ in range(3))
        self.slot_D = np.zeros(n_features, np.int32)
        self.buffers = Buffers()

    def forward(self, batch: SparseBatch) -> NDArray[np.float32]:
        """Pre-activations of shape (N, H), valid until the next call."""
        out_NH = self.buffers.array("out", (len(batch), self.weight_DH.shape[1]), np.float32)
        sparse_forward(batch.indptr, batch.indices, batch.values, self.weight_DH, NO_SCALE, self.bias, out_NH)
        return out_NH

    def step(
        self,
        batch: SparseBatch,
        gradient_NH: NDArray[np.float32],
        by_bias_H: NDArray[np.float32],
        rate: float,
        n_steps: int,
    ) -> None:
        """Move weights and bias by the gradients of the loss by what `forward` put out, and by the bias."""
        adam_step(self.bias, by_bias_H, self.bias_mean, self.bias_square, rate, n_steps)
        columns = transpose_batch(batch.indptr, batch.indices, batch.values, self.slot_D)
        seed = self.seed + n_steps * ROUNDING_STRIDE
        sparse_backward(columns, gradient_NH, self.weight_DH, self.square_D, rate, seed)

    def load(self, stored: dict[str, NDArray[Any]]) -> None:
        """Take the weights of a stored layer."""
        for rows in stretches(*self.weight_DH.shape):
            wide = wide_matrix(stored, "input", rows)
            self.weight_DH[rows] = to_bfloat16(wide) if self.weight_DH.dtype == np.uint16 else wide

    def weights(self) -> dict[str, NDArray[Any]]:
        """Weights by name; views."""
        return {"input.weight": self.weight_DH, "input.bias": self.bias}

    def state(self) -> dict[str, NDArray[Any]]:
        """Moments by name; views."""
        return {
            "square.input.weight": self.square_D,
            "mean.input.bias": self.bias_mean,
            "square.input.bias": self.bias_square,
        }
