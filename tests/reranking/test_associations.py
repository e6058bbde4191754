"""Rules of a feature and a class: counted and looked up, against plain loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, random_array

from mach.reranking.kernels import associations
from mach.reranking.kernels.associations import (
    CODES,
    LEAST_CONFIDENCE,
    count_rules,
    most_ruled,
    rules_for,
    scratch_of,
)
from tests.reranking.oracles import rule_numbers


def problem(seed: int, n_rows: int = 30, n_features: int = 8, n_classes: int = 6):
    generator = np.random.default_rng(seed)
    x = csr_array(random_array((n_rows, n_features), density=0.3, rng=generator, dtype=np.float32))
    x.data[generator.random(len(x.data)) < 0.1] = 0  # a stored 0 is no feature
    y = csr_array(random_array((n_rows, n_classes), density=0.3, rng=generator) != 0).astype(np.float32)
    return x, y


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from([1, 7, 2**24]), st.sampled_from([1, 2]))
def test_rules_are_those_of_plain_counting(seed: int, block: int, n_least: int):
    x, y = problem(seed)
    before, associations.BLOCK_PRODUCTS = associations.BLOCK_PRODUCTS, block
    try:
        offsets, classes, confidences, supports = count_rules(x, y, n_least)
    finally:
        associations.BLOCK_PRODUCTS = before
    x_ND, y_NK = x.toarray() != 0, y.toarray() != 0
    np.testing.assert_array_equal(supports, x_ND.sum(axis=0))
    for f in range(x.shape[1]):
        expected = {}
        for k in range(y.shape[1]):
            both = int((x_ND[:, f] & y_NK[:, k]).sum())
            share = both / (x_ND[:, f].sum() + 1)
            if both >= n_least and share >= LEAST_CONFIDENCE:
                expected[k] = round(CODES * share)
        span = slice(offsets[f], offsets[f + 1])
        found = dict(zip(classes[span].tolist(), confidences[span].tolist(), strict=True))
        assert found.keys() == expected.keys()
        assert all(abs(found[k] - expected[k]) <= 1 for k in found)  # halves round either way
        assert (np.diff(classes[span]) > 0).all()


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_what_rules_say_is_what_plain_loops_find(seed: int):
    x, y = problem(seed)
    rules = count_rules(x, y, 2)
    queries, _ = problem(seed + 1, n_rows=5)
    queries.data[::2] *= -1  # magnitudes count
    ids_NC = np.random.default_rng(seed).integers(-1, y.shape[1] + 2, (5, 9))  # some twice, some of none or new
    rows = (queries.indptr.astype(np.int64), queries.indices.astype(np.int32), queries.data)
    found_NC5 = np.full((5, 9, 5), -7, np.float32)
    scratch = scratch_of(y.shape[1])
    rules_for(rules, rows, scratch, ids_NC, found_NC5)
    assert not scratch[1].any()
    np.testing.assert_allclose(found_NC5, rule_numbers(rules, rows, ids_NC), rtol=1e-4, atol=1e-6)


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_classes_of_largest_mean_confidence_are_proposed(seed: int):
    x, y = problem(seed)
    offsets, classes, confidences, supports = rules = count_rules(x, y, 1)
    queries, _ = problem(seed + 1, n_rows=5)
    rows = (queries.indptr.astype(np.int64), queries.indices.astype(np.int32), queries.data)
    scratch, ids_NP = scratch_of(6), np.full((5, 3), -7)
    most_ruled(rules, rows, scratch, ids_NP)
    assert not scratch[0].any()
    share_FK = np.zeros((len(supports), 6))
    for f, span in enumerate(pairwise(offsets)):
        share_FK[f, classes[slice(*span)]] = confidences[slice(*span)]
    totals_NK = np.abs(queries.toarray()) @ share_FK
    for total_K, ids in zip(totals_NK, ids_NP.tolist(), strict=True):
        best = sorted(total_K[total_K > 0], reverse=True)[:3]
        np.testing.assert_allclose(total_K[[k for k in ids if k >= 0]], best, rtol=1e-5)
        assert ids[len(best) :] == [-1] * (3 - len(best))


def test_a_damaged_table_is_not_followed():
    rows = (np.array([0, 2]), np.array([0, 99], np.int32), np.ones(2, np.float32))
    found_NC5 = np.zeros((1, 2, 5), np.float32)
    table = (np.array([5, -3]), np.zeros(1, np.int32), np.ones(1, np.uint8), np.ones(1, np.int32))
    rules_for(table, rows, scratch_of(1), np.array([[0, 1]]), found_NC5)
    assert not found_NC5.any()
    ids_NP = np.zeros((1, 2), np.int64)
    most_ruled(table, rows, scratch_of(1), ids_NP)
    assert (ids_NP == -1).all()
