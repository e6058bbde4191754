"""Kernels of repetitions trained together: torch's and Triton's against those of the processor."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from mach.data.batch import Targets
from mach.data.kernels.batch import batch_targets
from mach.networks.kernels import batched
from mach.networks.kernels.adam import adam_step
from mach.networks.kernels.batched import Columns, Dropout, columns_of, gather_rows
from mach.networks.kernels.dense import relu_dropout
from mach.networks.kernels.losses import named
from mach.networks.kernels.sparse import sparse_backward, sparse_forward, transpose_batch
from mach.networks.output import loss_gradient, step_figures

R, D = 3, 40
HAS_TRITON = find_spec("triton") is not None
triton_batched: Any = import_module("mach.networks.kernels.triton_batched") if HAS_TRITON else None

kernels = [
    pytest.param(batched, "cpu", id="reference"),
    pytest.param(
        triton_batched,
        "cpu",
        id="interpreter",
        marks=pytest.mark.skipif(
            not HAS_TRITON or torch.cuda.is_available(),
            reason="Triton is not installed, or a GPU is there for its kernels",
        ),
    ),
    pytest.param(
        triton_batched,
        "cuda",
        id="gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
    ),
]
each_kernel = pytest.mark.parametrize(("kernel", "device"), kernels)
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5},
}


class Case:
    """Random rows, one of them empty, and one feature in all others."""

    def __init__(self, n_rows: int = 7, width: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        chosen = [np.sort(np.r_[0, 1 + generator.choice(D - 1, generator.integers(1, 9), replace=False)])] * n_rows
        chosen = [np.array([], np.int64) if n == 2 else row for n, row in enumerate(chosen)]
        self.indptr = np.r_[0, np.cumsum([len(row) for row in chosen])].astype(np.int64)
        self.indices = np.concatenate(chosen).astype(np.int32)
        self.values = generator.standard_normal(len(self.indices), dtype=np.float32)
        self.weight = torch.from_numpy(generator.standard_normal((D, R * width), dtype=np.float32)).to(dtype)
        self.bias = torch.from_numpy(generator.standard_normal((R, width), dtype=np.float32))
        self.gradient = torch.from_numpy(generator.standard_normal((R, n_rows, width), dtype=np.float32)).to(dtype)
        self.square = torch.from_numpy(generator.random((D, R), dtype=np.float32))
        self.keys = torch.from_numpy(generator.integers(0, 2**32, R))
        self.width, self.n_rows, self.dtype = width, n_rows, dtype

    def sparse(self, device: str) -> tuple[torch.Tensor, ...]:
        triple = (self.indptr.astype(np.int32), self.indices, self.values)
        return tuple(torch.from_numpy(array).to(device) for array in triple)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [None, 0.0, 0.4])
@pytest.mark.parametrize("width", [1, 24, 300])
def test_forward_is_the_processors(
    kernel: ModuleType, device: str, dtype: torch.dtype, rate: float | None, width: int
) -> None:
    case = Case(width=width, dtype=dtype)
    out = torch.full((R, case.n_rows, width), torch.nan, dtype=dtype, device=device)
    dropout = None if rate is None else Dropout(rate, case.keys.to(device))
    kernel.sparse_forward(*case.sparse(device), case.weight.to(device), case.bias.to(device), out, dropout)
    for r in range(R):
        weight = case.weight[:, r * width : (r + 1) * width].contiguous()
        array = weight.view(torch.uint16).numpy() if dtype == torch.bfloat16 else weight.numpy()
        expected = np.empty((case.n_rows, width), np.float32)
        none = np.empty(0, np.float32)
        sparse_forward(case.indptr, case.indices, case.values, array, none, case.bias[r].numpy(), expected)
        if rate is not None:
            flat = expected.reshape(-1)
            relu_dropout(flat.copy(), rate, int(case.keys[r]), flat)
        torch.testing.assert_close(out[r].cpu().float(), torch.from_numpy(expected), **TOLERANCE[dtype])


@each_kernel
def test_some_columns_of_wider_weights(kernel: ModuleType, device: str) -> None:
    case = Case()
    whole, part = (torch.empty((n, case.n_rows, case.width), device=device) for n in (R, 1))
    sparse, weight, bias = case.sparse(device), case.weight.to(device), case.bias.to(device)
    kernel.sparse_forward(*sparse, weight, bias, whole, None)
    kernel.sparse_forward(*sparse, weight[:, case.width : 2 * case.width], bias[1:2], part, None)
    torch.testing.assert_close(part[0], whole[1])


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_activation(kernel: ModuleType, device: str, dtype: torch.dtype, rate: float) -> None:
    case = Case(width=300, dtype=dtype)
    x = case.gradient.to(device)
    out = torch.full_like(x, torch.nan)
    dropout = Dropout(rate, case.keys.to(device))
    kernel.activate(x, out, dropout)
    expected = np.empty_like(case.gradient.float().numpy())
    for r in range(R):
        relu_dropout(case.gradient[r].float().numpy().reshape(-1), rate, int(case.keys[r]), expected[r].reshape(-1))
    torch.testing.assert_close(out.cpu().float(), torch.from_numpy(expected), **TOLERANCE[dtype])


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 24, 300])
def test_backward_is_the_processors(kernel: ModuleType, device: str, dtype: torch.dtype, width: int) -> None:
    """bfloat16 weights are one of the two next to the exact ones, and on average those."""
    case = Case(width=width, dtype=dtype)
    weight, square = case.weight.to(device).clone(), case.square.to(device).clone()
    columns = columns_of(*case.sparse(device))
    kernel.sparse_backward(columns, case.gradient.to(device), weight, square, 0.01, 0.5, case.keys.to(device))
    errors = []
    for r in range(R):
        part = slice(r * width, (r + 1) * width)
        expected = case.weight[:, part].float().numpy().copy()
        moments = case.square[:, r].numpy().copy()
        transposed = transpose_batch(case.indptr, case.indices, case.values, np.zeros(D, np.int32))
        gradient = np.float32(0.5) * case.gradient[r].float().numpy()
        sparse_backward(transposed, gradient, expected, moments, 0.01, 0)
        ours = weight[:, part].cpu().float().numpy()
        if dtype == torch.bfloat16:
            moved = expected[np.unique(case.indices)]
            step = 2.0 ** (np.floor(np.log2(np.abs(moved))) - 7)  # from one bfloat16 to the next
            errors.append((ours[np.unique(case.indices)] - moved) / step)
        else:
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(square[:, r].cpu().numpy(), moments, rtol=1e-5)
    if dtype == torch.bfloat16:
        error = np.concatenate([each.ravel() for each in errors])
        assert np.abs(error).max() <= 1.01
        assert abs(error.mean()) < 2 / len(error) ** 0.5
        assert len(error) < 1000 or np.abs(error).mean() > 0.2  # both ways, not to the nearest


@each_kernel
def test_slots_hold_some_features(kernel: ModuleType, device: str) -> None:
    """Weights of the batch's features alone, as they are streamed: the same steps as in place."""
    case = Case(dtype=torch.bfloat16)
    weight, square = case.weight.to(device).clone(), case.square.to(device).clone()
    columns = columns_of(*case.sparse(device))
    gradient, keys = case.gradient.to(device), case.keys.to(device)
    n = int(columns.n_unique)
    features = columns.features_U[:n].long()
    rows, squares = weight[features], square[features]
    kernel.sparse_backward(columns, gradient, weight, square, 0.01, 0.5, keys)
    slots = torch.arange(len(columns.features_U), device=device, dtype=torch.int32)
    compact = Columns(columns.features_U, slots, *(vars(columns)[name] for name in list(vars(columns))[2:]))
    kernel.sparse_backward(compact, gradient, rows, squares, 0.01, 0.5, keys)
    assert torch.equal(rows, weight[features])
    assert torch.equal(squares, square[features])


@each_kernel
@pytest.mark.parametrize("loss", ["binary", "softmax"])
@pytest.mark.parametrize(("n_heads", "n_buckets"), [(1, 9), (2, 5), (1, 1500)])
def test_loss_gradient_counts_a_bucket_once(
    kernel: ModuleType, device: str, loss: str, n_heads: int, n_buckets: int
) -> None:
    generator = np.random.default_rng(1)
    counts = np.array([2, 0, 5, 1])
    buckets = generator.integers(0, n_buckets, (R * n_heads, counts.sum())).astype(np.int32)
    buckets[:, 3] = buckets[:, 4]  # two classes of a row in a bucket
    logits = torch.from_numpy(generator.standard_normal((R, 4, n_heads * n_buckets), dtype=np.float32))
    ours = logits.clone().to(device)
    offsets = torch.from_numpy(np.r_[0, np.cumsum(counts)].astype(np.int32)).to(device)
    kernel.loss_gradient(ours, torch.from_numpy(buckets).to(device), offsets, n_heads, named(loss))
    for r in range(R):
        targets = batch_targets(counts, buckets[r * n_heads : (r + 1) * n_heads], n_buckets)
        expected = loss_gradient(logits[r].clone(), Targets(*targets, n_heads), named(loss))
        torch.testing.assert_close(ours[r].cpu(), expected, rtol=1e-5, atol=1e-6)


@each_kernel
@pytest.mark.parametrize("loss", ["binary", "softmax"])
@pytest.mark.parametrize(("n_heads", "n_buckets"), [(1, 9), (2, 5), (1, 1500)])
def test_figures_are_the_processors(kernel: ModuleType, device: str, loss: str, n_heads: int, n_buckets: int) -> None:
    """Coarse logits, so that several buckets are the top one: the first counts."""
    generator = np.random.default_rng(3)
    counts = np.array([2, 0, 5, 1, 3])
    buckets = generator.integers(0, n_buckets, (R * n_heads, counts.sum())).astype(np.int32)
    logits = torch.from_numpy(generator.integers(-3, 3, (R, 5, n_heads * n_buckets)).astype(np.float32))
    logits[1] *= 40
    logits[2, :, buckets[2 * n_heads, 4]] = 200
    offsets = torch.from_numpy(np.r_[0, np.cumsum(counts)].astype(np.int32)).to(device)
    ours = (
        kernel.figures(logits.to(device), torch.from_numpy(buckets).to(device), offsets, n_heads, named(loss))
        / 5
        / n_heads
    )
    for r in range(R):
        targets = batch_targets(counts, buckets[r * n_heads : (r + 1) * n_heads], n_buckets)
        expected = step_figures(logits[r], Targets(*targets, n_heads), named(loss))
        assert ours[r].tolist() == pytest.approx([expected.loss, expected.bucket_precision], rel=1e-5)
    assert ours[2, 1] > 0


@each_kernel
def test_adam_is_the_processors(kernel: ModuleType, device: str) -> None:
    generator = np.random.default_rng(2)
    arrays = [generator.standard_normal(1500).astype(np.float32) for _ in range(4)]
    arrays[3] = np.abs(arrays[3])
    weight, gradient, mean, square = (torch.from_numpy(array.copy()).to(device) for array in arrays)
    half = torch.empty_like(weight, dtype=torch.bfloat16)
    kernel.adam(weight, half, gradient, mean, square, 0.01, 0.5, 3)
    adam_step(arrays[0], arrays[1] * np.float32(0.5), arrays[2], arrays[3], 0.01, 3)
    for ours, theirs in zip((weight, mean, square), (arrays[0], arrays[2], arrays[3]), strict=True):
        np.testing.assert_allclose(ours.cpu().numpy(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(half, weight.bfloat16())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=kernels[2].marks)])
def test_a_batch_by_feature(device: str) -> None:
    case = Case()
    columns = columns_of(*case.sparse(device))
    n = int(columns.n_unique)
    dense = np.zeros((case.n_rows, D), np.float32)
    for u in range(n):
        entries = slice(int(columns.offsets_U1[u]), int(columns.offsets_U1[u + 1]))
        dense[columns.rows[entries].cpu(), int(columns.features_U[u])] = columns.values[entries].cpu()
        assert columns.rows[entries].tolist() == sorted(columns.rows[entries].tolist())
    expected = np.zeros_like(dense)
    expected[np.repeat(np.arange(case.n_rows), np.diff(case.indptr)), case.indices] = case.values
    np.testing.assert_array_equal(dense, expected)
    assert columns.features_U[:n].tolist() == sorted(set(case.indices.tolist()))
    empty = columns_of(*(tensor[:0] if i else tensor[:2] * 0 for i, tensor in enumerate(case.sparse(device))))
    assert int(empty.n_unique) == 0


def test_rows_are_gathered_in_the_given_order() -> None:
    case = Case()
    rows = np.array([4, 2, 0, 4])
    n = int((case.indptr[rows + 1] - case.indptr[rows]).sum())
    given = [torch.from_numpy(a) for a in (case.indptr, rows, case.indices, case.values)]
    indptr, indices, values = gather_rows(given[0], given[1], n, *given[2:])
    at = np.concatenate([np.arange(case.indptr[row], case.indptr[row + 1]) for row in rows])
    np.testing.assert_array_equal(indices, case.indices[at])
    np.testing.assert_array_equal(values, case.values[at])
    np.testing.assert_array_equal(np.diff(indptr), np.diff(case.indptr)[rows])


COMPILING = """
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from mach.networks.kernels import triton_batched as kernels

half, full, index, wide, number = "*bf16", "*fp32", "*i32", "*i64", "fp32"
KERNELS = [
    ("forward", [index, index, full, half, full, wide, half, *["i32"] * 4, "i64", number], (True, True, 8, 512)),
    ("activate", [half, wide, half, "i32", "i64", number], (True, 1024)),
    ("backward", [*[index] * 5, full, half, half, full, wide, *["i32"] * 4, number, number], (8, 2, 256)),
    *(("loss", [half, index, index, full, *["i32"] * 5], (*kind, 1024)) for kind in product((True, False), repeat=2)),
    ("adam", [full, half, half, full, full, "i32", *[number] * 3], (True, 1024)),
]
for name, types, constants in KERNELS:
    kernel = getattr(kernels, f"{name}_kernel")
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
    places = {(len(types) + i,): value for i, value in enumerate(constants)}
    source = triton.compiler.ASTSource(kernel, signature, places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print(name, len(compiled.asm["cubin"]))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run(
        [sys.executable, "-c", COMPILING], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 8
