"""The learned order: its formula, and what it learns that no blend can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.errors import StorageError
from mach.reranking.order import HIDDEN, NAMES, SECTION, LearnedOrder
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


def test_it_learns_what_no_blend_can_and_twice_the_same():
    order, (inputs_NCI, scores_NC, right_NC) = LearnedOrder.learn(*planted(800, seed=0), 5), planted(200, seed=1)
    best_N = order.scores(scores_NC, inputs_NCI).argmax(axis=1)
    assert right_NC[np.arange(200), best_N].mean() > 0.95  # 0.5 by chance
    again = LearnedOrder.learn(*planted(800, seed=0), 5)
    for name in NAMES:
        np.testing.assert_array_equal(order.arrays[name], again.arrays[name])
    assert order.arrays["scales"][3] == 0
