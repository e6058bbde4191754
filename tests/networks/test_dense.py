from __future__ import annotations

import numpy as np
import pytest

from mach.networks.inference import NO_SCALE
from mach.networks.kernels.dense import matmul_few_rows, relu_dropout, relu_dropout_backward
from mach.networks.kernels.memory import from_bfloat16, to_bfloat16


def test_without_dropout_it_is_relu():
    x = np.linspace(-2, 2, 101, dtype=np.float32)
    out = np.empty_like(x)
    relu_dropout(x, 0.0, 5, out)
    np.testing.assert_array_equal(out, np.maximum(x, 0))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.75])
def test_dropout_keeps_its_share_and_the_mean(rate: float):
    x = np.ones(200_000, np.float32)
    out = np.empty_like(x)
    relu_dropout(x, rate, 11, out)
    assert abs((out > 0).mean() - (1 - rate)) < 0.005
    assert abs(out.mean() - 1) < 0.02
    np.testing.assert_allclose(out[out > 0], 1 / (1 - rate), rtol=1e-6)


def test_masks_of_different_seeds_and_neighbours_are_independent():
    x = np.ones(100_000, np.float32)
    masks = []
    for seed in (1, 2, 2**31 + 7):
        out = np.empty_like(x)
        relu_dropout(x, 0.5, seed, out)
        masks.append(out > 0)
    again = np.empty_like(x)
    relu_dropout(x, 0.5, 1, again)
    assert np.array_equal(again > 0, masks[0])
    for a, b in [(masks[0], masks[1]), (masks[0], masks[2]), (masks[0][1:], masks[0][:-1])]:
        assert abs((a == b).mean() - 0.5) < 0.01


def test_dropout_to_bfloat16_is_dropout_rounded():
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    out, half = np.empty_like(x), np.empty(len(x), np.uint16)
    relu_dropout(x, 0.3, 7, out)
    relu_dropout(x, 0.3, 7, half)
    np.testing.assert_allclose(from_bfloat16(half), out, rtol=1 / 256)
    gradient, into = np.ones_like(x), np.empty_like(x)
    for kept in (out, half):
        relu_dropout_backward(gradient, kept, 1 / 0.7, into)
        np.testing.assert_allclose(into, np.where(out > 0, 1 / 0.7, 0), rtol=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_product_of_few_rows_is_the_matrix_product(half: bool):
    generator = np.random.default_rng(0)
    x, weight = (generator.standard_normal(shape, dtype=np.float32) for shape in [(3, 70), (11, 70)])
    bias = generator.standard_normal(11, dtype=np.float32)
    stored = to_bfloat16(weight) if half else weight
    out = np.empty((3, 11), np.float32)
    matmul_few_rows(x, stored, NO_SCALE, bias, out)
    exact = from_bfloat16(to_bfloat16(weight)) if half else weight
    np.testing.assert_allclose(out, x @ exact.T + bias, rtol=1e-4, atol=1e-5)
