"""What numba and numpy lack: aligned arrays, asking for a cache line ahead of time, reading and writing bfloat16.

bfloat16 is the upper half of a float32. Arrays of it are held as uint16, as numpy has no such type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.sketch.kernels.lanes import ask_for, pointer_to

Array = NDArray[Any]
CACHE_LINE = 64
FEW = 2**18  # entries of a matrix that are worked on at a time


def aligned_empty(shape: int | tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array like that of `numpy.empty` whose memory begins with a cache line.

    Rows of numpy's own large arrays begin 16 bytes into one, so that every wide load of a kernel touches two.

    Examples
    --------
    >>> aligned_empty((3, 512), np.float32).ctypes.data % CACHE_LINE
    0
    """
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(n_bytes + CACHE_LINE, np.uint8)
    begin = -raw.ctypes.data % CACHE_LINE
    return raw[begin : begin + n_bytes].view(dtype).reshape(shape)


@intrinsic
def wide_vectors(context: Any) -> Any:
    """Let loops of the kernel that calls it use whole AVX-512 registers, of which LLVM by itself takes halves."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # which llvmlite's own list lacks
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(context: Any, array: Any, row: Any, column: Any) -> Any:
    """Ask for the cache line that holds ``array[row, column]``; ``array`` is 2-D."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ask_for(builder, pointer_to(context, builder, signature.args[0], *arguments))
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@intrinsic
def widen(context: Any, number: Any) -> Any:
    """float32 of a float32, of a bfloat16 held as uint16, or of an int8."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number == types.uint16:
            upper = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.IntType(32)(16))
            return builder.bitcast(upper, ir.FloatType())
        return builder.sitofp(arguments[0], ir.FloatType()) if number == types.int8 else arguments[0]

    return types.float32(number), codegen


@intrinsic
def narrow_like(context: Any, pattern: Any, number: Any) -> Any:
    """A finite float32 as what ``pattern`` is: itself, or the nearest bfloat16, of two the even one (`to_bfloat16`)."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] != types.uint16:
            return arguments[1]
        bits, i32 = builder.bitcast(arguments[1], ir.IntType(32)), ir.IntType(32)
        is_odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
        rounded = builder.add(bits, builder.add(is_odd, i32(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, i32(16)), ir.IntType(16))

    return pattern(pattern, types.float32), codegen


@intrinsic
def narrow_at_random(context: Any, pattern: Any, number: Any, random: Any) -> Any:
    """`narrow_like`, but to one of the two nearest bfloat16, right on average: 16 bits of ``random`` choose."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] != types.uint16:
            return arguments[1]
        bits = builder.bitcast(arguments[1], ir.IntType(32))
        carried = builder.add(bits, builder.and_(arguments[2], ir.IntType(32)(0xFFFF)))
        return builder.trunc(builder.lshr(carried, ir.IntType(32)(16)), ir.IntType(16))

    return pattern(pattern, types.float32, types.uint32), codegen


@kernel()
def mixed(bits: np.uint32) -> Any:
    """A hash of 32 bits: the mixer "lowbias32" of C. Wellons without its last step."""
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D))  # numba widens products: cut back
    return np.uint32((bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B))


def to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even; the bits as uint16. Temporaries stay below 4 MB."""
    bits = np.ascontiguousarray(array, dtype=np.float32).reshape(-1).view(np.uint32)
    halves = np.empty(len(bits), np.uint16)
    for begin in range(0, len(bits), FEW):
        block = bits[begin : begin + FEW]
        halves[begin : begin + FEW] = (block + (0x7FFF + ((block >> 16) & 1))) >> 16
    return halves.reshape(array.shape)


def from_bfloat16(array: NDArray[Any]) -> NDArray[np.float32]:
    """The exact float32 values of bfloat16 bits; other arrays are given back."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def stretches(n_rows: int, width: int) -> list[slice]:
    """Slices of the rows of a matrix that hold about `FEW` entries each, so that temporaries stay small."""
    n = max(1, FEW // max(1, width))
    return [slice(begin, begin + n) for begin in range(0, n_rows, n)]


def to_int8(array_DH: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round to 255 steps a row: integers of shape (D, H) and the step of every row, its largest magnitude / 127."""
    codes_DH, steps_D = np.empty(array_DH.shape, np.int8), np.empty(len(array_DH), np.float32)
    for rows in stretches(*array_DH.shape):
        wide = from_bfloat16(array_DH[rows])
        steps_D[rows] = np.abs(wide).max(axis=1, initial=0.0) / np.float32(127)
        codes_DH[rows] = np.rint(wide / np.where(steps_D[rows] > 0, steps_D[rows], 1)[:, None])
    return codes_DH, steps_D


def to_kept(array_DH: Array, gains_D: Array, share: float) -> tuple[Array, Array, Array]:
    """The weights of largest ``abs(w) * gain``, rounded to 15 steps a row, in at most ``share * D * H`` bytes.

    D counts the rows of a gain above 0; of the others nothing is kept. Returns bytes (uint8, M), offsets (int64, D + 1)
    and steps (float32, D). Row d has the bytes ``offsets[d]..offsets[d + 1]``: in the upper half how far a weight is
    from the one before, the first from 0, in the lower half 8 more than its integer. A longer way is cut by entries of
    integer 0.
    """
    budget = n = int(share * np.count_nonzero(gains_D) * array_DH.shape[1])
    counts, offsets = np.zeros(2**16, np.int64), np.zeros(len(array_DH) + 1, np.int64)
    steps_D = np.empty(len(array_DH), np.float32)
    for rows in stretches(*array_DH.shape):
        sizes = np.abs(from_bfloat16(array_DH[rows]))
        steps_D[rows] = sizes.max(axis=1, initial=0.0) / np.float32(7)
        saliences = (sizes * gains_D[rows, None]).view(np.uint32)
        counts += np.bincount((saliences >> 16).reshape(-1), minlength=len(counts))
    n_above = np.cumsum(counts[::-1])[::-1]  # that reach the upper half of a float32's bits

    def upper_of(n: int) -> int:
        return min(max(int(np.searchsorted(-n_above, -n)), 1), 0x7F7F)

    while True:
        upper = upper_of(n)
        least = float(np.array(upper << 16, np.uint32).view(np.float32))
        _keep(array_DH, gains_D, steps_D, least, offsets[1:], np.empty(0, np.uint8))
        if offsets[-1] <= budget or n == 0:
            break
        while n and upper_of(n) == upper:
            n = max(0, n - int(offsets[-1] - budget))  # entries that cut a way count as well
    kept = np.empty(int(offsets[-1]), np.uint8)
    _keep(array_DH, gains_D, steps_D, least, offsets[1:], kept)
    return kept, offsets, steps_D


@kernel(error_model="numpy")
def _keep(array_DH: Array, gains_D: Array, steps_D: Array, least: float, ends_D: Array, kept: Array) -> None:
    """Write the entries of all rows, and where each row's end; with an empty ``kept`` only the latter."""
    p = 0
    for d in range(len(array_DH)):
        row, last = array_DH[d], 0
        lowest = max(np.float32(least) / gains_D[d], np.float32(0.5) * steps_D[d])  # less is rounded to 0
        for h in range(len(row)):
            if abs(widen(row[h])) > lowest:
                while h - last > 15:
                    if len(kept):
                        kept[p] = 15 << 4 | 8
                    last += 15
                    p += 1
                if len(kept):
                    kept[p] = (h - last) << 4 | (np.int64(np.rint(widen(row[h]) / steps_D[d])) + 8)
                last = h
                p += 1
        ends_D[d] = p
