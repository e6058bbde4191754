"""The output layer of a network in training: logits, loss, and the step of its weights, without autograd."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from mach.data.batch import Targets
from mach.networks.buffers import Buffers, aligned, array_of
from mach.networks.figures import StepFigures, figures_of, heads
from mach.networks.inference import NO_SCALE
from mach.networks.kernels.adam import adam, adam_rows
from mach.networks.kernels.loss import DITHER_STRIDE, dithered
from mach.networks.kernels.losses import Loss
from mach.networks.kernels.sparse import sparse_forward
from mach.networks.samples import Sample, line_of
from mach.networks.stored import MOMENTS

MOVES = "n_moves.output"  # of a checkpoint
SAMPLES = 1  # tells the random numbers of samples from others of the same seed and step
PAD = 32  # unused columns: rows a power of two apart would fall on the same lines of a cache


class OutputLayer:
    """``h @ weight.T + bias`` with Adam; master weights in float32, products in bfloat16 where ``half``.

    There are B outputs for every hash function, and ``bias`` (float32) are the log odds that an output is a row's
    target. `mach.networks.steps.Steps` says what ``sampled`` and ``dither`` are; only the processor heeds them.

    A step multiplies three times, 6 N H n_outputs FLOPs, and passes once over 28 bytes a weight; of sampled outputs
    alone, whose moments rest while they are not drawn. With dither two of the products skip the zeros, most of the
    gradient, whose mean stays what it was (Wiedemann, Mehari, Kepp and Samek, "Dithered backprop: a sparse and
    quantized backpropagation algorithm for more efficient deep neural network training", CVPR workshops 2020; there
    with steps of a size that follows the layer's gradients). In main memory its logits have a row for every output
    (`mach.networks.kernels.loss`), which is how oneDNN multiplies fastest.
    """

    def __init__(
        self,
        width: int,
        n_outputs: int,
        *,
        half: bool,
        bias: NDArray[np.float32],
        device: torch.device,
        sampled: float = 1.0,
        dither: float = 0.0,
        seed: int = 0,
        counts_moves: bool = False,
    ) -> None:
        bound = width**-0.5
        weight = torch.rand(n_outputs, width) * (2 * bound) - bound
        self.weight = aligned(weight).to(device)
        self.bias = torch.from_numpy(bias.copy()).to(device)
        self.half = aligned(weight.bfloat16()).to(device) if half else None
        zeros = torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros(n_outputs), torch.zeros(n_outputs)
        self.moments = [aligned(moment).to(device) for moment in zeros]
        self.buffers = Buffers()
        self.sampled, self.dither, self.seed = sampled, dither, seed
        self.moves = torch.zeros(n_outputs, dtype=torch.int32) if counts_moves else None  # steps that drew an output
        self.expect(1.0 / (1.0 + np.exp(-bias.astype(np.float64))))

    def expect(self, shares: NDArray[np.float64]) -> None:
        """Take how large a part of the rows to come has each output as a target: samples go by it."""
        self.shares = shares
        self.line: NDArray[np.float64] | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Of shape (N, n_outputs), in bfloat16 or float32."""
        if self.half is not None:
            return torch.addmm(self.bias.bfloat16(), hidden.bfloat16(), self.half.T)
        return torch.addmm(self.bias, hidden, self.weight.T)

    def step(
        self, hidden: Tensor, targets: Targets, loss: Loss, rate: float, n_steps: int, *, measured: bool = False
    ) -> tuple[Tensor, StepFigures | None]:
        """Move the weights; return the summed loss's gradient by ``hidden``, and the figures before the step if asked.

        ``n_steps`` counts from 1. The gradient is valid until the next step.
        """
        if self.weight.is_cpu:
            return self._step_in_main_memory(hidden, targets, loss, rate, n_steps, measured)
        logits = self.logits(hidden)
        figures = step_figures(logits.float().cpu(), targets, loss) if measured else None
        gradient = loss_gradient(logits, targets, loss)
        scale = 1.0 / len(hidden)
        back = gradient @ (self.weight if self.half is None else self.half)
        by_weight = gradient.T @ (hidden if self.half is None else hidden.bfloat16())
        mean, square, bias_mean, bias_square = self.moments
        adam(self.weight, self.half, by_weight, mean, square, rate, scale, n_steps)
        adam(self.bias, None, gradient.sum(0, dtype=torch.float32), bias_mean, bias_square, rate, scale, n_steps)
        return back, figures

    def _step_in_main_memory(
        self, hidden: Tensor, targets: Targets, loss: Loss, rate: float, n_steps: int, measured: bool
    ) -> tuple[Tensor, StepFigures | None]:
        N, scale, rounding = len(hidden), 1.0 / len(hidden), self.seed + n_steps * DITHER_STRIDE
        whole = self.weights() | self.state() | ({} if self.half is None else {"half": self.half})
        part, sample = whole, self._sample(targets, N, n_steps, is_even=loss.is_exclusive)
        if sample is not None:
            targets, drawn = sample.targets, torch.from_numpy(sample.outputs)
            part = {name: self._rows(name, tensor, drawn) for name, tensor in whole.items()}
            n_steps = max(1, round(n_steps * len(drawn) / len(self.shares)))  # as often the moments have moved
        weight, half, bias = part["output.weight"], part.get("half"), part["output.bias"].numpy()
        (B, H), multiplier = weight.shape, weight if half is None else half
        hidden = hidden.to(multiplier.dtype).contiguous()
        shapes = {"z": (B, N), "g": (N, B + PAD), "back": (N, H), "by_weight": (B, H)}
        z_BN, g_NB, back, by_weight = (self.buffers.tensor(*named, hidden.dtype) for named in shapes.items())
        g_NB = g_NB[: 0 if self.dither else N, :B]
        torch.mm(multiplier, hidden.T, out=z_BN)
        slices = heads(B, targets) if sample is None else sample.heads
        added_B = bias
        if sample is not None and loss.is_exclusive:
            added_B = bias + sample.corrections
            own = torch.from_numpy(targets.outputs), torch.from_numpy(targets.rows)
            z_BN[own] -= torch.from_numpy(sample.corrections)[own[0]].to(z_BN.dtype)
        z, g, by_bias = array_of(z_BN), array_of(g_NB), np.empty(B, np.float32)
        figures = None
        if measured:
            weights_B = None if sample is None or loss.is_exclusive else np.exp(sample.corrections)
            figures = figures_of(z, added_B, targets, loss, slices, weights_B)
        kernel = loss.kernel("gradient")
        for head in slices:
            kernel(z[head], added_B[head], targets.rows, targets.outputs, head.start, g[:, head], by_bias[head])
        if sample is not None and not loss.is_exclusive:  # a drawn output's gradient counts for all it stands for
            weights_B1 = torch.from_numpy(sample.corrections).exp_()[:, None]
            z_BN *= weights_B1
            g_NB *= weights_B1.T
            by_bias *= weights_B1[:, 0].numpy()
        if self.dither:
            by_hidden = csr_array(dithered(z, self.dither, rounding)[::-1], shape=(B, N))
            self._multiply(by_hidden, hidden, by_weight)
            self._multiply(by_hidden.T.tocsr(), multiplier, back)
        else:
            torch.mm(g_NB, multiplier, out=back)
            torch.mm(z_BN, hidden, out=by_weight)
        mean, square, bias_mean, bias_square = (part[name] for name in MOMENTS)
        if self.moves is None:
            adam(weight, half, by_weight, mean, square, rate, scale, n_steps)
            adam(part["output.bias"], None, torch.from_numpy(by_bias), bias_mean, bias_square, rate, scale, n_steps)
        else:
            part[MOVES] += 1
            steps_B, halves = part[MOVES].numpy(), None if half is None else array_of(half)
            moments = [array_of(part[name]).reshape(B, -1) for name in MOMENTS]
            adam_rows(array_of(weight), array_of(by_weight), moments[0], moments[1], rate, steps_B, scale, halves)
            adam_rows(bias[:, None], by_bias[:, None], moments[2], moments[3], rate, steps_B, scale)
        if sample is not None:
            for name, tensor in whole.items():
                tensor.index_copy_(0, drawn, part[name])
        return back, figures

    def _sample(self, targets: Targets, n_rows: int, n_steps: int, *, is_even: bool) -> Sample | None:
        """The outputs of this step, if these are not all."""
        if self.sampled >= 1:
            return None
        n_sampled = math.ceil(self.sampled * len(self.shares) / targets.n_heads)
        generator = np.random.default_rng([self.seed, n_steps, SAMPLES])
        if is_even:
            return Sample.even(targets, n_rows, self.shares, n_sampled, generator)
        if self.line is None:
            self.line = line_of(self.shares, targets.n_heads)
        return Sample.draw(targets, self.line, n_sampled, generator)

    def _multiply(self, csr: csr_array, dense: Tensor, out: Tensor) -> None:
        """``out = csr @ dense``; sums are of float32."""
        wide = self.buffers.tensor("wide", tuple(out.shape), torch.float32) if out.dtype == torch.bfloat16 else out
        given = csr.indptr.astype(np.int64), csr.indices, csr.data, array_of(dense), NO_SCALE
        sparse_forward(*given, np.zeros(out.shape[1], np.float32), wide.numpy())
        if wide is not out:
            out.copy_(wide)

    def _rows(self, name: str, whole: Tensor, rows: Tensor) -> Tensor:
        part = self.buffers.tensor(f"rows of {name}", (len(rows), *whole.shape[1:]), whole.dtype)
        return torch.index_select(whole, 0, rows, out=part)

    def weights(self) -> dict[str, Tensor]:
        return {"output.weight": self.weight, "output.bias": self.bias}

    def state(self) -> dict[str, Tensor]:
        """Moments by name; with `weights` everything that a resumed training needs."""
        moves = {} if self.moves is None else {MOVES: self.moves}
        return dict(zip(MOMENTS, self.moments, strict=True)) | moves

    def renew(self) -> None:
        """Make the bfloat16 copy anew after the weights were loaded."""
        if self.half is not None:
            self.half.copy_(self.weight)


def loss_gradient(logits: Tensor, targets: Targets, loss: Loss) -> Tensor:
    """Gradient by the logits of the loss summed over rows and heads."""
    is_target_NJB = _is_target(logits, targets)
    return loss.errors(logits.view(is_target_NJB.shape), is_target_NJB).view(logits.shape)


def step_figures(logits: Tensor, targets: Targets, loss: Loss) -> StepFigures:
    """Mean loss and bucket precision of a batch."""
    is_target_NJB = _is_target(logits, targets)
    logits_NJB = logits.view(is_target_NJB.shape)
    hits = is_target_NJB.gather(2, logits_NJB.argmax(2, keepdim=True)).sum()
    n = max(1, len(logits) * targets.n_heads)
    return StepFigures(float(loss.value(logits_NJB, is_target_NJB).sum()) / n, float(hits) / n)


def _is_target(logits: Tensor, targets: Targets) -> Tensor:
    """Whether buckets are targets, shape (N, J, B)."""
    is_target = torch.zeros_like(logits, dtype=torch.bool)
    is_target[torch.from_numpy(targets.rows), torch.from_numpy(targets.outputs)] = True
    return is_target.view(len(logits), targets.n_heads, -1)
