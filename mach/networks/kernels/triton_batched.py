"""The kernels of `mach.networks.kernels.batched` in Triton, for CUDA; the only module that imports it.

Programs run over rows or features first and over columns last, so that the slice of the gradient, or of the weights,
that is read again and again stays in the second cache level. No kernel adds atomically: results are deterministic.
Checked on a processor with Triton's interpreter (``TRITON_INTERPRET=1``), and compiled there for a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mach.networks.kernels import adam as processor
from mach.networks.kernels import batched, sparse
from mach.networks.kernels.batched import Columns, Dropout
from mach.networks.kernels.losses import BINARY, SOFTMAX, Loss

LOADED = 4096  # numbers that a program has in flight
N_PROGRAMS = 132 * 16  # that go through the features of a batch: some for every multiprocessor
MAX_WIDTH = 2**15  # of a layer, of which a program holds the gradient of a feature; wider ones take the reference
BETA1, BETA2 = tl.constexpr(processor.BETA1), tl.constexpr(processor.BETA2)
GAIN1, GAIN2 = tl.constexpr(1.0 - processor.BETA1), tl.constexpr(1.0 - processor.BETA2)
DECAY, GAIN = tl.constexpr(sparse.DECAY), tl.constexpr(1.0 - sparse.DECAY)
ADAM_EPSILON, EPSILON = tl.constexpr(processor.EPSILON), tl.constexpr(sparse.EPSILON)


@triton.jit
def mixed(bits):
    """Two steps of the hash of `mach.networks.kernels.memory.mixed`."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    return (bits ^ (bits >> 15)) * 0x846CA68B


@triton.jit
def dropped(total, at, key, threshold):
    """Numbers, of which a hash of position and key makes a share 0."""
    bits = mixed(at.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32))
    return tl.where((bits ^ (bits >> 16)) >= threshold.to(tl.uint32), total, 0.0)


@triton.jit
def forward_kernel(
    indptr,
    slots,
    values,
    weight,
    bias,
    keys,
    out,
    n_rows,
    stride,
    width,
    n_columns,
    threshold,
    scale,
    ACTIVATES: tl.constexpr,
    DROPS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < n_columns
    begin, end = tl.load(indptr + n), tl.load(indptr + n + 1)
    total = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        is_entry = entry < end
        slot = tl.load(slots + entry, mask=is_entry, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=is_entry, other=0.0)
        at = weight + slot[:, None] * stride + column[None, :]
        tile = tl.load(at, mask=is_entry[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tile * value[:, None], axis=0)
    r, h = column // width, column % width
    if ACTIVATES:
        total = tl.maximum(total, 0.0) * scale
    if DROPS:
        total = dropped(total, n * width + h, tl.load(keys + r, mask=is_column, other=0), threshold)
    at = (r.to(tl.int64) * n_rows + n) * width + h
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def activate_kernel(x, keys, out, n_numbers, threshold, scale, DROPS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.program_id(1)
    is_number = at < n_numbers
    start = r.to(tl.int64) * n_numbers
    total = tl.maximum(tl.load(x + start + at, mask=is_number, other=0.0).to(tl.float32), 0.0) * scale
    if DROPS:
        total = dropped(total, at, tl.load(keys + r), threshold)
    tl.store(out + start + at, total.to(out.dtype.element_ty), mask=is_number)


@triton.jit
def backward_kernel(
    features,
    slots,
    offsets,
    n_unique,
    rows,
    values,
    gradient,
    weight,
    square,
    keys,
    n_rows,
    width,
    n_repetitions,
    stride,
    rate,
    scale,
    ENTRIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program goes through every so many-th feature, for some repetitions; BLOCK >= width."""
    flat = tl.arange(0, GROUP * BLOCK)
    r_flat, h_flat = tl.program_id(1) * GROUP + flat // BLOCK, flat % BLOCK
    is_flat = (r_flat < n_repetitions) & (h_flat < width)
    source = r_flat.to(tl.int64) * n_rows * width + h_flat
    r_G = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    h_B = tl.arange(0, BLOCK)
    is_ours = (r_G < n_repetitions)[:, None] & (h_B < width)[None, :]
    key = tl.load(keys + r_G, mask=r_G < n_repetitions, other=0).to(tl.uint32)
    for u in range(tl.program_id(0), tl.load(n_unique), tl.num_programs(0)):
        begin, end = tl.load(offsets + u), tl.load(offsets + u + 1)
        total = tl.zeros((GROUP * BLOCK,), tl.float32)
        for first in range(begin, end, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            is_entry = entry < end
            row = tl.load(rows + entry, mask=is_entry, other=0).to(tl.int64)
            value = tl.load(values + entry, mask=is_entry, other=0.0)
            at = gradient + row[:, None] * width + source[None, :]
            tile = tl.load(at, mask=is_entry[:, None] & is_flat[None, :], other=0.0).to(tl.float32)
            total += tl.sum(tile * value[:, None], axis=0)
        sums = tl.reshape(total, (GROUP, BLOCK)) * scale
        slot = tl.load(slots + u).to(tl.int64)
        at_square = square + slot * n_repetitions + r_G
        moved = tl.load(at_square, mask=r_G < n_repetitions, other=0.0) * DECAY
        moved += tl.sum(sums * sums, axis=1) / width * GAIN
        tl.store(at_square, moved, mask=r_G < n_repetitions)
        pace = rate / (tl.sqrt(moved) + EPSILON)
        at = weight + slot * stride + r_G[:, None] * width + h_B[None, :]
        after = tl.load(at, mask=is_ours, other=0.0).to(tl.float32) - pace[:, None] * sums
        if weight.dtype.element_ty == tl.bfloat16:
            bits = mixed(tl.load(features + u).to(tl.uint32) * 40503 + key) >> 16  # once a row, then evenly over it
            spread = (bits[:, None] + h_B.to(tl.uint32)[None, :] * 40503) & 0xFFFF
            carried = (after.to(tl.uint32, bitcast=True) + spread) >> 16
            tl.store(at, carried.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=is_ours)
        else:
            tl.store(at, after, mask=is_ours)


@triton.jit
def are_targets(buckets, begin, end, column):
    """Whether buckets of a head are among those of a row's classes, as 0 and 1."""
    found = tl.zeros(column.shape, tl.int32)
    for m in range(begin, end):
        found |= (tl.load(buckets + m) == column).to(tl.int32)
    return found


@triton.jit
def loss_kernel(
    logits,
    buckets,
    offsets,
    out,
    n_rows,
    n_outputs,
    n_buckets,
    n_heads,
    n_classes,
    IS_BINARY: tl.constexpr,
    MEASURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a row and head of a repetition the gradient in place, or its loss and whether its top bucket is a target.

    A second pass over the outputs of a head finds them in the cache.
    """
    q, head = tl.program_id(0), tl.program_id(1)
    n, function = q % n_rows, (q // n_rows) * n_heads + head
    start = logits + q.to(tl.int64) * n_outputs + head * n_buckets
    of_function = buckets + function.to(tl.int64) * n_classes
    begin, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    best = tl.full((BLOCK,), 2147483647, tl.int32)
    is_best_target = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    at_targets = tl.zeros((BLOCK,), tl.float32)
    n_targets = tl.zeros((BLOCK,), tl.int32)
    if MEASURES or not IS_BINARY:
        for first in range(0, n_buckets, BLOCK):
            column = first + tl.arange(0, BLOCK)
            number = tl.load(start + column, mask=column < n_buckets, other=-float("inf")).to(tl.float32)
            is_target = are_targets(of_function, begin, end, column)
            n_targets += is_target
            higher = tl.maximum(most, number)
            if IS_BINARY:  # log(1 + exp(z)), which does not overflow
                total += tl.maximum(number, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(number)))
            else:
                shift = tl.where(higher == -float("inf"), 0.0, higher)
                total = total * tl.exp(most - shift) + tl.exp(number - shift)
            if MEASURES:
                at_targets += tl.where(is_target > 0, number, 0.0)
                best = tl.where(number > most, column, best)
                is_best_target = tl.where(number > most, is_target, is_best_target)
            most = higher
    peak = tl.max(most, axis=0)
    count = tl.sum(n_targets, axis=0)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if MEASURES:
        first_best = tl.min(tl.where(most == peak, best, 2147483647), axis=0)  # of equal logits the first, as argmax
        hit = tl.sum(tl.where(best == first_best, is_best_target, 0), axis=0)
        if IS_BINARY:
            loss = tl.sum(total, axis=0) - tl.sum(at_targets, axis=0)
        else:
            loss = peak + tl.log(tl.sum(total * tl.exp(most - peak), axis=0))
            loss = tl.where(count > 0, loss - tl.sum(at_targets, axis=0) * share, 0.0)
        at = out + (q.to(tl.int64) * n_heads + head) * 2
        tl.store(at, loss)
        tl.store(at + 1, hit.to(tl.float32))
    else:
        if not IS_BINARY:
            weight = tl.where(count > 0, 1.0 / tl.sum(total * tl.exp(most - peak), axis=0), 0.0)
        for first in range(0, n_buckets, BLOCK):
            column = first + tl.arange(0, BLOCK)
            is_column = column < n_buckets
            number = tl.load(start + column, mask=is_column, other=0.0).to(tl.float32)
            is_target = are_targets(of_function, begin, end, column).to(tl.float32)
            if IS_BINARY:
                gradient = tl.sigmoid(number) - is_target
            else:
                gradient = tl.exp(number - peak) * weight - is_target * share
            tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=is_column)


@triton.jit
def adam_kernel(
    weight,
    half,
    gradient,
    mean,
    square,
    n_numbers,
    pace,
    root,
    scale,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_number = at < n_numbers
    by = tl.load(gradient + at, mask=is_number, other=0.0).to(tl.float32) * scale
    m = tl.load(mean + at, mask=is_number, other=0.0) * BETA1 + by * GAIN1
    v = tl.load(square + at, mask=is_number, other=0.0) * BETA2 + by * GAIN2 * by
    after = tl.load(weight + at, mask=is_number, other=0.0) - pace * m / (tl.sqrt(v) * root + ADAM_EPSILON)
    tl.store(mean + at, m, mask=is_number)
    tl.store(square + at, v, mask=is_number)
    tl.store(weight + at, after, mask=is_number)
    if COPIES:
        tl.store(half + at, after.to(tl.bfloat16), mask=is_number)


def sparse_forward(
    indptr_N1: Tensor,
    slots: Tensor,
    values: Tensor,
    weight_DW: Tensor,
    bias_RH: Tensor,
    out_RNH: Tensor,
    dropout: Dropout | None,
) -> None:
    n_repetitions, n_rows, width = out_RNH.shape
    n_columns = n_repetitions * width
    block = min(triton.next_power_of_2(n_columns), 512)
    drop = dropout or Dropout(0.0, slots)
    tensors = (indptr_N1, slots, values, weight_DW, bias_RH.contiguous(), drop.keys_R, out_RNH)
    numbers = (n_rows, weight_DW.stride(0), width, n_columns, drop.threshold, drop.scale)
    forward_kernel[(n_rows, triton.cdiv(n_columns, block))](
        *tensors,
        *numbers,
        ACTIVATES=dropout is not None,
        DROPS=drop.rate > 0,
        ENTRIES=min(16, LOADED // block),
        BLOCK=block,
    )


def activate(x_RNH: Tensor, out_RNH: Tensor, dropout: Dropout) -> None:
    n = x_RNH[0].numel()
    arguments = (x_RNH.contiguous(), dropout.keys_R, out_RNH, n, dropout.threshold, dropout.scale)
    activate_kernel[(triton.cdiv(n, 1024), len(x_RNH))](*arguments, DROPS=dropout.rate > 0, BLOCK=1024)


def sparse_backward(
    columns: Columns,
    gradient_RNH: Tensor,
    weight_DW: Tensor,
    square_DR: Tensor,
    rate: float,
    scale: float,
    keys_R: Tensor,
) -> None:
    n_repetitions, n_rows, width = gradient_RNH.shape
    if width > MAX_WIDTH:
        batched.sparse_backward(columns, gradient_RNH, weight_DW, square_DR, rate, scale, keys_R)
        return
    block = triton.next_power_of_2(width)
    group = min(max(1, 256 // block), triton.next_power_of_2(n_repetitions))
    n_programs = min(N_PROGRAMS, len(columns.features_U))
    if not n_programs:
        return
    by_feature = (columns.features_U, columns.slots_U, columns.offsets_U1, columns.n_unique)
    tensors = (columns.rows, columns.values, gradient_RNH.contiguous(), weight_DW, square_DR, keys_R)
    numbers = (n_rows, width, n_repetitions, weight_DW.stride(0), rate, scale)
    backward_kernel[(n_programs, triton.cdiv(n_repetitions, group))](
        *by_feature,
        *tensors,
        *numbers,
        ENTRIES=max(1, min(16, LOADED // (group * block))),
        GROUP=group,
        BLOCK=block,
        num_warps=4 if group * block <= 2048 else 16,
    )


def loss_gradient(logits_RNO: Tensor, buckets_FM: Tensor, offsets_N1: Tensor, n_heads: int, loss: Loss) -> None:
    if loss in (BINARY, SOFTMAX):
        _by_head(logits_RNO, buckets_FM, offsets_N1, logits_RNO, n_heads, loss, MEASURES=False)
    else:
        batched.loss_gradient(logits_RNO, buckets_FM, offsets_N1, n_heads, loss)


def figures(logits_RNO: Tensor, buckets_FM: Tensor, offsets_N1: Tensor, n_heads: int, loss: Loss) -> Tensor:
    if loss not in (BINARY, SOFTMAX):
        return batched.figures(logits_RNO, buckets_FM, offsets_N1, n_heads, loss)
    out_RNJ2 = torch.empty((*logits_RNO.shape[:2], n_heads, 2), device=logits_RNO.device)
    _by_head(logits_RNO, buckets_FM, offsets_N1, out_RNJ2, n_heads, loss, MEASURES=True)
    return out_RNJ2.sum((1, 2), dtype=torch.float64)


def _by_head(
    logits_RNO: Tensor, buckets_FM: Tensor, offsets_N1: Tensor, out: Tensor, n_heads: int, loss: Loss, *, MEASURES: bool
) -> None:
    n_repetitions, n_rows, n_outputs = logits_RNO.shape
    n_buckets = n_outputs // n_heads
    numbers = (n_rows, n_outputs, n_buckets, n_heads, buckets_FM.shape[1])
    options = {"IS_BINARY": loss is BINARY, "MEASURES": MEASURES, "BLOCK": min(triton.next_power_of_2(n_buckets), 1024)}
    loss_kernel[(n_repetitions * n_rows, n_heads)](logits_RNO, buckets_FM, offsets_N1, out, *numbers, **options)


def adam(
    weight: Tensor,
    half: Tensor | None,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    rate: float,
    scale: float,
    step: int,
) -> None:
    n = weight.numel()
    tensors = (weight, weight if half is None else half, gradient.contiguous(), mean, square)
    pace, root = rate / (1.0 - processor.BETA1**step), (1.0 - processor.BETA2**step) ** -0.5
    adam_kernel[(triton.cdiv(n, 1024),)](*tensors, n, pace, root, scale, COPIES=half is not None, BLOCK=1024)
