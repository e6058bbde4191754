"""Main memory as a scratch pad of a device: input layers and optimiser states that do not fit there.

Of an input layer only the rows of a batch's features travel, while the step of the batch before runs: one background
thread gathers and scatters rows, in the order in which it is asked. Rows that two batches in a row share are handed
over on the device. The dense layers' moments pass through in pieces, on two streams in turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 2**24  # numbers of a moment on the device at once


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, in main memory that a device can read on its own: page-locked, where it is CUDA."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, of which nobody waits for the end; a tensor of its own on any device."""
    if device.type != "cuda":
        return tensor.to(device, copy=True)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


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

    def close(self) -> None:
        """Nothing to do."""


@dataclass(eq=False)
class _Pack:
    features_U: NDArray[np.int32]
    weight_UW: Tensor
    square_UR: Tensor
    loaded: Any  # event of the copies, or None


class HostRows:
    """The same in main memory; on the device are the rows of one batch, and those of the next on their way.

    A batch's rows are asked for by `fetch`, may be used between `begin` and `end`, and are written back after it.
    """

    def __init__(self, n_features: int, width: int, n_repetitions: int, dtype: torch.dtype, device: torch.device):
        self.device = device
        self.weight_DW = host_tensor((n_features, n_repetitions * width), dtype, device).zero_()
        self.square_DR = host_tensor((n_features, n_repetitions), torch.float32, device).zero_()
        self._worker = ThreadPoolExecutor(1, "mach-rows")
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._written: Future[None] | None = None
        self._last: _Pack | None = None
        self._slot_D = np.full(n_features, -1, np.int32)

    def fetch(self, features_U: NDArray[np.int32]) -> Future[_Pack]:
        """Begin to bring the rows of distinct features."""
        return self._worker.submit(self._load, features_U)

    def begin(self, fetched: Future[_Pack]) -> tuple[Tensor, Tensor]:
        """Weights (U, W) and squares (U, R) of a batch's features, to be moved in place."""
        pack = fetched.result()
        if pack.loaded is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(pack.loaded)
            for tensor in (pack.weight_UW, pack.square_UR):
                tensor.record_stream(stream)
        last = self._last
        if last is not None and last is not pack:  # what it moved may not have been written when this was read
            self._slot_D[last.features_U] = np.arange(len(last.features_U))
            theirs = self._slot_D[pack.features_U]
            self._slot_D[last.features_U] = -1
            mine = np.flatnonzero(theirs >= 0)
            to, source = (
                to_device(torch.from_numpy(ids.astype(np.int64)), self.device) for ids in (mine, theirs[mine])
            )
            pack.weight_UW[to] = last.weight_UW[source]
            pack.square_UR[to] = last.square_UR[source]
        self._last = pack
        return pack.weight_UW, pack.square_UR

    def end(self) -> None:
        """The rows that began were moved: write them back."""
        assert self._last is not None, "begun"
        moved = None
        if self._stream is not None:
            moved = new_event(torch.cuda.current_stream(self.device))
        if self._written is not None and self._written.done():
            self._written.result()  # raises what went wrong there
        self._written = self._worker.submit(self._store, self._last, moved)

    def whole(self) -> tuple[Tensor, Tensor]:
        """All weights and squares, once everything is written."""
        if self._written is not None:
            self._written.result()
        return self.weight_DW, self.square_DR

    def look(self, indices: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Weights to read, and where the rows of features are in them."""
        self.whole()
        features, slots = np.unique(indices, return_inverse=True)
        rows = self.weight_DW.index_select(0, torch.from_numpy(features.astype(np.int64)))
        return to_device(rows, self.device), to_device(torch.from_numpy(slots.astype(np.int32)), self.device)

    def close(self) -> None:
        """Write what is to be written, and end the thread."""
        self.whole()
        self._worker.shutdown()

    def _load(self, features_U: NDArray[np.int32]) -> _Pack:
        at = torch.from_numpy(features_U.astype(np.int64))
        parts = []
        for source in (self.weight_DW, self.square_DR):
            staged = host_tensor((len(at), source.shape[1]), source.dtype, self.device)
            parts.append(torch.index_select(source, 0, at, out=staged))
        if self._stream is None:
            return _Pack(features_U, parts[0].to(self.device), parts[1].to(self.device), None)
        with torch.cuda.stream(self._stream):
            sent = [to_device(part, self.device) for part in parts]
            return _Pack(features_U, sent[0], sent[1], new_event(self._stream))

    def _store(self, pack: _Pack, moved: Any) -> None:
        at = torch.from_numpy(pack.features_U.astype(np.int64))
        for source, target in ((pack.weight_UW, self.weight_DW), (pack.square_UR, self.square_DR)):
            if self._stream is None:
                rows = source.cpu()
            else:
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(moved)
                    rows = host_tensor(tuple(source.shape), source.dtype, self.device)
                    rows.copy_(source, non_blocking=True)
                    source.record_stream(self._stream)
                self._stream.synchronize()
            target.index_copy_(0, at, rows)


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
        """As `mach.kernels.batched.adam`; moments in main memory pass through the device in pieces."""
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
