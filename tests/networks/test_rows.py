from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from mach.networks.kernels.memory import CACHE_LINE, aligned_empty, from_bfloat16, narrow_like, to_bfloat16
from mach.networks.kernels.rows import add_rows


@pytest.mark.parametrize("width", [1, 16, 31, 128, 300])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("is_far", [False, True])
def test_rows_are_added_with_their_weights(width: int, kind: str, is_far: bool):
    generator = np.random.default_rng(width)
    wide = generator.standard_normal((9, width)).astype(np.float32)
    sources: dict[str, Any] = {"float32": wide, "bfloat16": to_bfloat16(wide), "int8": (20 * wide).astype(np.int8)}
    source = sources[kind]
    exact = from_bfloat16(source) if kind == "bfloat16" else source
    rows, scales = generator.integers(0, 9, 20).astype(np.int32), generator.standard_normal(20).astype(np.float32)
    for begin, end in ((0, 20), (3, 4), (7, 7), (20, 20)):
        out = np.arange(width, dtype=np.float32)
        add_rows(out, scales, rows, begin, end, source, is_far)
        expected = np.arange(width) + scales[begin:end].astype(np.float64) @ exact[rows[begin:end]]
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@njit
def _narrowed(x, out):
    for i in range(len(x)):
        out[i] = narrow_like(out[i], x[i])  # type: ignore[call-arg]


def test_bfloat16_is_rounded_as_torch_does_halves_too():
    """Else a network that goes on from a checkpoint, whose copy of the weights torch rounds, would be another."""
    bits = np.random.default_rng(0).integers(0x3000_0000, 0x4500_0000, 4000).astype(np.uint32)
    bits[:2000] = bits[:2000] & 0xFFFF_0000 | 0x8000  # just between two of them
    x = bits.view(np.float32)
    out = np.empty(len(x), np.uint16)
    _narrowed(x, out)
    np.testing.assert_array_equal(out, torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(out, to_bfloat16(x))


@pytest.mark.parametrize("shape", [1, 7, (3, 5), (1000, 1001)])
def test_aligned_arrays_begin_with_a_cache_line(shape: Any):
    array = aligned_empty(shape, np.float32)
    assert array.ctypes.data % CACHE_LINE == 0
    assert array.shape == np.empty(shape).shape
    assert array.flags.c_contiguous
