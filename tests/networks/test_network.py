"""A repetition's network: gradients against autograd, inference against training, state, user trunks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import random_array
from torch import nn

from mach.config import NetworkConfig
from mach.data.batch import Batch, DenseBatch, SparseBatch, Targets, rows_of
from mach.data.rows import RowView
from mach.errors import ConfigError, StorageError
from mach.networks.inference import (
    FEW_ROWS,
    bucket_logits,
    stored_weights,
    wide_matrix,
)
from mach.networks.kernels import memory
from mach.networks.kernels.losses import named
from mach.networks.kernels.memory import from_bfloat16, to_bfloat16, to_int8, to_kept
from mach.networks.kernels.sparse import sparse_forward_kept
from mach.networks.layers import load_trunk
from mach.networks.network import Network, refuse_missing
from mach.networks.output import loss_gradient, step_figures
from mach.networks.precision import native_precision
from mach.networks.stored import check_stored

D, B, N = 30, 8, 6


class ResidualTrunk(nn.Module):
    """A user's trunk: batch normalisation, a residual block, dropout."""

    def __init__(self, in_features: int, depth: int = 1) -> None:
        super().__init__()
        self.normal = nn.BatchNorm1d(in_features)
        self.blocks = nn.ModuleList(nn.Linear(in_features, in_features) for _ in range(depth))
        self.dropout = nn.Dropout(0.2)
        self.out_features = in_features

    def forward(self, x):
        x = self.normal(x)
        for block in self.blocks:
            x = x + torch.tanh(block(self.dropout(x)))
        return x


def batch_of(seed: int, dense: bool) -> Batch:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((N, D), dtype=np.float32)
    if dense:
        return DenseBatch(values)
    indices = np.concatenate([np.sort(generator.choice(D, 5, replace=False)) for _ in range(N)]).astype(np.int32)
    return SparseBatch(np.arange(0, 5 * N + 1, 5), indices, values.reshape(-1)[: 5 * N])


def network_of(
    dense: bool, hidden: list[int], *, loss="binary", seed=3, precision="float32", device="cpu", **options
) -> Network:
    config = NetworkConfig(hidden=hidden, dropout=options.pop("dropout", 0.0), **options)
    bias = np.linspace(-4, -2, B).astype(np.float32)
    shape: dict[str, Any] = {"n_features": D, "n_outputs": B, "dense_input": dense, "trunk": config.trunk}
    return Network(config, loss=loss, precision=precision, bias=bias, seed=seed, device=device, **shape)


TARGETS = Targets(np.array([0, 0, 1, 3, 4, 5]), np.array([1, 7, 2, 2, 0, 5]))


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("name", ["binary", "softmax"])
def test_gradients_and_figures_are_those_of_every_head(name: str, n_heads: int):
    loss, targets = named(name), Targets(TARGETS.rows, TARGETS.outputs, n_heads)
    logits = torch.randn(N, B, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    is_target = torch.zeros(N, B, dtype=torch.bool)
    is_target[targets.rows, targets.outputs] = True
    heads = [(logits[:, of_head], is_target[:, of_head]) for of_head in torch.arange(B).chunk(n_heads)]
    mean = torch.stack([loss.value(*head) for head in heads]).mean()
    assert step_figures(logits, targets, loss).loss == pytest.approx(float(mean))
    expected = torch.cat([loss.errors(*head) for head in heads], 1)
    torch.testing.assert_close(loss_gradient(logits, targets, loss), expected)


def test_bucket_precision_counts_rows_whose_top_bucket_is_a_target():
    logits = torch.zeros(4, 3)
    logits[0, 1] = logits[1, 2] = logits[2, 0] = logits[3, 0] = 1
    figures = step_figures(logits, Targets(np.array([0, 0, 1, 2]), np.array([1, 2, 0, 0])), named("binary"))
    assert figures.bucket_precision == 0.5  # rows 0 and 2; row 1's target is another, row 3 has none
    two_heads = Targets(np.array([0, 0, 1]), np.array([1, 2, 3]), n_heads=2)
    logits = torch.tensor([[0.0, 1, 0, 1], [0, 1, 1, 0]])
    assert step_figures(logits, two_heads, named("binary")).bucket_precision == 0.25  # the first row's first head


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("hidden", [[], [16], [16, 12]])
def test_inference_without_torch_equals_the_network(dense: bool, hidden: list[int]):
    network = network_of(dense, hidden)
    network.step(batch_of(1, dense), TARGETS, 0.01)
    batch = batch_of(2, dense)
    np.testing.assert_allclose(
        bucket_logits(network.weights(), batch), network.logits(batch).numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("width", [16, 7])
@pytest.mark.parametrize("kind", ["int8", "bfloat16", "float32"])
def test_stored_weights_answer_as_the_trained_ones_do(kind: Any, width: int):
    network = network_of(False, [width])
    for step in range(30):
        network.step(batch_of(step, False), TARGETS, 0.01)
    stored, batch = stored_weights(network.weights(), kind), batch_of(99, False)
    types = {"int8": np.int8, "bfloat16": np.uint16, "float32": np.float32}
    assert stored["input.weight"].dtype == types[kind]
    exact = bucket_logits(network.weights(), batch)
    error = np.abs(bucket_logits(stored, batch) - exact).max() / np.abs(exact).max()
    assert error <= {"int8": 0.01, "bfloat16": 0.01, "float32": 0.0}[kind]
    started = network_of(False, [width], seed=4)
    started.load_weights(stored)
    np.testing.assert_allclose(started.logits(batch).numpy(), bucket_logits(stored, batch), rtol=1e-4, atol=1e-4)
    with pytest.raises(StorageError, match="weights to start from: input"):
        network_of(False, [width + 1]).load_weights(stored)


def test_stored_weights_of_which_the_salient_are_kept_answer_as_their_matrix_does():
    network, batch = network_of(False, [16]), batch_of(99, False)
    for step in range(30):
        network.step(batch_of(step, False), TARGETS, 0.01)
    rows_D = np.ones(D, np.int64)
    rows_D[::2] = 0
    stored = stored_weights(network.weights(), "int4", rows_D)
    assert 0.2 * D / 2 * 16 < len(stored["input.weight"]) <= 0.3 * D / 2 * 16
    wide = wide_matrix(stored, "input")
    assert (wide[1::2] != 0).sum() > 0.2 * D / 2 * 16
    assert not wide[::2].any()  # features of no row
    np.testing.assert_array_equal(wide_matrix(stored, "input", slice(3, 7)), wide[3:7])
    only = {"input.weight": network.weights()["input.weight"], "input.bias": stored["input.bias"]}
    assert stored_weights(only, "int4", rows_D)["input.weight"].dtype == np.int8
    plain = {"input.weight": wide, "input.bias": stored["input.bias"], "output.bias": stored["output.bias"]}
    plain["output.weight"] = stored["output.weight"] * stored["output.scale"][:, None]
    for rows in (batch, rows_of(batch, np.arange(2 * FEW_ROWS) % N)):
        np.testing.assert_allclose(bucket_logits(stored, rows), bucket_logits(plain, rows), rtol=1e-4, atol=1e-5)
    started = network_of(False, [16], seed=4)
    started.load_weights(stored)
    np.testing.assert_allclose(started.logits(batch).numpy(), bucket_logits(stored, batch), rtol=1e-4, atol=1e-4)
    with pytest.raises(StorageError, match="weights to start from: input"):
        network_of(False, [17]).load_weights(stored)


def test_a_network_sees_powers_of_its_features_in_training_and_in_queries():
    plain, raised = (network_of(False, [16], power=power) for power in (1.0, 1.5))
    batch = batch_of(1, False)
    np.testing.assert_allclose(
        raised.logits(batch).numpy(), plain.logits(RowView(power=1.5).batch(batch)).numpy(), rtol=1e-6
    )
    raised.step(batch, TARGETS, 0.01)
    plain.step(RowView(power=1.5).batch(batch), TARGETS, 0.01)
    for name, array in raised.weights().items():
        np.testing.assert_array_equal(array, plain.weights()[name])


@settings(deadline=None)  # kernels may be compiled first
@given(st.integers(1, 60), st.integers(1, 70), st.floats(0.005, 1.3), st.booleans(), st.integers(0, 2**32 - 1))
def test_salient_weights_are_kept_within_their_bytes(n_rows: int, width: int, share: float, half: bool, seed: int):
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((n_rows, width)).astype(np.float32) * (rng.random((n_rows, width)) < 0.7)
    weights = from_bfloat16(to_bfloat16(drawn)) if half else drawn
    gains = rng.random(n_rows).astype(np.float32) + np.float32(0.01)
    kept, offsets, steps = to_kept(to_bfloat16(drawn) if half else drawn, gains, share)
    assert len(kept) == offsets[-1] <= share * weights.size
    found = np.empty_like(weights)
    unit = np.arange(n_rows + 1), np.arange(n_rows, dtype=np.int32), np.ones(n_rows, np.float32)
    sparse_forward_kept(unit, kept[None], offsets, steps, np.zeros(width, np.float32), found)
    is_kept, salience = found != 0, np.abs(weights) * gains[:, None]
    half_steps = np.broadcast_to(0.501 * steps[:, None], weights.shape)
    assert (np.abs(found - weights) <= half_steps)[is_kept].all()
    if is_kept.any():  # nothing more salient is left out, but what is rounded to 0; thresholds have 8 bits
        least = salience[is_kept].min()
        assert (np.abs(weights) <= half_steps)[~is_kept & (salience > 1.01 * least)].all()
    if share >= 1 + 1 / 15:  # room for all, and for what cuts long ways
        assert (np.abs(found - weights) <= half_steps).all()


def test_a_threshold_is_tried_once(monkeypatch: pytest.MonkeyPatch):
    """Each time it leaves a byte too many, and thousands of weights are above it: it is not lowered a byte a time."""
    weights, tried = np.zeros((100, 4096), np.float32), []
    weights[:, ::40] = 1.0  # 103 a row, and two more entries for each way between them
    keep = memory._keep

    def trying(*given: Any) -> Any:
        tried.append(given[3])
        return keep(*given)

    monkeypatch.setattr(memory, "_keep", trying)
    kept, _, _ = to_kept(weights, np.ones(100, np.float32), (100 * 307 - 1) / weights.size)
    assert len(kept) == 0
    assert len(tried) == len(set(tried)) + 1 <= 4  # the last is tried, and written


@pytest.mark.parametrize("n_rows", [4, 9, 300])
def test_a_layer_of_kept_weights_answers_many_rows_as_few(n_rows: int):
    """300 rows name each of 30 features often enough that its weights are spelled out once."""
    rng = np.random.default_rng(n_rows)
    drawn = rng.standard_normal((30, 21)).astype(np.float32)
    kept, offsets, steps = to_kept(drawn, np.ones(30, np.float32), 0.4)
    bias = rng.standard_normal(21).astype(np.float32)
    weights: dict[str, Any] = {"input.weight": kept, "input.offsets": offsets, "input.scale": steps, "input.bias": bias}
    rows = random_array((n_rows, 30), density=0.3, rng=rng, dtype=np.float32).tocsr()
    csr = rows.indptr.astype(np.int64), rows.indices.astype(np.int32), rows.data
    found = bucket_logits(weights, SparseBatch(*csr))
    expected = np.empty_like(found)
    sparse_forward_kept(csr, kept[None], offsets, steps, bias, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len(np.unique(csr[1])) == 30 or n_rows < 300


def test_a_damaged_layer_of_kept_weights_reads_nothing_outside():
    weights = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    kept, offsets, steps = to_kept(weights, np.ones(5, np.float32), 1.2)
    out, bias = np.empty((5, 8), np.float32), np.zeros(8, np.float32)
    unit = np.arange(6), np.arange(5, dtype=np.int32), np.ones(5, np.float32)
    for wrong in (offsets + 10**12, -offsets - 1, offsets[::-1].copy()):
        sparse_forward_kept(unit, kept[None], wrong, steps, bias, out)
        assert not out.any()
    sparse_forward_kept(unit, np.full_like(kept, 0xFF)[None], offsets, steps, bias, out)  # steps of 15
    assert np.isfinite(out).all()


@pytest.mark.parametrize("width", [1, 2, 33])
def test_integers_are_within_half_a_step_of_the_weights(width: int):
    weights = np.random.default_rng(0).standard_normal((7, width)).astype(np.float32)
    weights[3] = 0
    codes, steps = to_int8(weights)
    assert (np.abs(codes * steps[:, None] - weights) <= 0.501 * steps[:, None]).all()
    assert (np.abs(codes).max(axis=1) == [127, 127, 127, 0, 127, 127, 127]).all()


@pytest.mark.parametrize("width", [1, 2, 33])
def test_packed_integers_of_older_runs_are_read(width: int):
    """Two weights a byte: p in the lower half and ceil(H / 2) + p in the upper, both 8 more than the integer."""
    generator = np.random.default_rng(0)
    codes, steps = generator.integers(-7, 8, (7, width)), generator.random(7).astype(np.float32)
    half = -(-width // 2)
    upper = np.pad(codes[:, half:] + 8, ((0, 0), (0, 2 * half - width)))
    packed = (codes[:, :half] + 8 | upper << 4).astype(np.uint8)
    weights, bias = (codes * steps[:, None]).astype(np.float32), np.ones(width, np.float32)
    stored: dict[str, Any] = {"input.weight": packed, "input.scale": steps, "input.bias": bias}
    shapes = {"input.weight": weights.shape, "input.bias": bias.shape}
    check_stored(stored, shapes, "a file", has_trunk=False)
    with pytest.raises(StorageError, match=r"input\.weight is uint8 of shape"):
        check_stored(stored | {"input.weight": packed[:, 1:]}, shapes, "a file", has_trunk=False)
    np.testing.assert_array_equal(wide_matrix(stored, "input", slice(2, 5)), weights[2:5])
    batch = SparseBatch(np.arange(8), np.array([3, 0, 6, 6, 1, 2, 5], np.int32), np.full(7, 2, np.float32))
    np.testing.assert_allclose(bucket_logits(stored, batch), 1 + 2 * weights[batch.indices], rtol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("hidden", [[], [16]])
@pytest.mark.parametrize("loss", ["binary", "softmax"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_reduce_the_loss(dense: bool, hidden: list[int], loss: str, precision: str):
    network = network_of(dense, hidden, loss=loss, precision=precision)
    batch = batch_of(1, dense)
    first = network.step(batch, TARGETS, 0.02, measured=True)
    for _ in range(60):
        last = network.step(batch, TARGETS, 0.02, measured=True)
    assert first is not None
    assert last is not None
    assert last.loss < 0.35 * first.loss
    assert last.bucket_precision == 5 / 6  # row 2 has no class


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("loss", ["binary", "softmax"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_figures_of_a_step_are_those_of_its_logits(loss: Any, n_heads: int, precision: str):
    network, batch = network_of(False, [16], loss=loss, precision=precision), batch_of(1, False)
    targets = Targets(TARGETS.rows, TARGETS.outputs, n_heads)
    for _ in range(3):
        expected = step_figures(network.logits(batch), targets, network.loss)
        figures = network.step(batch, targets, 0.02, measured=True)
        assert figures is not None
        assert figures.loss == pytest.approx(expected.loss, rel=1e-5 if precision == "float32" else 0.01)
        assert figures.bucket_precision == pytest.approx(expected.bucket_precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_without_autograd_is_one_with_it(precision: str):
    networks = [network_of(False, [16], dropout=0.4, precision=precision) for _ in range(2)]
    for step in range(4):
        networks[0].step(batch_of(step, False), TARGETS, 0.01)
    networks[1].activation = None
    for step in range(4):
        networks[1].step(batch_of(step, False), TARGETS, 0.01)
    rtol, atol = (1e-5, 1e-6) if precision == "float32" else (1 / 64, 0.004)  # the mean is rounded once less
    for name, array in networks[0].state().items():
        one, other = (from_bfloat16(a) if a.dtype == np.uint16 else a for a in (array, networks[1].state()[name]))
        np.testing.assert_allclose(one, other, rtol, atol, err_msg=name)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"hidden": [16, 8], "dropout": 0.4},
        {"hidden": [16], "dropout": 0.4, "precision": "bfloat16"},
        {"hidden": []},
        {"hidden": [10], "trunk": "tests.networks.test_network:ResidualTrunk", "trunk_options": {"depth": 2}},
    ],
)
def test_a_restored_network_goes_on_bit_for_bit(dense: bool, options: dict):
    whole, first, second = (network_of(dense, **options) for _ in range(3))
    for step in range(6):
        whole.step(batch_of(step, dense), TARGETS, 0.01)
        if step < 3:
            first.step(batch_of(step, dense), TARGETS, 0.01)
    torch.manual_seed(999)  # whatever happened to the global generator in between
    second.load_state({name: np.array(array) for name, array in first.state().items()})
    for step in range(3, 6):
        second.step(batch_of(step, dense), TARGETS, 0.01)
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, second.state()[name], err_msg=name)


def test_the_same_seed_gives_the_same_network_and_another_seed_another():
    weights = [network_of(False, [16], seed=seed).weights()["input.weight"] for seed in (3, 3, 4)]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


@pytest.mark.parametrize("dense", [False, True])
def test_a_users_trunk_trains_and_answers(dense: bool):
    trunk = "tests.networks.test_network:ResidualTrunk"
    network = network_of(dense, [12], trunk=trunk)
    batch = batch_of(1, dense)
    for _ in range(60):
        figures = network.step(batch, TARGETS, 0.02, measured=True)
    assert figures is not None
    assert figures.bucket_precision >= 4 / 6
    config = NetworkConfig(hidden=[12], dropout=0.0, trunk=trunk)
    weights = network.weights()
    answer = load_trunk(config, trunk, weights, n_features=D, dense_input=dense)
    np.testing.assert_allclose(
        bucket_logits(weights, batch, answer), network.logits(batch).numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("trunk", "words"),
    [
        ("no_such_package:Trunk", "cannot be imported"),
        ("tests.networks.test_network:Missing", "cannot be imported"),
        ("tests.networks.test_network", "give package.module:Class"),
        ("torch.nn:ReLU", "needs an attribute out_features"),
        ("torch.nn:GRU", "refuses its arguments"),
        ("builtins:dict", "no class of torch.nn.Module"),
        ("os:getcwd", "no class of torch.nn.Module"),
    ],
)
def test_a_bad_trunk_is_named(trunk: str, words: str):
    with pytest.raises(ConfigError, match=words):
        network_of(True, [12], trunk=trunk)


@pytest.mark.parametrize("dense", [False, True])
def test_a_device_is_given_what_the_processor_computes(dense: bool, monkeypatch: pytest.MonkeyPatch):
    """The way of other devices, through torch's own operations, gives the same weights; here it runs on the CPU."""
    networks = [network_of(dense, [16, 8]), network_of(dense, [16, 8])]
    for step in range(4):
        networks[0].step(batch_of(step, dense), TARGETS, 0.01)
    networks[1].activation = None
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    monkeypatch.setattr("mach.networks.kernels.adam.adam_step", _never)
    for step in range(4):
        networks[1].step(batch_of(step, dense), TARGETS, 0.01)
    weights = networks[0].weights()
    for name, array in networks[1].weights().items():
        np.testing.assert_allclose(array, weights[name], atol=2e-6, err_msg=name)
    state = {name: array.copy() for name, array in networks[1].state().items()}
    restored = network_of(dense, [16, 8], seed=9)
    restored.load_state(state)
    for name, array in restored.state().items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def _never(*arguments: object) -> None:
    raise AssertionError("the kernel of main memory was called")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_learns_what_the_processor_learns():
    networks = [network_of(False, [16, 8]), network_of(False, [16, 8], device="cuda:0")]
    for network in networks:
        for step in range(4):
            network.step(batch_of(step, False), TARGETS, 0.01)
    weights = networks[0].weights()
    for name, array in networks[1].weights().items():
        np.testing.assert_allclose(array, weights[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("flag", "speed", "expected"), [(0, 9, "float32"), (1, 9, "bfloat16"), (1, 0.1, "float32")])
def test_precision_is_that_of_the_faster_product(
    flag: int, speed: float, expected: str, monkeypatch: Any, tmp_path: Path
):
    clock = [0.0]

    def mm(a: torch.Tensor, b: torch.Tensor) -> None:
        clock[0] += 1.0 if a.dtype == torch.float32 else 1.0 / speed

    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: {"avx512bf16": flag})
    monkeypatch.setattr("torch.mm", mm)
    monkeypatch.setattr("mach.networks.precision.time.perf_counter", lambda: clock[0])
    monkeypatch.setenv("MACH_CACHE", str(tmp_path))
    assert native_precision() == expected
    seconds = clock[0]
    assert native_precision() == expected
    assert clock[0] == seconds  # the cache knows it
    if flag:
        (tmp_path / "precision.json").write_text("{}")
        assert native_precision() == expected
        assert clock[0] > seconds  # and is not believed where it is damaged


def test_the_faster_product_is_timed_by_a_process_of_its_own(monkeypatch: Any, tmp_path: Path):
    code = (
        "import sys; from mach.networks import precision; print(precision.native_precision(), 'torch' in sys.modules)"
    )
    environment = os.environ | {"MACH_CACHE": str(tmp_path)}
    told = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert told.split()[0] in {"float32", "bfloat16"}
    assert told.split()[1] == "False"


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"device cuda:99 cannot be used .* set launch.gpus = 0"):
        refuse_missing("cuda:99")
