"""Products of features: where they lie, and what linear classifiers learn by them."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array, random_array

from mach.data.kernels.views import N_HASHED, hashed, with_pairs
from mach.reranking.kernels.rerank import fit_classes


def rows_of(n_rows: int, n_features: int, seed: int) -> csr_array:
    x = csr_array(random_array((n_rows, n_features), density=0.4, rng=np.random.default_rng(seed), dtype=np.float32))
    x.indptr, x.indices = x.indptr.astype(np.int64), x.indices.astype(np.int32)
    return x


def as_matrix(parts, n_features: int) -> csr_array:
    indptr, indices, values = parts
    made = csr_array((values, indices, indptr), shape=(len(indptr) - 1, n_features + N_HASHED))
    made.sum_duplicates()
    return made


def test_a_pair_has_one_place_and_different_pairs_spread():
    assert hashed(3, 70_000) == hashed(70_000, 3)
    places = {hashed(i, j) for i in range(300) for j in range(i)}
    assert len(places) > 0.97 * 300 * 299 / 2  # 44,850 pairs in a million places: 2.1 % meet by chance
    assert max(places) < N_HASHED


def fit(x: csr_array, signs: np.ndarray, pairs: int):
    own, others = (np.flatnonzero(signs == sign).astype(np.int32) for sign in (1, -1))
    given = np.array([0, len(own)]), own, np.array([0, len(others)]), others
    return fit_classes(
        x.indptr, x.indices, x.data, *given, x.shape[1], pairs, False, 4.0, 10**6, 500, 1e-3, 0.0, 10**6, 0
    )


def test_classifiers_of_pairs_are_linear_ones_over_the_wider_rows():
    x = rows_of(60, 20, seed=1)
    signs = np.where(np.random.default_rng(2).random(60) < 0.3, 1, -1)
    wide = as_matrix(with_pairs(x.indptr, x.indices, x.data, np.arange(60), 5, 20), 20)
    wide.indptr, wide.indices = wide.indptr.astype(np.int64), wide.indices.astype(np.int32)
    narrow_fit, wide_fit = fit(x, signs, pairs=5), fit(wide, signs, pairs=0)
    np.testing.assert_array_equal(narrow_fit[1], wide_fit[1])
    np.testing.assert_allclose(narrow_fit[2], wide_fit[2], atol=5e-3)
    np.testing.assert_allclose(narrow_fit[3], wide_fit[3], atol=5e-3)


def test_what_only_two_features_together_say_is_learned():
    """The class is there if exactly one of two features is: no linear classifier gets more than three of four right."""
    values = np.array([[a, b, 1.0] for a in (0, 1) for b in (0, 1)] * 10, np.float32)
    values[:, :2] += np.float32(1e-3)  # absent ones stay in the row, so that each has both products
    x = csr_array(values)
    x.indptr, x.indices = x.indptr.astype(np.int64), x.indices.astype(np.int32)
    signs = np.where(values[:, 0].round() != values[:, 1].round(), 1, -1)

    def n_right(pairs: int) -> int:
        offsets, features, weights, biases, _ = fit(x, signs, pairs)
        w = csr_array((weights, features, offsets), shape=(1, 3 + N_HASHED))
        rows = as_matrix(with_pairs(x.indptr, x.indices, x.data, np.arange(len(values)), pairs, 3), 3)
        return int((np.sign((rows @ w.T).toarray()[:, 0] + biases[0]) == signs).sum())

    assert n_right(0) <= 30
    assert n_right(3) == 40
