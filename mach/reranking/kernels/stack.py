"""A network of two hidden layers over each candidate's inputs, compiled for `mach.reranking.order`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(cache=True, nogil=True, error_model="numpy")
def _layer(x_IC: Array, w_IH: Array, b_H: Array, out_HC: Array) -> None:
    for h in range(w_IH.shape[1]):
        out_HC[h] = b_H[h]
        for i in range(w_IH.shape[0]):
            w = w_IH[i, h]
            if w == 0:  # between networks side by side
                continue
            for c in range(x_IC.shape[1]):
                out_HC[h, c] += w * x_IC[i, c]


@njit(cache=True, nogil=True, error_model="numpy")
def objections(inputs_NIC: Array, layers: tuple[Array, Array, Array, Array, Array, Array], out_NC: Array) -> None:
    """Outputs for standardised inputs, candidates of a query side by side, which a processor's lanes want."""
    w_IH, b_H, w_HG, b_G, w_G1, b_1 = layers
    C = inputs_NIC.shape[2]
    first_HC, second_GC = np.empty((w_IH.shape[1], C), np.float32), np.empty((w_HG.shape[1], C), np.float32)
    last_1C = np.empty((1, C), np.float32)
    for n in range(len(inputs_NIC)):
        _layer(inputs_NIC[n], w_IH, b_H, first_HC)
        first_HC /= np.float32(1) + np.exp(-first_HC)
        _layer(first_HC, w_HG, b_G, second_GC)
        second_GC /= np.float32(1) + np.exp(-second_GC)
        _layer(second_GC, w_G1, b_1, last_1C)
        out_NC[n] = last_1C[0]
