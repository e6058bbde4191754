"""The best of the classes that a row is found to have something in common with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel

Array = NDArray[Any]


@kernel(error_model="numpy")
def keep(ids_P: Array, best_P: Array, k: int, value: np.float32) -> None:
    """Put class k where its value belongs among the best, of equal ones the first class first; none stands there twice.

    In the beginning ids are -1 and values minus infinity.
    """
    at = len(ids_P) - 1
    if not (value > best_P[at] or (value == best_P[at] and k < ids_P[at])):
        return
    for j in range(len(ids_P)):
        if ids_P[j] == k:
            if best_P[j] >= value:
                return
            at = j
    while at > 0 and (value > best_P[at - 1] or (value == best_P[at - 1] and k < ids_P[at - 1])):
        best_P[at], ids_P[at] = best_P[at - 1], ids_P[at - 1]
        at -= 1
    best_P[at], ids_P[at] = value, k


@kernel()
def drop_listed(ids_NP: Array, others_NC: Array) -> None:
    """Put -1 in place of ids that stand in the same row of others, or before in their own."""
    for n in range(len(ids_NP)):
        for p in range(ids_NP.shape[1]):
            k = ids_NP[n, p]
            for c in range(others_NC.shape[1]):
                if others_NC[n, c] == k:
                    ids_NP[n, p] = -1
            for before in range(p):
                if ids_NP[n, before] == k:
                    ids_NP[n, p] = -1
