"""The contract of a loss, held by every entry of the list: its formulas agree, and its kernels are these in float64."""

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
    exact_NB = torch.from_numpy((from_bfloat16(stored).astype(np.float64) + bias[:, None]).T)
    is_target_NB = torch.zeros((N, B), dtype=torch.bool)
    own = outputs >= FIRST
    is_target_NB[rows[own], outputs[own] - FIRST] = True
    return stored, bias, rows, outputs, exact_NB, is_target_NB


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
class TestLoss:
    def test_it_is_found_by_its_name(self, loss: Loss):
        assert named(loss.name) is loss

    @settings(deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(2, 9))
    def test_errors_are_the_slope_of_the_value(self, loss: Loss, seed: int, n_buckets: int):
        generator = np.random.default_rng(seed)
        z_NB = torch.from_numpy(2 * generator.standard_normal((4, n_buckets))).requires_grad_()
        is_target_NB = torch.from_numpy(generator.random((4, n_buckets)) < 0.3)
        (slopes_NB,) = torch.autograd.grad(loss.value(z_NB, is_target_NB).sum(), z_NB)
        torch.testing.assert_close(loss.errors(z_NB.detach(), is_target_NB), slopes_NB, atol=1e-7, rtol=0)
        assert loss.errors(z_NB.detach().bfloat16(), is_target_NB).dtype == torch.bfloat16

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
        expected_NB = loss.errors(exact_NB, is_target_NB).numpy()
        sums, transposed = np.full(B, np.nan, np.float32), np.zeros((N, B + 9), z.dtype)
        loss.kernel("gradient")(z, bias, rows, outputs, FIRST, transposed[:, 4:-5], sums)
        np.testing.assert_array_equal(transposed[:, 4:-5], z.T)
        assert not transposed[:, :4].any()
        assert not transposed[:, -5:].any()
        np.testing.assert_allclose(from_bfloat16(z).T, expected_NB, rtol=1 / 256 if half else 2e-5, atol=1e-30)
        np.testing.assert_allclose(sums, expected_NB.sum(axis=0), rtol=1e-4, atol=1e-5)

    def test_without_rows_for_the_transpose_the_gradient_is_the_same(self, loss: Loss):
        found = []
        for n_rows in (N, 0):
            z, bias, rows, outputs, _, _ = batch(half=False)
            sums = np.empty(B, np.float32)
            loss.kernel("gradient")(z, bias, rows, outputs, FIRST, np.empty((n_rows, B), np.float32), sums)
            found.append((z, sums))
        np.testing.assert_array_equal(found[0][0], found[1][0])
        np.testing.assert_array_equal(found[0][1], found[1][1])

    @each_type
    def test_its_loss_kernel_is_the_oracle(self, loss: Loss, half: bool):
        *given, exact_NB, is_target_NB = batch(half, seed=1)
        assert loss.kernel("loss")(*given, FIRST) == pytest.approx(
            float(loss.value(exact_NB, is_target_NB).sum()), rel=1e-5
        )


def test_hits_are_rows_whose_largest_logit_is_a_target():
    *given, exact_NB, is_target_NB = batch(half=False, seed=1)
    count: Any = n_hits
    assert count(*given, FIRST) == int(is_target_NB[torch.arange(N), exact_NB.argmax(1)].sum()) > 0


def test_an_unknown_loss_names_those_that_are_known():
    with pytest.raises(ConfigError, match=r"training.loss = 'hinge' is unknown: choose one of auto, binary, softmax"):
        named("hinge")
