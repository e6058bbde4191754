"""Bucket probabilities of one trained repetition, without torch: what a loaded model runs.

The weights are a mapping of names to arrays, float32 or bfloat16 bits (uint16), usually memory-mapped:
``input.weight`` (D, H) and ``input.bias`` (H,) of the sparse input layer; ``trunk.layers.i.weight`` (out, in) and
``.bias`` of hidden layers; ``output.weight`` (J B, H) and ``output.bias`` (J B,) for J hash functions. A linear network
over sparse features is its input layer alone, with H = J B. An ``input.weight`` of int8, or of packed int4 (uint8,
(D, ceil(H / 2))), stands beside ``input.scale`` (D,), by which its rows are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mach.config import NetworkConfig
from mach.networks.batch import Batch, DenseBatch

Weights = Mapping[str, NDArray[Any]]
Kind = Literal["int4", "int8", "bfloat16", "float32"]
Trunk = Callable[[NDArray[np.float32]], NDArray[np.float32]]
NO_SCALE = np.empty(0, np.float32)
FEW_ROWS = 8  # below, a compiled product that reads bfloat16 in place beats widening for BLAS


def bucket_logits(weights: Weights, batch: Batch, trunk: Trunk | None = None) -> NDArray[np.float32]:
    """Logits of shape (N, J B); reads the input rows of the batch's features and every dense weight once.

    ``trunk`` takes the place of the hidden layers, where it is the user's own (`mach.networks.trunks`).
    """
    if isinstance(batch, DenseBatch):
        x_NH, activated = batch.values_ND, True
    else:
        from mach.kernels.sparse import sparse_forward, sparse_forward_int4

        x_NH, activated = np.empty((len(batch), len(weights["input.bias"])), np.float32), False
        layer = (weights["input.weight"], weights.get("input.scale", NO_SCALE), weights["input.bias"])
        forward = sparse_forward_int4 if layer[0].dtype == np.uint8 else sparse_forward
        forward(batch.indptr, batch.indices, batch.values, *layer, x_NH)
    if trunk is not None:
        return _affine(trunk(x_NH), weights["output.weight"], weights["output.bias"])
    for name in _dense_layers(weights):
        if not activated:
            np.maximum(x_NH, 0.0, out=x_NH)
        x_NH, activated = _affine(x_NH, weights[f"{name}.weight"], weights[f"{name}.bias"]), False
    return x_NH


def bucket_probabilities(logits_NB: NDArray[np.float32], loss: Literal["binary", "softmax"]) -> NDArray[np.float32]:
    """Logistic function of every logit, or the softmax over the last axis; accurate to float32 in both tails."""
    if loss == "softmax":
        exponentials_NB = np.exp(logits_NB - logits_NB.max(axis=-1, keepdims=True))
        return exponentials_NB / exponentials_NB.sum(axis=-1, keepdims=True)
    decay_NB = np.exp(-np.abs(logits_NB))  # at most 1: no overflow
    probs_NB: NDArray[np.float32] = np.where(logits_NB >= 0, np.float32(1.0), decay_NB) / (1 + decay_NB)
    return probs_NB


def weight_shapes(
    config: NetworkConfig, *, n_features: int, n_outputs: int, dense_input: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights; of one with a trunk, those outside it."""
    widths = [*config.hidden, n_outputs]
    shapes: dict[str, tuple[int, ...]] = {}
    below = n_features
    if not dense_input:
        stored = -(-widths[0] // 2) if config.weights == "int4" else widths[0]
        shapes |= {"input.weight": (n_features, stored), "input.bias": (widths[0],)}
        shapes |= {"input.scale": (n_features,)} if config.weights in {"int4", "int8"} else {}
        below = widths.pop(0)
    if config.trunk is not None:
        return shapes | {"output.bias": (n_outputs,)}
    for i, width in enumerate(widths):
        name = "output" if i == len(widths) - 1 else f"trunk.layers.{i}"
        shapes |= {f"{name}.weight": (width, below), f"{name}.bias": (width,)}
        below = width
    return shapes


def stored_weights(weights: Weights, kind: Kind) -> dict[str, NDArray[Any]]:
    """Trained weights (float32 or bfloat16) as they are stored: matrices as ``kind`` says, biases in float32.

    With int4 and int8 only the sparse input layer's matrix is of integers, the others are bfloat16.
    """
    from mach.kernels.memory import from_bfloat16, to_bfloat16, to_int4, to_int8

    stored: dict[str, NDArray[Any]] = {}
    for name, array in weights.items():
        if array.ndim != 2 or array.dtype not in (np.float32, np.uint16):
            stored[name] = array
        elif kind in {"int4", "int8"} and name == "input.weight":
            stored[name], stored["input.scale"] = (to_int4 if kind == "int4" else to_int8)(array)
        elif array.dtype == np.uint16:
            stored[name] = from_bfloat16(array) if kind == "float32" else array
        else:
            stored[name] = array if kind == "float32" else to_bfloat16(array)
    return stored


def stored_shape(array: NDArray[Any], width: int) -> tuple[int, ...]:
    """Shape of the matrix that an array stores; of packed int4 its bytes must be those of rows of ``width``."""
    if array.dtype == np.uint8 and array.ndim == 2 and array.shape[1] == -(-width // 2):
        return (len(array), width)
    return array.shape


def stretches(n_rows: int, width: int) -> list[slice]:
    """Slices of the rows of a matrix that hold about 4 million entries each."""
    n = max(1, 2**22 // max(1, width))
    return [slice(begin, begin + n) for begin in range(0, n_rows, n)]


def wide_rows(weights: Weights, rows: slice, width: int) -> NDArray[np.float32]:
    """Rows of a stored ``input.weight`` of H = ``width`` as float32, whatever type they are stored in."""
    from mach.kernels.memory import from_bfloat16, from_int4

    stored = weights["input.weight"][rows]
    if stored.dtype == np.uint8:
        return from_int4(stored, weights["input.scale"][rows], width)
    if stored.dtype == np.int8:
        return stored.astype(np.float32) * weights["input.scale"][rows, None]
    return from_bfloat16(stored) if stored.dtype == np.uint16 else stored


def _dense_layers(weights: Weights) -> list[str]:
    hidden = [f"trunk.layers.{i}" for i in range(len(weights)) if f"trunk.layers.{i}.weight" in weights]
    return hidden + (["output"] if "output.weight" in weights else [])


def _affine(x_NH: NDArray[np.float32], weight_BH: NDArray[Any], bias_B: NDArray[np.float32]) -> NDArray[np.float32]:
    if len(x_NH) < FEW_ROWS:
        from mach.kernels.dense import matmul_few_rows

        out_NB = np.empty((len(x_NH), len(weight_BH)), np.float32)
        matmul_few_rows(x_NH, weight_BH, bias_B, out_NB)
        return out_NB
    from mach.kernels.memory import from_bfloat16

    wide_BH = from_bfloat16(weight_BH) if weight_BH.dtype == np.uint16 else weight_BH
    return x_NH @ wide_BH.T + bias_B
