"""Several repetitions as one network on a device: one pass over a sparse batch, matrix products in batches.

The same mathematics as `mach.networks.network.Network`, the same initial weights and dropout, and the same arrays in
checkpoints, so that a repetition goes on wherever it was begun. Parameters stand one repetition after the other,
(R, ...); the weights of the sparse input layer are (D, R H), so that a feature's row serves all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mach.config import HostMemory, NetworkConfig
from mach.data.batch import Batch, SparseBatch
from mach.errors import ConfigError
from mach.networks.device_assignment import DeviceAssignment
from mach.networks.feed import DeviceBatch
from mach.networks.kernels.batched import MASK, Dropout
from mach.networks.keys import step_keys
from mach.networks.layers import ReluDropout
from mach.networks.network import ROUNDING_STRIDE, Network
from mach.networks.offload import Adam, HostRows, ResidentRows, host_tensor, to_device
from mach.networks.output import StepFigures
from mach.sketch.hashing import Assignment

INPUT, SQUARE = "weights.input.weight", "square.input.weight"
KEY_STEPS = 256  # whose keys are computed at once


def can_be_batched(config: NetworkConfig, *, dense_input: bool) -> bool:
    """Whether such networks can be trained as one: sparse rows, and no trunk of the user's own."""
    return config.trunk is None and not dense_input


class BatchedNetwork:
    """R repetitions that are trained together, row by row the same batch.

    Parameters
    ----------
    like : Network
        On the processor; of the shape, loss and precision of all repetitions.
    config : NetworkConfig
    n_repetitions : int
    device : str
    host_memory : {"none", "input", "all"}
        What stays in main memory (`mach.networks.offload`): nothing, input layers, moments of other layers as well.

    Notes
    -----
    Zero until every repetition was adopted. Deterministic on a device.
    """

    def __init__(
        self,
        like: Network,
        config: NetworkConfig,
        *,
        n_repetitions: int,
        device: str,
        host_memory: HostMemory = "none",
    ) -> None:
        assert like.input is not None, "sparse rows"
        self.device, self.loss = torch.device(device), like.loss
        self.n_repetitions, self.dropout, self.view = n_repetitions, config.dropout, like.view
        self.n_steps = like.n_steps
        self.kernels = _kernels(self.device)
        self.dtype = torch.bfloat16 if like.is_half else torch.float32
        shapes = {name: array.shape for name, array in like.state().items() if name != "n_steps"}
        n_features, self.width = shapes.pop(INPUT)
        del shapes[SQUARE]
        rows = ResidentRows if host_memory == "none" else HostRows
        self.host_memory = host_memory
        with self.working():
            self.rows: Any = rows(n_features, self.width, n_repetitions, self.dtype, self.device)
            self.tensors = {name: self._zeros(name, shape) for name, shape in shapes.items()}
        dense = [name for name in shapes if name.startswith("weights.") and name.endswith(".weight")]
        self.dense = sorted((name[len("weights.") : -len(".weight")] for name in dense), key=_place)
        self.half: dict[str, Tensor] = {}
        if self.dtype == torch.bfloat16:
            self.half = {n: torch.zeros_like(self.tensors[f"weights.{n}.weight"], dtype=self.dtype) for n in self.dense}
        self.adam = Adam(self.kernels, self.device)
        self._members: list[Member] = []
        self._seeds: list[int] = []
        self._modules = [i for i, module in enumerate(like.trunk.modules()) if isinstance(module, ReluDropout)]
        self._keys: tuple[int, Tensor, Tensor] | None = None
        self._assignment: tuple[list[Assignment], DeviceAssignment] | None = None

    def adopt(self, network: Network) -> Member:
        """Take a repetition's state, and answer for it from now on; all are adopted at the same step."""
        member = Member(self, len(self._members))
        if network.n_steps != self.n_steps or len(self._members) == self.n_repetitions:
            raise ValueError(f"step {network.n_steps} of repetition {member.index}, others are at {self.n_steps}")
        self._members.append(member)
        self._seeds.append(network.seed)
        member.load_state(network.state())
        return member

    def step(
        self, batch: DeviceBatch, assignments: Sequence[Assignment], rate: float, *, measured: bool = False
    ) -> list[StepFigures] | None:
        """One step of the optimisers of all repetitions on a batch; figures of each as of `Network.step`.

        Parameters
        ----------
        batch : DeviceBatch
        assignments : sequence of Assignment
            Of every repetition, its own J functions.
        rate : float
        measured : bool
            Whether figures are wanted; the device is waited for.

        Raises
        ------
        ConfigError
            When the device lacks memory.
        """
        with torch.no_grad(), self.working():
            return self._step(batch, assignments, rate, measured)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """On the device, where kernels are launched; a ConfigError that says what to do, should it lack memory."""
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                yield
        except torch.cuda.OutOfMemoryError as error:
            n, repairs = self.n_repetitions, ["a smaller training.batch"]
            if n > 1:
                repairs.insert(0, f"launch.shard below {n}")
            raise ConfigError(
                f"device {self.device} lacks memory to train {n} repetitions together: set {', or '.join(repairs)}"
            ) from error

    def _step(
        self, batch: DeviceBatch, assignments: Sequence[Assignment], rate: float, measured: bool
    ) -> list[StepFigures] | None:
        self.n_steps += 1
        dropout_LR, rounding_R = self._keys_of_step()
        dropouts = [Dropout(self.dropout, keys_R) for keys_R in dropout_LR]
        fetched = batch.fetched
        weight_SW, square_SR = self.rows.whole() if fetched is None else self.rows.begin(fetched)
        buckets_FM = self._buckets(assignments).buckets(batch.classes_M)
        rows = (batch.indptr_N1, batch.slots, batch.values)
        activations, gradient = self._forward(rows, weight_SW, slice(None), dropouts)
        targets = (buckets_FM, batch.offsets_N1, assignments[0].n_repetitions, self.loss)
        sums_R2 = self.kernels.figures(gradient, *targets) if measured else None
        self.kernels.loss_gradient(gradient, *targets)
        scale = 1.0 / len(batch)
        for name, x_RNH in zip(reversed(self.dense), reversed(activations), strict=True):
            by_weight, by_bias = torch.bmm(gradient.mT, x_RNH), gradient.sum(1, dtype=torch.float32)
            gradient = torch.bmm(gradient, self._products(name))
            factor = scale / (1.0 - self.dropout)
            self.kernels.activate_backward(gradient, x_RNH, factor, gradient)
            self._move(f"{name}.weight", by_weight, rate, scale)
            self._move(f"{name}.bias", by_bias, rate, scale)
            scale = 1.0
        self._move("input.bias", gradient.sum(1, dtype=torch.float32), rate, scale)
        self.kernels.sparse_backward(batch.columns, gradient, weight_SW, square_SR, rate, scale, rounding_R)
        if fetched is not None:
            self.rows.end()
        if sums_R2 is None:
            return None
        n = len(batch) * assignments[0].n_repetitions
        return [StepFigures(total / n, hits / n) for total, hits in sums_R2.tolist()]  # waits for the device

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
        numbers = (rate, scale, self.n_steps)
        travels = self.host_memory == "all" and name.endswith(".weight")
        self.adam.step(weight, half, gradient, mean, square, *numbers, moments_travel=travels)

    def _products(self, name: str) -> Tensor:
        return self.half[name] if self.half else self.tensors[f"weights.{name}.weight"]

    def _zeros(self, name: str, shape: tuple[int, ...]) -> Tensor:
        shape = (self.n_repetitions, *shape)
        if self.host_memory == "all" and not name.startswith("weights.") and name.endswith(".weight"):
            return host_tensor(shape, torch.float32, self.device).zero_()
        return torch.zeros(shape, device=self.device)

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

    def _buckets(self, assignments: Sequence[Assignment]) -> DeviceAssignment:
        """The assignments on the device; anew when they are others."""
        known = self._assignment
        if known is None or any(mine is not theirs for mine, theirs in zip(known[0], assignments, strict=True)):
            known = self._assignment = (list(assignments), DeviceAssignment(assignments, self.device))
        return known[1]


class Member:
    """One repetition of a batched network; answers as its `Network` would, and is moved with the others only.

    Parameters
    ----------
    network : BatchedNetwork
    index : int
        Its place there.
    """

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
        weight_SW, slots = whole.rows.look(batch.indices)
        indptr_N1 = to_device(torch.from_numpy(batch.indptr.astype(np.int32)), self.device)
        rows = (indptr_N1, slots, to_device(torch.from_numpy(batch.values), self.device))
        none = [Dropout(0.0, torch.zeros(1, dtype=torch.int64, device=self.device))] * max(1, len(whole.dense))
        with torch.no_grad(), whole.working():
            return whole._forward(rows, weight_SW[:, self._columns], members, none)[1][0].float().cpu()

    def weights(self) -> dict[str, NDArray[Any]]:
        """Arrays under the names that `mach.networks.inference` reads."""
        return {name.removeprefix("weights."): array for name, array in self._arrays("weights.").items()}

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that a resumed training needs, as `Network.state`."""
        return self._arrays("") | {"n_steps": np.array([self.n_steps], np.int64)}

    def load_state(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take the state of a network of the same shape."""
        weight_DW, square_DR = self.network.rows.whole()
        weight = arrays[INPUT]
        as_stored = torch.from_numpy(weight.view(np.int16) if weight.dtype == np.uint16 else weight)
        if weight.dtype == np.uint16:
            as_stored = as_stored.view(torch.bfloat16)
        weight_DW[:, self._columns].copy_(as_stored)
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
        weight_DW, square_DR = self.network.rows.whole()
        weight_DH = weight_DW[:, self._columns].contiguous().cpu()
        is_half = weight_DH.dtype == torch.bfloat16
        found = {INPUT: weight_DH.view(torch.int16).numpy().view(np.uint16) if is_half else weight_DH.numpy()}
        wanted = {SQUARE: square_DR[:, self.index]} | {n: t[self.index] for n, t in self.network.tensors.items()}
        return found | {n: t.contiguous().cpu().numpy() for n, t in wanted.items() if n.startswith(prefix)}


def _kernels(device: torch.device) -> ModuleType:
    """Triton's on CUDA where it is installed, else those of tensor operations."""
    from mach.networks.kernels import batched, triton_batched

    return triton_batched if device.type == "cuda" and triton_batched.is_there() else batched


def _place(name: str) -> tuple[bool, int]:
    """Hidden layers by number, then the output."""
    return name == "output", int(name.rsplit(".", 1)[1]) if name != "output" else 0
