"""What every entry of `AGGREGATES` must do, whatever it is: a new one is tested by its name alone, and by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach import config
from mach.errors import ConfigError
from mach.sketch.aggregates import AGGREGATES, aggregate_of, naive, reduce, transform
from mach.sketch.answers import TopK
from mach.sketch.decoder import Decoder, class_scores_oracle, padded, topk_oracle
from mach.sketch.hashing import UniversalAssignment
from mach.sketch.tables import TableAssignment
from tests.sketch.cases import SHAPES, STYLES, assert_same, assignments, bucket_scores, topk

PROBS_KR = np.array([[0.1, 0.2, 0.5, 0.7], [0.4, 0.2, 0.6, 0.7], [0.4, 0.8, 0.5, 0.7]])  # of the classes by hand
BY_HAND = {
    "mean": PROBS_KR.mean(axis=1),
    "unbiased-mean": 2 * (PROBS_KR.mean(axis=1) - 1 / 2),
    "log-mean": np.log(PROBS_KR).mean(axis=1),
    "logit-mean": np.log(PROBS_KR / (1 - PROBS_KR)).mean(axis=1),
    "min": PROBS_KR.min(axis=1),
    "median": np.median(PROBS_KR, axis=1),
    "trimmed-mean": np.sort(PROBS_KR, axis=1)[:, 1:-1].mean(axis=1),
}


def scores_of(probs_RN: np.ndarray, aggregate: str) -> np.ndarray:
    return reduce(transform(probs_RN, aggregate), aggregate, 64)


@pytest.mark.parametrize("aggregate", AGGREGATES)
class TestEveryAggregate:
    def test_it_is_what_it_is_by_hand(self, aggregate: str):
        assignment = TableAssignment.from_table([[0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1]], 2)
        probs_NRB = np.array([[[0.1, 0.4], [0.2, 0.8], [0.6, 0.5], [0.3, 0.7]]], dtype=np.float32)
        scores_1K = class_scores_oracle(probs_NRB, assignment, aggregate)
        np.testing.assert_allclose(scores_1K[0], BY_HAND[aggregate], rtol=1e-5)
        assert aggregate_of(aggregate).meaning

    def test_its_scale_is_monotone_and_finite(self, aggregate: str):
        probs = np.array([np.nan, -np.inf, -1, 0, 1e-45, 1e-38, 1e-4, 0.5, 1 - 2**-24, 1, 7, np.inf], dtype=np.float32)
        values = transform(probs, aggregate)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert np.all(np.diff(values) >= 0)
        assert values[7] > values[6] > values[0]
        assert values[0] == values[3]
        assert np.abs(values).max() <= aggregate_of(aggregate).largest

    @given(seed=st.integers(0, 2**32 - 1), R=st.integers(1, 9), style=st.sampled_from(STYLES))
    @settings(max_examples=30)
    def test_no_score_falls_where_a_bucket_score_rises(self, aggregate: str, seed: int, R: int, style: str):
        rng = np.random.default_rng(seed)
        probs_RN = np.nan_to_num(bucket_scores(style, assignments(1000, 37, 5)[0], R, rng)[:, 0, :])
        higher_RN = probs_RN.copy()
        higher_RN[rng.integers(R)] += rng.random(probs_RN.shape[1]).astype(np.float32)
        assert (scores_of(higher_RN, aggregate) >= scores_of(probs_RN, aggregate)).all()

    @given(seed=st.integers(0, 2**32 - 1), R=st.integers(1, 9))
    @settings(max_examples=30)
    def test_the_order_of_repetitions_means_nothing(self, aggregate: str, seed: int, R: int):
        rng = np.random.default_rng(seed)
        probs_RN = rng.random((R, 50), np.float32)
        other_RN = probs_RN[rng.permutation(R)]
        np.testing.assert_allclose(scores_of(other_RN, aggregate), scores_of(probs_RN, aggregate), rtol=1e-5, atol=1e-6)

    def test_a_probability_is_one(self, aggregate: str):
        found = naive(scores_of(np.random.default_rng(0).random((4, 99), np.float32), aggregate), aggregate)
        assert ((found >= 0) & (found <= 1)).all()

    def test_padded_values_are_the_transformed_ones(self, aggregate: str):
        probs_NRB = bucket_scores("damaged", assignments(1000, 37, 5)[0], 4, np.random.default_rng(5))
        values_NRP = padded(probs_NRB, aggregate)
        np.testing.assert_array_equal(values_NRP[:, :, :37], transform(probs_NRB, aggregate))
        assert np.isneginf(values_NRP[:, :, 37:]).all()

    @pytest.mark.parametrize("style", STYLES)
    def test_every_method_equals_the_oracle(self, aggregate: str, style: str):
        for shape in SHAPES:
            for assignment in assignments(*shape):
                probs_NRB = bucket_scores(style, assignment, 3, np.random.default_rng(7))
                for k in (1, 10, 60):
                    expected = topk_oracle(probs_NRB, assignment, k, aggregate)
                    for method in ("auto", "gather", "threshold"):
                        found = topk(probs_NRB, assignment, k, aggregate=aggregate, method=method)
                        assert_same(found, expected)
                        assert found.exact_N.all()
                        assert np.array_equal(found.bound_N, expected[1][:, -1])

    @given(
        seed=st.integers(0, 2**32 - 1),
        style=st.sampled_from(["sharp", "noise", "ties"]),
        R=st.integers(1, 9),
        B=st.integers(2, 70),
        K=st.integers(1, 3000),
    )
    @settings(max_examples=20)
    def test_thresholds_find_what_the_oracle_finds(self, aggregate: str, seed: int, style: str, R: int, B: int, K: int):
        """Repetitions of very different scale, so that thresholds differ between them, in any order."""
        rng = np.random.default_rng(seed)
        whole = UniversalAssignment.draw(n_classes=K, n_buckets=B, n_repetitions=R, seed=seed)
        implicit = whole.select(rng.permutation(R)[: rng.integers(1, R + 1)].tolist())
        table = TableAssignment.from_table(implicit.buckets(np.arange(K)), B)
        probs_NRB = bucket_scores(style, implicit, 2, rng) ** rng.uniform(0.2, 2, (implicit.n_repetitions, 1))
        k = int(rng.integers(1, 40))
        expected = topk_oracle(probs_NRB, implicit, k, aggregate)
        for assignment in (implicit, table):
            assert_same(topk(probs_NRB, assignment, k, aggregate=aggregate, method="threshold"), expected)

    def test_scores_of_given_classes_equal_the_oracle(self, aggregate: str):
        for assignment in assignments(1000, 37, 5):
            rng = np.random.default_rng(5)
            probs_NRB = bucket_scores("damaged", assignment, 4, rng)
            ids_NC = rng.integers(-1, 1000, (4, 50))
            expected = np.take_along_axis(class_scores_oracle(probs_NRB, assignment, aggregate), ids_NC, axis=1)
            expected[ids_NC == -1] = -np.inf
            np.testing.assert_array_equal(Decoder(assignment, aggregate).score(probs_NRB, ids_NC), expected)

    def test_a_batch_equals_its_queries_one_by_one(self, aggregate: str):
        assignment = assignments(3000, 64, 4)[0]
        probs_NRB = bucket_scores("sharp", assignment, 9, np.random.default_rng(0))
        decoder = Decoder(assignment, aggregate)
        decoder._chunks = lambda n, first=0: [slice(i, i + 4) for i in range(first, n, 4)]  # type: ignore
        batch = decoder.topk(np.asfortranarray(probs_NRB), 7, method="threshold")
        single = TopK.concatenate(
            [Decoder(assignment, aggregate).topk(p[None], 7, method="threshold") for p in probs_NRB]
        )
        for name, column in vars(batch).items():
            np.testing.assert_array_equal(column, getattr(single, name), err_msg=name)


def test_the_configuration_names_the_aggregates_of_the_table():
    assert set(get_args(config.Aggregate)) == {"auto", *AGGREGATES}


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown aggregate 'max': choose one of mean, .*, log-mean, .*median"):
        aggregate_of("max")


def test_a_trimmed_mean_does_not_hear_one_repetition_that_went_wrong():
    right, other = [0.3, 0.25, 0.35, 0.0, 0.3], [0.1, 0.05, 0.1, 1.0, 0.1]  # the fourth of five has lost its weights
    probs_RN = np.array([right, other], np.float32).T
    best = {name: int(scores_of(probs_RN, name).argmax()) for name in ("mean", "log-mean", "trimmed-mean")}
    assert best == {"mean": 1, "log-mean": 1, "trimmed-mean": 0}
    np.testing.assert_array_equal(scores_of(probs_RN[:2], "trimmed-mean"), scores_of(probs_RN[:2], "mean"))


def test_the_unbiased_mean_is_unbiased():
    probs_K = np.array([0.6, 0.3, 0.1, 0.0])
    p, rng = 10_007, np.random.default_rng(2)
    assignment = UniversalAssignment(4, 5, p, rng.integers(1, p, 20_000), rng.integers(0, p, 20_000))
    probs_1RB = np.stack([np.bincount(row, probs_K, minlength=5) for row in assignment.buckets(np.arange(4))])[None]
    assert class_scores_oracle(probs_1RB, assignment, "unbiased-mean")[0] == pytest.approx(probs_K, abs=0.02)
