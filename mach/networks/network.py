"""The trainable network of one repetition on a CPU: a sparse input layer in numba under a dense part in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mach.config import NetworkConfig
from mach.errors import ConfigError
from mach.kernels.adam import adam_step, adam_step_of_tensors
from mach.kernels.sparse import sparse_backward_adam, sparse_forward, transpose_batch
from mach.networks.batch import Batch, DenseBatch, SparseBatch
from mach.networks.trunks import ReluDropout, build_dense_part, is_in_main_memory

INPUT_WEIGHT_SCALE = 0.05


@dataclass(frozen=True)
class StepFigures:
    """What a step tells about itself: mean loss a row, and the share of rows whose top bucket is a target."""

    loss: float
    bucket_precision: float


class Network:
    """One repetition: bucket logits of a batch, and training steps on it.

    Parameters
    ----------
    config : NetworkConfig
    n_features, n_buckets : int
        D and B.
    dense_input : bool
        Whether batches are dense.
    loss : {"binary", "softmax"}
    precision : {"float32", "bfloat16"}
        Of dense matrix products; master weights are float32 throughout.
    bias_B : float32 array of shape (B,)
        Initial bias of the output, such as the log odds of each bucket.
    seed : int
        Of the initial weights and of dropout.
    device : str
        Of the dense part, such as "cuda:0". A sparse input layer stays in main memory: a batch touches few of its
        rows, and only its activations and their gradient, (N, H) each, travel.

    Notes
    -----
    Deterministic on a CPU for a given seed and number of torch threads. Dropout depends on (seed, step) alone, so a
    network restored by `load_state` goes on as if never interrupted.
    """

    def __init__(
        self,
        config: NetworkConfig,
        *,
        n_features: int,
        n_buckets: int,
        dense_input: bool,
        loss: Literal["binary", "softmax"],
        precision: Literal["float32", "bfloat16"],
        bias_B: NDArray[np.float32],
        seed: int,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.loss = loss
        self.precision = precision
        self.seed = seed
        self.n_steps = 0
        self.input_dropout = config.input_dropout
        dense = build_dense_part(config, n_features=n_features, n_buckets=n_buckets, dense_input=dense_input)
        self.dense = dense.to(self.device)
        self.input: SparseInput | None = None
        if not dense_input:
            width = config.hidden[0] if config.hidden else n_buckets
            self.input = SparseInput(n_features, width, seed)
        bias = torch.from_numpy(bias_B)
        with torch.no_grad():
            if isinstance(self.dense, nn.Identity):
                assert self.input is not None
                self.input.bias.copy_(bias)
            else:
                self.dense.output.bias.copy_(bias)  # type: ignore[operator, union-attr]
        named = [*self.dense.named_parameters(), *([("input.bias", self.input.bias)] if self.input else [])]
        self.parameters = dict(named)
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named}

    def step(
        self,
        batch: Batch,
        target_rows: NDArray[np.int64],
        targets: NDArray[np.int64],
        rate: float,
        *,
        measured: bool = False,
    ) -> StepFigures | None:
        """One Adam step on a batch whose row ``target_rows[i]`` belongs to bucket ``targets[i]``.

        Figures are those of the batch before the step, under dropout; their cost is that of the loss alone.
        """
        self.n_steps += 1
        self._seed_dropout()
        if self.input_dropout:
            batch = _drop_inputs(batch, self.input_dropout, np.random.default_rng([self.seed, self.n_steps]))
        x = self._input(batch).requires_grad_()
        logits = self._dense(x)
        figures = step_figures(logits.detach().float().cpu(), target_rows, targets, self.loss) if measured else None
        logits.backward(  # type: ignore[no-untyped-call]
            loss_gradient(logits.detach(), target_rows, targets, self.loss)
        )
        if self.input is not None and isinstance(batch, SparseBatch):
            assert x.grad is not None
            self.input.step(batch, x.grad, rate, self.n_steps)
        self._move_parameters(rate)
        return figures

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Float32 bucket logits of shape (N, B), without dropout."""
        self.dense.eval()
        logits = self._dense(self._input(batch)).float().cpu()
        self.dense.train()
        return logits

    def weights(self) -> dict[str, NDArray[Any]]:
        """Arrays under the names that `mach.networks.inference` reads; views, but copies from another device."""
        return {name: tensor.cpu().numpy() for name, tensor in self._weights().items()}

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that a resumed training needs; views, but copies from another device."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self._state().items()}
        return arrays | {"n_steps": np.array([self.n_steps], np.int64)}

    def load_state(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Continue from `state`."""
        self.n_steps = int(arrays["n_steps"][0])
        for name, tensor in self._state().items():
            if is_in_main_memory(tensor):
                tensor.numpy()[...] = arrays[name]
            else:
                tensor.copy_(torch.tensor(arrays[name]))

    def _weights(self) -> dict[str, Tensor]:
        tensors = {name: tensor.detach() for name, tensor in self.dense.state_dict().items()}
        if self.input is not None:
            tensors |= {"input.weight": torch.from_numpy(self.input.weight_DH), "input.bias": self.input.bias.detach()}
        return tensors

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"weights.{name}": tensor for name, tensor in self._weights().items()}
        if self.input is not None:
            moments = {"mean.input.weight": self.input.mean_DH, "square.input.weight": self.input.square_DH}
            tensors |= {name: torch.from_numpy(array) for name, array in moments.items()}
        for name, (mean, square) in self.moments.items():
            tensors |= {f"mean.{name}": mean, f"square.{name}": square}
        return tensors

    def _move_parameters(self, rate: float) -> None:
        """Adam on the dense parameters; torch's own would import its compiler, seconds a worker."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                tensors = (parameter.detach(), parameter.grad, *self.moments[name])
                if is_in_main_memory(parameter):
                    flat = [tensor.numpy().reshape(-1) for tensor in tensors]
                    adam_step(flat[0], flat[1], flat[2], flat[3], rate, self.n_steps)
                else:
                    adam_step_of_tensors(*tensors, rate, self.n_steps)
                parameter.grad = None

    def _input(self, batch: Batch) -> Tensor:
        if isinstance(batch, DenseBatch):
            return torch.from_numpy(batch.values_ND)
        assert self.input is not None
        return self.input.forward(batch)

    def _dense(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.dense(x.to(self.device))

    def _seed_dropout(self) -> None:
        """Make all randomness of a step a function of (seed, step)."""
        key = int(np.random.SeedSequence([self.seed, self.n_steps]).generate_state(1)[0])
        torch.manual_seed(key)  # for modules of a user's trunk
        for i, module in enumerate(self.dense.modules()):
            if isinstance(module, ReluDropout):
                module.seed = key + i


class SparseInput:
    """Input layer over sparse features: weight (D, H) with row-lazy Adam moments, bias (H,) for torch's Adam."""

    def __init__(self, n_features: int, width: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.weight_DH = generator.standard_normal((n_features, width), dtype=np.float32)
        self.weight_DH *= np.float32(INPUT_WEIGHT_SCALE)
        self.mean_DH = np.zeros_like(self.weight_DH)
        self.square_DH = np.zeros_like(self.weight_DH)
        self.bias = nn.Parameter(torch.zeros(width))
        self.slot_D = np.zeros(n_features, np.int32)

    def forward(self, batch: SparseBatch) -> Tensor:
        out_NH = np.empty((len(batch), self.weight_DH.shape[1]), np.float32)
        bias_H = self.bias.detach().numpy()
        sparse_forward(batch.indptr, batch.indices, batch.values, self.weight_DH, bias_H, out_NH)
        return torch.from_numpy(out_NH)

    def step(self, batch: SparseBatch, gradient: Tensor, rate: float, n_steps: int) -> None:
        self.bias.grad = gradient.sum(0)
        columns = transpose_batch(batch.indptr, batch.indices, batch.values, self.slot_D)
        layer = (self.weight_DH, self.mean_DH, self.square_DH)
        sparse_backward_adam(*columns, gradient.numpy(), *layer, rate, n_steps)


def loss_gradient(logits_NB: Tensor, target_rows: NDArray[np.int64], targets: NDArray[np.int64], loss: str) -> Tensor:
    """Gradient of the mean loss a row by the logits: (p - y) / N, without a dense target matrix.

    For softmax a row's target mass is shared equally by its buckets, and a row without one pulls nothing.
    """
    rows, buckets = (torch.from_numpy(ids).to(logits_NB.device) for ids in (target_rows, targets))
    if loss == "binary":
        gradient = torch.sigmoid(logits_NB)
        gradient[rows, buckets] -= 1
    else:
        counts_N = torch.bincount(rows, minlength=len(logits_NB))
        gradient = torch.softmax(logits_NB, 1) * (counts_N > 0)[:, None]
        gradient[rows, buckets] -= (1.0 / counts_N[rows]).to(gradient.dtype)
    return gradient.div_(len(logits_NB))


def mean_loss(logits_NB: Tensor, target_rows: NDArray[np.int64], targets: NDArray[np.int64], loss: str) -> float:
    """Mean over rows of the binary (summed over buckets) or softmax cross-entropy."""
    rows, buckets = torch.from_numpy(target_rows), torch.from_numpy(targets)
    at_targets = logits_NB[rows, buckets]
    if loss == "binary":
        total = nn.functional.softplus(logits_NB).sum() - at_targets.sum()
    else:
        counts_N = torch.bincount(rows, minlength=len(logits_NB))
        normalizers_N = torch.logsumexp(logits_NB, 1)
        total = ((normalizers_N[rows] - at_targets) / counts_N[rows]).sum()
    return float(total) / max(1, len(logits_NB))


def step_figures(
    logits_NB: Tensor, target_rows: NDArray[np.int64], targets: NDArray[np.int64], loss: str
) -> StepFigures:
    """Mean loss and bucket precision of a batch."""
    is_target = torch.zeros_like(logits_NB, dtype=torch.bool)
    is_target[torch.from_numpy(target_rows), torch.from_numpy(targets)] = True
    hits = is_target.gather(1, logits_NB.argmax(1, keepdim=True)).sum().item()
    return StepFigures(mean_loss(logits_NB, target_rows, targets, loss), hits / max(1, len(logits_NB)))


def mean_figures(figures: Sequence[StepFigures]) -> StepFigures:
    """Means over steps of as many rows each."""
    return StepFigures(
        float(np.mean([figure.loss for figure in figures])),
        float(np.mean([figure.bucket_precision for figure in figures])),
    )


def _drop_inputs(batch: Batch, rate: float, generator: np.random.Generator) -> Batch:
    if isinstance(batch, DenseBatch):
        keep = generator.random(batch.values_ND.shape, dtype=np.float32) >= rate
        return DenseBatch(batch.values_ND * keep / np.float32(1.0 - rate))
    keep = generator.random(len(batch.values), dtype=np.float32) >= rate
    return SparseBatch(batch.indptr, batch.indices, batch.values * keep / np.float32(1.0 - rate))


def native_precision() -> Literal["float32", "bfloat16"]:
    """bfloat16 where the processor multiplies it natively, else float32."""
    from llvmlite.binding import get_host_cpu_features

    features = get_host_cpu_features()
    return "bfloat16" if features.get("avx512bf16") or features.get("amx-bf16") else "float32"


def refuse_missing(device: str) -> None:
    """Raise a ConfigError unless tensors can live on a device, such as "cuda:0"."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"device {device} cannot be used ({reason}): set launch.gpus = 0 to train on the CPU"
        ) from error
