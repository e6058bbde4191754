"""Steps of the softmax loss on a sample of the buckets: laws of the sample, gradients, and that they teach."""

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
from mach.networks.output import SAMPLES, OutputLayer, Sample

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
@given(st.integers(0, 2**32), st.integers(1, B))
def test_a_sample_holds_its_targets_and_as_many_of_every_head(seed: int, n_sampled: int):
    shares_JB = uneven_shares(seed)
    targets = targets_of(np.random.default_rng(seed), shares_JB)
    sample = Sample.draw(targets, N, shares_JB.reshape(-1), n_sampled, np.random.default_rng(seed))
    assert (np.diff(sample.outputs) > 0).all()
    n_each = np.bincount(sample.outputs // B, minlength=J)
    n_most = max(len(np.unique(targets.outputs[targets.outputs // B == j])) for j in range(J))
    assert n_each.tolist() == [min(max(n_sampled, n_most + n_sampled // 4), B)] * J
    np.testing.assert_array_equal(sample.outputs[sample.targets.outputs], targets.outputs)
    np.testing.assert_array_equal(sample.targets.rows, targets.rows)
    assert (sample.corrections >= 0).all()
    if n_sampled == B:
        assert (sample.corrections == 0).all()


def test_sums_over_samples_are_those_over_all_outputs_on_average():
    shares_JB, logits = uneven_shares(0), np.random.default_rng(1).normal(size=J * B)
    generator, total = np.random.default_rng(2), np.zeros(J)
    for _ in range(4000):
        sample = Sample.draw(targets_of(generator, shares_JB), N, shares_JB.reshape(-1), 16, generator)
        terms = np.exp(logits[sample.outputs] + sample.corrections)
        total += np.bincount(sample.outputs // B, terms, J)
    exact_J = np.exp(logits).reshape(J, B).sum(axis=1)
    np.testing.assert_allclose(total / 4000, exact_J, rtol=0.03)


def layer_of(sampled: float, *, half: bool = False) -> OutputLayer:
    torch.manual_seed(0)
    bias = log_odds(uneven_shares(0))
    return OutputLayer(H, J * B, half=half, bias=bias, device=torch.device("cpu"), sampled=sampled, seed=5)


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


def test_a_step_follows_the_corrected_loss_and_leaves_other_outputs_alone():
    layer, targets = layer_of(0.3), targets_of(np.random.default_rng(3), uneven_shares(0))
    before, bias_before = layer.weight.clone(), layer.bias.clone()
    hidden = torch.rand(N, H, generator=torch.Generator().manual_seed(1), requires_grad=True)
    sample = Sample.draw(targets, N, layer.shares, 12, np.random.default_rng([5, 1, SAMPLES]))
    drawn = torch.from_numpy(sample.outputs)
    z = hidden @ before[drawn].T + bias_before[drawn] + torch.from_numpy(sample.corrections)
    own = torch.from_numpy(sample.targets.rows), torch.from_numpy(sample.targets.outputs)
    at_own = z[own] - torch.from_numpy(sample.corrections)[own[1]]
    z = z.index_put(own, at_own)
    loss = (torch.logsumexp(z.view(N, J, -1), 2)).sum() - at_own.sum()
    (expected,) = torch.autograd.grad(loss, hidden)
    back, figures = layer.step(hidden.detach(), targets, named("softmax"), 0.1, 1, measured=True)
    torch.testing.assert_close(back, expected, atol=1e-5, rtol=1e-4)
    assert figures is not None
    assert figures.loss == pytest.approx(float(loss.detach()) / (N * J), rel=1e-4)
    others = np.setdiff1d(np.arange(J * B), sample.outputs)
    assert torch.equal(layer.weight[others], before[others])
    assert torch.equal(layer.bias[others], bias_before[others])
    assert not torch.isclose(layer.weight[drawn], before[drawn]).all(dim=1).any()  # the first step of Adam moves all


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
