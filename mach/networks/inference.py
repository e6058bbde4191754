"""Bucket probabilities of one trained repetition, without torch: what a loaded model runs.

The weights are a mapping of names to arrays, float32 or bfloat16 bits (uint16), usually memory-mapped:
``input.weight`` (D, H) and ``input.bias`` (H,) of the sparse input layer; ``trunk.layers.i.weight`` (out, in) and
``.bias`` of hidden layers; ``output.weight`` (J B, H) and ``output.bias`` (J B,) for J hash functions. A linear network
over sparse features is its input layer alone, with H = J B. Matrices of integers stand beside the factors of their
rows, ``input.scale`` (D,) and ``output.scale`` (J B,): those of int8, an ``input.weight`` of which only the salient
weights are kept (uint8, (M,), beside ``input.offsets`` (D + 1,)), and in older runs one of packed int4 (uint8,
(D, ceil(H / 2))).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mach.config import NetworkConfig
from mach.data.batch import Batch, DenseBatch

Weights = Mapping[str, NDArray[Any]]
Rows = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]  # CSR: indptr, indices and values
Kind = Literal["int4", "int8", "bfloat16", "float32"]
Trunk = Callable[[NDArray[np.float32]], NDArray[np.float32]]
NO_SCALE = np.empty(0, np.float32)
KEEP = 0.3  # share of the weights of an input layer of int4
REPEATED = 4  # times that features of a batch occur on average, from which their rows of weights are widened once
FEW_ROWS = 8  # below, a compiled product that reads bfloat16 in place beats widening for BLAS


def bucket_logits(weights: Weights, batch: Batch, trunk: Trunk | None = None) -> NDArray[np.float32]:
    """Logits of shape (N, J B); reads the input rows of the batch's features and every dense weight once.

    ``trunk`` takes the place of the hidden layers, where it is the user's own (`mach.networks.layers`).
    """
    if isinstance(batch, DenseBatch):
        x_NH, activated = batch.values_ND, True
    else:
        x_NH, activated = np.empty((len(batch), len(weights["input.bias"])), np.float32), False
        _sparse_layer((batch.indptr, batch.indices, batch.values), weights, weights["input.bias"], x_NH)
    if trunk is not None:
        return _affine(trunk(x_NH), weights, "output")
    for layer in [*(f"trunk.layers.{i}" for i in range(len(weights))), "output"]:
        if f"{layer}.weight" in weights:
            if not activated:
                np.maximum(x_NH, 0.0, out=x_NH)
            x_NH, activated = _affine(x_NH, weights, layer), False
    return x_NH


def weight_shapes(
    config: NetworkConfig, *, n_features: int, n_outputs: int, dense_input: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights, however they are stored; of one with a trunk, those outside it."""
    widths = [*config.hidden, n_outputs]
    shapes: dict[str, tuple[int, ...]] = {}
    below = n_features
    if not dense_input:
        shapes |= {"input.weight": (n_features, widths[0]), "input.bias": (widths[0],)}
        below = widths.pop(0)
    if config.trunk is not None:
        return shapes | {"output.bias": (n_outputs,)}
    for i, width in enumerate(widths):
        name = "output" if i == len(widths) - 1 else f"trunk.layers.{i}"
        shapes |= {f"{name}.weight": (width, below), f"{name}.bias": (width,)}
        below = width
    return shapes


def stored_weights(weights: Weights, kind: Kind, rows_D: NDArray[np.int64] | None = None) -> dict[str, NDArray[Any]]:
    """Trained weights (float32 or bfloat16) as they are stored: matrices as ``kind`` says, biases in float32.

    With int8 the matrices of the sparse input layer and of the output layer are integers, others are bfloat16. With
    int4, where ``rows_D`` says in how many training rows a feature occurs, a share `KEEP` of the input layer's weights
    stays, a byte each, unless it is the only layer: those of largest ``abs(w) * rows^(1/4)``. Among the salience
    measures ``abs(w) * norm(x)^a`` of Sun, Liu, Bair and Kolter ("A simple and effective pruning approach for large
    language models", ICLR 2024, with a = 1), a = 1/2 kept the most accuracy (docs/log.md).
    """
    from mach.networks.kernels.memory import from_bfloat16, to_bfloat16, to_int8, to_kept

    stored: dict[str, NDArray[Any]] = {}
    for name, array in weights.items():
        layer = name.removesuffix(".weight")
        if array.ndim != 2 or array.dtype not in (np.float32, np.uint16):
            stored[name] = array
        elif name == "input.weight" and kind == "int4" and rows_D is not None and "output.weight" in weights:
            gains_D = (rows_D**0.25).astype(np.float32)
            stored[name], stored["input.offsets"], stored["input.scale"] = to_kept(array, gains_D, KEEP)
        elif layer in {"input", "output"} and kind in {"int4", "int8"}:
            stored[name], stored[f"{layer}.scale"] = to_int8(array)
        elif array.dtype == np.uint16:
            stored[name] = from_bfloat16(array) if kind == "float32" else array
        else:
            stored[name] = array if kind == "float32" else to_bfloat16(array)
    return stored


def wide_matrix(weights: Weights, layer: str, rows: slice = slice(None)) -> NDArray[np.float32]:
    """Rows of a layer's stored matrix as float32, whatever type they are stored in."""
    from mach.networks.kernels.memory import from_bfloat16

    stored, scale = weights[f"{layer}.weight"], weights.get(f"{layer}.scale", NO_SCALE)
    if stored.dtype == np.uint8:
        return _input_rows(weights, np.arange(*rows.indices(len(scale)), dtype=np.int32))
    return stored[rows].astype(np.float32) * scale[rows, None] if len(scale) else from_bfloat16(stored[rows])


def _input_rows(weights: Weights, features_U: NDArray[np.int32]) -> NDArray[np.float32]:
    """Weights of different features, (U, H)."""
    wide_UH = np.empty((len(features_U), len(weights["input.bias"])), np.float32)
    unit = (np.arange(len(features_U) + 1), features_U, np.ones(len(features_U), np.float32))
    _sparse_layer(unit, weights, np.zeros_like(weights["input.bias"]), wide_UH)
    return wide_UH


def _sparse_layer(csr: Rows, weights: Weights, bias_H: NDArray[Any], out_NH: NDArray[Any]) -> None:
    from mach.networks.kernels.sparse import sparse_forward, sparse_forward_kept

    indptr, indices, values = csr
    weight, offsets = weights["input.weight"], weights.get("input.offsets")
    scale_D = weights.get("input.scale", NO_SCALE)
    if weight.dtype == np.uint8 and (offsets is None or len(indptr) > FEW_ROWS):
        features_U, places = np.unique(indices, return_inverse=True)
        slots = places.astype(np.int32)
        if offsets is None:
            codes_UH = _unpacked(weight[features_U])[:, : len(bias_H)]
            return sparse_forward(indptr, slots, values, codes_UH, scale_D[features_U], bias_H, out_NH)
        if len(indices) >= REPEATED * len(features_U):
            return sparse_forward(indptr, slots, values, _input_rows(weights, features_U), NO_SCALE, bias_H, out_NH)
    if offsets is not None:
        return sparse_forward_kept(csr, weight[None], offsets, scale_D, bias_H, out_NH)
    return sparse_forward(*csr, weight, scale_D, bias_H, out_NH)


def _unpacked(packed_UP: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Integers as older runs pack them: byte p holds those of columns p, in its lower half, and P + p, 8 added."""
    return np.concatenate([packed_UP & 15, packed_UP >> 4], axis=1).astype(np.int8) - np.int8(8)


def _affine(x_NH: NDArray[np.float32], weights: Weights, layer: str) -> NDArray[np.float32]:
    bias_B = weights[f"{layer}.bias"]
    if len(x_NH) < FEW_ROWS:
        from mach.networks.kernels.dense import matmul_few_rows

        out_NB = np.empty((len(x_NH), len(bias_B)), np.float32)
        matmul_few_rows(x_NH, weights[f"{layer}.weight"], weights.get(f"{layer}.scale", NO_SCALE), bias_B, out_NB)
        return out_NB
    return x_NH @ wide_matrix(weights, layer).T + bias_B
