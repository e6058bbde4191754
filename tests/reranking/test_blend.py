"""What held-out rows choose of the blend, where the right choice is known."""

from __future__ import annotations

import numpy as np
import pytest

from mach.reranking.blend import HINGE, LOGISTIC, PAIRS, USUAL, Blend, Trial, best_of, choose, path_of
from mach.reranking.settings import FitSettings
from mach.reranking.signals.classifiers import Classifiers
from mach.reranking.signals.networks import Aggregate
from mach.reranking.signals.prior import Prior
from mach.reranking.signals.repeats import Repeats
from mach.sketch.terms import prior_terms

N, C = 400, 12


def trial_of(*, known_is_right: float, share_alike: float = 0.5, loss="hinge") -> Trial:
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
    equal_NC2 = np.log1p(np.stack([known_NC, np.repeat(is_alike_N[:, None], C, axis=1)], axis=2), dtype=np.float32)
    prior = Prior()
    prior.learned_K = np.full(C, 10, np.int64)
    signals = (Aggregate(), prior, Classifiers.of({}, loss), Repeats())
    columns = {"prior": np.zeros((N, C, 1), np.float32), "classifiers": margins_NC[:, :, None], "repeats": equal_NC2}
    return Trial(signals, ids_NC, scores_NC, columns, right_NC)


@pytest.mark.parametrize("settings", [{}, {"pairs": 4}, {"loss": "logistic"}])
@pytest.mark.parametrize(("known_is_right", "sign"), [(0.0, -1), (1.0, 1), (0.3, 0)])
def test_repeats_count_for_what_they_are_worth(settings: dict, known_is_right: float, sign: int):
    fitted = FitSettings(**settings)
    trial = trial_of(known_is_right=known_is_right, loss=fitted.loss)
    blend = choose(trial, fitted, {})
    if sign:
        assert np.sign(blend.strengths["repeats"]) == sign
        without = choose(trial, fitted, {"repeats": 0.0})
        assert without.strengths["repeats"] == 0
        assert trial.gains(blend).mean() > trial.gains(without).mean() + 0.005
    else:
        assert blend.strengths["repeats"] >= 0


def test_one_row_decides_nothing():
    trial = trial_of(known_is_right=0.0, share_alike=0.0)
    trial.columns["repeats"][0, :, 1] = trial.columns["repeats"][0, trial.scores_NC[0].argmax(), 0] = np.log(2)
    assert choose(trial, FitSettings(), {}).strengths["repeats"] == 0
    gains_AN = np.zeros((2, 2000))
    gains_AN[1, 0] = 1
    assert (best_of(gains_AN), best_of(gains_AN, usual=0)) == (1, 0)


def test_what_is_given_is_not_chosen():
    trial = trial_of(known_is_right=0.0, share_alike=0.0)
    assert choose(trial, FitSettings(), {}).strengths["repeats"] == 0  # no row has equals
    assert choose(trial, FitSettings(), {"repeats": 2.0}).strengths["repeats"] == 2


def test_terms_of_all_signals_add_up_and_strengths_of_0_ask_nothing():
    trial = trial_of(known_is_right=1.0)
    blend = Blend({"weight": 2.0, "prior": -0.5, "repeats": 3.0})
    scores_NC = blend.scores(trial.scores_NC, trial.ids_NC, trial.signals, lambda one: trial.columns[one.name])
    losses_NC = np.square(np.maximum(0, 1 - trial.columns["classifiers"][:, :, 0]))
    equal_NC2 = trial.columns["repeats"]
    terms_NC = prior_terms(np.full(C, 10), -0.5)[trial.ids_NC] + 3 * (equal_NC2[:, :, 0] - equal_NC2[:, :, 1])
    np.testing.assert_allclose(scores_NC, trial.scores_NC - 2 * losses_NC + terms_NC, rtol=1e-5)
    asked: list[str] = []

    def columns(signal):
        asked.append(signal.name)
        return trial.columns[signal.name]

    Blend({"weight": 1.0, "prior": 0.0}).scores(trial.scores_NC, trial.ids_NC, trial.signals, columns)
    assert asked == ["classifiers"]


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
    assert path_of(FitSettings()) == HINGE
    assert path_of(FitSettings(pairs=4)) == PAIRS
    assert path_of(FitSettings(pairs=4, loss="logistic")) == LOGISTIC
