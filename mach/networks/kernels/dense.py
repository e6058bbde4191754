"""Dense kernels that libraries lack: counter-based draws and dropout, and bfloat16 products of few rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.networks.kernels.memory import mixed, narrow_like, prefetch, wide_vectors, widen

Array = NDArray[Any]
AHEAD, LINE = 4, 32  # rows asked for ahead of time, as the processor does not look beyond a page; bfloat16 in a line


@kernel()
def _bits(i: int, key: np.uint32) -> Any:
    """32 random bits of a position."""
    bits = mixed(np.uint32(i * 0x9E3779B9 + key))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@kernel()
def draw(quantiles: Array, seed: int, out: Array) -> None:
    """Fill a contiguous 1-D array with draws from 4096 equally likely values; several times as fast as a normal one."""
    key = np.uint32(seed & 0xFFFFFFFF)
    for i in range(len(out)):
        out[i] = quantiles[_bits(i, key) >> np.uint32(20)]


@kernel(error_model="numpy")
def relu_dropout(x: Array, rate: float, seed: int, out: Array) -> None:
    """``out = max(x, 0)`` with a share ``rate`` of entries zeroed and the rest scaled by 1 / (1 - rate).

    An entry's fate is a hash of its position and ``seed``, so it needs no state and does not depend on threads. x and
    out: contiguous and 1-D; out is float32 or bfloat16.
    """
    wide_vectors()
    threshold, key = np.uint32(rate * 4294967295.0), np.uint32(seed & 0xFFFFFFFF)
    scale = np.float32(1.0 / (1.0 - rate))
    for i in range(len(x)):
        y = x[i] * scale if x[i] > np.float32(0.0) and _bits(i, key) >= threshold else np.float32(0.0)
        out[i] = narrow_like(out[i], y)


@kernel(error_model="numpy")
def relu_dropout_backward(gradient: Array, out: Array, scale: float, into: Array) -> None:
    """Gradient by x of `relu_dropout`, from that by ``out``, times ``scale``; both float32 or bfloat16.

    ``scale`` includes dropout's own, 1 / (1 - rate).
    """
    wide_vectors()
    for i in range(len(into)):
        into[i] = widen(gradient[i]) * np.float32(scale) if widen(out[i]) > np.float32(0.0) else np.float32(0.0)


@kernel(error_model="numpy", fastmath={"contract", "reassoc"})
def matmul_few_rows(x_NH: Array, weight_BH: Array, scale_B: Array, bias_B: Array, out_NB: Array) -> None:
    """``out = x @ weight.T + bias`` for a handful of rows, reading float32, bfloat16 or int8 weights once a row.

    Rows of weights are those given times ``scale_B``, unless that is empty.

    It is bound by memory: 21 MB of weights took 2.0 to 2.5 ms, 2.7 to 3.0 without `prefetch`, only reading 1.8 to 2.1.
    """
    for n in range(x_NH.shape[0]):
        for b in range(weight_BH.shape[0]):
            row = weight_BH[b]
            if b + AHEAD < weight_BH.shape[0]:
                for h in range(0, x_NH.shape[1], LINE):
                    prefetch(weight_BH, b + AHEAD, h)
            total = np.float32(0.0)
            for h in range(x_NH.shape[1]):
                total += x_NH[n, h] * widen(row[h])
            out_NB[n, b] = (total * scale_B[b] if len(scale_B) else total) + bias_B[b]
