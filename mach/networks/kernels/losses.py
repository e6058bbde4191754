"""The losses of a head's buckets: one entry each, with its formulas; ``loss.py`` has the fast paths of the processor.

To add one, write its entry here and its kernels ``NAME_gradient`` and ``NAME_loss`` there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class Loss:
    """A loss of one row over the B buckets of a head.

    ``value`` and ``errors`` take logits and targets (bool) of shape (..., B), tensors on any device, and answer in the
    logits' own type. In float64 they are the oracle of the kernels.
    """

    name: str
    is_exclusive: bool  # probabilities of a head's buckets sum to 1: it may be estimated from a sample of the buckets
    probabilities: Callable[[Array], Array]  # of logits of shape (..., B); accurate to float32 in both tails
    value: Callable[[Tensor, Tensor], Tensor]  # the loss, shape (...)
    errors: Callable[[Tensor, Tensor], Tensor]  # its gradient by the logits

    def kernel(self, what: str) -> Callable[..., Any]:
        """A kernel of `mach.networks.kernels.loss`, such as ``binary_gradient`` for "gradient"."""
        from mach.networks.kernels import loss

        kernel: Callable[..., Any] = getattr(loss, f"{self.name}_{what}")
        return kernel


def _logistic(logits: Array) -> Array:
    decay = np.abs(logits)
    np.exp(np.negative(decay, out=decay), out=decay)  # at most 1: no overflow
    probs: Array = np.maximum(decay, logits >= 0)  # 1 of these
    return np.divide(probs, np.add(decay, 1, out=decay), out=probs)


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _shares(is_target: Tensor) -> Tensor:
    """The mass of a row, shared equally by its targets; nothing where there is none."""
    return is_target / is_target.sum(-1, keepdim=True).clamp(min=1)


# Cross-entropy of every bucket by itself, summed over the buckets; a row has any number of targets.
BINARY = Loss(
    name="binary",
    is_exclusive=False,
    probabilities=_logistic,
    value=lambda z, is_target: (z.clamp(min=0) + (-z.abs()).exp().log1p() - z * is_target).sum(-1),
    errors=lambda z, is_target: z.sigmoid().sub_(is_target.byte()),
)
# Cross-entropy over the buckets of a head, of which a row's targets share its mass; without any it is 0.
SOFTMAX = Loss(
    name="softmax",
    is_exclusive=True,
    probabilities=_softmax,
    value=lambda z, is_target: is_target.any(-1) * z.logsumexp(-1) - (z * _shares(is_target)).sum(-1),
    errors=lambda z, is_target: z.softmax(-1) * is_target.any(-1, keepdim=True) - _shares(is_target).to(z.dtype),
)
LOSSES = {loss.name: loss for loss in (BINARY, SOFTMAX)}


def named(name: str) -> Loss:
    """The loss of a name; a ConfigError where there is none."""
    if name not in LOSSES:
        raise ConfigError(f"training.loss = {name!r} is unknown: choose one of {', '.join(['auto', *LOSSES])}")
    return LOSSES[name]
