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
from mach.errors import ConfigError
from mach.networks.buffers import flat_array, is_in_main_memory
from mach.networks.inference import Weights
from mach.networks.kernels.dense import relu_dropout, relu_dropout_backward
from mach.networks.kernels.memory import from_bfloat16
from mach.networks.permission import Trunk, agreed, class_of

TRUNK = "trunk."  # prefix of the names of its weights


class ReluDropout(nn.Module):
    """``dropout(relu(x))`` whose mask is a function of ``seed`` and position, so that a resumed run draws the same.

    Parameters
    ----------
    rate : float
    is_half : bool
        Whether the result is bfloat16 rather than float32.

    Attributes
    ----------
    seed : int
        Set anew before every training step.
    """

    def __init__(self, rate: float, *, is_half: bool) -> None:
        super().__init__()
        self.rate, self.is_half = rate, is_half
        self.seed = 0

    def forward(self, x: Tensor) -> Tensor:
        if not is_in_main_memory(x):
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
    """Linear layers, each followed by ReLU and dropout.

    Parameters
    ----------
    in_features : int
        Width of what comes in.
    widths : list of int
        Widths of the layers.
    dropout : float
        Rate on every activation.
    activate_input : bool
        Whether what comes in are pre-activations (from the sparse input layer).
    half : bool
        Whether activations are bfloat16.
    """

    def __init__(
        self, in_features: int, widths: list[int], dropout: float, *, activate_input: bool, half: bool
    ) -> None:
        super().__init__()
        sizes = [in_features, *widths]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.activations = nn.ModuleList(
            ReluDropout(dropout, is_half=half) for _ in range(len(widths) + activate_input)
        )
        self.out_features = sizes[-1]

    @property
    def only_activation(self) -> ReluDropout | None:
        """What is left of them where the sparse input layer is the only one: a step needs no autograd then."""
        return None if len(self.layers) else self.activations[0]  # type: ignore[return-value]

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
    given = agreed(config.trunk, given, "the configuration")
    if given is not None:
        if not dense_input and len(config.hidden) != 1:
            raise ConfigError(
                f"network.hidden = {config.hidden}: with a trunk over sparse features, give one width, that of the "
                "input layer in front of the trunk"
            )
        trunk = _user_trunk(given, config, n_features if dense_input else config.hidden[0])
        return trunk, int(trunk.out_features)  # type: ignore[arg-type]
    if dense_input:
        hidden = HiddenLayers(n_features, config.hidden, config.dropout, activate_input=False, half=half)
    elif config.hidden:
        hidden = HiddenLayers(config.hidden[0], config.hidden[1:], config.dropout, activate_input=True, half=half)
    else:
        return None
    return hidden, hidden.out_features


def load_trunk(
    config: NetworkConfig, given: Trunk | None, weights: Weights, *, n_features: int, dense_input: bool
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """A user's trunk with trained weights, as a function from arrays to arrays for `mach.networks.inference`."""
    built = build_trunk(config, given, n_features=n_features, dense_input=dense_input)
    assert built is not None
    module = built[0]
    wide = {n: from_bfloat16(a) if a.dtype == np.uint16 else np.array(a) for n, a in weights.items()}
    of_trunk = {n.removeprefix(TRUNK): torch.from_numpy(a) for n, a in wide.items() if n.startswith(TRUNK)}
    module.load_state_dict(of_trunk)
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
    except TypeError as error:
        raise ConfigError(f"network.trunk = {config.trunk!r} refuses its arguments: {error}") from error
    if not isinstance(getattr(trunk, "out_features", None), int):
        raise ConfigError(f"network.trunk = {config.trunk!r} needs an attribute out_features, an integer")
    return trunk
