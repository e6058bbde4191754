"""The sparse input layer against dense numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, random_array

from mach.data.kernels.batch import batch_targets, gather_rows
from mach.networks.kernels.adam import adam_step
from mach.networks.kernels.memory import from_bfloat16, to_bfloat16
from mach.networks.kernels.sparse import sparse_backward, sparse_forward, transpose_batch

NO_SCALE = np.empty(0, np.float32)


def random_batch(n_rows: int, n_features: int, density: float, seed: int) -> csr_array:
    generator = np.random.default_rng(seed)
    matrix = csr_array(random_array((n_rows, n_features), density=density, rng=generator, dtype=np.float32))
    matrix.sort_indices()
    return matrix


def triple(matrix: csr_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.float32)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 30), st.floats(0, 1))
def test_gathered_rows_are_the_rows(seed, n_rows, n_features, density):
    matrix = random_batch(n_rows, n_features, density, seed)
    rows = np.random.default_rng(seed).integers(0, n_rows, 5)
    indptr, indices, values = gather_rows(*triple(matrix), rows)
    gathered = csr_array((values, indices, indptr), shape=(5, n_features))
    np.testing.assert_array_equal(gathered.toarray(), matrix.toarray()[rows])


@pytest.mark.parametrize("width", [1, 3, 16, 50])
@pytest.mark.parametrize("half", [False, True])
def test_forward_is_the_matrix_product(width: int, half: bool):
    matrix = random_batch(7, 40, 0.3, seed=width)
    generator = np.random.default_rng(1)
    weight = generator.standard_normal((40, width), dtype=np.float32)
    bias = generator.standard_normal(width, dtype=np.float32)
    stored = to_bfloat16(weight) if half else weight
    out = np.full((7, width), np.nan, np.float32)
    sparse_forward(*triple(matrix), stored, NO_SCALE, bias, out)
    exact = from_bfloat16(to_bfloat16(weight)) if half else weight
    np.testing.assert_allclose(out, matrix.toarray() @ exact + bias, rtol=1e-5, atol=1e-5)


def test_forward_multiplies_rows_of_integers_by_their_steps():
    matrix = random_batch(7, 40, 0.3, seed=5)
    generator = np.random.default_rng(1)
    codes = generator.integers(-127, 128, (40, 19)).astype(np.int8)
    steps, bias = generator.random(40, dtype=np.float32), generator.random(19, dtype=np.float32)
    out = np.empty((7, 19), np.float32)
    sparse_forward(*triple(matrix), codes, steps, bias, out)
    np.testing.assert_allclose(out, matrix.toarray() @ (codes * steps[:, None]) + bias, rtol=1e-4, atol=1e-4)


def test_forward_of_empty_rows_is_the_bias():
    empty = csr_array((3, 4), dtype=np.float32)
    out = np.empty((3, 2), np.float32)
    sparse_forward(*triple(empty), np.ones((4, 2), np.float32), NO_SCALE, np.array([1.0, 2.0], np.float32), out)
    np.testing.assert_array_equal(out, [[1, 2]] * 3)


def test_transposed_batch_is_the_transpose_and_leaves_its_scratch_clean():
    matrix = random_batch(9, 25, 0.3, seed=4)
    slot = np.zeros(25, np.int32)
    features, offsets, rows, values = transpose_batch(*triple(matrix), slot)
    rebuilt = np.zeros((9, 25), np.float32)
    for u, feature in enumerate(features):
        span = slice(offsets[u], offsets[u + 1])
        assert (np.diff(rows[span]) > 0).all()
        rebuilt[rows[span], feature] = values[span]
    np.testing.assert_array_equal(rebuilt, matrix.toarray())
    assert len(set(features)) == len(features)
    assert not slot.any()


def test_backward_is_row_wise_rmsprop():
    """In plain numpy: g = X' G; s <- 0.999 s + 0.001 mean(g^2) and w <- w - rate g / sqrt(s) in the batch's rows."""
    generator = np.random.default_rng(0)
    n_features, width = 30, 24
    weight = generator.standard_normal((n_features, width), dtype=np.float32)
    square = np.zeros(n_features, np.float32)
    slot = np.zeros(n_features, np.int32)
    expected, expected_square = weight.astype(np.float64), np.zeros(n_features)
    for step in range(1, 8):
        matrix = random_batch(6, n_features, 0.2, seed=step)
        gradient = generator.standard_normal((6, width), dtype=np.float32)
        sparse_backward(transpose_batch(*triple(matrix), slot), gradient, weight, square, 0.01, 0)
        touched = np.unique(matrix.indices)
        dense = (matrix.toarray().T.astype(np.float64) @ gradient)[touched]
        expected_square[touched] = 0.999 * expected_square[touched] + 0.001 * (dense**2).mean(axis=1)
        expected[touched] -= 0.01 * dense / (np.sqrt(expected_square[touched, None]) + 1e-9)
    np.testing.assert_allclose(square, expected_square, rtol=1e-4)
    np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-4)


def test_backward_of_bfloat16_weights_is_that_of_float32_on_average():
    matrix = random_batch(6, 30, 0.4, seed=1)
    columns = transpose_batch(*triple(matrix), np.zeros(30, np.int32))
    gradient = np.random.default_rng(0).standard_normal((6, 24), dtype=np.float32)
    start = from_bfloat16(to_bfloat16(np.random.default_rng(1).standard_normal((30, 24)).astype(np.float32)))
    exact = start.copy()
    sparse_backward(columns, gradient, exact, np.ones(30, np.float32), 1e-3, 0)
    results = []
    for seed in range(400):
        weight = to_bfloat16(start)
        sparse_backward(columns, gradient, weight, np.ones(30, np.float32), 1e-3, seed * 40_014)
        results.append(from_bfloat16(weight))
    step = np.abs(start) / 128
    assert (np.abs(np.array(results) - exact) <= step + 1e-6).all()
    assert (np.abs(np.mean(results, axis=0) - exact) <= 5 * step / 2 / 20 + 1e-6).all()  # five standard errors
    assert len(np.unique(np.array(results), axis=0)) > 350


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 9))
def test_targets_are_the_union_of_the_classes_buckets(seed, n_heads, n_buckets):
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 5, 6)
    buckets = generator.integers(0, n_buckets, (n_heads, counts.sum())).astype(np.int32)
    rows, outputs = batch_targets(counts, buckets, n_buckets)
    expected = {
        (int(row), int(j * n_buckets + b))
        for j in range(n_heads)
        for row, b in zip(np.repeat(np.arange(6), counts), buckets[j], strict=True)
    }
    assert len(rows) == len(expected)
    assert set(zip(rows.tolist(), outputs.tolist(), strict=True)) == expected


def test_adam_of_bfloat16_gradients_is_adam_and_renews_the_copy():
    generator = np.random.default_rng(3)
    weights = [generator.standard_normal(50).astype(np.float32)] * 2
    weights = [w.copy() for w in weights]
    states = [(np.zeros(50, np.float32), np.zeros(50, np.float32)) for _ in weights]
    half = to_bfloat16(weights[0])
    for step in range(1, 9):
        gradient = to_bfloat16(generator.standard_normal(50).astype(np.float32))
        adam_step(weights[0], from_bfloat16(gradient) * np.float32(0.25), *states[0], 0.03, step)
        adam_step(weights[1], gradient, *states[1], 0.03, step, 0.25, half)
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-6)
    np.testing.assert_allclose(from_bfloat16(half), weights[1], rtol=1 / 256)


def test_dense_adam_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50, generator=generator))
    weight = parameter.detach().numpy().copy()
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    optimizer = torch.optim.Adam([parameter], lr=0.03)
    for step in range(1, 20):
        parameter.grad = torch.randn(50, generator=generator)
        optimizer.step()
        adam_step(weight, parameter.grad.numpy(), mean, square, 0.03, step)
    np.testing.assert_allclose(weight, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_untouched_rows_are_not_written():
    weight = np.ones((5, 4), np.float32)
    matrix = csr_array(np.array([[0, 2.0, 0, 0, 1.0]], np.float32))
    columns = transpose_batch(*triple(matrix), np.zeros(5, np.int32))
    square = np.zeros(5, np.float32)
    sparse_backward(columns, np.ones((1, 4), np.float32), weight, square, 0.1, 0)
    assert (weight[[0, 2, 3]] == 1).all()
    assert (weight[[1, 4]] < 1).all()
    assert not square[[0, 2, 3]].any()
