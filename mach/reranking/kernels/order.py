"""The network of a learned order over many candidates: `mach.reranking.order` has its formula and its training."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.networks.kernels.loss import sigmoid
from mach.networks.kernels.memory import wide_vectors
from mach.sketch.kernels.lanes import LANES

CUT = 4.0  # standard deviations, at which inputs end
Array = NDArray[Any]


@kernel(error_model="numpy", fastmath={"contract"})
def _layer(x_IC: Array, w_IH: Array, b_H: Array, out_HC: Array) -> None:
    wide_vectors()
    for h in range(w_IH.shape[1]):
        for c in range(out_HC.shape[1]):
            out_HC[h, c] = b_H[h]
        four = w_IH.shape[0] // 4 * 4
        for i in range(0, four, 4):
            w0, w1, w2, w3 = w_IH[i, h], w_IH[i + 1, h], w_IH[i + 2, h], w_IH[i + 3, h]
            if w0 == 0 and w1 == 0 and w2 == 0 and w3 == 0:  # between networks side by side
                continue
            for c in range(out_HC.shape[1]):
                total = out_HC[h, c] + w0 * x_IC[i, c] + w1 * x_IC[i + 1, c]
                out_HC[h, c] = total + w2 * x_IC[i + 2, c] + w3 * x_IC[i + 3, c]
        for i in range(four, w_IH.shape[0]):
            for c in range(out_HC.shape[1]):
                out_HC[h, c] += w_IH[i, h] * x_IC[i, c]


@kernel(error_model="numpy", fastmath={"contract"})
def _silu(x_HC: Array) -> None:
    wide_vectors()
    for h in range(x_HC.shape[0]):
        for c in range(x_HC.shape[1]):
            x_HC[h, c] *= sigmoid(x_HC[h, c])


@kernel(error_model="numpy")
def objections(inputs_NCI: Array, layers: tuple[Array, ...], out_NC: Array) -> None:
    """Outputs of the layers for standardised inputs, candidates of a query side by side, as lanes want them.

    Candidates are padded to whole registers: so a candidate's bits do not depend on how many there are.
    """
    means, scales, w_IH, b_H, w_HG, b_G, w_G1, b_1 = layers
    (N, C, n_in), cut = inputs_NCI.shape, np.float32(CUT)
    width = (C + LANES - 1) // LANES * LANES
    x_IC, last_1C = np.zeros((n_in, width), np.float32), np.empty((1, width), np.float32)
    first_HC, second_GC = np.empty((len(b_H), width), np.float32), np.empty((len(b_G), width), np.float32)
    for n in range(N):
        for c in range(C):
            for i in range(n_in):
                x_IC[i, c] = min(max((inputs_NCI[n, c, i] - means[i]) * scales[i], -cut), cut)
        _layer(x_IC, w_IH, b_H, first_HC)
        _silu(first_HC)
        _layer(first_HC, w_HG, b_G, second_GC)
        _silu(second_GC)
        _layer(second_GC, w_G1, b_1, last_1C)
        for c in range(C):
            out_NC[n, c] = last_1C[0, c]
