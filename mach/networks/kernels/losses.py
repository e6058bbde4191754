"""The losses of a head's buckets: one entry each, with its oracle in numpy; `loss.py` has the fast paths.

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

    Attributes
    ----------
    name : str
    sentence : str
        What it is.
    is_exclusive : bool
        Whether probabilities of a head's buckets sum to 1. Such a loss may be estimated from a sample of the buckets,
        and its errors are too small to be rounded at random.
    probabilities : callable
        Of logits of shape (..., B), the same shape; accurate to float32 in both tails.
    value, errors : callable
        The oracle: loss of logits (..., B) whose targets are given as bool (..., B), shape (...), and its gradient by
        the logits, (..., B). Both in float64.
    tensor_value, tensor_errors : callable
        The same of tensors, in their own type, for what is not in main memory.
    """

    name: str
    sentence: str
    is_exclusive: bool
    probabilities: Callable[[Array], Array]
    value: Callable[[Array, Array], Array]
    errors: Callable[[Array, Array], Array]
    tensor_value: Callable[[Tensor, Tensor], Tensor]
    tensor_errors: Callable[[Tensor, Tensor], Tensor]

    @property
    def gradient_kernel(self) -> Callable[..., None]:
        """Errors over logits that have a row for every bucket; see `mach.networks.kernels.loss.binary_gradient`."""
        return self._kernel("gradient")

    @property
    def loss_kernel(self) -> Callable[..., float]:
        """Loss of such logits, summed over the batch; see `mach.networks.kernels.loss.binary_loss`."""
        return self._kernel("loss")

    def _kernel(self, what: str) -> Any:
        from mach.networks.kernels import loss

        return getattr(loss, f"{self.name}_{what}")


def _logistic(logits: Array) -> Array:
    decay = np.exp(-np.abs(logits))  # at most 1: no overflow
    probs: Array = np.where(logits >= 0, np.float32(1.0), decay) / (1 + decay)
    return probs


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _shares(is_target: Any) -> Any:
    """The mass of a row, shared equally by its targets; nothing where there is none."""
    return is_target / (is_target.sum(-1)[..., None] + (is_target.sum(-1) == 0)[..., None])


def _has_target(is_target: Any) -> Any:
    return is_target.sum(-1) > 0


def _softmax_value(logits: Array, is_target: Array) -> Array:
    largest = logits.max(axis=-1)
    normalizers = largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
    return _has_target(is_target) * normalizers - (logits * _shares(is_target)).sum(axis=-1)


BINARY = Loss(
    name="binary",
    sentence="Cross-entropy of every bucket by itself, summed over the buckets; a row has any number of targets.",
    is_exclusive=False,
    probabilities=_logistic,
    value=lambda z, is_target: (np.logaddexp(0.0, z) - z * is_target).sum(axis=-1),
    errors=lambda z, is_target: _logistic(z) - is_target,
    tensor_value=lambda z, is_target: (z.clamp(min=0) + (-z.abs()).exp().log1p() - z * is_target).sum(-1),
    tensor_errors=lambda z, is_target: z.sigmoid() - is_target.to(z.dtype),
)
SOFTMAX = Loss(
    name="softmax",
    sentence="Cross-entropy over the buckets of a head, of which a row's targets share its mass; without any it is 0.",
    is_exclusive=True,
    probabilities=_softmax,
    value=_softmax_value,
    errors=lambda z, is_target: _has_target(is_target)[..., None] * _softmax(z) - _shares(is_target),
    tensor_value=lambda z, is_target: _has_target(is_target) * z.logsumexp(-1) - (z * _shares(is_target)).sum(-1),
    tensor_errors=lambda z, is_target: (
        z.softmax(-1) * _has_target(is_target)[..., None] - _shares(is_target).to(z.dtype)
    ),
)
LOSSES = {loss.name: loss for loss in (BINARY, SOFTMAX)}


def named(name: str) -> Loss:
    """The loss of a name.

    Raises
    ------
    ConfigError
        When there is none of that name.
    """
    if name not in LOSSES:
        raise ConfigError(f"training.loss = {name!r} is unknown: choose one of {', '.join(['auto', *LOSSES])}")
    return LOSSES[name]
