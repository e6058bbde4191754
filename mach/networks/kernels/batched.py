"""Kernels of several networks trained together on one device, in plain torch.

The functions here are the reference: they run on any device, and `mach.networks.kernels.triton_batched` has the same
ones under the same names for CUDA. Axes: R repetitions that are trained together, N rows, H width of a layer, W = R H,
D features or the slots of those that are at hand, U features that occur in the batch, M classes of its rows, F = R J
functions. Random numbers are hashes of position and key, those of dropout the same as the processor's
(`mach.networks.kernels.dense`), so that a network drops the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mach.networks.kernels.adam import adam  # noqa: F401 - one of the kernels
from mach.networks.kernels.losses import Loss
from mach.networks.kernels.sparse import DECAY, EPSILON

MASK = 0xFFFFFFFF
BLOCK_VALUES = 2**24  # of temporaries


@dataclass(frozen=True, eq=False)
class Columns:
    """A sparse batch by feature: entries ``offsets_U1[u]`` to ``offsets_U1[u + 1]`` are those of the u-th.

    Integers are int32. Of features beyond ``n_unique`` nothing is known.
    """

    features_U: Tensor
    slots_U: Tensor  # the rows of the weights that hold them
    offsets_U1: Tensor
    n_unique: Tensor  # of shape (1,), on the device: nobody waits for it
    rows: Tensor  # of every entry, ascending within a feature
    values: Tensor


@dataclass(frozen=True)
class Dropout:
    """``relu`` and dropout of an activation of shape (R, N, H): a share ``rate`` of zeros by the hash of position.

    ``keys_R`` are int64 numbers below 2**32, of every repetition, layer and step.
    """

    rate: float
    keys_R: Tensor

    @property
    def threshold(self) -> int:
        return int(self.rate * 4294967295.0)

    @property
    def scale(self) -> float:
        return 1.0 / (1.0 - self.rate)


def gather_rows(indptr: Tensor, rows_N: Tensor, n_entries: int, *arrays: Tensor) -> tuple[Tensor, ...]:
    """Rows of a CSR matrix on the device: the new indptr (int32), and the entries of each array.

    ``n_entries`` is the number of the rows' entries, which the caller knows: nobody waits for the device.
    """
    begins, counts = indptr[rows_N], indptr[rows_N + 1] - indptr[rows_N]
    out_indptr = torch.zeros(len(rows_N) + 1, dtype=torch.int64, device=indptr.device)
    torch.cumsum(counts, 0, out=out_indptr[1:])
    shift = torch.repeat_interleave(begins - out_indptr[:-1], counts, output_size=n_entries)
    at = shift + torch.arange(n_entries, device=indptr.device)
    return out_indptr.int(), *(array[at] for array in arrays)


def columns_of(indptr_N1: Tensor, indices: Tensor, values: Tensor) -> Columns:
    """A batch by feature, ascending; sorts the entries, and waits for nothing on the device."""
    n, device = len(indices), indices.device
    rows = torch.repeat_interleave(
        torch.arange(len(indptr_N1) - 1, device=device, dtype=torch.int32), indptr_N1.diff(), output_size=n
    )
    features, order = torch.sort(indices, stable=True)
    begins = torch.ones(n, dtype=torch.bool, device=device)
    torch.ne(features[1:], features[:-1], out=begins[1:])
    at = torch.where(begins, torch.cumsum(begins, 0) - 1, n)  # entries that begin no feature go to the last place
    features_U = torch.zeros(n + 1, dtype=torch.int32, device=device).scatter_(0, at, features)[:n]
    offsets_U1 = torch.full((n + 1,), n, dtype=torch.int32, device=device)
    offsets_U1.scatter_(0, at, torch.where(begins, torch.arange(n, dtype=torch.int32, device=device), n))
    n_unique = begins.sum(dtype=torch.int32).view(1)
    return Columns(features_U, features_U, offsets_U1, n_unique, rows[order], values[order])


def sparse_forward(
    indptr_N1: Tensor,
    slots: Tensor,
    values: Tensor,
    weight_DW: Tensor,
    bias_RH: Tensor,
    out_RNH: Tensor,
    dropout: Dropout | None,
) -> None:
    """``X @ weight + bias`` of every repetition, then relu and dropout unless there is none; sums in float32.

    Reads nnz * W weights. ``weight_DW`` may be some of the columns of a wider one.
    """
    n_repetitions, n_rows, width = out_RNH.shape
    sums_NW = bias_RH.float().reshape(1, -1).repeat(n_rows, 1)
    rows = torch.repeat_interleave(torch.arange(n_rows, device=slots.device), indptr_N1.diff())
    step = max(1, BLOCK_VALUES // max(1, n_repetitions * width))
    for begin in range(0, len(slots), step):
        part = slice(begin, begin + step)
        sums_NW.index_add_(0, rows[part], weight_DW[slots[part].long()].float() * values[part, None])
    sums_RNH = sums_NW.view(n_rows, n_repetitions, width).transpose(0, 1)
    if dropout is None:
        out_RNH.copy_(sums_RNH)
    else:
        activate(sums_RNH, out_RNH, dropout)


def activate(x_RNH: Tensor, out_RNH: Tensor, dropout: Dropout) -> None:
    """``relu`` and dropout."""
    y_RNH = torch.relu(x_RNH.float())
    if dropout.rate:
        at_NH = torch.arange(x_RNH[0].numel(), device=x_RNH.device).view(x_RNH.shape[1:])
        bits_RNH = _mixed(at_NH * 0x9E3779B9 + dropout.keys_R[:, None, None])
        y_RNH = y_RNH * ((bits_RNH ^ (bits_RNH >> 16)) >= dropout.threshold) * dropout.scale
    out_RNH.copy_(y_RNH)


def sparse_backward(
    columns: Columns,
    gradient_RNH: Tensor,
    weight_DW: Tensor,
    square_DR: Tensor,
    rate: float,
    scale: float,
    keys_R: Tensor,
) -> None:
    """Gradient of `sparse_forward` by its weights, times ``scale``, and a step of row-wise RMSprop in place.

    As `mach.networks.kernels.sparse.sparse_backward` on every repetition; ``keys_R``, below 2**32, are its seeds.
    """
    n = int(columns.n_unique)
    n_repetitions, _, width = gradient_RNH.shape
    features_U, slots_U = columns.features_U[:n].long(), columns.slots_U[:n].long()
    counts_U = columns.offsets_U1[: n + 1].diff()
    segments = torch.repeat_interleave(torch.arange(n, device=counts_U.device), counts_U)
    sums_URH = torch.zeros(n, n_repetitions, width, device=weight_DW.device)
    step = max(1, BLOCK_VALUES // (n_repetitions * width))
    for begin in range(0, len(segments), step):
        part = slice(begin, begin + step)
        of_rows = gradient_RNH[:, columns.rows[part].long()].float().transpose(0, 1)
        sums_URH.index_add_(0, segments[part], of_rows * columns.values[part, None, None])
    sums_URH *= scale
    square_UR = DECAY * square_DR[slots_U] + (1.0 - DECAY) * sums_URH.square().mean(2)
    square_DR[slots_U] = square_UR
    weight_URH = weight_DW[slots_U].float().view_as(sums_URH)
    weight_URH -= rate / (square_UR.sqrt() + EPSILON)[:, :, None] * sums_URH
    if weight_DW.dtype == torch.bfloat16:
        bits_UR = _mixed(features_U[:, None] * 40503 + keys_R) >> 16  # once a row, then spread evenly over it
        bits_URH = (bits_UR[:, :, None] + torch.arange(width, device=weight_DW.device) * 40503) & 0xFFFF
        weight_URH = ((weight_URH.view(torch.int32) + bits_URH.int()) >> 16).to(torch.int16).view(torch.bfloat16)
    weight_DW[slots_U] = weight_URH.flatten(1)


def _mixed(bits: Tensor) -> Tensor:
    """`mach.networks.kernels.memory.mixed` of int64 numbers."""
    bits = bits & MASK
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & MASK
    return ((bits ^ (bits >> 15)) * 0x846CA68B) & MASK


def _are_targets(logits_RNO: Tensor, buckets_FM: Tensor, offsets_N1: Tensor, repetition: int, n_heads: int) -> Tensor:
    """Whether an output of a repetition is a target of a row: shape (N, J, B), bool."""
    _, n_rows, n_outputs = logits_RNO.shape
    rows_M = torch.repeat_interleave(torch.arange(n_rows, device=buckets_FM.device), offsets_N1.diff())
    found_NJB = torch.zeros(n_rows, n_heads, n_outputs // n_heads, dtype=torch.bool, device=buckets_FM.device)
    heads_J1 = torch.arange(n_heads, device=buckets_FM.device)[:, None]
    found_NJB[rows_M, heads_J1, buckets_FM[repetition * n_heads + heads_J1[:, 0]].long()] = True
    return found_NJB


def loss_gradient(logits_RNO: Tensor, buckets_FM: Tensor, offsets_N1: Tensor, n_heads: int, loss: Loss) -> None:
    """Gradient of the summed loss by the logits in their place.

    ``buckets_FM`` holds the buckets of all rows' classes, one row's after another's as ``offsets_N1`` says; two
    classes of a row may share one.
    """
    for r, logits_NO in enumerate(logits_RNO):
        are_targets_NJB = _are_targets(logits_RNO, buckets_FM, offsets_N1, r, n_heads)
        errors_NJB = loss.errors(logits_NO.float().view(are_targets_NJB.shape), are_targets_NJB)
        logits_NO.copy_(errors_NJB.view_as(logits_NO))


def figures(logits_RNO: Tensor, buckets_FM: Tensor, offsets_N1: Tensor, n_heads: int, loss: Loss) -> Tensor:
    """Loss, and the rows and heads whose top bucket is a target, of every repetition: sums, shape (R, 2), float64."""
    sums_R2 = torch.empty(len(logits_RNO), 2, dtype=torch.float64, device=logits_RNO.device)
    for r, logits_NO in enumerate(logits_RNO):
        are_targets_NJB = _are_targets(logits_RNO, buckets_FM, offsets_N1, r, n_heads)
        logits_NJB = logits_NO.float().view(are_targets_NJB.shape)
        sums_R2[r, 0] = loss.value(logits_NJB, are_targets_NJB).sum(dtype=torch.float64)
        sums_R2[r, 1] = are_targets_NJB.gather(2, logits_NJB.argmax(2, keepdim=True)).sum()
    return sums_R2
