"""Steps whose errors are rounded at random: they are right on average, and they teach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mach.config import NetworkConfig
from mach.data.batch import SparseBatch, Targets
from mach.networks.kernels.losses import named
from mach.networks.network import Network
from mach.networks.output import OutputLayer

J, B, H, N = 2, 24, 40, 32


def targets_of(seed: int) -> Targets:
    pairs = np.unique(np.random.default_rng(seed).integers(0, N * J * B, 3 * N))
    return Targets(*np.divmod(pairs, J * B), J)


def stepped(
    dither: float, loss: str = "binary", *, seed: int = 0, half: bool = False, sampled: float = 1.0
) -> tuple[OutputLayer, torch.Tensor]:
    """A layer after its first step (its first moments are a tenth of the gradients), and the gradient by ``hidden``."""
    torch.manual_seed(0)
    bias = np.linspace(-4, 0, J * B).astype(np.float32)
    options: dict[str, Any] = {"half": half, "bias": bias, "device": torch.device("cpu"), "sampled": sampled}
    layer = OutputLayer(H, J * B, dither=dither, seed=seed, **options)
    hidden = torch.rand(N, H, generator=torch.Generator().manual_seed(1))
    back, _ = layer.step(hidden, targets_of(0), named(loss), 1e-3, 1)
    return layer, back.float().clone()


@pytest.mark.parametrize("loss", ["binary", "softmax"])
@pytest.mark.parametrize("half", [False, True])
def test_where_no_error_is_small_the_step_is_the_plain_one(loss: str, half: bool):
    (plain, plain_back), (dithered, dithered_back) = (stepped(d, loss, half=half) for d in (0.0, 1e-12))
    tolerance: dict[str, Any] = {"atol": 2e-2, "rtol": 2e-2} if half else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(plain_back, dithered_back, **tolerance)
    torch.testing.assert_close(plain.moments[0], dithered.moments[0], **tolerance)
    assert torch.equal(plain.moments[2], dithered.moments[2])  # of the bias: sums are taken before


@pytest.mark.parametrize("loss", ["binary", "softmax"])
def test_gradients_are_right_on_average(loss: str):
    plain, plain_back = stepped(0.0, loss)
    n_seeds = 300
    found = [stepped(0.3, loss, seed=1000 * i) for i in range(n_seeds)]
    for mean, exact in (
        (torch.stack([back for _, back in found]), plain_back),
        (torch.stack([layer.moments[0] for layer, _ in found]), plain.moments[0]),
    ):
        assert mean.std(0).mean() > 0.005 * exact.abs().mean()  # they do differ
        error = (mean.mean(0) - exact).abs()
        assert (error <= 6 * mean.std(0) / n_seeds**0.5 + 1e-6).all()


def test_it_goes_with_samples():
    plain, dithered = (stepped(d, "softmax", sampled=0.4)[0] for d in (0.0, 1e-12))
    torch.testing.assert_close(plain.weight, dithered.weight, atol=1e-6, rtol=1e-4)


def network() -> Network:
    how: dict[str, Any] = {"n_features": B, "n_outputs": J * B, "dense_input": False, "precision": "float32"}
    config, bias = NetworkConfig(hidden=[16], dropout=0.0), np.full(J * B, -3, np.float32)
    return Network(config, loss="binary", bias=bias, dither=0.2, seed=1, **how)


def test_rounded_errors_teach_and_a_restored_network_goes_on_alike():
    """Feature i belongs to bucket i of both heads."""
    generator, dithered, other = np.random.default_rng(0), network(), network()
    for step in range(300):
        features = generator.integers(0, B, 8).astype(np.int32)
        batch = SparseBatch(np.arange(9), features, np.ones(8, np.float32))
        targets = Targets(np.repeat(np.arange(8), J), (features[:, None] + B * np.arange(J)).reshape(-1), J)
        dithered.step(batch, targets, 0.02)
        if step == 150:
            other.load_state({name: array.copy() for name, array in dithered.state().items()})
        elif step > 150:
            other.step(batch, targets, 0.02)
    for name, array in dithered.weights().items():
        np.testing.assert_array_equal(array, other.weights()[name])
    everything = SparseBatch(np.arange(B + 1), np.arange(B, dtype=np.int32), np.ones(B, np.float32))
    probs = torch.sigmoid(dithered.logits(everything)).view(B, J, B).numpy()
    assert (probs.argmax(2) == np.arange(B)[:, None]).all()
    assert probs[np.arange(B), :, np.arange(B)].mean() > 0.8
    assert np.median(probs) < 0.02  # errors far below the bound count as well
