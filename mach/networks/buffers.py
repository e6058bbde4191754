"""Tensors in aligned memory (`mach.networks.kernels.memory`), and views of tensors for kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mach.networks.kernels.memory import aligned_empty


def array_of(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor of the processor as an array of its shape, bfloat16 as uint16; a view."""
    is_half = tensor.dtype == torch.bfloat16
    array: NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16) if is_half else tensor.numpy()
    return array


def flat_array(tensor: Tensor) -> NDArray[Any]:
    """`array_of` a contiguous tensor with one axis."""
    return array_of(tensor).reshape(-1)


def aligned(tensor: Tensor) -> Tensor:
    """A copy in main memory that begins with a cache line."""
    return Buffers().tensor("", tuple(tensor.shape), tensor.dtype).copy_(tensor)


class Buffers:
    """Tensors by name that every step uses anew: fresh ones would cost a page fault for every 4 KB.

    Examples
    --------
    >>> buffers = Buffers()
    >>> buffers.tensor("x", (2, 8), torch.float32).data_ptr() == buffers.tensor("x", (1, 8), torch.float32).data_ptr()
    True
    """

    def __init__(self) -> None:
        self._bytes: dict[str, Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of any content, valid until the same name is asked for again."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if name not in self._bytes or len(self._bytes[name]) < n_bytes:
            self._bytes[name] = torch.from_numpy(aligned_empty(n_bytes, np.uint8))
        return self._bytes[name][:n_bytes].view(dtype).view(shape)
