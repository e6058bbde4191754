"""The kernels of `mach.networks.kernels.batched` in Triton, for CUDA; the only module that imports it.

Programs run over rows or features first and over columns last, so that the slice of the gradient, or of the weights,
that is read again and again stays in the second cache level. No kernel adds atomically: results are deterministic.
Checked on a processor with Triton's interpreter (``TRITON_INTERPRET=1``), and compiled there for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mach.networks.kernels import batched
from mach.networks.kernels.adam import BETA1, BETA2
from mach.networks.kernels.adam import EPSILON as ADAM_EPSILON
from mach.networks.kernels.batched import Columns, Dropout
from mach.networks.kernels.losses import BINARY, SOFTMAX, Loss
from mach.networks.kernels.sparse import DECAY, EPSILON

try:
    import triton
    import triton.language as tl
except ImportError:  # the reference runs instead
    triton = tl = None

LOADED = 4096  # numbers that a program has in flight
N_PROGRAMS = 132 * 16  # that go through the features of a batch: some for every multiprocessor
MAX_WIDTH = 2**15  # of a layer, of which a program holds the gradient of a feature; wider ones take the reference


def is_there() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def jit(function: Callable[..., None]) -> Any:
    """``triton.jit``, where there is one."""
    return function if triton is None else triton.jit(function)


@jit
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
        key = tl.load(keys + r, mask=is_column, other=0).to(tl.uint32)
        bits = (n * width + h).to(tl.uint32) * 0x9E3779B9 + key
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        total = tl.where((bits ^ (bits >> 16)) >= threshold.to(tl.uint32), total, 0.0)
    at = (r.to(tl.int64) * n_rows + n) * width + h
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_column)


@jit
def activate_kernel(x, keys, out, n_numbers, threshold, scale, DROPS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.program_id(1)
    is_number = at < n_numbers
    start = r.to(tl.int64) * n_numbers
    total = tl.maximum(tl.load(x + start + at, mask=is_number, other=0.0).to(tl.float32), 0.0) * scale
    if DROPS:
        bits = at.to(tl.uint32) * 0x9E3779B9 + tl.load(keys + r).to(tl.uint32)
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        total = tl.where((bits ^ (bits >> 16)) >= threshold.to(tl.uint32), total, 0.0)
    tl.store(out + start + at, total.to(out.dtype.element_ty), mask=is_number)


@jit
def activate_backward_kernel(gradient, out, into, n_numbers, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_number = at < n_numbers
    number = tl.load(gradient + at, mask=is_number, other=0.0).to(tl.float32) * factor
    is_on = tl.load(out + at, mask=is_number, other=0.0).to(tl.float32) > 0.0
    tl.store(into + at, tl.where(is_on, number, 0.0).to(into.dtype.element_ty), mask=is_number)


@jit
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
    decay,
    gain,
    epsilon,
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
        moved = tl.load(at_square, mask=r_G < n_repetitions, other=0.0) * decay
        moved += gain * (tl.sum(sums * sums, axis=1) / width)
        tl.store(at_square, moved, mask=r_G < n_repetitions)
        pace = rate / (tl.sqrt(moved) + epsilon)
        at = weight + slot * stride + r_G[:, None] * width + h_B[None, :]
        after = tl.load(at, mask=is_ours, other=0.0).to(tl.float32) - pace[:, None] * sums
        if weight.dtype.element_ty == tl.bfloat16:
            bits = tl.load(features + u).to(tl.uint32) * 40503 + key  # mixed once a row, then spread evenly over it
            bits = (bits ^ (bits >> 16)) * 0x7FEB352D
            bits = ((bits ^ (bits >> 15)) * 0x846CA68B) >> 16
            spread = (bits[:, None] + h_B.to(tl.uint32)[None, :] * 40503) & 0xFFFF
            carried = (after.to(tl.uint32, bitcast=True) + spread) >> 16
            tl.store(at, carried.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=is_ours)
        else:
            tl.store(at, after, mask=is_ours)


@jit
def binary_gradient_kernel(
    logits, buckets, offsets, n_rows, n_outputs, n_buckets, n_heads, n_classes, BLOCK: tl.constexpr
):
    q = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < n_outputs
    at = logits + q.to(tl.int64) * n_outputs + column
    number = tl.load(at, mask=is_column, other=0.0).to(tl.float32)
    function = (q // n_rows) * n_heads + column // n_buckets
    bucket = column % n_buckets
    is_target = tl.zeros((BLOCK,), tl.int32)
    n = q % n_rows
    for m in range(tl.load(offsets + n), tl.load(offsets + n + 1)):
        theirs = tl.load(buckets + function.to(tl.int64) * n_classes + m, mask=is_column, other=-1)
        is_target |= (theirs == bucket).to(tl.int32)
    gradient = tl.sigmoid(number) - is_target.to(tl.float32)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=is_column)


@jit
def softmax_gradient_kernel(
    logits, buckets, offsets, n_rows, n_outputs, n_buckets, n_heads, n_classes, BLOCK: tl.constexpr
):
    """Two passes over the outputs of a head: the second finds them in the cache."""
    q, head = tl.program_id(0), tl.program_id(1)
    n, function = q % n_rows, (q // n_rows) * n_heads + head
    start = logits + q.to(tl.int64) * n_outputs + head * n_buckets
    of_function = buckets + function.to(tl.int64) * n_classes
    begin, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    n_targets = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n_buckets, BLOCK):
        column = first + tl.arange(0, BLOCK)
        number = tl.load(start + column, mask=column < n_buckets, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, number)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(most - shift) + tl.exp(number - shift)
        most = higher
        is_target = tl.zeros((BLOCK,), tl.int32)
        for m in range(begin, end):
            is_target |= (tl.load(of_function + m) == column).to(tl.int32)
        n_targets += is_target
    peak = tl.max(most, axis=0)
    weight = 1.0 / tl.sum(total * tl.exp(most - peak), axis=0)
    count = tl.sum(n_targets, axis=0)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    weight = tl.where(count > 0, weight, 0.0)
    for first in range(0, n_buckets, BLOCK):
        column = first + tl.arange(0, BLOCK)
        is_column = column < n_buckets
        number = tl.load(start + column, mask=is_column, other=0.0).to(tl.float32)
        is_target = tl.zeros((BLOCK,), tl.int32)
        for m in range(begin, end):
            is_target |= (tl.load(of_function + m) == column).to(tl.int32)
        gradient = tl.exp(number - peak) * weight - is_target.to(tl.float32) * share
        tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=is_column)


@jit
def figures_kernel(
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
    BLOCK: tl.constexpr,
):
    """Of a row and head of a repetition: its loss, and whether its top bucket is a target."""
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
    for first in range(0, n_buckets, BLOCK):
        column = first + tl.arange(0, BLOCK)
        number = tl.load(start + column, mask=column < n_buckets, other=-float("inf")).to(tl.float32)
        is_target = tl.zeros((BLOCK,), tl.int32)
        for m in range(begin, end):
            is_target |= (tl.load(of_function + m) == column).to(tl.int32)
        is_higher = number > most
        higher = tl.maximum(most, number)
        if IS_BINARY:  # log(1 + exp(z)), which does not overflow
            total += tl.maximum(number, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(number)))
        else:
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp(most - shift) + tl.exp(number - shift)
        at_targets += tl.where(is_target > 0, number, 0.0)
        n_targets += is_target
        best = tl.where(is_higher, column, best)
        is_best_target = tl.where(is_higher, is_target, is_best_target)
        most = higher
    peak = tl.max(most, axis=0)
    first_best = tl.min(tl.where(most == peak, best, 2147483647), axis=0)  # of equal logits the first, as argmax
    hit = tl.sum(tl.where(best == first_best, is_best_target, 0), axis=0)
    count = tl.sum(n_targets, axis=0)
    of_targets = tl.sum(at_targets, axis=0)
    if IS_BINARY:
        loss = tl.sum(total, axis=0) - of_targets
    else:
        loss = peak + tl.log(tl.sum(total * tl.exp(most - peak), axis=0))
        loss = tl.where(count > 0, loss - of_targets / tl.maximum(count, 1).to(tl.float32), 0.0)
    at = out + (q.to(tl.int64) * n_heads + head) * 2
    tl.store(at, loss)
    tl.store(at + 1, hit.to(tl.float32))


@jit
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
    beta1,
    gain1,
    beta2,
    gain2,
    epsilon,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_number = at < n_numbers
    by = tl.load(gradient + at, mask=is_number, other=0.0).to(tl.float32) * scale
    m = beta1 * tl.load(mean + at, mask=is_number, other=0.0) + gain1 * by
    v = beta2 * tl.load(square + at, mask=is_number, other=0.0) + gain2 * by * by
    after = tl.load(weight + at, mask=is_number, other=0.0) - pace * m / (tl.sqrt(v) * root + epsilon)
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
    forward_kernel[(n_rows, triton.cdiv(n_columns, block))](
        indptr_N1,
        slots,
        values,
        weight_DW,
        bias_RH.contiguous(),
        slots if dropout is None else dropout.keys_R,
        out_RNH,
        n_rows,
        weight_DW.stride(0),
        width,
        n_columns,
        0 if dropout is None else dropout.threshold,
        1.0 if dropout is None else dropout.scale,
        ACTIVATES=dropout is not None,
        DROPS=dropout is not None and dropout.rate > 0,
        ENTRIES=min(16, LOADED // block),
        BLOCK=block,
    )


def activate(x_RNH: Tensor, out_RNH: Tensor, dropout: Dropout) -> None:
    n = x_RNH[0].numel()
    arguments = (x_RNH.contiguous(), dropout.keys_R, out_RNH, n, dropout.threshold, dropout.scale)
    activate_kernel[(triton.cdiv(n, 1024), len(x_RNH))](*arguments, DROPS=dropout.rate > 0, BLOCK=1024)


def activate_backward(gradient_RNH: Tensor, out_RNH: Tensor, factor: float, into_RNH: Tensor) -> None:
    n = out_RNH.numel()
    arguments = (gradient_RNH.contiguous(), out_RNH, into_RNH, n, factor)
    activate_backward_kernel[(triton.cdiv(n, 1024),)](*arguments, BLOCK=1024)


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
    backward_kernel[(n_programs, triton.cdiv(n_repetitions, group))](
        columns.features_U,
        columns.slots_U,
        columns.offsets_U1,
        columns.n_unique,
        columns.rows,
        columns.values,
        gradient_RNH.contiguous(),
        weight_DW,
        square_DR,
        keys_R,
        n_rows,
        width,
        n_repetitions,
        weight_DW.stride(0),
        rate,
        scale,
        DECAY,
        1.0 - DECAY,
        EPSILON,
        ENTRIES=max(1, min(16, LOADED // (group * block))),
        GROUP=group,
        BLOCK=block,
        num_warps=4 if group * block <= 2048 else 16,
    )


def loss_gradient(logits_RNO: Tensor, buckets_FM: Tensor, offsets_N1: Tensor, n_heads: int, loss: Loss) -> None:
    n_repetitions, n_rows, n_outputs = logits_RNO.shape
    n_buckets, n_classes = n_outputs // n_heads, buckets_FM.shape[1]
    arguments = (logits_RNO, buckets_FM, offsets_N1, n_rows, n_outputs, n_buckets, n_heads, n_classes)
    if loss is BINARY:
        block = min(triton.next_power_of_2(n_outputs), 1024)
        grid = (n_repetitions * n_rows, triton.cdiv(n_outputs, block))
        binary_gradient_kernel[grid](*arguments, BLOCK=block)
    elif loss is SOFTMAX:
        block = min(triton.next_power_of_2(n_buckets), 1024)
        softmax_gradient_kernel[(n_repetitions * n_rows, n_heads)](*arguments, BLOCK=block)
    else:
        batched.loss_gradient(logits_RNO, buckets_FM, offsets_N1, n_heads, loss)


def figures(logits_RNO: Tensor, buckets_FM: Tensor, offsets_N1: Tensor, n_heads: int, loss: Loss) -> Tensor:
    if loss not in (BINARY, SOFTMAX):
        return batched.figures(logits_RNO, buckets_FM, offsets_N1, n_heads, loss)
    n_repetitions, n_rows, n_outputs = logits_RNO.shape
    n_buckets = n_outputs // n_heads
    out_RNJ2 = torch.empty((n_repetitions, n_rows, n_heads, 2), device=logits_RNO.device)
    sizes = (n_rows, n_outputs, n_buckets, n_heads, buckets_FM.shape[1])
    figures_kernel[(n_repetitions * n_rows, n_heads)](
        logits_RNO,
        buckets_FM,
        offsets_N1,
        out_RNJ2,
        *sizes,
        IS_BINARY=loss is BINARY,
        BLOCK=min(triton.next_power_of_2(n_buckets), 1024),
    )
    return out_RNJ2.sum((1, 2), dtype=torch.float64)


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
    adam_kernel[(triton.cdiv(n, 1024),)](
        weight,
        weight if half is None else half,
        gradient.contiguous(),
        mean,
        square,
        n,
        rate / (1.0 - BETA1**step),
        (1.0 - BETA2**step) ** -0.5,
        scale,
        BETA1,
        1.0 - BETA1,
        BETA2,
        1.0 - BETA2,
        ADAM_EPSILON,
        COPIES=half is not None,
        BLOCK=1024,
    )
