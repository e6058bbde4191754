"""Compiled classifiers against plain numpy and scipy, and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.sparse import csr_array, random_array
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from mach.data.rows import RowView
from mach.reranking.kernels.best import keep
from mach.reranking.kernels.rerank import UNSEEN, fit_classes, margins
from mach.reranking.signals.classifiers import ClassifierSet, encode
from tests.reranking.oracles import weights_of


def problem(n_rows: int, n_features: int, seed: int):
    """Sparse rows and, for each of three classes, its rows and those that list it."""
    generator = np.random.default_rng(seed)
    x = csr_array(random_array((n_rows, n_features), density=0.2, rng=generator, dtype=np.float32))
    x.indptr, x.indices = x.indptr.astype(np.int64), x.indices.astype(np.int32)
    own = [np.sort(generator.choice(n_rows, n_rows // 4, replace=False)) for _ in range(2)] + [np.array([], int)]
    listed = [np.sort(generator.choice(n_rows, n_rows // 2, replace=False)) for _ in range(3)]
    return x, own, listed


def csr(lists) -> tuple[np.ndarray, np.ndarray]:
    return np.cumsum([0, *map(len, lists)]), np.concatenate(lists).astype(np.int32)


def fit(
    x, own, listed, *, cost=2.0, most=10**6, iterations=2000, tolerance=1e-5, threshold=0.0, seed=0, logistic=False,
    pairs=0, most_weights=10**6,
):  # fmt: skip
    return fit_classes(
        x.indptr, x.indices, x.data, *csr(own), *csr(listed), x.shape[1],
        pairs, logistic, cost, most, iterations, tolerance, threshold, most_weights, seed,
    )  # fmt: skip


def dense(fitted, n_features: int) -> np.ndarray:
    offsets, features, weights, *_ = fitted
    return csr_array((weights, features, offsets), shape=(len(offsets) - 1, n_features)).toarray()


def fit_oracle(x: np.ndarray, signs: np.ndarray, cost: float) -> tuple[np.ndarray, float]:
    """The same objective, minimised in float64 by scipy."""
    x = np.hstack([x, np.ones((len(x), 1))]).astype(float)

    def objective(w):
        short = np.maximum(0, 1 - signs * (x @ w))
        return w @ w / 2 + cost * short @ short, w - 2 * cost * x.T @ (signs * short)

    w = minimize(objective, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}).x
    return w[:-1], w[-1]


@pytest.mark.parametrize("cost", [0.1, 2.0])
def test_fitted_classes_minimise_the_objective(cost: float):
    x, own, listed = problem(80, 30, seed=3)
    fitted = fit(x, own, listed, cost=cost)
    weights_KD, biases_K = dense(fitted, 30), fitted[3]
    for k in range(2):
        rows = np.concatenate([own[k], np.setdiff1d(listed[k], own[k])])
        signs = np.where(np.arange(len(rows)) < len(own[k]), 1, -1)
        w_D, bias = fit_oracle(x[rows].toarray(), signs, cost)
        assert weights_KD[k] == pytest.approx(w_D, abs=1e-3)
        assert biases_K[k] == pytest.approx(bias, abs=1e-3)
        svc = LinearSVC(loss="squared_hinge", C=cost, tol=1e-7, max_iter=10**5).fit(x[rows].toarray(), signs)
        assert weights_KD[k] == pytest.approx(svc.coef_[0], abs=1e-3)
    assert (weights_KD[2] == 0).all()
    assert biases_K[2] == -1  # no row of its own


@pytest.mark.parametrize("cost", [0.1, 8.0, 1000.0])
def test_fitted_logistic_classes_minimise_the_objective(cost: float):
    x, own, listed = problem(80, 30, seed=3)
    fitted = fit(x, own, listed, cost=cost, logistic=True, iterations=20_000, tolerance=1e-4)
    weights_KD, biases_K = dense(fitted, 30), fitted[3]
    for k in range(2):
        rows = np.concatenate([own[k], np.setdiff1d(listed[k], own[k])])
        signs = np.where(np.arange(len(rows)) < len(own[k]), 1, -1)
        with_one = np.hstack([x[rows].toarray(), np.ones((len(rows), 1))]).astype(float)
        oracle = LogisticRegression(C=cost, fit_intercept=False, tol=1e-8, max_iter=10**5).fit(with_one, signs)
        found = np.append(weights_KD[k], biases_K[k])
        assert found == pytest.approx(oracle.coef_[0], abs=0.01 * np.abs(oracle.coef_).max())
    assert (weights_KD[2] == 0).all()
    assert biases_K[2] == UNSEEN


def test_a_class_does_not_depend_on_its_neighbours_and_small_weights_go():
    x, own, listed = problem(60, 20, seed=5)
    whole = fit(x, own, listed, iterations=5)
    alone = fit(x, own[1:], listed[1:], iterations=5, seed=1)
    np.testing.assert_array_equal(dense(whole, 20)[1:], dense(alone, 20))
    pruned = dense(fit(x, own, listed, iterations=5, threshold=0.2), 20)
    np.testing.assert_array_equal(pruned, np.where(np.abs(dense(whole, 20)) >= 0.2, dense(whole, 20), 0))
    capped = dense(fit(x, own, listed, iterations=5, most_weights=4), 20)
    for k, weights_D in enumerate(dense(whole, 20)):
        largest = np.argsort(-np.abs(weights_D), kind="stable")[:4]
        np.testing.assert_array_equal(capped[k], np.where(np.isin(np.arange(20), largest), weights_D, 0))
    hard = [np.setdiff1d(listed[k], own[k]) for k in range(2)]
    assert fit(x, own, listed, most=0)[4] == sum(map(len, own))
    assert fit(x, own, listed, most=1)[4] == sum(len(own[k]) + min(len(own[k]) + 1, len(hard[k])) for k in range(2))


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([5, 100_000]))
def test_encoded_weights_come_back_and_margins_equal_the_matrix(seed: int, n_features: int):
    generator = np.random.default_rng(seed)
    counts_K = generator.integers(0, 6, 4)
    features = [np.sort(generator.choice(n_features, min(n, n_features), replace=False)) for n in counts_K]
    offsets, flat = csr(features)
    weights = generator.normal(size=len(flat)).astype(np.float32)
    ends, gaps, codes, scales = encode(offsets, flat, weights)
    biases = generator.normal(size=4).astype(np.float32)
    arrays: dict[str, np.ndarray] = {"offsets": ends, "gaps": gaps, "codes": codes, "scales": scales, "biases": biases}
    found = weights_of(ClassifierSet(arrays, RowView(n_features=n_features)))
    expected = csr_array((weights, flat, offsets), shape=(4, n_features)).toarray()
    assert np.abs(found.toarray() - expected).max() <= (scales.max() / 2) * 1.001
    x = csr_array(random_array((3, n_features), density=0.5, rng=generator, dtype=np.float32))
    ids_NC, out_NC = generator.integers(-1, 4, (3, 5)), np.empty((3, 5), np.float32)
    x_D = np.zeros(n_features + 1, np.float32)
    rows = (x.indptr.astype(np.int64), x.indices.astype(np.int32), x.data)
    margins(rows, ids_NC, (ends, gaps, codes, scales, biases), x_D, out_NC)
    all_NK = (x @ found.T).toarray() + biases
    oracle_NC = np.where(ids_NC < 0, 0, np.take_along_axis(all_NK, np.maximum(ids_NC, 0), axis=1))
    np.testing.assert_allclose(out_NC, oracle_NC, atol=1e-4)
    assert (x_D == 0).all()


def test_damaged_weights_are_read_within_bounds():
    ids_NC, out_NC = np.array([[0, 1, 2]]), np.empty((1, 3), np.float32)
    rows = (np.array([0, 1]), np.array([2], np.int32), np.ones(1, np.float32))
    offsets, gaps = np.array([0, 2, 99, 1]), np.array([-5, 30_000], np.int16)
    ones_K, x_D = np.ones(3, np.float32), np.zeros(4, np.float32)
    margins(rows, ids_NC, (offsets, gaps, np.ones(2, np.int8), ones_K, ones_K), x_D, out_NC)
    assert out_NC.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("n_found", [2, 40])
def test_the_best_are_kept_in_order_each_class_once(n_found):
    """More than there is room for, many of them equal, and classes that come again, better or worse."""
    generator = np.random.default_rng(n_found)
    classes, values = generator.integers(12, size=n_found), generator.integers(6, size=n_found).astype(np.float32)
    ids_P, best_P = np.full(5, -1), np.full(5, -np.inf, np.float32)
    most: dict[int, float] = {}
    for k, value in zip(classes.tolist(), values, strict=True):
        keep(ids_P, best_P, k, value)
        most[k] = max(float(value), most.get(k, -np.inf))
        ranked = sorted(most, key=lambda k: (-most[k], k))[:5]
        assert ids_P.tolist() == ranked + [-1] * (5 - len(ranked))
        assert best_P[: len(ranked)].tolist() == [most[k] for k in ranked]
