"""The network without torch makes the steps of that with it; its bits are its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mach.config import NetworkConfig
from mach.data.batch import SparseBatch, Targets
from mach.errors import StorageError
from mach.networks.inference import stored_weights
from mach.networks.light import LightNetwork
from mach.networks.network import Network

D, H, B, J, N = 50, 40, 6, 2, 23
TARGETS = Targets(np.arange(2 * N) // 2, np.arange(2 * N) % 2 * B + np.arange(2 * N) // 2 % B, J)
LOSSES = pytest.mark.parametrize(("loss", "dither"), [("binary", 0.0), ("binary", 0.2), ("softmax", 0.0)])


def batch_of(seed: int) -> SparseBatch:
    """Rows of no to seven features."""
    generator = np.random.default_rng(seed)
    counts = np.arange(N) % 8
    indices = np.concatenate([np.sort(generator.choice(D, n, replace=False)) for n in counts]).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return SparseBatch(indptr, indices, generator.uniform(0.1, 1, len(indices)).astype(np.float32))


def options_of(**changed: Any) -> dict[str, Any]:
    given = {"n_features": D, "n_outputs": J * B, "loss": "binary", "seed": 7, "dither": 0.0} | changed
    return given | {"bias": np.linspace(-4, -1, J * B, dtype=np.float32)}


def light(**changed: Any) -> LightNetwork:
    return LightNetwork(NetworkConfig(hidden=[H], dropout=0.3, power=1.5), **options_of(**changed))


@LOSSES
def test_it_makes_the_steps_of_the_network_with_torch(loss: str, dither: float):
    config = NetworkConfig(hidden=[H], dropout=0.3, power=1.5)
    mine = light(loss=loss, dither=dither)
    theirs = Network(config, dense_input=False, precision="float32", **options_of(loss=loss, dither=dither))
    for name, array in theirs.weights().items():
        assert np.array_equal(mine.weights()[name], array), name
    for step in range(6):
        figures = [one.step(batch_of(step), TARGETS, 0.01, measured=True) for one in (mine, theirs)]
        assert figures[0] is not None
        assert figures[1] is not None
        assert figures[0].loss == pytest.approx(figures[1].loss, rel=1e-4)
        assert figures[0].bucket_precision == figures[1].bucket_precision
    for name, array in theirs.state().items():
        np.testing.assert_allclose(mine.state()[name], array, atol=2e-5, err_msg=name)
    told = [one.figures(batch_of(9), TARGETS) for one in (mine, theirs)]
    assert told[0].loss == pytest.approx(told[1].loss, rel=1e-4)
    assert told[0].bucket_precision == told[1].bucket_precision


@LOSSES
def test_a_restored_network_goes_on_to_the_same_bits(loss: str, dither: float):
    whole, first, second = (light(loss=loss, dither=dither, seed=seed) for seed in (7, 7, 7))
    for step in range(6):
        whole.step(batch_of(step), TARGETS, 0.01)
        if step == 3:
            second.load_state({name: array.copy() for name, array in first.state().items()})
        (first if step < 3 else second).step(batch_of(step), TARGETS, 0.01)
    for name, array in whole.state().items():
        assert np.array_equal(second.state()[name], array), name


def test_a_state_of_another_shape_is_refused():
    state = light().state()
    with pytest.raises(StorageError, match=r"no weights\.output\.weight of shape \(12, 40\)"):
        light().load_state(state | {"weights.output.weight": state["weights.output.weight"][:, :3]})


def test_it_starts_from_stored_weights():
    trained, begun = light(), light(seed=8)
    trained.step(batch_of(0), TARGETS, 0.01)
    stored = stored_weights(trained.weights(), "float32")
    begun.load_weights({name: array.copy() for name, array in stored.items()})
    assert begun.n_steps == 0
    for name, array in trained.weights().items():
        assert np.array_equal(begun.weights()[name], array), name


def test_what_diverges_has_no_finite_loss():
    for name in ("input.weight", "output.weight"):
        network = light()
        network.weights()[name][:] = np.nan
        figures = network.step(batch_of(0), TARGETS, 0.01, measured=True)
        assert figures is not None
        assert np.isnan(figures.loss)
