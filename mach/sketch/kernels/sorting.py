"""Sorting within kernels: numba's own ``np.sort`` and ``np.partition`` take seconds to compile, for every type anew."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel

Array = NDArray[Any]


@kernel()
def sort(values: Array) -> None:
    """Sort numbers ascending, in place; none of them may be NaN.

    Heapsort (Williams, "Algorithm 232", CACM 7, 1964): n log n steps whatever the order is, and no memory.
    """
    n = len(values)
    for turn in range(n // 2 + n - 1):
        root, end = n // 2 - 1 - turn, n
        if root < 0:  # the heap is made: its largest entry goes behind it
            root, end = 0, n + n // 2 - 1 - turn
            values[0], values[end] = values[end], values[0]
        moved = values[root]
        while 2 * root + 1 < end:
            child = 2 * root + 1
            if child + 1 < end and values[child] < values[child + 1]:
                child += 1
            if not moved < values[child]:
                break
            values[root] = values[child]
            root = child
        values[root] = moved


@kernel()
def descending(scores: Array, order_2N: Array) -> None:
    """Write the places of float32 scores to ``order_2N[0, : len(scores)]``: largest first, equal ones as they stand.

    A radix sort of the numbers' bits, 8 at a time, least ones first; a heap's branches cannot be foreseen.
    """
    n, bits = len(scores), scores.view(np.uint32)
    for i in range(n):
        order_2N[0, i] = i
    counts = np.empty(257, np.int64)
    for turn in range(4):
        shift, given, taken = np.uint32(8 * turn), order_2N[turn % 2], order_2N[1 - turn % 2]
        counts[:] = 0
        for i in range(n):
            counts[_digit(bits[i], shift) + 1] += 1
        for digit in range(256):
            counts[digit + 1] += counts[digit]
        for i in range(n):
            digit = _digit(bits[given[i]], shift)
            taken[counts[digit]] = given[i]
            counts[digit] += 1


@kernel(inline="always")
def _digit(bits: Any, shift: Any) -> Any:
    """Eight bits of a float32, such that larger numbers have smaller ones; 0 and -0 differ."""
    rising = bits ^ (np.uint32(0x80000000) if bits < np.uint32(0x80000000) else np.uint32(0xFFFFFFFF))
    return np.int64((~rising >> shift) & np.uint32(255))
