"""The network of a repetition that is little work, without torch, whose import would take longer than all its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.config import NetworkConfig
from mach.data.batch import Batch, SparseBatch, Targets
from mach.data.rows import RowView
from mach.errors import StorageError
from mach.networks.buffers import Buffers
from mach.networks.figures import StepFigures, figures_of, heads
from mach.networks.inference import NO_SCALE, wide_matrix
from mach.networks.kernels.adam import adam_step
from mach.networks.kernels.dense import relu_dropout, relu_dropout_backward
from mach.networks.kernels.loss import DITHER_STRIDE, dithered
from mach.networks.kernels.losses import named
from mach.networks.kernels.memory import aligned_empty
from mach.networks.kernels.sparse import sparse_forward, transpose_batch
from mach.networks.sparse import SparseInput
from mach.networks.stored import MOMENTS, check_stored

DROPOUT_STRIDE = 3  # as the only activation of `mach.networks.network.Network` counts among its modules


class LightNetwork:
    """As `mach.networks.network.Network` of one hidden layer over sparse rows, on the processor.

    Arguments are those of that; with ``half`` the weights of the input layer are bfloat16. It begins with the same
    weights and makes the same steps, but for the order of sums. Products are of float32, by numpy's library; those of
    rounded errors (``dither``) by a kernel that skips zeros. Its bits depend on the number of threads of that library,
    which the caller decides (`mach.networks.blas`).
    """

    device = "cpu"
    samples = False

    def __init__(
        self,
        config: NetworkConfig,
        *,
        n_features: int,
        n_outputs: int,
        loss: str,
        bias: NDArray[np.float32],
        seed: int,
        half: bool = False,
        dither: float = 0.0,
    ) -> None:
        (width,) = config.hidden
        self.loss, self.seed, self.dither, self.dropout = named(loss), seed, dither, config.dropout
        self.n_steps = 0
        self.view = RowView(power=config.power)
        self.buffers = Buffers()
        self.input = SparseInput(n_features, width, seed, half=half)
        self.weight_BH = aligned_empty((n_outputs, width), np.float32)
        bound = width**-0.5
        self.weight_BH[:] = uniform(seed, self.weight_BH.size).reshape(self.weight_BH.shape) * (2 * bound) - bound
        self.bias_B = bias.copy()
        shapes = (self.weight_BH.shape, self.weight_BH.shape, bias.shape, bias.shape)
        self.moments = [np.zeros(shape, np.float32) for shape in shapes]

    def step(self, batch: Batch, targets: Targets, rate: float, *, measured: bool = False) -> StepFigures | None:
        """One step of the optimisers on a batch; figures are those before it, under dropout."""
        assert isinstance(batch, SparseBatch)
        self.n_steps += 1
        batch = self.view.sparse(batch)
        N, key = len(batch), int(np.random.SeedSequence([self.seed, self.n_steps]).generate_state(1)[0])
        x_NH = self.input.forward(batch)
        hidden_NH = self.buffers.array("hidden", x_NH.shape, np.float32)
        relu_dropout(x_NH.reshape(-1), self.dropout, key + DROPOUT_STRIDE, hidden_NH.reshape(-1))
        z_BN = self._logits(hidden_NH)
        figures = None
        if measured:
            figures = figures_of(z_BN, self.bias_B, targets, self.loss)
            if not (np.isfinite(x_NH).all() and np.isfinite(self.weight_BH).all()):  # what zeros are skipped for
                figures = StepFigures(np.nan, figures.bucket_precision)
        nobody_NB, by_bias_B = np.empty((0, len(z_BN)), np.float32), np.empty(len(z_BN), np.float32)
        kernel = self.loss.kernel("gradient")
        for head in heads(len(z_BN), targets):
            given = z_BN[head], self.bias_B[head], targets.rows, targets.outputs, head.start
            kernel(*given, nobody_NB[:, head], by_bias_B[head])
        by_weight_BH = self.buffers.array("by weight", self.weight_BH.shape, np.float32)
        back_NH = self.buffers.array("back", x_NH.shape, np.float32)
        if self.dither:
            entries = dithered(z_BN, self.dither, self.seed + self.n_steps * DITHER_STRIDE)
            _multiply(*entries, hidden_NH, by_weight_BH)
            rows_U, indptr, columns, values = transpose_batch(*entries, np.zeros(N, np.int32))
            some_UH = self.buffers.array("some", (len(rows_U), x_NH.shape[1]), np.float32)
            _multiply(indptr, columns, values, self.weight_BH, some_UH)
            back_NH[:] = 0.0
            back_NH[rows_U] = some_UH
        else:
            np.matmul(z_BN, hidden_NH, out=by_weight_BH)
            np.matmul(z_BN.T, self.weight_BH, out=back_NH)
        mean_BH, square_BH, mean_B, square_B = self.moments
        by_weight_BH *= np.float32(1.0 / N)
        by_bias_B *= np.float32(1.0 / N)
        flat = [array.reshape(-1) for array in (self.weight_BH, by_weight_BH, mean_BH, square_BH)]
        adam_step(flat[0], flat[1], flat[2], flat[3], rate, self.n_steps)
        adam_step(self.bias_B, by_bias_B, mean_B, square_B, rate, self.n_steps)
        scale = 1.0 / (N * (1.0 - self.dropout))
        relu_dropout_backward(back_NH.reshape(-1), hidden_NH.reshape(-1), scale, x_NH.reshape(-1))
        self.input.step(batch, x_NH, x_NH.sum(axis=0), rate, self.n_steps)
        return figures

    def figures(self, batch: Batch, targets: Targets) -> StepFigures:
        """Of a batch, without dropout."""
        assert isinstance(batch, SparseBatch)
        x_NH = self.input.forward(self.view.sparse(batch))
        return figures_of(self._logits(np.maximum(x_NH, 0.0)), self.bias_B, targets, self.loss)

    def weights(self) -> dict[str, NDArray[Any]]:
        """Arrays under the names that `mach.networks.inference` reads; views."""
        return self.input.weights() | {"output.weight": self.weight_BH, "output.bias": self.bias_B}

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that a resumed training needs; views."""
        return self._state() | {"n_steps": np.array([self.n_steps], np.int64)}

    def load_state(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Continue from `state`; a StorageError where that is of another network."""
        for name, array in self._state().items():
            if name not in arrays or arrays[name].shape != array.shape:
                raise StorageError(f"the checkpoint has no {name} of shape {array.shape}: it is of another version")
            array[...] = arrays[name]
        self.n_steps = int(arrays["n_steps"][0])

    def load_weights(self, stored: dict[str, NDArray[Any]]) -> None:
        """Start from weights as they are stored; a StorageError where they are of another network."""
        shapes = {name: array.shape for name, array in self.weights().items()}
        check_stored(stored, shapes, "weights to start from", has_trunk=False)
        self.input.load(stored)
        self.input.bias[:], self.bias_B[:] = stored["input.bias"], stored["output.bias"]
        self.weight_BH[:] = wide_matrix(stored, "output")

    def _state(self) -> dict[str, NDArray[Any]]:
        weights = {f"weights.{name}": array for name, array in self.weights().items()}
        return weights | self.input.state() | dict(zip(MOMENTS, self.moments, strict=True))

    def _logits(self, hidden_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        """Without the bias, (B, N)."""
        z_BN = self.buffers.array("z", (len(self.bias_B), len(hidden_NH)), np.float32)
        with np.errstate(all="ignore"):  # a loss that is not finite is told by the figures
            return np.matmul(self.weight_BH, hidden_NH.T, out=z_BN)


def uniform(seed: int, n: int) -> NDArray[np.float32]:
    """As ``torch.rand(n)`` after ``torch.manual_seed(seed)``."""
    drawn = np.frombuffer(np.random.RandomState(seed).bytes(4 * n), "<u4")
    return (drawn & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)


def _multiply(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    dense: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """``out = csr @ dense``."""
    sparse_forward(indptr, indices, values, dense, NO_SCALE, np.zeros(out.shape[1], np.float32), out)
