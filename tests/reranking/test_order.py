"""The learned order: its formula, and what it learns that no blend can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.errors import StorageError
from mach.model.curves import Curve, calibration_error, fit, pairs_of
from mach.reranking.blend import Blend, Trial
from mach.reranking.fitting import taught_crosswise
from mach.reranking.order import FOLDED, FOLDS, HIDDEN, NAMES, OTHERS, SECTION, TAUGHT, LearnedOrder, _gradients, taught
from mach.reranking.signals.contract import SignalFile
from tests.reranking.oracles import ordered


def some_network(seed: int, n_inputs: int) -> LearnedOrder:
    generator = np.random.default_rng(seed)
    shapes = [(n_inputs,), (n_inputs,), (n_inputs, HIDDEN), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (HIDDEN, 1), (1,)]
    return LearnedOrder(
        {name: generator.normal(size=shape).astype(np.float32) for name, shape in zip(NAMES, shapes, strict=True)}
    )


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 15), st.integers(1, 12))
def test_compiled_scores_are_those_of_the_formula_and_never_above_the_aggregate(seed, n_inputs, n_candidates):
    order, generator = some_network(seed, n_inputs), np.random.default_rng(seed)
    inputs_NCI = generator.normal(size=(3, n_candidates, n_inputs), scale=3).astype(np.float32)
    scores_NC = -generator.exponential(size=(3, n_candidates)).astype(np.float32)
    scores_NC[0, 0] = -np.inf  # as of a class that is none
    found_NC = order.scores(scores_NC, inputs_NCI)
    expected_NC = ordered(order, scores_NC, inputs_NCI)
    np.testing.assert_allclose(found_NC, expected_NC, rtol=1e-4, atol=1e-4)
    assert (found_NC <= scores_NC).all()
    one_NC = np.concatenate([order.scores(scores_NC[:, [c]], inputs_NCI[:, [c]]) for c in range(n_candidates)], axis=1)
    np.testing.assert_array_equal(found_NC, one_NC)  # whatever is asked for with it


def test_a_floor_is_read_as_it_was_written():
    arrays = {SECTION + name: array for name, array in some_network(0, 3).arrays.items()}
    for notes, floor in (({}, -np.inf), ({"floor": "-2.0"}, -2.0)):
        order = LearnedOrder.load(SignalFile("file", arrays, notes, 5, 5))
        assert order is not None
        assert order.floor == floor
    for damaged in ("nan", "0.5", "low"):
        with pytest.raises(StorageError, match=r"^file: its metadata are damaged \(floor is .* train it again$"):
            LearnedOrder.load(SignalFile("file", arrays, {"floor": damaged}, 5, 5))


def planted(n_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A candidate is right where exactly one of two inputs is large, which no weighted sum tells."""
    generator = np.random.default_rng(seed)
    inputs_NCI = generator.normal(size=(n_rows, 10, 4)).astype(np.float32)
    inputs_NCI[:, :, 3] = 7  # tells nothing
    right_NC = (inputs_NCI[:, :, 0] > 0) != (inputs_NCI[:, :, 1] > 0)
    scores_NC = -generator.random((n_rows, 10), np.float32)
    scores_NC[:, 9], right_NC[:, 9] = -np.inf, False  # no class
    return inputs_NCI, scores_NC, right_NC


def test_it_learns_what_no_blend_can_and_twice_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mach.reranking.order.LEAST_STEPS", 500)
    order, (inputs_NCI, scores_NC, right_NC) = LearnedOrder.learn(*planted(800, seed=0), 5), planted(200, seed=1)
    best_N = order.scores(scores_NC, inputs_NCI).argmax(axis=1)
    assert right_NC[np.arange(200), best_N].mean() > 0.95  # 0.5 by chance
    again = LearnedOrder.learn(*planted(800, seed=0), 5)
    for name in NAMES:
        np.testing.assert_array_equal(order.arrays[name], again.arrays[name])
    assert order.arrays["scales"][3] == 0


def test_what_is_taught_crosswise_answers_for_a_fold_by_what_has_not_seen_it():
    inputs_NCI, scores_NC, right_NC = planted(300, seed=0)
    order = LearnedOrder.learn(inputs_NCI, scores_NC, right_NC, 5, crosswise=True)
    assert order.n_folds == FOLDS > 1
    by_fold = [order.blind(fold) for fold in range(FOLDS)]
    assert [one.n_folds for one in by_fold] == [0] * FOLDS
    losses = [-one.scores(np.zeros_like(scores_NC), inputs_NCI).astype(np.float64) for one in by_fold]
    objections = [loss + np.log(-np.expm1(-loss)) for loss in losses]  # of which losses are the softplus
    whole_NC = order.scores(np.zeros_like(scores_NC), inputs_NCI)
    np.testing.assert_allclose(whole_NC, -np.logaddexp(0, np.mean(objections, axis=0)), atol=1e-3)
    other_NC = right_NC.copy()
    other_NC[::FOLDS] = ~other_NC[::FOLDS]  # of the first fold alone
    again = LearnedOrder.learn(inputs_NCI, scores_NC, other_NC, 5, crosswise=True)
    found_NC, changed_NC = (one.crosswise(scores_NC, inputs_NCI) for one in (order, again))
    np.testing.assert_array_equal(found_NC[::FOLDS], changed_NC[::FOLDS])
    assert not np.array_equal(found_NC[1::FOLDS], changed_NC[1::FOLDS])
    np.testing.assert_array_equal(found_NC[::FOLDS], by_fold[0].scores(scores_NC[::FOLDS], inputs_NCI[::FOLDS]))
    arrays = {SECTION + name: array for name, array in order.arrays.items()}
    loaded = LearnedOrder.load(SignalFile("file", arrays, {"floor": "-2.0"}, 5, 5))
    assert loaded is not None
    np.testing.assert_array_equal(loaded.crosswise(scores_NC, inputs_NCI), found_NC)
    damaged = arrays | {SECTION + FOLDED: np.zeros(3, np.float32)}
    with pytest.raises(StorageError, match=r"^file: stacker.folds is not of 32 and 32 units: train it again$"):
        LearnedOrder.load(SignalFile("file", damaged, {}, 5, 5))


def test_held_out_rows_teach_an_order_unless_the_blend_is_surely_better():
    def kept(right_NC: np.ndarray) -> LearnedOrder | None:
        trial = Trial([], np.tile(np.arange(10), (len(right_NC), 1)), scores_NC, {}, right_NC)
        none_NP = np.empty((len(right_NC), 0), np.int64)
        return taught_crosswise(trial, Blend({}), none_NP, inputs_NCI, seed=0)

    inputs_NCI, scores_NC, right_NC = planted(400, seed=0)
    order, (more_NCI, more_NC, more_right_NC) = kept(right_NC), planted(200, seed=1)
    assert order is not None
    best_N = order.scores(more_NC, more_NCI).argmax(axis=1)
    assert more_right_NC[np.arange(200), best_N].mean() > 0.9  # 0.5 by the aggregates
    assert kept(scores_NC == scores_NC.max(axis=1, keepdims=True)) is None  # the blend has it all


def test_crosswise_scores_are_not_overconfident_and_those_of_rows_that_taught_are():
    def rows(n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One input of thirty says a little of whether a candidate is right."""
        inputs_NCI = generator.normal(size=(n_rows, 10, 30)).astype(np.float32)
        right_NC = generator.random((n_rows, 10)) < 0.5 / (1 + np.exp(-inputs_NCI[:, :, 0]))
        return inputs_NCI, np.full((n_rows, 10), -0.7, np.float32), right_NC

    def curve(order_scores_NC: np.ndarray) -> Curve:
        ids_NC = np.tile(np.arange(10), (len(right_NC), 1))
        return fit(*pairs_of(ids_NC, order_scores_NC, right_NC), "log-mean")

    generator = np.random.default_rng(0)
    (inputs_NCI, scores_NC, right_NC), (more_NCI, more_NC, more_right_NC) = rows(200), rows(2000)
    order = LearnedOrder.learn(inputs_NCI, scores_NC, right_NC, 0, crosswise=True)
    curves = curve(order.scores(scores_NC, inputs_NCI)), curve(order.crosswise(scores_NC, inputs_NCI))
    asked_NC = order.scores(more_NC, more_NCI)
    of_seen, of_unseen = (calibration_error(one(asked_NC).ravel(), more_right_NC.ravel()) for one in curves)
    assert of_unseen < 0.04
    assert of_seen > 0.08


def test_an_order_learns_by_the_gradients_of_its_loss():
    generator = np.random.default_rng(0)
    layers = [generator.normal(size=shape) for shape in ((5, 4), (4,), (4, 4), (4,), (4, 1), (1,))]
    x_MI, scores_M, right_M = generator.normal(size=(30, 5)), generator.normal(size=30), generator.random(30) < 0.3

    def loss() -> float:
        hidden = x_MI
        for at in (0, 2, 4):
            hidden = (hidden / (1 + np.exp(-hidden)) if at else hidden) @ layers[at] + layers[at + 1]
        odds_M = scores_M - np.log1p(np.exp(hidden[:, 0]))
        return float(np.mean(np.log1p(np.exp(np.where(right_M, -odds_M, odds_M)))))

    for layer, gradient in zip(layers, _gradients(layers, x_MI, scores_M, right_M), strict=True):
        assert layer.shape == gradient.shape
        for at in np.ndindex(layer.shape):
            kept, losses = layer[at], []
            for moved in (1e-5, -1e-5):
                layer[at] = kept + moved
                losses.append(loss())
            layer[at] = kept
            assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(gradient[at], rel=1e-4, abs=1e-7)


def test_an_order_learns_from_the_best_candidates_and_some_of_all_others():
    """Wide networks think too well of what they have never seen, so none of a long list is far from what they have."""
    scores_NC = np.tile(-np.arange(100, dtype=np.float32), (2, 1))
    ids_NC = np.tile(np.arange(100), (2, 1))
    none_NP = np.empty((2, 0), np.int64)
    few, more = taught(scores_NC, ids_NC, none_NP), taught(scores_NC, ids_NC, none_NP, OTHERS)
    assert few.tolist() == [[*range(TAUGHT)]] * 2
    assert more[:, :TAUGHT].tolist() == few.tolist()
    assert more.shape == (2, TAUGHT + OTHERS)
    others = more[0, TAUGHT:]
    assert others[-1] == 99
    assert (others[1:] <= 1.5 * others[:-1]).all()
    proposed_NT = taught(scores_NC, ids_NC, np.array([[70, 3], [-1, -1]]), OTHERS)
    assert proposed_NT.shape == (2, TAUGHT + OTHERS + 2)
    assert 70 in proposed_NT[0]
    assert taught(scores_NC[:, :5], ids_NC[:, :5], none_NP, OTHERS).tolist() == [[*range(5)]] * 2
