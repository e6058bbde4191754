"""Tensors in aligned memory (`mach.networks.kernels.memory`), and views of tensors for kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mach.networks.kernels.memory import aligned_empty


def is_in_main_memory(tensor: Tensor) -> bool:
    """Whether kernels for the processor can reach it; elsewhere torch's own operations do the work."""
    return tensor.device.type == "cpu"


def array_of(tensor: Tensor) -> NDArray[Any]:
    """A tensor's memory as an array of its shape for kernels, bfloat16 as uint16; a view."""
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    array: NDArray[Any] = tensor.numpy()
    return array


def flat_array(tensor: Tensor) -> NDArray[Any]:
    """`array_of` a contiguous tensor with one axis."""
    return array_of(tensor).reshape(-1)


def aligned(tensor: Tensor) -> Tensor:
    """A copy in main memory that begins with a cache line."""
    n_bytes = tensor.numel() * tensor.element_size()
    return torch.from_numpy(aligned_empty(n_bytes, np.uint8)).view(tensor.dtype).view(tensor.shape).copy_(tensor)


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
        self._last: dict[str, Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of any content, valid until the same name is asked for again."""
        last = self._last.get(name)
        if last is None or last.shape != shape or last.dtype != dtype:
            n_bytes = math.prod(shape) * dtype.itemsize
            if name not in self._bytes or len(self._bytes[name]) < n_bytes:
                self._bytes[name] = torch.from_numpy(aligned_empty(n_bytes, np.uint8))
            last = self._last[name] = self._bytes[name][:n_bytes].view(dtype).view(shape)
        return last.detach()  # another tensor: what autograd did to the last one is not seen
