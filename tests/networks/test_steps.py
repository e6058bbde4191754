"""Settings of a training's steps follow from the shape of its data, and the rate from them."""

from __future__ import annotations

from typing import Any

import pytest

from mach.config import NetworkConfig
from mach.errors import ConfigError
from mach.networks.steps import Steps

SHAPE: dict[str, Any] = {
    "n_rows": 1_800_000,
    "n_buckets": 4096,
    "dense_input": False,
    "loss": "softmax",
    "precision": "bfloat16",
}


def steps(network: dict[str, Any] | None = None, **shape: Any) -> Steps:
    return Steps.of(NetworkConfig(**network or {}), **SHAPE | shape)


def test_many_rows_warm_up():
    shares = [steps(n_rows=n).warmup for n in (1, 42_000, 50_000, 75_000, 100_000, 335_000)]
    assert shares == [0, 0, 0, 0.05, 0.1, 0.1]


def test_many_buckets_are_sampled_where_rows_have_one_class():
    assert steps().sampled == 0.25
    assert steps(n_buckets=2048).sampled == steps(loss="binary").sampled == 1


def test_errors_are_dithered_where_products_are_float32_and_rows_have_several_classes():
    assert steps(loss="binary", precision="float32").dither == 0.2
    assert steps(loss="binary", light=True).dither == 0.1
    assert steps(precision="float32").dither == steps(loss="binary").dither == 0


@pytest.mark.parametrize("network", [{"hidden": []}, {"trunk": "a:B"}, {}])
def test_networks_of_another_kind_go_plain_steps(network: dict[str, Any]):
    for loss in ("binary", "softmax"):
        assert steps(network, loss=loss, precision="float32", dense_input=not network) == Steps()


def test_a_run_of_before_goes_on_as_it_began():
    before = {"training.warmup": 0.3, "training.sampled": 0.5, "training.dither": 0.0, "network.keep": 1.0}
    assert steps(retired=before | {"training.schedule": "linear"}) == Steps(0.3, 0.5, 0.0)
    with pytest.raises(ConfigError, match=r"training.schedule = 'cosine': this run began so"):
        steps(retired={"training.schedule": "cosine"})


def test_the_rate_rises_then_falls():
    rates = [Steps(warmup=0.1).rate(2.0, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.05
