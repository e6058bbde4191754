import functools
import itertools
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from mach.errors import ConfigError, DataError
from mach.sketch import decoder as module
from mach.sketch.aggregates import AGGREGATES
from mach.sketch.answers import TopK
from mach.sketch.decoder import MAX_PADDING, Decoder, class_scores_oracle, topk_oracle
from mach.sketch.hashing import MAX_CAPACITY, UniversalAssignment
from mach.sketch.kernels import lanes
from mach.sketch.kernels.scan import scan
from mach.sketch.kernels.sweep import modulus_of
from tests.sketch.cases import SHAPES, STYLES, assert_same, assignments, bucket_scores, topk


@pytest.mark.parametrize("style", ["sharp", "noise", "ties"])
@pytest.mark.parametrize("aggregate", ["mean", "unbiased-mean", "log-mean", "logit-mean"])
def test_queries_scanned_together_have_the_oracle_s_answers(aggregate, style, monkeypatch):
    """77 queries: 16 by themselves, three whole scans and one that lacks queries; some are left to the search."""
    scanned = []
    monkeypatch.setattr(module, "_MET", -1.0)

    def watched(*given: Any) -> np.ndarray:
        scanned.append(scan(*given))
        return scanned[-1]

    monkeypatch.setattr(module, "scan", watched)
    for K, R, B in ((3000, 1, 70), (5000, 4, 64), (700, 7, 33)):
        for assignment in assignments(K, B, R):
            probs_NRB = bucket_scores(style, assignment, 77, np.random.default_rng(7))
            for k in (1, 10, K // 32):
                found = topk(probs_NRB, assignment, k, aggregate=aggregate)
                assert_same(found, topk_oracle(probs_NRB, assignment, k, aggregate))
                assert found.exact_N.all()
                assert np.array_equal(found.bound_N, found.scores_Nk[:, -1])
    assert all(len(certain_N) == 61 for certain_N in scanned)
    share = np.concatenate(scanned[9:]).mean()  # classes that share the only bucket of one function are tied
    assert share > 0.8 or style == "ties"


@pytest.mark.parametrize("style", ["sharp", "noise", "ties"])
@pytest.mark.parametrize("aggregate", list(AGGREGATES))
def test_a_large_part_of_the_classes_is_found_without_a_search(aggregate, style, monkeypatch):
    monkeypatch.setattr(module, "search", None)
    for assignment in assignments(3000, 64, 2):
        probs_NRB = bucket_scores(style, assignment, 5, np.random.default_rng(7))
        for k in (module.MANY, 2999, 3000, 3010):
            found = topk(probs_NRB, assignment, k, aggregate=aggregate)
            assert_same(found, topk_oracle(probs_NRB, assignment, k, aggregate))
            assert found.exact_N.all()
            assert np.array_equal(found.bound_N, found.scores_Nk[:, -1])


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(AGGREGATES)), st.sampled_from(STYLES), st.sampled_from(SHAPES))
@settings(max_examples=60)
def test_a_budget_keeps_its_promises(seed, aggregate, style, shape):
    rng = np.random.default_rng(seed)
    assignment = assignments(*shape)[rng.integers(3)]
    K, k = assignment.n_classes, 5
    probs_NRB = bucket_scores(style, assignment, 3, rng)
    allowed_K = rng.random(K) < 0.7 if rng.random() < 0.5 else None
    budget = int(rng.integers(0, 2 * K))
    found = topk(probs_NRB, assignment, k, aggregate=aggregate, budget=budget, allowed_K=allowed_K, method="threshold")
    scores_NK = class_scores_oracle(probs_NRB, assignment, aggregate)
    if allowed_K is not None:
        scores_NK[:, ~allowed_K] = -np.inf
    assert found.n_scored_N.max() <= budget
    for n in range(3):
        ids = found.ids_Nk[n][found.ids_Nk[n] >= 0]
        assert len(set(ids)) == len(ids)
        assert np.array_equal(found.scores_Nk[n, : len(ids)], scores_NK[n, ids])
        assert np.all(np.delete(scores_NK[n], ids) <= found.bound_N[n])
        if found.exact_N[n]:
            best = np.argsort(-scores_NK[n], kind="stable")[:k]
            assert np.array_equal(ids, best[np.isfinite(scores_NK[n, best])])


def test_a_small_budget_is_not_called_exact():
    assignment = assignments(3000, 64, 4)[0]
    probs_NRB = bucket_scores("noise", assignment, 4, np.random.default_rng(0))
    assert not topk(probs_NRB, assignment, 10, budget=100).exact_N.any()
    nothing = topk(probs_NRB, assignment, 2, budget=0)
    assert np.all(nothing.ids_Nk == -1)
    assert np.all(nothing.bound_N >= topk(probs_NRB, assignment, 1).scores_Nk[:, 0])


@pytest.mark.parametrize("share", [0, 0.002, 0.3, 1])
@pytest.mark.parametrize("method", ["auto", "gather", "threshold"])
def test_only_allowed_classes_are_returned(share, method):
    for assignment in assignments(3000, 64, 4):
        rng = np.random.default_rng(3)
        allowed_K = rng.random(3000) < share
        probs_NRB = bucket_scores("sharp", assignment, 2, rng)
        scores_NK = class_scores_oracle(probs_NRB, assignment, "log-mean")
        scores_NK[:, ~allowed_K] = -np.inf
        best_Nk = np.argsort(-scores_NK, axis=1, kind="stable")[:, :8]
        scores_Nk = np.take_along_axis(scores_NK, best_Nk, axis=1)
        found = topk(probs_NRB, assignment, 8, allowed_K=allowed_K, method=method)
        assert_same(found, (np.where(np.isfinite(scores_Nk), best_Nk, -1), scores_Nk))


@pytest.mark.parametrize("method", ["auto", "threshold"])
def test_flat_scores_cost_little_more_than_a_scan(method):
    for assignment in assignments(20_000, 60, 6):
        probs_NRB = bucket_scores("noise", assignment, 3, np.random.default_rng(2))
        found = topk(probs_NRB, assignment, 300, method=method)
        assert_same(found, topk_oracle(probs_NRB, assignment, 300, "log-mean"))
        assert found.n_scored_N.min() >= 20_000  # the thresholds gave up
        assert found.n_scored_N.max() < 2.2 * 20_000


def test_a_budget_for_a_scan_is_never_left_half_used():
    for assignment in assignments(20_000, 60, 6):
        probs_NRB = bucket_scores("noise", assignment, 3, np.random.default_rng(2))
        expected = topk_oracle(probs_NRB, assignment, 300, "log-mean")
        for budget in (20_000, 21_000, 30_000, 10**9):
            found = topk(probs_NRB, assignment, 300, budget=budget, method="threshold")
            assert_same(found, expected)
            assert found.exact_N.all()
            assert found.n_scored_N.max() <= budget
        small = topk(probs_NRB, assignment, 300, budget=10_000, method="threshold")
        assert small.n_scored_N.min() > 7000  # buckets are opened until the next does not fit


@pytest.mark.parametrize("features", [{}, {"avx512f": True}])
def test_sixteen_lanes_equal_numpy(features, monkeypatch):
    """With and without gather instructions, as far as the processor has them."""
    if features and not llvm.get_host_cpu_features().get("avx512f", False):
        pytest.skip("the processor has no AVX-512")
    host = SimpleNamespace(get_host_cpu_features=lambda: features, get_host_cpu_name=lambda: "unknown")
    monkeypatch.setattr("mach.sketch.kernels.lanes.llvm", host)
    progression: Any = lanes.add_progression
    listed: Any = lanes.add_listed

    @njit
    def run(sums, values_RB, steps, lists, modulus, test):
        first = progression(sums, 16, values_RB, 1, steps, 0, np.uint32(96), modulus, test)
        return first, listed(sums, 0, values_RB, 1, lists, 0, 1, 3, test)

    rng = np.random.default_rng(0)
    values_RB = rng.normal(size=(2, 70)).astype(np.float32)
    steps, lists = rng.integers(0, 97, (1, 2, 32)).astype(np.uint32), rng.integers(0, 70, (1, 2, 20)).astype(np.uint16)
    for is_counting in (False, True):
        sums = np.zeros(32, np.float32)
        bits = run(sums, values_RB, steps, lists, modulus_of(97, 70), (np.float32(-0.5), np.float32(0.1), is_counting))
        found = values_RB[1][np.concatenate([lists[0, 1, 3:19], (96 + steps[0, 1, 16:].astype(np.int64)) % 97 % 70])]
        expected = np.where(found < np.float32(0.1), -1, 0) if is_counting else found
        np.testing.assert_array_equal(sums, expected.astype(np.float32))
        enough = [sum(1 << i for i in range(16) if part[i] >= -0.5) for part in (sums[16:], sums[:16])]
        assert list(bits) == enough


@given(st.integers(1, MAX_CAPACITY), st.lists(st.integers(0, MAX_CAPACITY), min_size=1))
def test_division_by_multiplication_is_exact(n_buckets, images):
    _, _, multiplier, shift = (int(number) for number in modulus_of(MAX_CAPACITY, n_buckets))
    assert multiplier < 2**32
    largest = MAX_CAPACITY // n_buckets * n_buckets
    for z in (*images, largest, largest - 1):
        assert z * multiplier >> shift == z // n_buckets


def test_few_buckets_are_opened_on_sharp_scores():
    for assignment in assignments(60_000, 1024, 6)[:2]:
        probs_NRB = np.exp(np.random.default_rng(0).normal(-8, 0.5, (4, 6, 1024))).astype(np.float32)
        truth = [5, 77, 59_999]
        probs_NRB[:, np.arange(6)[:, None], assignment.buckets(truth)] = np.array([0.9, 0.8, 0.7])
        found = topk(probs_NRB, assignment, 3)
        assert found.ids_Nk.tolist() == [truth] * 4
        assert found.n_opened_N.max() < 6 * 10
        assert found.n_scored_N.max() < 0.06 * 60_000


def test_ten_million_implicit_classes_need_no_table():
    K, R, B = 10_000_019, 4, 16384
    assignment = UniversalAssignment.draw(n_classes=K, n_buckets=B, n_repetitions=R, seed=9)
    probs_NRB = np.exp(np.random.default_rng(0).normal(-9, 0.3, (1, R, B))).astype(np.float32)
    truth = np.array([0, 123_456, 9_876_543, K - 1])
    probs_NRB[0, np.arange(R)[:, None], assignment.buckets(truth)] = np.array([0.9, 0.8, 0.7, 0.6])
    topk(probs_NRB[:, :2], assignment.select([0, 1]), 4)  # compiles
    tracemalloc.start()
    found = topk(probs_NRB, assignment, 4, method="threshold")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.ids_Nk[0].tolist() == truth.tolist()
    assert found.exact_N[0]
    assert peak_bytes < K / 2  # a K-sized array of single bytes would show
    np.testing.assert_array_equal(found.scores_Nk, Decoder(assignment).score(probs_NRB, truth[None]))


def members_of(assignment: UniversalAssignment, r: int, bucket: int) -> np.ndarray:
    """Classes of one bucket, by the inverse of the hash function."""
    shifted = (np.arange(bucket, assignment.prime, assignment.n_buckets) - assignment.offsets_R[r]) % assignment.prime
    classes = shifted * assignment.inverses_R[r] % assignment.prime
    return classes[classes < assignment.n_classes]


@pytest.mark.parametrize("n_buckets", [4096, 5000])
def test_the_largest_capacity_can_be_decoded(n_buckets):
    assignment = UniversalAssignment.draw(n_classes=MAX_CAPACITY, n_buckets=n_buckets, n_repetitions=2, seed=3)
    probs_NRB = np.full((1, 2, n_buckets), 1e-4, dtype=np.float32)
    truth = MAX_CAPACITY - 1
    probs_NRB[0, [0, 1], assignment.buckets([truth])[:, 0]] = 0.9
    found = topk(probs_NRB, assignment, 3, budget=2**31 // n_buckets * 3)
    twins = functools.reduce(
        np.intersect1d, [members_of(assignment, r, int(assignment.buckets([truth])[r, 0])) for r in (0, 1)]
    )
    assert truth in twins
    assert np.array_equal(found.ids_Nk[0], twins[:3])


def test_ties_go_to_the_smaller_class():
    for assignment, method in itertools.product(assignments(3000, 64, 4), ("gather", "threshold")):
        found = topk(np.full((1, 4, 64), 0.5), assignment, 5, method=method)
        assert found.ids_Nk.tolist() == [[0, 1, 2, 3, 4]]


def test_misfits():
    assignment = assignments(5, 8, 3)[0]
    probs_NRB = np.full((2, 3, 8), 0.1, dtype=np.float32)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ConfigError, "aggregate 'max'", lambda: topk(probs_NRB, assignment, aggregate="max")),
        (ConfigError, "method 'sort'", lambda: topk(probs_NRB, assignment, method="sort")),
        (ConfigError, "k 0", lambda: topk(probs_NRB, assignment, 0)),
        (ConfigError, "budget 3", lambda: topk(probs_NRB, assignment, method="gather", budget=3)),
        (DataError, r"\(N, 3, 8\)", lambda: topk(probs_NRB[:, :2], assignment)),
        (DataError, r"shape \(5,\)", lambda: topk(probs_NRB, assignment, allowed_K=np.ones(4, dtype=bool))),
        (DataError, r"\(1, 2\).*\(2, 3, 8\).*\(N, C\)", lambda: Decoder(assignment).score(probs_NRB, [[0, 1]])),
        (ConfigError, r"k 1000000000 .* 10005: there are K = 5", lambda: topk(probs_NRB, assignment, 10**9)),
        (ConfigError, r"^k 10006 ", lambda: topk(probs_NRB, assignment, 5 + MAX_PADDING + 1)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("method", ["auto", "gather", "threshold"])
def test_columns_beyond_the_last_class_are_padding(method):
    for assignment in assignments(5, 8, 3):
        probs_NRB = bucket_scores("noise", assignment, 2, np.random.default_rng(0))
        found = topk(probs_NRB, assignment, 5 + MAX_PADDING, method=method)
        assert_same(found, topk_oracle(probs_NRB, assignment, 5 + MAX_PADDING, "log-mean"))
        assert (found.ids_Nk[:, 5:] == -1).all()


@pytest.mark.parametrize("n_parts", [1, 3])
def test_parts_concatenate_to_the_whole(n_parts):
    assignment = assignments(1000, 37, 5)[0]
    probs_NRB = bucket_scores("sharp", assignment, 6, np.random.default_rng(0))
    parts = [topk(part, assignment, 4, budget=500) for part in np.split(probs_NRB, n_parts)]
    whole = topk(probs_NRB, assignment, 4, budget=500)
    for name, column in vars(TopK.concatenate(parts)).items():
        np.testing.assert_array_equal(column, getattr(whole, name), err_msg=name)


def test_no_queries():
    found = topk(np.empty((0, 3, 8)), assignments(5, 8, 3)[0], 4)
    assert found.ids_Nk.shape == (0, 4)
