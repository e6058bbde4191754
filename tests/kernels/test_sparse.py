"""The sparse input layer against dense numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, random_array

from mach.kernels.adam import adam_step
from mach.kernels.memory import from_bfloat16, to_bfloat16
from mach.kernels.sparse import gather_rows, sparse_backward_adam, sparse_forward, transpose_batch


def random_batch(n_rows: int, n_features: int, density: float, seed: int) -> csr_array:
    generator = np.random.default_rng(seed)
    matrix = csr_array(random_array((n_rows, n_features), density=density, rng=generator, dtype=np.float32))
    matrix.sort_indices()
    return matrix


def triple(matrix: csr_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data.astype(np.float32)


@settings(deadline=None, max_examples=30)
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
    sparse_forward(*triple(matrix), stored, bias, out)
    exact = from_bfloat16(to_bfloat16(weight)) if half else weight
    np.testing.assert_allclose(out, matrix.toarray() @ exact + bias, rtol=1e-5, atol=1e-5)


def test_forward_of_empty_rows_is_the_bias():
    empty = csr_array((3, 4), dtype=np.float32)
    out = np.empty((3, 2), np.float32)
    sparse_forward(*triple(empty), np.ones((4, 2), np.float32), np.array([1.0, 2.0], np.float32), out)
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


def test_backward_is_sparse_adam_of_torch():
    """Over several batches, rows absent from a batch keep weights and moments: torch.optim.SparseAdam."""
    generator = np.random.default_rng(0)
    n_features, width = 30, 24
    weight = generator.standard_normal((n_features, width), dtype=np.float32)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    slot = np.zeros(n_features, np.int32)
    parameter = torch.nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = torch.optim.SparseAdam([parameter], lr=0.01)
    for step in range(1, 8):
        matrix = random_batch(6, n_features, 0.2, seed=step)
        gradient = generator.standard_normal((6, width), dtype=np.float32)
        columns = transpose_batch(*triple(matrix), slot)
        sparse_backward_adam(*columns, gradient, weight, mean, square, 0.01, step)
        touched = np.unique(matrix.indices)
        dense = matrix.toarray().T @ gradient
        parameter.grad = torch.sparse_coo_tensor(
            torch.from_numpy(touched)[None].long(),
            torch.from_numpy(dense[touched]),
            parameter.shape,
            check_invariants=True,
        )
        optimizer.step()
    # torch places epsilon before the bias correction: tiny gradients differ by a hundredth of a step
    np.testing.assert_allclose(weight, parameter.detach().numpy(), rtol=0, atol=1e-4)


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
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    sparse_backward_adam(*columns, np.ones((1, 4), np.float32), weight, mean, square, 0.1, 1)
    assert (weight[[0, 2, 3]] == 1).all()
    assert (weight[[1, 4]] < 1).all()
    assert not mean[[0, 2, 3]].any()
