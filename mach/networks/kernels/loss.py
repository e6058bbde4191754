"""The losses' fast paths: gradients by the logits, in place, with their sums and transposes.

Logits stand here with a row for every output, (B, N): so the products before and after read their operands as they
lie, and sums over the batch run along memory. They are float32 or bfloat16 without the bias, and become the gradient of
the summed loss, p - y, of the same type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.networks.kernels.memory import mixed, narrow_like, wide_vectors, widen
from mach.sketch.kernels.lanes import transpose

Array = NDArray[Any]
FLAGS: Any = {"error_model": "numpy", "fastmath": {"contract", "reassoc"}}
BLOCK = 64
DITHER_STRIDE = 48_271  # of the seed of random rounding, a step
LOWEST = np.float32(-87.0)  # exp of less is no normal float32


@intrinsic
def _times_power_of_two(context: Any, number: Any, power: Any) -> Any:
    """``number * 2**power`` where neither is extreme: the exponent's bits are added to."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.add(bits, builder.shl(arguments[1], ir.IntType(32)(23))), ir.FloatType())

    return types.float32(types.float32, types.int32), codegen


@kernel(**FLAGS)
def exp(x: Any) -> Any:
    """``e**max(x, -87)`` of float32 x <= 0, to a relative error below 5e-6; loops over it become vector code."""
    scaled = max(x, LOWEST) * np.float32(1.4426950408889634)
    whole = np.floor(scaled + np.float32(0.5))
    f = scaled - whole  # 2**f by its Taylor series: |f| <= 1/2
    power = np.float32(1.5403530393381606e-4)
    power = power * f + np.float32(1.3333558146428441e-3)
    power = power * f + np.float32(9.618129107628477e-3)
    power = power * f + np.float32(5.550410866482158e-2)
    power = power * f + np.float32(2.402265069591007e-1)
    power = power * f + np.float32(6.931471805599453e-1)
    power = power * f + np.float32(1.0)
    return _times_power_of_two(power, np.int32(whole))


@kernel(**FLAGS)
def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x) of float32, as exact in relative terms near 0 as near 1."""
    decay = exp(-abs(x))
    return (decay if x < np.float32(0.0) else np.float32(1.0)) / (np.float32(1.0) + decay)


@kernel(**FLAGS)
def binary_gradient(
    z_BN: Array, bias_B: Array, rows: Array, outputs: Array, first: int, g_NB: Array, sums_B: Array
) -> None:
    """``sigmoid(z + bias) - y`` over z, its transpose, and its sums over the batch.

    y is 1 at (outputs[i] - first, rows[i]); targets of other outputs than these B are passed over. Reads every logit
    once and writes it twice, or once where ``g_NB`` has no rows: then nobody wants the transpose.
    """
    wide_vectors()
    at_targets = np.empty(len(rows), np.float32)
    for i in range(len(rows)):
        b = outputs[i] - first
        if 0 <= b < len(z_BN):
            at_targets[i] = -sigmoid(-widen(z_BN[b, rows[i]]) - bias_B[b])
    for begin in range(0, len(z_BN), BLOCK):
        end = min(begin + BLOCK, len(z_BN))
        for b in range(begin, end):
            z_N, bias, total = z_BN[b], bias_B[b], np.float32(0.0)
            for n in range(len(z_N)):
                p = sigmoid(widen(z_N[n]) + bias)
                z_N[n] = narrow_like(z_N[n], p)
                total += p
            sums_B[b] = total
        if len(g_NB):
            transpose(z_BN, begin, end, g_NB)  # while the caches hold them
    _put(z_BN, rows, outputs, first, at_targets, np.ones(z_BN.shape[1], np.float32), g_NB, sums_B)


@kernel(**FLAGS)
def softmax_gradient(
    z_BN: Array, bias_B: Array, rows: Array, outputs: Array, first: int, g_NB: Array, sums_B: Array
) -> None:
    """`binary_gradient` of the softmax cross-entropy over one head's outputs: a row's targets share its mass equally.

    A row without a target pulls nothing. Reads every logit three times.
    """
    wide_vectors()
    N = z_BN.shape[1]
    largest_N, factors_N, counts_N = _sums(z_BN, bias_B, rows, outputs, first)
    for n in range(N):
        factors_N[n] = np.float32(counts_N[n] > 0) / factors_N[n]
    at_targets = np.empty(len(rows), np.float32)
    for i in range(len(rows)):
        b, n = outputs[i] - first, rows[i]
        if 0 <= b < len(z_BN):
            p = exp(widen(z_BN[b, n]) + bias_B[b] - largest_N[n]) * factors_N[n]
            at_targets[i] = p - np.float32(1.0) / counts_N[n]
    for begin in range(0, len(z_BN), BLOCK):
        end = min(begin + BLOCK, len(z_BN))
        for b in range(begin, end):
            z_N, bias, total = z_BN[b], bias_B[b], np.float32(0.0)
            for n in range(N):
                p = exp(widen(z_N[n]) + bias - largest_N[n]) * factors_N[n]
                z_N[n] = narrow_like(z_N[n], p)
                total += p
            sums_B[b] = total
        if len(g_NB):
            transpose(z_BN, begin, end, g_NB)  # while the caches hold them
    _put(z_BN, rows, outputs, first, at_targets, np.float32(1.0) / counts_N, g_NB, sums_B)


@kernel(**FLAGS)
def _put(
    z_BN: Array, rows: Array, outputs: Array, first: int, at_targets: Array, shares_N: Array, g_NB: Array, sums_B: Array
) -> None:
    """The gradient p - y at the targets, where y is the row's share, and y off the sums of p."""
    for i in range(len(rows)):
        b, n = outputs[i] - first, rows[i]
        if 0 <= b < len(z_BN):
            z_BN[b, n] = narrow_like(z_BN[b, n], at_targets[i])
            if len(g_NB):
                g_NB[n, b] = z_BN[b, n]
            sums_B[b] -= shares_N[n]


@kernel(**FLAGS)
def dithered(g_BN: Array, least: float, seed: int) -> tuple[Array, Array, Array]:
    """CSR of g, whose entries below ``least`` are rounded at random to 0 or, signs kept, to that: the mean is g.

    An entry's chance to stay is its size over ``least``. What it is compared with lies evenly along a row (multiples of
    the golden ratio from a start that is hashed from row and ``seed``), so that a sum over the row errs by less than
    with chances drawn one by one.
    """
    B, N = g_BN.shape
    indptr, rows, values = np.zeros(B + 1, np.int64), np.empty(B * N, np.int32), np.empty(B * N, np.float32)
    bound = np.float32(least)
    unit = bound * np.float32(2.0**-24)
    m = 0
    for b in range(B):
        start = mixed(np.uint32((seed + b * 40503) & 0xFFFFFFFF))
        for n in range(N):
            g: Any = widen(g_BN[b, n])
            random = np.uint32(start + np.uint32(n) * np.uint32(2654435769)) >> np.uint32(8)
            rows[m], values[m] = n, g if abs(g) >= bound else np.copysign(bound, g)
            m += np.int64(abs(g) > unit * np.float32(random))
        indptr[b + 1] = m
    return indptr, rows[:m], values[:m]


@kernel(**FLAGS)
def binary_loss(z_BN: Array, bias_B: Array, rows: Array, outputs: Array, first: int) -> float:
    """The loss over one head's outputs, summed over the batch; arguments are those of `binary_gradient`."""
    wide_vectors()
    N = z_BN.shape[1]
    total: Any = 0.0
    products_N = np.ones(N, np.float32)  # of 1 + e**-|z|, whose logarithms are taken once in 64 outputs
    for b in range(len(z_BN)):
        z_N, bias, linear = z_BN[b], bias_B[b], np.float32(0.0)
        for n in range(N):
            z = widen(z_N[n]) + bias
            products_N[n] *= np.float32(1.0) + exp(-abs(z))
            linear += max(z, np.float32(0.0))
        total += linear
        if b % 64 == 63 or b == len(z_BN) - 1:
            for n in range(N):
                total += float(np.log(products_N[n]))
                products_N[n] = np.float32(1.0)
    for i in range(len(rows)):
        b = outputs[i] - first
        if 0 <= b < len(z_BN):
            total -= widen(z_BN[b, rows[i]]) + bias_B[b]
    return total


@kernel(**FLAGS)
def softmax_loss(z_BN: Array, bias_B: Array, rows: Array, outputs: Array, first: int) -> float:
    """`binary_loss` of the softmax cross-entropy."""
    wide_vectors()
    total: Any = 0.0
    largest_N, sums_N, counts_N = _sums(z_BN, bias_B, rows, outputs, first)
    for i in range(len(rows)):
        b, n = outputs[i] - first, rows[i]
        if 0 <= b < len(z_BN):
            total += (np.log(sums_N[n]) + largest_N[n] - widen(z_BN[b, n]) - bias_B[b]) / counts_N[n]
    return total


@kernel(**FLAGS)
def _sums(z_BN: Array, bias_B: Array, rows: Array, outputs: Array, first: int) -> tuple[Array, Array, Array]:
    """Of every row the largest logit, the sum of all ``exp(logit - largest)``, and the number of its targets."""
    wide_vectors()
    N = z_BN.shape[1]
    largest_N, sums_N, counts_N = np.full(N, -np.inf, np.float32), np.zeros(N, np.float32), np.zeros(N, np.float32)
    for b in range(len(z_BN)):
        z_N, bias = z_BN[b], bias_B[b]
        for n in range(N):
            largest_N[n] = max(largest_N[n], widen(z_N[n]) + bias)
    for b in range(len(z_BN)):
        z_N, bias = z_BN[b], bias_B[b]
        for n in range(N):
            sums_N[n] += exp(widen(z_N[n]) + bias - largest_N[n])
    for i in range(len(rows)):
        counts_N[rows[i]] += np.float32(0 <= outputs[i] - first < len(z_BN))
    return largest_N, sums_N, counts_N


@kernel(**FLAGS)
def n_hits(z_BN: Array, bias_B: Array, rows: Array, outputs: Array, first: int) -> int:
    """Of how many rows the largest logit is a target; of equal logits the first counts."""
    N = z_BN.shape[1]
    largest_N, best_N = np.full(N, -np.inf, np.float32), np.zeros(N, np.int32)
    for b in range(len(z_BN)):
        z_N, bias = z_BN[b], bias_B[b]
        for n in range(N):
            z = widen(z_N[n]) + bias
            best_N[n] = b if z > largest_N[n] else best_N[n]
            largest_N[n] = max(largest_N[n], z)
    total = 0
    for i in range(len(rows)):
        total += best_N[rows[i]] == outputs[i] - first
    return total
