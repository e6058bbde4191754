"""The parts of a score: Shapley values by their definition, and sums."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from mach.data.batch import rows_of
from mach.reranking.blend import Blend
from mach.reranking.breakdown import breakdown, shapley
from mach.reranking.model import Reranker
from mach.reranking.order import LearnedOrder
from mach.reranking.signals import SIGNALS
from mach.reranking.signals.contract import Material, Shortlist
from tests.reranking.test_order import some_network


def test_shapley_values_are_means_over_all_sequences():
    values_M, expected = np.random.default_rng(0).normal(size=16), np.zeros(4)
    for sequence in permutations(range(4)):
        there = 0
        for player in sequence:
            expected[player] += (values_M[there | 1 << player] - values_M[there]) / 24
            there |= 1 << player
    np.testing.assert_allclose(shapley(values_M), expected, atol=1e-12)


def pairs_of(shortlist: Shortlist) -> list[Shortlist]:
    """Each a query and a class."""
    return [
        Shortlist(
            rows_of(shortlist.batch, np.array([n])),
            shortlist.ids_NC[[n], c : c + 1],
            shortlist.scores_NC[[n], c : c + 1],
            shortlist.probs_NRB[[n]],
        )
        for n, c in np.argwhere(shortlist.ids_NC >= 0)[::3].tolist()
    ]


@pytest.mark.parametrize("is_learned", [False, True])
def test_parts_add_up_to_the_score(material: Material, shortlist: Shortlist, is_learned: bool):
    signals = [kind.fit(material) for kind in SIGNALS]
    n_columns = sum(signal.n_columns for signal in signals)
    order = LearnedOrder(some_network(1, n_columns).arrays, floor=-0.5) if is_learned else None
    reranker = Reranker(signals, Blend({"weight": 0.7, "prior": -0.3, "repeats": 2.0}), 9, order)
    n_shared = n_lifted = 0
    for pair in pairs_of(shortlist):
        start, parts = breakdown(reranker, pair)
        assert start + sum(part.added for part in parts) == pytest.approx(reranker.rescore(pair)[0, 0], abs=1e-4)
        if order:
            n_lifted += bool(
                (pair.ids_NC == reranker.proposed(pair.batch)).any() and pair.scores_NC[0, 0] < order.floor
            )
        [own] = [part for part in parts if part.signal.name == "classifiers"]
        if own.evidence:
            n_shared += 1
            given = own.signal.evidence(pair)
            assert given is not None
            ratios = [one.amount / before.amount for one, before in zip(own.evidence, given, strict=True)]
            assert ratios == pytest.approx([ratios[0]] * len(ratios))
            if is_learned:
                assert sum(one.amount for one in own.evidence) == pytest.approx(own.added, abs=1e-4)
    assert n_shared > 5
    assert n_lifted > 0 or not is_learned
