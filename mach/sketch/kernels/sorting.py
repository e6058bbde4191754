"""Sorting within kernels: numba's own ``np.sort`` and ``np.partition`` take seconds to compile, for every type anew."""

from __future__ import annotations

from typing import Any

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
