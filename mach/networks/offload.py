"""Main memory as a scratch pad of a device: input layers and optimiser states that do not fit there.

Of an input layer only the rows of a batch's features travel, while other steps run: on CUDA the device itself gathers
them from page-locked memory and scatters them back, on two streams, and no processor touches them. Rows that a batch
shares with the two before it are handed over on the device. The dense layers' moments pass through in pieces, on two
streams in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mach.errors import ConfigError

PIECE = 2**24  # numbers of a moment on the device at once


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, in main memory that a device can read on its own: page-locked, where it is CUDA."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, of which nobody waits for the end; a tensor of its own on any device."""
    if device.type != "cuda":
        return tensor.to(device, copy=True)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def seen_from(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of main memory as one of the device, whose kernels read and write it over the bus; nothing is copied."""
    if device.type != "cuda":
        return tensor
    array = {  # as CUDA libraries hand over arrays; the protocol has no bfloat16
        "shape": tuple(tensor.shape),
        "typestr": {2: "<i2", 4: "<f4"}[tensor.itemsize],
        "data": (tensor.data_ptr(), False),
        "version": 2,
    }
    owner = SimpleNamespace(__cuda_array_interface__=array, tensor=tensor)  # lives as long as what is seen
    seen = torch.as_tensor(owner, device=device).view(tensor.dtype)
    if seen.data_ptr() != tensor.data_ptr():  # a copy: the memory counts as another GPU's
        raise ConfigError(
            f"device {device} cannot use main memory as its own: let each worker see its own GPU only "
            "(CUDA_VISIBLE_DEVICES), or take a smaller launch.shard, which fits its memory"
        )
    return seen


def new_stream(device: torch.device) -> Any:
    """A stream of a CUDA device; None elsewhere, within which work is done as ever."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def new_event(stream: Any) -> Any:
    """An event that has happened once all that is queued on a stream is done."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class Pack(NamedTuple):
    """Rows of U features on the device: weights (U, W) and squares (U, R)."""

    features_U: Tensor
    weight_UW: Tensor
    square_UR: Tensor


class HostRows:
    """The input layers of all repetitions in main memory; on the device are the rows of a few batches.

    The rows of a batch are asked for by `fetch`, before or after the step before it, and may be moved between `begin`
    and `end`. They are written back until `fetch` is called for the second batch after; on a processor no earlier than
    that, so that tests meet what may happen on a GPU.
    """

    def __init__(self, weight_DW: Tensor, square_DR: Tensor, device: torch.device):
        self.device, self._whole = device, (weight_DW, square_DR)
        self._seen = [seen_from(device, tensor) for tensor in self._whole]
        self._out = new_stream(device)
        self._begun: list[Pack] = []  # the last two
        self._unwritten: list[Pack] = []
        self._written: list[Any] = []  # events, oldest first

    def fetch(self, features_U: Tensor) -> Pack:
        """Begin to bring the rows of distinct features, ascending (int64, on the device), on the current stream."""
        if len(self._written) > 1:
            torch.cuda.current_stream(self.device).wait_event(self._written[-2])
        return Pack(features_U, *(source.index_select(0, features_U) for source in self._seen))

    def begin(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Weights (U, W) and squares (U, R) of a batch's features, once they came, to be moved in place."""
        for before in self._begun:  # what they moved may not have been written when this was read
            if len(before.features_U):
                at_U = torch.searchsorted(before.features_U, pack.features_U).clamp_(max=len(before.features_U) - 1)
                is_shared_U1 = (before.features_U[at_U] == pack.features_U)[:, None]
                torch.where(is_shared_U1, before.weight_UW[at_U], pack.weight_UW, out=pack.weight_UW)
                torch.where(is_shared_U1, before.square_UR[at_U], pack.square_UR, out=pack.square_UR)
        self._begun = [*self._begun[-1:], pack]
        return pack.weight_UW, pack.square_UR

    def end(self) -> None:
        """The rows that began were moved: they are to be written back."""
        pack = self._begun[-1]
        if self._out is None:
            self._store(self._unwritten)
            self._unwritten = [pack]
            return
        self._out.wait_event(new_event(torch.cuda.current_stream(self.device)))
        with torch.cuda.stream(self._out):
            self._store([pack])
            for tensor in pack:
                tensor.record_stream(self._out)
            self._written = [*self._written[-1:], new_event(self._out)]

    def whole(self) -> tuple[Tensor, Tensor]:
        """All weights and squares, once everything is written."""
        self._store(self._unwritten)
        self._unwritten = []
        if self._out is not None:
            self._out.synchronize()
        return self._whole

    def _store(self, packs: list[Pack]) -> None:
        for pack in packs:
            self._seen[0].index_copy_(0, pack.features_U, pack.weight_UW)
            self._seen[1].index_copy_(0, pack.features_U, pack.square_UR)


def adam_in_pieces(
    adam: Callable[..., None], streams: Sequence[Any], tensors: tuple[Any, ...], *numbers: float
) -> None:
    """``adam`` on a device, through which moments in main memory pass in pieces, on the streams in turn."""
    weight, half, gradient, mean, square = tensors
    device, flat_half = weight.device, None if half is None else half.view(-1)
    flat = [tensor.contiguous().view(-1) for tensor in (weight, gradient, mean, square)]
    for i, begin in enumerate(range(0, weight.numel(), PIECE)):
        piece, stream = slice(begin, begin + PIECE), streams[i % len(streams)]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            moments = [to_device(moment[piece], device) for moment in flat[2:]]
            adam(flat[0][piece], None if flat_half is None else flat_half[piece], flat[1][piece], *moments, *numbers)
            for source, target in zip(moments, flat[2:], strict=True):
                target[piece].copy_(source, non_blocking=True)
    for stream in streams:
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
