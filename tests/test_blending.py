"""What held-out rows choose of the blend, where the right choice is known."""

from __future__ import annotations

import numpy as np
import pytest

from mach.blending import HINGE, LOGISTIC, PAIRS, USUAL, Judged, best_of, blends_of, choose, given
from mach.config import RerankingConfig
from mach.ordering import repeat_terms
from mach.reranker import Blend

N, C = 400, 12


def judged(*, known_is_right: float, share_alike: float = 0.5) -> Judged:
    """Rows with one right candidate; of rows with equals in training it is the known one with such a chance."""
    generator = np.random.default_rng(0)
    ids_NC = np.tile(np.arange(C), (N, 1))
    right_N = generator.integers(0, C, N)
    is_alike_N = generator.random(N) < share_alike
    is_known_right_N = generator.random(N) < known_is_right
    known_N = np.where(is_known_right_N, right_N, (right_N + 1) % C)
    known_NC = np.zeros((N, C), np.uint8)
    known_NC[np.arange(N), known_N] = is_alike_N
    scores_NC = -generator.random((N, C)).astype(np.float32)
    scores_NC[np.arange(N), known_N] += 0.5 * is_alike_N.astype(np.float32)  # networks remember a little of it
    right_NC = ids_NC == right_N[:, None]
    margins_NC = generator.normal(size=(N, C)).astype(np.float32) + 2 * right_NC
    return Judged(
        ids_NC, scores_NC, margins_NC, known_NC, is_alike_N.astype(np.uint8), right_NC, np.full(C, 10, np.int64)
    )


@pytest.mark.parametrize("settings", [{}, {"pairs": 4}, {"loss": "logistic"}])
@pytest.mark.parametrize(("known_is_right", "sign"), [(0.0, -1), (1.0, 1), (0.3, 0)])
def test_repeats_count_for_what_they_are_worth(settings: dict, known_is_right: float, sign: int):
    found = judged(known_is_right=known_is_right)
    blend = choose(found, RerankingConfig(candidates=C, **settings))
    if sign:
        assert np.sign(blend.repeats) == sign
        without = choose(found, RerankingConfig(candidates=C, repeats=0.0, **settings))
        loss = RerankingConfig(**settings).loss
        assert found.gains(blend, loss).mean() > found.gains(without, loss).mean() + 0.005
    else:
        assert blend.repeats >= 0


def test_one_row_decides_nothing():
    found = judged(known_is_right=0.0, share_alike=0.0)
    found.alike_N[0], found.known_NC[0, found.scores_NC[0].argmax()] = 1, 1
    assert choose(found, RerankingConfig(candidates=C)).repeats == 0
    gains_AN = np.zeros((2, 2000))
    gains_AN[1, 0] = 1
    assert (best_of(gains_AN), best_of(gains_AN, usual=0)) == (1, 0)


def test_rows_without_equals_leave_repeats_alone():
    found = judged(known_is_right=0.0, share_alike=0.0)
    assert choose(found, RerankingConfig(candidates=C)).repeats == 0
    assert choose(found, RerankingConfig(candidates=C, repeats=2.0)).repeats == 2


def test_what_is_fixed_is_not_chosen():
    fixed = RerankingConfig(candidates=C, weight=0.25, prior=0.0, repeats=-1.0)
    assert choose(judged(known_is_right=1.0), fixed) == Blend(weight=0.25, prior=0.0, repeats=-1.0)
    assert given(RerankingConfig(prior=0.5), weight=3.0) == Blend(weight=3.0, prior=0.5)


def test_the_usual_blend_stays_unless_another_is_better_beyond_chance():
    generator = np.random.default_rng(1)
    usual_N = generator.random(500)
    noisy_N = usual_N + generator.normal(0.01, 1.0, 500)
    better_N = usual_N + generator.normal(0.2, 1.0, 500)
    gains_AN = np.stack([noisy_N, usual_N, usual_N - 0.1])
    gains_AN[0] += 0.01 - (noisy_N - usual_N).mean()  # better by far less than chance
    assert best_of(gains_AN) == 0
    assert best_of(gains_AN, usual=1) == 1
    assert best_of(np.stack([noisy_N, usual_N, better_N]), usual=1) == 2


def test_usual_blends_are_on_their_paths():
    assert set(USUAL) == {PAIRS, LOGISTIC}
    assert all(usual in path for path, usual in USUAL.items())
    assert blends_of(RerankingConfig()) == HINGE


def test_repeats_never_raise_a_score():
    counts_NC = np.array([[0, 1, 5, 255]], np.uint8)
    for strength in (-12.0, -1.0, 0.0, 1.0, 3.0):
        terms_NC = repeat_terms(counts_NC, np.array([255], np.uint8), strength)
        assert terms_NC.dtype == np.float32
        assert (terms_NC <= 0).all()
        assert (np.diff(terms_NC[0]) * strength >= 0).all()
