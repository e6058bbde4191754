"""Steps on a sample of the buckets: laws of the sample, gradients, and that they teach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import NetworkConfig
from mach.data.batch import SparseBatch, Targets
from mach.networks.kernels.losses import named
from mach.networks.network import Network
from mach.networks.output import MOVES, SAMPLES, OutputLayer
from mach.networks.samples import Sample, line_of

J, B, H, N = 2, 40, 6, 16


def targets_of(generator: np.random.Generator, shares_JB: np.ndarray, n_rows: int = N) -> Targets:
    drawn_JN = np.stack([generator.choice(B, n_rows, p=shares_B) for shares_B in shares_JB])
    outputs = (drawn_JN + B * np.arange(J)[:, None]).T.reshape(-1)
    return Targets(np.repeat(np.arange(n_rows), J), outputs, J)


def uneven_shares(seed: int) -> np.ndarray:
    shares_JB = np.random.default_rng(seed).random((J, B)) ** 4
    return shares_JB / shares_JB.sum(axis=1, keepdims=True)


def log_odds(shares: np.ndarray) -> np.ndarray:
    return np.log(shares / (1 - shares)).astype(np.float32).reshape(-1)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, B - 1))
def test_a_sample_holds_its_targets_and_others_of_every_head(seed: int, n_sampled: int):
    shares_JB = uneven_shares(seed)
    targets = targets_of(np.random.default_rng(seed), shares_JB)
    line_JB = line_of(shares_JB.reshape(-1), J)
    sample = Sample.draw(targets, line_JB, n_sampled, np.random.default_rng(seed))
    assert (np.diff(sample.outputs) > 0).all()
    np.testing.assert_array_equal(sample.outputs[sample.targets.outputs], targets.outputs)
    np.testing.assert_array_equal(sample.targets.rows, targets.rows)
    is_own = np.isin(sample.outputs, targets.outputs)
    assert (sample.corrections[is_own] == 0).all()
    for head, part in enumerate(sample.heads):
        assert (sample.outputs[part] // B == head).all()
        n_own = is_own[part].sum()
        assert n_own <= part.stop - part.start <= n_own + max(n_sampled - n_own, n_sampled // 4, 1)
    assert sample.heads[-1].stop == len(sample.outputs)
    roots_JB = np.sqrt(shares_JB)
    expected = roots_JB / roots_JB.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.diff(line_JB, prepend=0.0), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_sums_over_samples_are_those_over_all_outputs_on_average(seed: int):
    """Whatever the targets: these count once, and what is drawn beside them stands for all the others."""
    shares_JB, terms = (
        (uneven_shares(seed) + 0.01) / (1 + 0.01 * B),
        np.exp(np.random.default_rng(1).normal(size=J * B)),
    )
    targets, total = targets_of(np.random.default_rng(seed), shares_JB), np.zeros(J)
    line_JB, generator = line_of(shares_JB.reshape(-1), J), np.random.default_rng(2)
    for _ in range(4000):
        sample = Sample.draw(targets, line_JB, 16, generator)
        weighted = terms[sample.outputs] * np.exp(sample.corrections)
        total += [weighted[part].sum() for part in sample.heads]
    np.testing.assert_allclose(total / 4000, terms.reshape(J, B).sum(axis=1), rtol=0.01)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, B))
def test_an_even_sample_holds_its_targets_and_as_many_of_every_head(seed: int, n_sampled: int):
    shares_JB = uneven_shares(seed)
    targets = targets_of(np.random.default_rng(seed), shares_JB)
    sample = Sample.even(targets, N, shares_JB.reshape(-1), n_sampled, np.random.default_rng(seed))
    assert (np.diff(sample.outputs) > 0).all()
    n_each = np.bincount(sample.outputs // B, minlength=J)
    n_most = max(len(np.unique(targets.outputs[targets.outputs // B == j])) for j in range(J))
    assert n_each.tolist() == [min(max(n_sampled, n_most + n_sampled // 4), B)] * J
    np.testing.assert_array_equal(sample.outputs[sample.targets.outputs], targets.outputs)
    np.testing.assert_array_equal(sample.targets.rows, targets.rows)
    assert (sample.corrections >= 0).all()
    if n_sampled == B:
        assert (sample.corrections == 0).all()


def test_sums_over_even_samples_are_those_over_all_outputs_on_average():
    shares_JB, logits = uneven_shares(0), np.random.default_rng(1).normal(size=J * B)
    generator, total = np.random.default_rng(2), np.zeros(J)
    for _ in range(4000):
        sample = Sample.even(targets_of(generator, shares_JB), N, shares_JB.reshape(-1), 16, generator)
        terms = np.exp(logits[sample.outputs] + sample.corrections)
        total += np.bincount(sample.outputs // B, terms, J)
    exact_J = np.exp(logits).reshape(J, B).sum(axis=1)
    np.testing.assert_allclose(total / 4000, exact_J, rtol=0.03)


def layer_of(sampled: float, *, half: bool = False, counts_moves: bool = False) -> OutputLayer:
    torch.manual_seed(0)
    bias = log_odds(uneven_shares(0))
    how: dict[str, Any] = {"half": half, "device": torch.device("cpu"), "seed": 5, "counts_moves": counts_moves}
    return OutputLayer(H, J * B, bias=bias, sampled=sampled, **how)


@pytest.mark.parametrize("half", [False, True])
def test_a_step_on_all_outputs_is_the_step_without_samples(half: bool):
    targets = targets_of(np.random.default_rng(3), uneven_shares(0))
    hidden = torch.rand(N, H, generator=torch.Generator().manual_seed(1))
    steps = [
        (layer := layer_of(s, half=half), layer.step(hidden, targets, named("softmax"), 0.1, 1)[0])
        for s in (1.0, 0.999)
    ]
    (plain, plain_back), (sampled, sampled_back) = steps
    assert torch.equal(plain.weight, sampled.weight)
    assert torch.equal(plain.bias, sampled.bias)
    assert torch.equal(plain_back, sampled_back)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_a_step_follows_the_weighted_loss_and_leaves_other_outputs_alone(loss: str, half: bool):
    is_even, generator = loss == "softmax", np.random.default_rng([5, 1, SAMPLES])
    layer = layer_of(0.3, half=half, counts_moves=not is_even)
    targets = targets_of(np.random.default_rng(3), uneven_shares(0))
    before, bias_before = layer.weight.clone(), layer.bias.clone()
    hidden = torch.rand(N, H, generator=torch.Generator().manual_seed(1), requires_grad=True)
    if is_even:
        sample = Sample.even(targets, N, layer.shares, 12, generator)
    else:
        sample = Sample.draw(targets, line_of(layer.shares, J), 12, generator)
    drawn, corrections = torch.from_numpy(sample.outputs), torch.from_numpy(sample.corrections)
    z = hidden @ before[drawn].T + bias_before[drawn]
    own = torch.from_numpy(sample.targets.rows), torch.from_numpy(sample.targets.outputs)
    if is_even:
        raised = (z + corrections).index_put(own, z[own])
        sums = [raised[:, part].logsumexp(1).sum() for part in sample.heads]
        expected_loss = torch.stack(sums).sum() - z[own].sum()
    else:
        expected_loss = (torch.nn.functional.softplus(z) @ corrections.exp()).sum() - z[own].sum()
    (expected,) = torch.autograd.grad(expected_loss, hidden)
    back, figures = layer.step(hidden.detach(), targets, named(loss), 0.1, 1, measured=True)
    atol, rtol = (0.1, 0.1) if half else (1e-5, 1e-4)
    torch.testing.assert_close(back.float(), expected, atol=atol, rtol=rtol)
    assert figures is not None
    assert figures.loss == pytest.approx(float(expected_loss.detach()) / (N * J), rel=0.02 if half else 1e-4)
    others = np.setdiff1d(np.arange(J * B), sample.outputs)
    assert torch.equal(layer.weight[others], before[others])
    assert torch.equal(layer.bias[others], bias_before[others])
    moved = layer.weight[drawn] - before[drawn]
    assert (moved.abs() > 0.05).all()  # the first step of Adam moves all by the rate
    if layer.half is not None:
        assert torch.equal(layer.half, layer.weight.bfloat16())
    if not is_even:
        np.testing.assert_array_equal(layer.state()[MOVES].numpy(), np.isin(np.arange(J * B), sample.outputs))


def test_gradients_of_samples_are_those_of_all_outputs_on_average():
    """By the hidden states, with the binary loss: sums over outputs, which a softmax's logarithm is not."""
    targets = targets_of(np.random.default_rng(3), uneven_shares(0))
    hidden = torch.rand(N, H, generator=torch.Generator().manual_seed(1))
    whole = layer_of(1.0).step(hidden, targets, named("binary"), 0.0, 1)[0].clone()
    layer, total = layer_of(0.3, counts_moves=True), torch.zeros(N, H)
    for step in range(1, 2001):  # at a rate of 0 nothing moves, and every step draws anew
        total += layer.step(hidden, targets, named("binary"), 0.0, step)[0]
    torch.testing.assert_close(total / 2000, whole, atol=0.02, rtol=0.02)


def planted_batch(generator: np.random.Generator, n_rows: int) -> tuple[SparseBatch, Targets]:
    """Feature i belongs to bucket i of both heads; half of the rows have one of the first four."""
    shares_B = np.where(np.arange(B) < 4, 0.125, 0.5 / (B - 4))
    features = generator.choice(B, n_rows, p=shares_B)
    batch = SparseBatch(np.arange(n_rows + 1), features.astype(np.int32), np.ones(n_rows, np.float32))
    outputs = (features[:, None] + B * np.arange(J)).reshape(-1)
    return batch, Targets(np.repeat(np.arange(n_rows), J), outputs, J)


def network_of(sampled: float) -> Network:
    shares_B = np.where(np.arange(B) < 4, 0.125, 0.5 / (B - 4))
    config = NetworkConfig(hidden=[16], dropout=0.0)
    how: dict[str, Any] = {"n_features": B, "n_outputs": J * B, "dense_input": False, "precision": "float32", "seed": 1}
    return Network(config, loss="softmax", bias=log_odds(np.tile(shares_B, J)), sampled=sampled, **how)


def test_samples_teach_what_all_outputs_do_and_a_restored_network_goes_on_alike():
    generator, sampled, other = np.random.default_rng(0), network_of(0.2), network_of(0.2)
    for step in range(300):
        batch, targets = planted_batch(generator, 8)
        sampled.step(batch, targets, 0.02)
        if step == 150:
            other.load_state({name: array.copy() for name, array in sampled.state().items()})
        elif step > 150:
            other.step(batch, targets, 0.02)
    for name, array in sampled.weights().items():
        np.testing.assert_array_equal(array, other.weights()[name])
    everything = SparseBatch(np.arange(B + 1), np.arange(B, dtype=np.int32), np.ones(B, np.float32))
    probs = torch.softmax(sampled.logits(everything).view(B, J, B), 2).numpy()
    right = probs[np.arange(B), :, np.arange(B)]
    assert (probs.argmax(2) == np.arange(B)[:, None]).mean() > 0.95
    assert right.mean() > 0.6  # probabilities over all buckets, though no step has seen them all
