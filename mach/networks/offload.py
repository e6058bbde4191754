"""Main memory as a scratch pad of a device: input layers and optimiser states that do not fit there.

Of an input layer only the rows of a batch's features travel, while other steps run: on CUDA the device itself gathers
them from page-locked memory and scatters them back, on two streams, and no processor touches them. Rows that a batch
shares with the two before it are handed over on the device. The dense layers' moments pass through in pieces, on two
streams in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
    seen = torch.as_tensor(_Seen(tensor), device=device).view(tensor.dtype)
    if seen.data_ptr() != tensor.data_ptr():  # a copy: the memory counts as another GPU's
        raise ConfigError(
            f"device {device} cannot use main memory as its own: let each worker see its own GPU only "
            "(CUDA_VISIBLE_DEVICES), or take a smaller launch.shard, which fits its memory"
        )
    return seen


class _Seen:
    """Page-locked memory under the protocol by which CUDA libraries hand over arrays; it has no bfloat16."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        kind = {2: "<i2", 4: "<f4"}[tensor.itemsize]
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": kind,
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def new_stream(device: torch.device) -> Any:
    """A stream of a CUDA device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event(stream: Any) -> Any:
    """An event that has happened once all that is queued on a stream is done."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


@contextlib.contextmanager
def beside(stream: Any) -> Iterator[None]:
    """Within, work is queued on a stream that first waits for the current one; without a stream, as ever."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


class ResidentRows:
    """The input layers of all repetitions on the device: weight (D, W) and square (D, R)."""

    def __init__(self, n_features: int, width: int, n_repetitions: int, dtype: torch.dtype, device: torch.device):
        self.weight_DW = torch.zeros((n_features, n_repetitions * width), dtype=dtype, device=device)
        self.square_DR = torch.zeros((n_features, n_repetitions), device=device)

    def whole(self) -> tuple[Tensor, Tensor]:
        """All weights and squares."""
        return self.weight_DW, self.square_DR

    def look(self, indices: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Weights to read, and where the rows of features are in them."""
        return self.weight_DW, to_device(torch.from_numpy(indices), self.weight_DW.device)


@dataclass(eq=False)
class Pack:
    """Rows of a batch's features on the device.

    Parameters
    ----------
    features_U : int64 tensor
    weight_UW, square_UR : tensors
    before : list of (Pack, Tensor, Tensor)
        The two packs asked for before, and which of our rows they have too: where here, and where there.
    came : optional
        Event of the copies.
    """

    features_U: Tensor
    weight_UW: Tensor
    square_UR: Tensor
    before: list[tuple[Pack, Tensor, Tensor]]
    came: Any = None

    def tensors(self) -> list[Tensor]:
        shared = [tensor for _, *places in self.before for tensor in places]
        return [self.features_U, self.weight_UW, self.square_UR, *shared]


class HostRows:
    """The same in main memory; on the device are the rows of a few batches.

    The rows of a batch are asked for by `fetch`, before or after the step before it, and may be moved between `begin`
    and `end`. They are written back until `fetch` is called for the second batch after; on a processor no earlier than
    that, so that tests meet what may happen on a GPU.
    """

    def __init__(self, n_features: int, width: int, n_repetitions: int, dtype: torch.dtype, device: torch.device):
        self.device = device
        self.weight_DW = host_tensor((n_features, n_repetitions * width), dtype, device).zero_()
        self.square_DR = host_tensor((n_features, n_repetitions), torch.float32, device).zero_()
        self._seen = [seen_from(device, tensor) for tensor in (self.weight_DW, self.square_DR)]
        self._out = new_stream(device) if device.type == "cuda" else None
        self._asked: list[Pack] = []  # the last two that were asked for, oldest first
        self._begun: list[Pack] = []  # the last two that began
        self._unwritten: list[Pack] = []
        self._written: list[Any] = []  # events, oldest first

    def fetch(self, features_U: Tensor) -> Pack:
        """Begin to bring the rows of distinct features, ascending (int64, on the device), on the current stream."""
        came = None
        if self.device.type == "cuda" and len(self._written) > 1:
            torch.cuda.current_stream(self.device).wait_event(self._written[-2])
        before = [(pack, *self._shared(features_U, pack)) for pack in self._asked]
        rows = [source.index_select(0, features_U) for source in self._seen]
        if self.device.type == "cuda":
            came = new_event(torch.cuda.current_stream(self.device))
        pack = Pack(features_U, rows[0], rows[1], before, came)
        self._asked = [*self._asked[-1:], pack]
        return pack

    def begin(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Weights (U, W) and squares (U, R) of a batch's features, to be moved in place."""
        if pack.came is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(pack.came)
            for tensor in pack.tensors():
                tensor.record_stream(stream)
        for before in self._begun:  # what they moved may not have been written when this was read
            known = next((shared[1:] for shared in pack.before if shared[0] is before), None)
            mine, theirs = known or self._shared(pack.features_U, before)
            pack.weight_UW.index_copy_(0, mine, before.weight_UW.index_select(0, theirs))
            pack.square_UR.index_copy_(0, mine, before.square_UR.index_select(0, theirs))
        pack.before = []  # else every pack would be kept by the next
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
            for tensor in (pack.features_U, pack.weight_UW, pack.square_UR):
                tensor.record_stream(self._out)
            self._written = [*self._written[-1:], new_event(self._out)]

    def whole(self) -> tuple[Tensor, Tensor]:
        """All weights and squares, once everything is written."""
        self._store(self._unwritten)
        self._unwritten = []
        if self._out is not None:
            self._out.synchronize()
        return self.weight_DW, self.square_DR

    def look(self, indices: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Weights to read, and where the rows of features are in them."""
        self.whole()
        features, slots = np.unique(indices, return_inverse=True)
        rows = self.weight_DW.index_select(0, torch.from_numpy(features.astype(np.int64)))
        return to_device(rows, self.device), to_device(torch.from_numpy(slots.astype(np.int32)), self.device)

    @staticmethod
    def _shared(features_U: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        """Where the features of both are: here, and in the pack. Waits for the stream."""
        if not len(pack.features_U):
            return features_U[:0], features_U[:0]
        theirs_U = torch.searchsorted(pack.features_U, features_U)
        theirs_U.clamp_(max=len(pack.features_U) - 1)
        mine = torch.nonzero(pack.features_U[theirs_U] == features_U).view(-1)
        return mine, theirs_U[mine]

    def _store(self, packs: list[Pack]) -> None:
        for pack in packs:
            self._seen[0].index_copy_(0, pack.features_U, pack.weight_UW)
            self._seen[1].index_copy_(0, pack.features_U, pack.square_UR)


class Adam:
    """Adam's steps of weights on a device, whose moments are there or in main memory."""

    def __init__(self, kernels: ModuleType, device: torch.device, piece: int = PIECE) -> None:
        self.kernels, self.device, self.piece = kernels, device, piece
        self._streams = [new_stream(device) if device.type == "cuda" else None for _ in range(2)]

    def step(
        self,
        weight: Tensor,
        half: Tensor | None,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        *numbers: Any,
        moments_travel: bool = False,
    ) -> None:
        """As `mach.networks.kernels.batched.adam`; moments in main memory pass through the device in pieces."""
        if not moments_travel:
            self.kernels.adam(weight, half, gradient, mean, square, *numbers)
            return
        flat = [None if t is None else t.contiguous().view(-1) for t in (weight, half, gradient, mean, square)]
        for i, begin in enumerate(range(0, weight.numel(), self.piece)):
            parts = [None if t is None else t[begin : begin + self.piece] for t in flat]
            stream = self._streams[i % 2]
            with beside(stream):
                moments: list[Any] = [to_device(part, self.device) for part in parts[3:] if part is not None]
                self.kernels.adam(*parts[:3], *moments, *numbers)
                for source, target in zip(moments, parts[3:], strict=True):
                    assert target is not None
                    target.copy_(source, non_blocking=True)
        for stream in self._streams:
            if stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
