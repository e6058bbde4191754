"""What lies between input and output layer, as torch modules: hidden layers, or a trunk of the user's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mach.config import NetworkConfig
from mach.errors import ConfigError, StorageError
from mach.networks.buffers import flat_array
from mach.networks.inference import Weights
from mach.networks.kernels.dense import relu_dropout, relu_dropout_backward
from mach.networks.kernels.memory import from_bfloat16
from mach.networks.trunk import Trunk, agreed, class_of

TRUNK = "trunk."  # prefix of the names of its weights


class ReluDropout(nn.Module):
    """``dropout(relu(x))`` whose mask is a function of ``seed`` and position, so that a resumed run draws the same.

    The seed is set anew before every training step. The result is bfloat16 where ``is_half``, else float32.
    """

    def __init__(self, rate: float, *, is_half: bool) -> None:
        super().__init__()
        self.rate, self.is_half = rate, is_half
        self.seed = 0

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            out = nn.functional.dropout(torch.relu(x.float()), self.rate, self.training)
            return out.bfloat16() if self.is_half else out
        return _ReluDropout.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]

    def activate(self, x: Tensor, out: Tensor) -> None:
        """`forward` of a float32 tensor in main memory into another."""
        rate = self.rate if self.training else 0.0
        relu_dropout(flat_array(x), rate, self.seed, flat_array(out))

    def pull_back(self, gradient: Tensor, out: Tensor, into: Tensor, scale: float = 1.0) -> None:
        """Gradient by x, float32, from that by what `activate` put out, times a number."""
        scale /= 1.0 - self.rate if self.training else 1.0
        relu_dropout_backward(flat_array(gradient), flat_array(out), scale, flat_array(into))


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: ReluDropout) -> Tensor:
        x = x.float().contiguous()
        out = torch.empty_like(x, dtype=torch.bfloat16 if layer.is_half else torch.float32)
        layer.activate(x.detach(), out)
        ctx.save_for_backward(out)
        ctx.layer = layer
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (out,) = ctx.saved_tensors
        into = torch.empty_like(out, dtype=torch.float32)
        ctx.layer.pull_back(gradient.contiguous(), out, into)
        return into, None


class HiddenLayers(nn.Module):
    """Linear layers of some widths, each followed by ReLU and dropout.

    With ``activate_input`` what comes in are pre-activations (of the sparse input layer). Activations are bfloat16
    where ``half``.
    """

    def __init__(
        self, in_features: int, widths: list[int], dropout: float, *, activate_input: bool, half: bool
    ) -> None:
        super().__init__()
        sizes = [in_features, *widths]
        n_activations = len(widths) + activate_input
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.activations = nn.ModuleList(ReluDropout(dropout, is_half=half) for _ in range(n_activations))
        self.out_features = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        activations = iter(self.activations)
        if len(self.activations) > len(self.layers):
            x = next(activations)(x)
        for layer, activation in zip(self.layers, activations, strict=True):
            x = activation(layer(x))
        return x


def build_trunk(
    config: NetworkConfig, given: Trunk | None, *, n_features: int, dense_input: bool, half: bool = False
) -> tuple[nn.Module, int] | None:
    """What lies between the input and the output layer, and its width; None for a linear network over sparse features.

    A user's trunk is called as ``Class(in_features, **trunk_options)`` and has an attribute ``out_features``. It
    receives dense features, or the pre-activations of a sparse input layer of width ``hidden[0]``. The class is
    ``given`` by the caller, and the configuration must name the same.
    """
    given, widths = agreed(config.trunk, given, "the configuration"), list(config.hidden)
    if given is not None:
        if not dense_input and len(widths) != 1:
            raise ConfigError(
                f"network.hidden = {widths}: with a trunk over sparse features, give one width, that of the "
                "input layer in front of the trunk"
            )
        trunk = _user_trunk(given, config, n_features if dense_input else widths[0])
        return trunk, int(trunk.out_features)  # type: ignore[arg-type]
    if not dense_input and not widths:
        return None
    below = n_features if dense_input else widths.pop(0)
    hidden = HiddenLayers(below, widths, config.dropout, activate_input=not dense_input, half=half)
    return hidden, hidden.out_features


def load_trunk(
    config: NetworkConfig, given: Trunk | None, weights: Weights, *, n_features: int, dense_input: bool
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """A user's trunk with trained weights, as a function from arrays to arrays for `mach.networks.inference`."""
    built = build_trunk(config, given, n_features=n_features, dense_input=dense_input)
    assert built is not None
    module = built[0]
    stored = {name: np.array(from_bfloat16(array)) for name, array in weights.items() if name.startswith(TRUNK)}
    try:
        module.load_state_dict({name.removeprefix(TRUNK): torch.from_numpy(array) for name, array in stored.items()})
    except RuntimeError as error:
        raise StorageError(f"weights of network.trunk = {config.trunk!r} do not fit it: {error!s:.200}") from error
    if weights["output.weight"].shape[1] != built[1]:
        raise StorageError(
            f"network.trunk = {config.trunk!r} puts out {built[1]} numbers, output.weight takes "
            f"{weights['output.weight'].shape[1]}: the weights are of another trunk"
        )
    module.eval()

    @torch.no_grad()
    def activations(x_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        out_NH: NDArray[np.float32] = module(torch.from_numpy(np.ascontiguousarray(x_NH))).float().numpy()
        return out_NH

    return activations


def _user_trunk(given: Trunk, config: NetworkConfig, in_features: int) -> nn.Module:
    trunk_class: Callable[..., nn.Module] = class_of(given)
    try:
        trunk = trunk_class(in_features, **config.trunk_options)
    except Exception as error:  # whatever a user's class, or torch below it, raises of options that it does not like
        raise ConfigError(f"network.trunk = {config.trunk!r} refuses its arguments: {error}") from error
    if not isinstance(getattr(trunk, "out_features", None), int):
        raise ConfigError(f"network.trunk = {config.trunk!r} needs an attribute out_features, an integer")
    return trunk
