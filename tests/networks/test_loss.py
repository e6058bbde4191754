"""What the losses' kernels are made of, against plain numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from mach.networks.kernels.loss import dithered, exp, sigmoid
from mach.networks.kernels.memory import from_bfloat16, to_bfloat16
from mach.sketch.kernels.lanes import transpose


@settings(max_examples=60)
@drawn(st.integers(0, 2**32), st.integers(0, 2**31), st.floats(1e-3, 0.9), st.booleans(), st.integers(1, 60))
def test_dither_keeps_what_is_large_and_makes_of_the_rest_nothing_or_its_bound(
    seed: int, key: int, least: float, half: bool, n_rows: int
):
    generator = np.random.default_rng(seed)
    g = (generator.standard_normal((7, n_rows)) ** 3 * 0.2).astype(np.float32)
    g[:, 0] = 0
    stored: Any = to_bfloat16(g) if half else g
    exact = from_bfloat16(stored) if half else g
    indptr, rows, values = dithered(stored, least, key)
    found = csr_array((values, rows, indptr), shape=g.shape)
    assert found.has_canonical_format
    assert (values != 0).all()
    bound, dense = np.float32(least), found.toarray()
    is_large = np.abs(exact) >= bound
    np.testing.assert_array_equal(dense[is_large], exact[is_large])
    rounded = dense[~is_large]
    assert np.isin(np.abs(rounded), np.array([0, bound], np.float32)).all()
    assert (rounded * exact[~is_large] >= 0).all()
    assert not dense[exact == 0].any()


def test_dither_is_right_on_average_and_over_a_row_nearer_than_chance():
    """Sums of 512 entries, each kept by a chance of its own, would err by 0.2 sqrt(sum of p (1 - p)), here 1.1."""
    g = np.random.default_rng(0).random((40, 512), np.float32) * np.float32(0.1)
    found = np.stack([csr_array(dithered(g, 0.2, 977 * i)[::-1], shape=g.shape).toarray() for i in range(500)])
    chance = np.sqrt(g * (0.2 - g))
    assert np.abs(found.mean(axis=0) - g).max() < 6 * chance.max() / np.sqrt(500)
    assert np.abs(found.mean(axis=0) - g).mean() < chance.mean() / np.sqrt(500)
    errors = found.sum(axis=2) - g.sum(axis=1)
    assert np.sqrt((errors**2).mean()) < np.sqrt((chance**2).sum(axis=1).mean())
    assert len({array.tobytes() for array in found}) == 500


def test_exponential_and_logistic_function_are_exact_in_relative_terms():
    x = np.concatenate([-np.logspace(-6, np.log10(80), 500), [0.0]]).astype(np.float32)
    exact = x.astype(np.float64)
    np.testing.assert_allclose([exp(number) for number in x], np.exp(exact), rtol=5e-6)
    for sign in (1, -1):
        np.testing.assert_allclose(
            [sigmoid(np.float32(sign) * number) for number in x], 1 / (1 + np.exp(-sign * exact)), rtol=5e-6
        )
    assert exp(np.float32(-1e30)) < 1e-37
    assert sigmoid(np.float32(-1e30)) < 1e-37


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (15, 40), (64, 17), (150, 33)])
@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_transpose(shape: tuple[int, int], kind: type):
    source: Any = np.random.default_rng(0).integers(1, 60_000, shape).astype(kind)
    into = np.zeros(shape[::-1], kind)
    first = shape[0] // 3
    transpose(source, first, shape[0], into)
    np.testing.assert_array_equal(into[:, first:], source.T[:, first:])
    assert not into[:, :first].any()
