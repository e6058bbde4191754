"""Arrays and tensors in aligned memory (`mach.networks.kernels.memory`), and views of tensors for kernels.

torch is imported by whoever has a tensor, or asks for one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.networks.kernels.memory import aligned_empty

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def array_of(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor of the processor as an array of its shape, bfloat16 as uint16; a view."""
    import torch

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
    """Arrays by name that every step uses anew: fresh ones would cost a page fault for every 4 KB.

    Examples
    --------
    >>> buffers = Buffers()
    >>> buffers.array("x", (2, 8), np.float32).ctypes.data == buffers.array("x", (1, 8), np.float32).ctypes.data
    True
    """

    def __init__(self) -> None:
        self._bytes: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A contiguous array of any content, valid until the same name is asked for again."""
        return self._of(name, math.prod(shape) * np.dtype(dtype).itemsize).view(dtype).reshape(shape)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`array`, as a tensor."""
        import torch

        return torch.from_numpy(self._of(name, math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)

    def _of(self, name: str, n_bytes: int) -> NDArray[np.uint8]:
        if name not in self._bytes or len(self._bytes[name]) < n_bytes:
            self._bytes[name] = aligned_empty(n_bytes, np.uint8)
        return self._bytes[name][:n_bytes]
