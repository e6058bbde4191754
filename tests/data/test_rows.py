"""How rows are seen, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array, random_array

from mach.data.batch import Batch, DenseBatch, SparseBatch, rows_of
from mach.data.kernels.views import hashed
from mach.data.rows import RowView

D = 12
VIEWS = st.builds(
    RowView,
    most=st.sampled_from([0, 1, 3, 64]),
    presence=st.sampled_from([0.0, 0.25]),
    power=st.sampled_from([1.0, 0.5, 1.5, 2.2]),
    pairs=st.sampled_from([0, 2, 3, 64]),
    n_features=st.just(D),
)


def batch_of(seed: int, n_rows: int = 5) -> SparseBatch:
    drawn = random_array((n_rows, D), density=0.5, rng=np.random.default_rng(seed), dtype=np.float32)
    x = csr_array(drawn)
    x.data = np.where(x.data < 0.4, -x.data, x.data)
    return SparseBatch(x.indptr.astype(np.int64), x.indices.astype(np.int32), x.data)


@settings(max_examples=60)  # kernels may be compiled first
@given(st.integers(0, 2**32), VIEWS)
def test_rows_are_seen_by_the_definition(seed: int, view: RowView):
    batch = batch_of(seed)
    seen = view.sparse(batch).matrix(view.n_columns)
    seen.sum_duplicates()
    for n in range(len(batch)):
        own = slice(batch.indptr[n], batch.indptr[n + 1])
        expected = view.row(batch.indices[own], batch.values[own])
        found = slice(seen.indptr[n], seen.indptr[n + 1])
        assert seen.indices[found].tolist() == sorted(expected)
        np.testing.assert_allclose(seen.data[found], [expected[j] for j in sorted(expected)], rtol=1e-4)


@settings(max_examples=40)
@given(st.integers(0, 2**32), VIEWS)
def test_a_row_is_seen_alone_as_among_others(seed: int, view: RowView):
    batch = batch_of(seed)
    chosen = np.array([3, 0, 3])
    together, alone = rows_of(view.batch(batch), chosen), view.batch(rows_of(batch, chosen))
    assert isinstance(together, SparseBatch)
    assert isinstance(alone, SparseBatch)
    assert together.indices.tolist() == alone.indices.tolist()
    assert together.values.tobytes() == alone.values.tobytes()


def test_rows_keep_their_largest_features_and_their_norm():
    batch = SparseBatch(
        np.array([0, 4, 6, 6]), np.array([1, 2, 3, 4, 0, 5], np.int32), np.array([1, -3, 2, 2, 1, 1], np.float32)
    )
    kept = RowView(most=2).batch(batch)
    assert isinstance(kept, SparseBatch)
    assert kept.indptr.tolist() == [0, 2, 4, 4]
    assert kept.indices.tolist() == [2, 3, 0, 5]
    assert kept.values.tolist() == pytest.approx([-3 * (18 / 13) ** 0.5, 2 * (18 / 13) ** 0.5, 1, 1])
    assert RowView().batch(batch) is batch
    again = RowView(most=2).batch(kept)
    assert isinstance(again, SparseBatch)
    assert again.values.tolist() == kept.values.tolist()


@settings(deadline=None)
@given(st.floats(0.3, 4.0), st.booleans(), st.integers(0, 2**32 - 1))
def test_powers_keep_signs_order_and_length(power: float, dense: bool, seed: int):
    rng = np.random.default_rng(seed)
    x_ND = (rng.standard_normal((6, 9)) * (rng.random((6, 9)) < 0.6)).astype(np.float32)
    x_ND[2] = 0
    batch: Batch = DenseBatch(x_ND)
    if not dense:
        matrix = csr_array(x_ND)
        batch = SparseBatch(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32), matrix.data)
    found = RowView(power=power).batch(batch)
    found_ND = found.values_ND if isinstance(found, DenseBatch) else found.matrix(9).toarray()
    raised_ND = np.sign(x_ND) * np.abs(x_ND.astype(np.float64)) ** power
    lengths = np.linalg.norm(x_ND, axis=1) / np.maximum(np.linalg.norm(raised_ND, axis=1), 1e-30)
    np.testing.assert_allclose(found_ND, raised_ND * lengths[:, None], rtol=1e-4, atol=1e-6)
    assert RowView().batch(batch) is batch


@settings(max_examples=30)
@given(st.integers(0, 2**32), VIEWS)
def test_members_are_the_features_behind_every_entry(seed: int, view: RowView):
    batch = rows_of(batch_of(seed, 1), np.array([0]))
    members, indices = view.members(batch), view.sparse(batch).indices.tolist()
    assert [own[0] if len(own) == 1 else D + int(hashed(*own)) for own in members] == indices
