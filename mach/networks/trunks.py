"""The dense part of a network as torch modules: hidden layers, or a trunk of the user's own."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mach.config import NetworkConfig
from mach.errors import ConfigError
from mach.kernels.dense import relu_dropout
from mach.kernels.memory import from_bfloat16
from mach.networks.inference import Weights


def is_in_main_memory(tensor: Tensor) -> bool:
    """Whether kernels for the processor can reach it; elsewhere torch's own operations do the work."""
    return tensor.device.type == "cpu"


class ReluDropout(nn.Module):
    """``dropout(relu(x))`` whose mask is a function of ``seed`` and position, so that a resumed run draws the same.

    Attributes
    ----------
    seed : int
        Set anew before every training step.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.seed = 0

    def forward(self, x: Tensor) -> Tensor:
        if not is_in_main_memory(x):
            return nn.functional.dropout(torch.relu(x.float()), self.rate, self.training)
        return _ReluDropout.apply(
            x,  # type: ignore[no-untyped-call]
            self.rate if self.training else 0.0,
            self.seed,
        )


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, seed: int) -> Tensor:
        x = x.float().contiguous()
        out = torch.empty_like(x)
        relu_dropout(x.detach().numpy().reshape(-1), rate, seed, out.numpy().reshape(-1))
        ctx.save_for_backward(out)
        ctx.scale = 1.0 / (1.0 - rate)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (out,) = ctx.saved_tensors
        return torch.where(out > 0, gradient * ctx.scale, 0.0), None, None


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
    """

    def __init__(self, in_features: int, widths: list[int], dropout: float, *, activate_input: bool) -> None:
        super().__init__()
        sizes = [in_features, *widths]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.activations = nn.ModuleList(ReluDropout(dropout) for _ in range(len(widths) + activate_input))
        self.out_features = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        activations = iter(self.activations)
        if len(self.activations) > len(self.layers):
            x = next(activations)(x)
        for layer, activation in zip(self.layers, activations, strict=True):
            x = activation(layer(x))
        return x


class DensePart(nn.Module):
    """A trunk and the output layer over it: (N, in_features) to bucket logits (N, B)."""

    def __init__(self, trunk: nn.Module, out_features: int, n_buckets: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.output = nn.Linear(out_features, n_buckets)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.trunk(x))


def build_dense_part(config: NetworkConfig, *, n_features: int, n_buckets: int, dense_input: bool) -> nn.Module:
    """The torch side of a network; the identity for a linear network over sparse features.

    A user's trunk is called as ``Class(in_features, **trunk_options)`` and has an attribute ``out_features``. It
    receives dense features, or the pre-activations of a sparse input layer of width ``hidden[0]``.
    """
    if config.trunk is not None:
        if not dense_input and len(config.hidden) != 1:
            raise ConfigError(
                f"network.hidden = {config.hidden}: with a trunk over sparse features, give one width, that of the "
                "input layer in front of the trunk"
            )
        trunk = _user_trunk(config, n_features if dense_input else config.hidden[0])
        return DensePart(trunk, int(trunk.out_features), n_buckets)  # type: ignore[arg-type]
    if dense_input:
        hidden = HiddenLayers(n_features, config.hidden, config.dropout, activate_input=False)
    elif config.hidden:
        hidden = HiddenLayers(config.hidden[0], config.hidden[1:], config.dropout, activate_input=True)
    else:
        return nn.Identity()
    return DensePart(hidden, hidden.out_features, n_buckets)


def load_dense_part(
    config: NetworkConfig, weights: Weights, *, n_features: int, n_buckets: int, dense_input: bool
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The dense part with trained weights, as a function from arrays to arrays for `mach.networks.inference`."""
    module = build_dense_part(config, n_features=n_features, n_buckets=n_buckets, dense_input=dense_input)
    wide = {n: from_bfloat16(a) if a.dtype == np.uint16 else np.array(a) for n, a in weights.items()}
    module.load_state_dict({n: torch.from_numpy(a) for n, a in wide.items() if not n.startswith("input.")})
    module.eval()

    @torch.no_grad()
    def logits(x_NH: NDArray[np.float32]) -> NDArray[np.float32]:
        out_NB: NDArray[np.float32] = module(torch.from_numpy(np.ascontiguousarray(x_NH))).float().numpy()
        return out_NB

    return logits


def _user_trunk(config: NetworkConfig, in_features: int) -> nn.Module:
    assert config.trunk is not None
    module_name, _, class_name = config.trunk.partition(":")
    if os.getcwd() not in sys.path:  # the user's module usually lies where the command was typed
        sys.path.append(os.getcwd())
    try:
        trunk_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"network.trunk = {config.trunk!r} cannot be imported ({error}): write package.module:Class and make sure "
            "that the package is on the Python path"
        ) from error
    try:
        trunk = trunk_class(in_features, **config.trunk_options)
    except TypeError as error:
        raise ConfigError(f"network.trunk = {config.trunk!r} refuses its arguments: {error}") from error
    if not isinstance(trunk, nn.Module) or not isinstance(getattr(trunk, "out_features", None), int):
        raise ConfigError(f"network.trunk = {config.trunk!r} must be a torch.nn.Module with an integer out_features")
    return trunk
