"""Several repetitions as one network on a device: one pass over a sparse batch, matrix products in batches.

The same mathematics as `mach.networks.network.Network`, the same initial weights and dropout, and the same arrays in
checkpoints, so that a repetition goes on wherever it was begun. Parameters stand one repetition after the other,
(R, ...); the weights of the sparse input layer are (D, R H), so that a feature's row serves all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mach.config import NetworkConfig
from mach.data.batch import Batch, SparseBatch, Targets
from mach.errors import ConfigError
from mach.networks.buffers import array_of
from mach.networks.feed import DeviceBatch
from mach.networks.figures import StepFigures
from mach.networks.kernels.batched import MASK, Dropout
from mach.networks.layers import ReluDropout
from mach.networks.network import Network
from mach.networks.offload import HostRows, adam_in_pieces, host_tensor, new_stream, to_device
from mach.networks.output import step_figures
from mach.networks.sparse import ROUNDING_STRIDE
from mach.sketch.hashing import Assignment, UniversalAssignment
from mach.sketch.ledger import HostMemory
from mach.sketch.tables import TableAssignment

INPUT, SQUARE = "weights.input.weight", "square.input.weight"
KEY_STEPS = 256  # whose keys are computed at once
POOL, SHIFT = 4, np.uint32(16)  # of numpy's SeedSequence


def can_be_batched(config: NetworkConfig, *, dense_input: bool) -> bool:
    """Whether such networks can be trained as one: over sparse rows, without a trunk of the user's own."""
    return config.trunk is None and not dense_input


class BatchedNetwork:
    """R repetitions that are trained together, row by row the same batch; deterministic on a device.

    They have the shape, loss and precision of the network ``like``, which is on the processor. What ``host_memory``
    names stays in main memory (`mach.networks.offload`): nothing, input layers, or moments of other layers as well.
    Weights are 0 until every repetition is adopted.
    """

    def __init__(
        self, like: Network, config: NetworkConfig, *, n_repetitions: int, device: str, host_memory: HostMemory = "none"
    ) -> None:
        assert like.input is not None, "sparse rows"
        self.device, self.loss = torch.device(device), like.loss
        self.n_repetitions, self.dropout, self.view = n_repetitions, config.dropout, like.view
        self.n_steps = like.n_steps
        kernels = "triton_batched" if self.device.type == "cuda" and find_spec("triton") else "batched"
        self.kernels = import_module(f"mach.networks.kernels.{kernels}")
        self.dtype = torch.bfloat16 if like.is_half else torch.float32
        shapes = {name: array.shape for name, array in like.state().items() if name != "n_steps"}
        n_features, self.width = shapes.pop(INPUT)
        del shapes[SQUARE]
        self.host_memory = host_memory
        with self.working():
            self.weight_DW = self._zeros((n_features, n_repetitions * self.width), self.dtype, host_memory != "none")
            self.square_DR = self._zeros((n_features, n_repetitions), torch.float32, host_memory != "none")
            self.host = None if host_memory == "none" else HostRows(self.weight_DW, self.square_DR, self.device)
            self.tensors = {
                name: self._zeros((n_repetitions, *shape), torch.float32, self._travels(name))
                for name, shape in shapes.items()
            }
        weights = {n: t for n, t in self.tensors.items() if n.startswith("weights.") and n.endswith(".weight")}
        self.dense = [name.removeprefix("weights.").removesuffix(".weight") for name in weights]  # the output is last
        self.half = {
            name: torch.zeros_like(weight, dtype=self.dtype)
            for name, weight in zip(self.dense, weights.values(), strict=True)
            if like.is_half
        }
        self._streams = [new_stream(self.device) for _ in range(2)]
        self._assignments: list[Assignment] = []
        self._seeds: list[int] = []
        self._modules = [i for i, module in enumerate(like.trunk.modules()) if isinstance(module, ReluDropout)]
        self._keys: tuple[int, Tensor, Tensor] | None = None
        self._buckets: Callable[[Tensor], Tensor] | None = None

    def adopt(self, network: Network, assignment: Assignment) -> Member:
        """Take a repetition's state, and answer for it from now on; all are adopted at the same step.

        The assignments hold the J functions of their repetition; all are universal, or all are tables.
        """
        member = Member(self, len(self._seeds))
        self._assignments.append(assignment)
        self._seeds.append(network.seed)
        member.load_state(network.state())
        return member

    def step(self, batch: DeviceBatch, rate: float, *, measured: bool = False) -> list[StepFigures] | None:
        """One step of the optimisers of all repetitions on a batch; figures of each as of `Network.step`.

        Figures, where they are ``measured``, make the processor wait for the device. A ConfigError where that lacks
        memory.
        """
        with torch.no_grad(), self.working():
            self.n_steps += 1
            dropout_LR, rounding_R = self._keys_of_step()
            dropouts = [Dropout(self.dropout, keys_R) for keys_R in dropout_LR]
            if self._buckets is None:
                self._buckets = buckets_on(self.device, self._assignments)
            n_heads = self._assignments[0].n_repetitions
            weight_SW, square_SR = self.host.begin(batch.fetched) if self.host and batch.fetched else self.whole()
            rows = (batch.indptr_N1, batch.slots, batch.values)
            activations, gradient = self._forward(rows, weight_SW, slice(None), dropouts)
            targets = (self._buckets(batch.classes_M), batch.offsets_N1, n_heads, self.loss)
            sums_R2 = self.kernels.figures(gradient, *targets) if measured else None
            self.kernels.loss_gradient(gradient, *targets)
            scale = 1.0 / len(batch)
            for name, x_RNH in zip(reversed(self.dense), reversed(activations), strict=True):
                by_weight, by_bias = torch.bmm(gradient.mT, x_RNH), gradient.sum(1, dtype=torch.float32)
                gradient = torch.bmm(gradient, self._products(name))
                torch.ops.aten.threshold_backward.grad_input(gradient, x_RNH, 0, grad_input=gradient)
                self._move(f"{name}.weight", by_weight, rate, scale)
                self._move(f"{name}.bias", by_bias, rate, scale)
                scale /= 1.0 - self.dropout
            self._move("input.bias", gradient.sum(1, dtype=torch.float32), rate, scale)
            self.kernels.sparse_backward(batch.columns, gradient, weight_SW, square_SR, rate, scale, rounding_R)
            if self.host is not None:
                self.host.end()
            if sums_R2 is None:
                return None
            n = len(batch) * n_heads
            return [StepFigures(total / n, hits / n) for total, hits in sums_R2.tolist()]  # waits for the device

    def whole(self) -> tuple[Tensor, Tensor]:
        """Weights (D, W) and squares (D, R) of the input layers, once all steps are in them."""
        return (self.weight_DW, self.square_DR) if self.host is None else self.host.whole()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """On the device, where kernels are launched; a ConfigError that says what to do, should it lack memory."""
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                yield
        except torch.cuda.OutOfMemoryError as error:
            n = self.n_repetitions
            raise ConfigError(
                f"device {self.device} lacks memory to train {n} repetitions together: set "
                f"{f'launch.shard below {n}, or ' if n > 1 else ''}a smaller training.batch"
            ) from error

    def _forward(
        self, rows: tuple[Tensor, Tensor, Tensor], weight_SW: Tensor, members: slice, dropouts: list[Dropout]
    ) -> tuple[list[Tensor], Tensor]:
        """Activations that go into the dense layers, and logits, each (R, N, width)."""
        bias_RH = self.tensors["weights.input.bias"][members]
        shape = (len(bias_RH), len(rows[0]) - 1, self.width)
        x_RNH = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.kernels.sparse_forward(*rows, weight_SW, bias_RH, x_RNH, dropouts[0] if self.dense else None)
        activations: list[Tensor] = []
        for i, name in enumerate(self.dense, 1):
            activations.append(x_RNH)
            bias_R1H = self.tensors[f"weights.{name}.bias"][members, None].to(self.dtype)
            x_RNH = torch.baddbmm(bias_R1H, x_RNH, self._products(name)[members].mT)
            if i < len(self.dense):
                self.kernels.activate(x_RNH, out := torch.empty_like(x_RNH), dropouts[i])
                x_RNH = out
        return activations, x_RNH

    def _move(self, name: str, gradient: Tensor, rate: float, scale: float) -> None:
        weight, mean, square = (self.tensors[f"{kind}.{name}"] for kind in ("weights", "mean", "square"))
        half = self.half.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        tensors = (weight, half, gradient, mean, square)
        if self._travels(f"mean.{name}"):
            adam_in_pieces(self.kernels.adam, self._streams, tensors, rate, scale, self.n_steps)
        else:
            self.kernels.adam(*tensors, rate, scale, self.n_steps)

    def _travels(self, name: str) -> bool:
        """Whether an array of the state stays in main memory, but for steps."""
        return self.host_memory == "all" and not name.startswith("weights.") and name.endswith(".weight")

    def _products(self, name: str) -> Tensor:
        return self.half[name] if self.half else self.tensors[f"weights.{name}.weight"]

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype, on_host: bool) -> Tensor:
        if on_host:
            return host_tensor(shape, dtype, self.device).zero_()
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _keys_of_step(self) -> tuple[Tensor, Tensor]:
        """Of dropout, shape (layers, R), and of rounding, shape (R,), as `Network` draws them; below 2**32."""
        if self._keys is None or not 0 <= self.n_steps - self._keys[0] < KEY_STEPS:
            steps_T = np.arange(self.n_steps, self.n_steps + KEY_STEPS)
            drawn_TR = step_keys(np.array(self._seeds, np.uint32), steps_T.astype(np.uint32)).astype(np.int64)
            dropout_TLR = (drawn_TR[:, None] + np.array(self._modules, np.int64)[:, None]) & MASK
            rounding_TR = (steps_T[:, None] * ROUNDING_STRIDE + np.array(self._seeds, np.int64)) & MASK
            keys = [torch.from_numpy(array) for array in (dropout_TLR, rounding_TR)]
            self._keys = (self.n_steps, to_device(keys[0], self.device), to_device(keys[1], self.device))
        first, dropout, rounding = self._keys
        return dropout[self.n_steps - first], rounding[self.n_steps - first]


class Member:
    """One repetition of a batched network; answers as its `Network` would, and is moved with the others only."""

    def __init__(self, network: BatchedNetwork, index: int) -> None:
        self.network, self.index = network, index
        self.device, self.loss = network.device, network.loss

    @property
    def n_steps(self) -> int:
        return self.network.n_steps

    def logits(self, batch: Batch) -> Tensor:
        """Float32 logits of shape (N, J B) in main memory, without dropout."""
        whole = self.network
        batch = whole.view.batch(batch)
        assert isinstance(batch, SparseBatch)
        members = slice(self.index, self.index + 1)
        features_U, places = np.unique(batch.indices, return_inverse=True)
        weight_DH = whole.whole()[0][:, self._columns]
        weight_UH = weight_DH.index_select(0, torch.from_numpy(features_U).to(weight_DH.device)).to(self.device)
        arrays = (batch.indptr.astype(np.int32), places.astype(np.int32), batch.values)
        rows: Any = [to_device(torch.from_numpy(array), self.device) for array in arrays]
        none = [Dropout(0.0, torch.zeros(1, dtype=torch.int64, device=self.device))] * max(1, len(whole.dense))
        with torch.no_grad(), whole.working():
            return whole._forward(rows, weight_UH, members, none)[1][0].float().cpu()

    def figures(self, batch: Batch, targets: Targets) -> StepFigures:
        """Of a batch, without dropout."""
        return step_figures(self.logits(batch), targets, self.loss)

    def weights(self) -> dict[str, NDArray[Any]]:
        """Arrays under the names that `mach.networks.inference` reads."""
        return {name.removeprefix("weights."): array for name, array in self._arrays("weights.").items()}

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that a resumed training needs, as `Network.state`."""
        return self._arrays("") | {"n_steps": np.array([self.n_steps], np.int64)}

    def load_state(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take the state of a network of the same shape."""
        weight_DW, square_DR = self.network.whole()
        bits = torch.from_numpy(arrays[INPUT].view(np.int16 if weight_DW.dtype == torch.bfloat16 else np.float32))
        weight_DW[:, self._columns].copy_(bits.view(weight_DW.dtype))
        square_DR[:, self.index].copy_(torch.from_numpy(arrays[SQUARE]))
        for name, tensor in self.network.tensors.items():
            tensor[self.index].copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))
        for name, half in self.network.half.items():
            half[self.index].copy_(self.network.tensors[f"weights.{name}.weight"][self.index])

    @property
    def _columns(self) -> slice:
        return slice(self.index * self.network.width, (self.index + 1) * self.network.width)

    def _arrays(self, prefix: str) -> dict[str, NDArray[Any]]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # moments on their way to main memory
        weight_DW, square_DR = self.network.whole()
        tensors = {INPUT: weight_DW[:, self._columns], SQUARE: square_DR[:, self.index]}
        tensors |= {name: tensor[self.index] for name, tensor in self.network.tensors.items()}
        return {n: array_of(t.contiguous().cpu()) for n, t in tensors.items() if n.startswith(prefix)}


def buckets_on(device: torch.device, assignments: Sequence[Assignment]) -> Callable[[Tensor], Tensor]:
    """A function on a device from classes (M,) to their buckets by the functions of all assignments, (F, M) int32.

    Tables take 4 bytes a class and function there.
    """
    tables = [each.table_RK for each in assignments if isinstance(each, TableAssignment)]
    if tables:
        table_FK = torch.from_numpy(np.concatenate(tables).astype(np.int32)).to(device)
        return lambda classes_M: table_FK[:, classes_M.long()]
    drawn = [each for each in assignments if isinstance(each, UniversalAssignment)]
    prime, n_buckets = drawn[0].prime, drawn[0].n_buckets
    factors_F1, offsets_F1 = (
        torch.from_numpy(np.concatenate(parts)).to(device)[:, None]
        for parts in ([each.multipliers_R for each in drawn], [each.offsets_R for each in drawn])
    )  # products are below 2**62: exact
    return lambda classes_M: ((factors_F1 * classes_M.long() + offsets_F1) % prime % n_buckets).int()


def step_keys(seeds_R: NDArray[np.uint32], steps_T: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """``SeedSequence([seed, step]).generate_state(1)[0]`` of every pair, shape (T, R).

    The hash of M. E. O'Neill, "Developing a seed_seq alternative" (2015), as numpy has it and promises to keep it, but
    in 0.1 instead of 6 microseconds a key.
    """
    shape = (len(steps_T), len(seeds_R))
    seeds_TR, steps_TR = np.broadcast_to(seeds_R, shape), np.broadcast_to(steps_T[:, None], shape)
    constant = 0x43B0D7E5

    def hashed(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 & 0xFFFFFFFF
        value = value * np.uint32(constant)
        return value ^ value >> SHIFT

    none_TR = np.zeros(shape, np.uint32)
    pool = [hashed(value) for value in (seeds_TR, steps_TR, none_TR, none_TR)]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                mixed = pool[target] * np.uint32(0xCA01F9DD) - hashed(pool[source]) * np.uint32(0x4973F715)
                pool[target] = mixed ^ mixed >> SHIFT
    key = pool[0] ^ np.uint32(0x8B51F9DD)
    key *= np.uint32(0x8B51F9DD * 0x58F38DED & 0xFFFFFFFF)
    keys_TR: NDArray[np.uint32] = key ^ key >> SHIFT
    return keys_TR
