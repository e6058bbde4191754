"""The contract of a loss, held by every entry of the list: its oracle, its kernels and its tensors say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.errors import ConfigError
from mach.networks.kernels.loss import n_hits
from mach.networks.kernels.losses import LOSSES, Loss, named
from mach.networks.kernels.memory import from_bfloat16, to_bfloat16

B, N, FIRST = 70, 19, 70  # the second head's outputs
each_type = pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])


def batch(half: bool, seed: int = 0) -> tuple[Any, ...]:
    """Logits with extremes, a bias, and targets of two heads of which those of the second one count; row 3 has none."""
    generator = np.random.default_rng(seed)
    z = (3 * generator.standard_normal((B, N))).astype(np.float32)
    z[5, 2], z[6, 2], z[7, 4] = 60, -60, 30
    bias = np.linspace(-4, 1, B).astype(np.float32)
    pairs = np.unique(generator.integers(0, N * 2 * B, 4 * N))
    rows, outputs = np.divmod(pairs, 2 * B)
    rows, outputs = rows[rows != 3], outputs[rows != 3]
    stored: Any = to_bfloat16(z) if half else z
    exact_NB = ((from_bfloat16(stored) if half else z).astype(np.float64) + bias[:, None]).T
    is_target_NB = np.zeros((N, B), np.bool_)
    own = outputs >= FIRST
    is_target_NB[rows[own], outputs[own] - FIRST] = True
    return stored, bias, rows, outputs, exact_NB, is_target_NB


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
class TestLoss:
    def test_it_is_found_by_its_name_and_says_what_it_is(self, loss: Loss):
        assert named(loss.name) is loss
        assert loss.sentence.endswith(".")

    @settings(deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(2, 9))
    def test_errors_are_the_slope_of_the_value(self, loss: Loss, seed: int, n_buckets: int):
        generator, step = np.random.default_rng(seed), 1e-6
        z_NB, is_target_NB = 2 * generator.standard_normal((4, n_buckets)), generator.random((4, n_buckets)) < 0.3
        for b in range(n_buckets):
            around = [loss.value(z_NB + side * step * np.eye(n_buckets)[b], is_target_NB) for side in (1, -1)]
            slopes_N = (around[0] - around[1]) / (2 * step)
            np.testing.assert_allclose(loss.errors(z_NB, is_target_NB)[:, b], slopes_N, atol=1e-7)

    def test_probabilities_keep_their_precision_in_both_tails(self, loss: Loss):
        logits = np.array([[-80.0, -20.0, 0.0, 20.0, 80.0]], np.float32)
        probs, exact = loss.probabilities(logits), loss.probabilities(logits.astype(np.float64))
        np.testing.assert_allclose(probs, exact, rtol=1e-6, atol=1e-37)
        assert np.isfinite(loss.probabilities(logits * np.float32(1e30))).all()
        assert ((probs >= 0) & (probs <= 1)).all()
        assert (np.diff(probs) >= 0).all()
        if loss.is_exclusive:
            assert probs.sum() == pytest.approx(1.0)

    @each_type
    def test_its_gradient_kernel_is_the_oracle_with_sums_and_transpose(self, loss: Loss, half: bool):
        z, bias, rows, outputs, exact_NB, is_target_NB = batch(half)
        expected_NB = loss.errors(exact_NB, is_target_NB)
        sums, transposed = np.full(B, np.nan, np.float32), np.zeros((N, B + 9), z.dtype)
        loss.gradient_kernel(z, bias, rows, outputs, FIRST, transposed[:, 4:-5], sums)
        np.testing.assert_array_equal(transposed[:, 4:-5], z.T)
        assert not transposed[:, :4].any()
        assert not transposed[:, -5:].any()
        found = from_bfloat16(z) if half else z
        np.testing.assert_allclose(found.T, expected_NB, rtol=1 / 256 if half else 2e-5, atol=1e-30)
        np.testing.assert_allclose(sums, expected_NB.sum(axis=0), rtol=1e-4, atol=1e-5)

    def test_without_rows_for_the_transpose_the_gradient_is_the_same(self, loss: Loss):
        found = []
        for n_rows in (N, 0):
            z, bias, rows, outputs, _, _ = batch(half=False)
            sums = np.empty(B, np.float32)
            loss.gradient_kernel(z, bias, rows, outputs, FIRST, np.empty((n_rows, B), np.float32), sums)
            found.append((z, sums))
        np.testing.assert_array_equal(found[0][0], found[1][0])
        np.testing.assert_array_equal(found[0][1], found[1][1])

    @each_type
    def test_its_loss_kernel_is_the_oracle(self, loss: Loss, half: bool):
        *given, exact_NB, is_target_NB = batch(half, seed=1)
        assert loss.loss_kernel(*given, FIRST) == pytest.approx(loss.value(exact_NB, is_target_NB).sum(), rel=1e-5)

    def test_its_tensors_are_the_oracle(self, loss: Loss):
        *_, exact_NB, is_target_NB = batch(half=False, seed=2)
        z, is_target = torch.from_numpy(exact_NB), torch.from_numpy(is_target_NB)
        np.testing.assert_allclose(loss.tensor_value(z, is_target), loss.value(exact_NB, is_target_NB), rtol=1e-6)
        np.testing.assert_allclose(loss.tensor_errors(z, is_target), loss.errors(exact_NB, is_target_NB), atol=1e-7)
        assert loss.tensor_errors(z.bfloat16(), is_target).dtype == torch.bfloat16


def test_hits_are_rows_whose_largest_logit_is_a_target():
    *given, exact_NB, is_target_NB = batch(half=False, seed=1)
    assert n_hits(*given, FIRST) == is_target_NB[np.arange(N), exact_NB.argmax(axis=1)].sum() > 0


def test_an_unknown_loss_names_those_that_are_known():
    with pytest.raises(ConfigError, match=r"training.loss = 'hinge' is unknown: choose one of auto, binary, softmax"):
        named("hinge")
