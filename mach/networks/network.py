"""The trainable network of one repetition: sparse input layer in numba, trunk in torch, output layer of some heads."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mach.config import NetworkConfig
from mach.data.batch import Batch, DenseBatch, SparseBatch, Targets
from mach.data.rows import RowView
from mach.errors import ConfigError, StorageError
from mach.networks.buffers import Buffers
from mach.networks.figures import StepFigures
from mach.networks.inference import wide_matrix
from mach.networks.kernels.adam import adam
from mach.networks.kernels.losses import named
from mach.networks.layers import TRUNK, HiddenLayers, ReluDropout, build_trunk
from mach.networks.output import OutputLayer, loss_gradient, step_figures
from mach.networks.sparse import SparseInput
from mach.networks.stored import check_stored
from mach.networks.trunk import Trunk


class Network:
    """One repetition: logits of the buckets for a batch, and training steps on it.

    Parameters
    ----------
    n_features, n_outputs : int
        D, and B times the number of the repetition's hash functions.
    loss : str
        A name of `mach.networks.kernels.losses.LOSSES`.
    precision : {"float32", "bfloat16"}
        Of matrix products, and of the weights of a sparse input layer; other weights are float32.
    bias : float32 array of shape (n_outputs,)
        Initial bias of the output, such as the log odds of each bucket.
    device : str
        Of trunk and output layer, such as "cuda:0". A sparse input layer stays in main memory: a batch touches few of
        its rows, and only its activations and their gradient, (N, H) each, travel.
    sampled, dither : float
        As of `mach.networks.steps.Steps`; only the processor heeds them.
    trunk : class or str, optional
        What the caller passed for ``config.trunk`` (`mach.networks.trunk`).

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
        n_outputs: int,
        dense_input: bool,
        loss: str,
        precision: Literal["float32", "bfloat16"],
        bias: NDArray[np.float32],
        seed: int,
        device: str = "cpu",
        sampled: float = 1.0,
        dither: float = 0.0,
        trunk: Trunk | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.loss = named(loss)
        self.seed = seed
        self.n_steps = 0
        self.view = RowView(power=config.power)
        self.buffers = Buffers()
        self.is_half = precision == "bfloat16"  # of products
        self.dtype = torch.bfloat16 if self.is_half else torch.float32
        built = build_trunk(config, trunk, n_features=n_features, dense_input=dense_input, half=self.is_half)
        self.input: SparseInput | None = None
        if not dense_input:
            width = config.hidden[0] if config.hidden else n_outputs
            self.input = SparseInput(n_features, width, seed, half=self.is_half)
        self.trunk: nn.Module = nn.Identity()
        self.output: OutputLayer | None = None
        self.activation: ReluDropout | None = None  # all that the trunk is, in main memory: it needs no autograd
        if built is not None:
            self.trunk = built[0].to(self.device)
            how: dict[str, Any] = {"bias": bias, "device": self.device, "seed": seed}
            how["counts_moves"] = sampled < 1 and not self.loss.is_exclusive
            self.output = OutputLayer(built[1], n_outputs, half=self.is_half, sampled=sampled, dither=dither, **how)
            if self.input is not None and self.output.weight.is_cpu and isinstance(self.trunk, HiddenLayers):
                self.activation = None if len(self.trunk.layers) else self.trunk.activations[0]  # type: ignore[assignment]
        elif self.input is not None:
            self.input.bias[:] = bias
        self.parameters = {TRUNK + name: parameter for name, parameter in self.trunk.named_parameters()}
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}

    def step(self, batch: Batch, targets: Targets, rate: float, *, measured: bool = False) -> StepFigures | None:
        """One step of the optimisers on a batch.

        Figures are those of the batch before the step, under dropout; their cost is that of the loss alone.
        """
        self.n_steps += 1
        self._seed_dropout()
        batch = self.view.batch(batch)
        x = self._input(batch)
        if self.activation is not None:
            hidden = self.buffers.tensor("hidden", tuple(x.shape), self.dtype)
            self.activation.activate(x, hidden)
        else:
            hidden = self._trunk(x.requires_grad_(self.input is not None))
        if self.output is not None:
            back, figures = self.output.step(hidden.detach(), targets, self.loss, rate, self.n_steps, measured=measured)
        else:
            logits = hidden.detach()
            figures = step_figures(logits.float().cpu(), targets, self.loss) if measured else None
            back = loss_gradient(logits, targets, self.loss)
        if self.activation is not None:
            self.activation.pull_back(back, hidden, into=x, scale=1.0 / len(batch))
        elif hidden.requires_grad:
            hidden.backward(back.to(hidden.dtype).div_(len(batch)))  # type: ignore[no-untyped-call]
        if self.input is not None and isinstance(batch, SparseBatch):
            gradient = x if self.activation is not None else x.grad
            assert gradient is not None
            self.input.step(batch, gradient.numpy(), gradient.sum(0).numpy(), rate, self.n_steps)
        self._move_parameters(rate)
        return figures

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Float32 logits of shape (N, n_outputs), without dropout."""
        self.trunk.eval()
        hidden = self._trunk(self._input(self.view.batch(batch)))
        self.trunk.train()
        return (hidden.clone() if self.output is None else self.output.logits(hidden)).float().cpu()

    def figures(self, batch: Batch, targets: Targets) -> StepFigures:
        """Of a batch, without dropout."""
        return step_figures(self.logits(batch), targets, self.loss)

    def weights(self) -> dict[str, NDArray[Any]]:
        """Arrays under the names that `mach.networks.inference` reads; views, but copies from another device."""
        return {name: tensor.cpu().numpy() for name, tensor in self._weights().items()}

    @property
    def samples(self) -> bool:
        """Whether steps compute a sample of the outputs."""
        return self.output is not None and self.output.sampled < 1

    def expect(self, shares: NDArray[np.float64]) -> None:
        """Take how large a part of the rows of coming steps has each output as a target: samples go by it."""
        if self.output is not None:
            self.output.expect(shares)

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that a resumed training needs; views, but copies from another device."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self._state().items()}
        return arrays | {"n_steps": np.array([self.n_steps], np.int64)}

    def load_state(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Continue from `state`; a StorageError where that is of another network, such as one of an earlier version."""
        state = self._state()
        for name, tensor in state.items():
            if name not in arrays or arrays[name].shape != tuple(tensor.shape):
                raise StorageError(
                    f"the checkpoint has no {name} of shape {tuple(tensor.shape)}: it is of another version"
                )
        self.n_steps = int(arrays["n_steps"][0])
        for name, tensor in state.items():
            if tensor.is_cpu:
                tensor.numpy()[...] = arrays[name]
            else:
                tensor.copy_(torch.tensor(arrays[name]))
        if self.output is not None:
            self.output.renew()

    def load_weights(self, stored: dict[str, NDArray[Any]]) -> None:
        """Start from weights as `mach.networks.inference.stored_weights` keeps them; moments and steps are at 0.

        A StorageError where they are of another network.
        """
        weights = self._weights()
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        check_stored(stored, shapes, "weights to start from", has_trunk=not isinstance(self.trunk, HiddenLayers))
        for name, tensor in weights.items():
            if name == "input.weight" and self.input is not None:
                self.input.load(stored)
            else:
                layer, is_matrix = name.removesuffix(".weight"), stored[name].ndim == 2
                tensor.copy_(torch.from_numpy(np.array(wide_matrix(stored, layer) if is_matrix else stored[name])))
        if self.output is not None:
            self.output.renew()

    def _weights(self) -> dict[str, Tensor]:
        tensors = {TRUNK + name: tensor.detach() for name, tensor in self.trunk.state_dict().items()}
        if self.input is not None:
            tensors |= {name: torch.from_numpy(array) for name, array in self.input.weights().items()}
        return tensors | (self.output.weights() if self.output is not None else {})

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"weights.{name}": tensor for name, tensor in self._weights().items()}
        if self.input is not None:
            tensors |= {name: torch.from_numpy(array) for name, array in self.input.state().items()}
        for name, (mean, square) in self.moments.items():
            tensors |= {f"mean.{name}": mean, f"square.{name}": square}
        return tensors | (self.output.state() if self.output is not None else {})

    def _move_parameters(self, rate: float) -> None:
        """Adam on the trunk's parameters; torch's own would import its compiler, seconds a worker."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                adam(parameter.detach(), None, parameter.grad, *self.moments[name], rate, 1.0, self.n_steps)
                parameter.grad = None

    def _input(self, batch: Batch) -> Tensor:
        if isinstance(batch, DenseBatch):
            return torch.from_numpy(batch.values_ND)
        assert self.input is not None
        return torch.from_numpy(self.input.forward(batch))

    def _trunk(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half):
            hidden: Tensor = self.trunk(x.to(self.device))
        return hidden if self.output is None or self.output.half is not None else hidden.float()

    def _seed_dropout(self) -> None:
        """Make all randomness of a step a function of (seed, step)."""
        key = int(np.random.SeedSequence([self.seed, self.n_steps]).generate_state(1)[0])
        torch.default_generator.manual_seed(key)  # for a user's trunk; torch.manual_seed keeps a traceback of each call
        if self.device.type == "cuda":
            torch.cuda.manual_seed(key)
        for i, module in enumerate(self.trunk.modules()):
            if isinstance(module, ReluDropout):
                module.seed = key + i


def refuse_missing(device: str) -> None:
    """Raise a ConfigError unless tensors can live on a device, such as "cuda:0"."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"device {device} cannot be used ({reason}): set launch.gpus = 0 to train on the CPU"
        ) from error
