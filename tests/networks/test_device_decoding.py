"""The decoder of a device against the oracle: the same classes in the same order, equal scores by ascending class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mach.decoding import AGGREGATES, topk_oracle
from mach.errors import ConfigError, DataError
from mach.hashing import Assignment, TableAssignment, UniversalAssignment
from mach.networks.device_decoding import DeviceAssignment, DeviceDecoder

K, B, R, N = 700, 16, 5, 9
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")])
each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
UNIVERSAL = UniversalAssignment.draw(n_classes=K, n_buckets=B, n_repetitions=R, seed=3)
TABLE = TableAssignment.from_table(np.random.default_rng(5).integers(0, B, (R, K)), B)


def probs_of(seed: int) -> np.ndarray:
    """Coarse scores, so that many classes are equal; some impossible ones, one query flat."""
    generator = np.random.default_rng(seed)
    probs_NRB = generator.integers(0, 4, (N, R, B)).astype(np.float32) / 4
    probs_NRB[0] = 0.5
    probs_NRB[1, 2, 3], probs_NRB[1, 0, 0], probs_NRB[2, 1, 1] = np.nan, 7.0, -1.0
    return probs_NRB


@each_device
@pytest.mark.parametrize("assignment", [UNIVERSAL, TABLE], ids=["universal", "table"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("chunk_values", [N * 30, 2**25])
def test_it_is_the_oracle(device: str, assignment: Assignment, aggregate: str, chunk_values: int) -> None:
    probs_NRB = probs_of(0)
    top = DeviceDecoder(assignment, aggregate, device, chunk_values).topk(probs_NRB, 20)
    ids_Nk, scores_Nk = topk_oracle(probs_NRB, assignment, 20, aggregate)
    np.testing.assert_array_equal(top.ids_Nk, ids_Nk)
    np.testing.assert_array_equal(top.scores_Nk, scores_Nk)
    assert top.exact_N.all()
    assert (top.bound_N == top.scores_Nk[:, -1]).all()
    tensor = torch.from_numpy(probs_NRB).to(device)
    on_device = DeviceDecoder(assignment, aggregate, device, chunk_values).topk(tensor, 20)
    np.testing.assert_allclose(on_device.scores_Nk, scores_Nk, rtol=1e-5)


@each_device
def test_only_allowed_classes(device: str) -> None:
    probs_NRB, allowed_K = probs_of(1), np.arange(K) % 50 == 7
    top = DeviceDecoder(UNIVERSAL, "log-mean", device, N * 30).topk(probs_NRB, 20, allowed_K=allowed_K)
    everything, scores = topk_oracle(probs_NRB, UNIVERSAL, K, "log-mean")
    for n in range(N):
        right = allowed_K[everything[n]]
        np.testing.assert_array_equal(top.ids_Nk[n, :14], everything[n][right])
        np.testing.assert_array_equal(top.scores_Nk[n, :14], scores[n][right])
    assert (top.ids_Nk[:, 14:] == -1).all()
    assert np.isneginf(top.scores_Nk[:, 14:]).all()


@each_device
@pytest.mark.parametrize("assignment", [UNIVERSAL, TABLE], ids=["universal", "table"])
def test_buckets_are_those_of_the_assignment(device: str, assignment: Assignment) -> None:
    classes = np.array([3, 699, 0, 3])
    parts = [assignment.select([0, 1]), assignment.select([4, 2])]
    found = DeviceAssignment(parts, torch.device(device)).buckets(torch.from_numpy(classes).to(device))
    np.testing.assert_array_equal(found.cpu().numpy(), assignment.select([0, 1, 4, 2]).buckets(classes))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(9, 5, 15\): need \(N, 5, 16\)"):
        DeviceDecoder(UNIVERSAL).topk(probs_of(0)[:, :, 1:])
    with pytest.raises(ConfigError, match="k 701 must be at least 1 and at most 700"):
        DeviceDecoder(UNIVERSAL).topk(probs_of(0), 701)
    with pytest.raises(ConfigError, match="unknown aggregate"):
        DeviceDecoder(UNIVERSAL, "most")
