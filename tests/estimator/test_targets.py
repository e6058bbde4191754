"""Class values and ids, and rows kept against forgetting."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from mach.errors import DataError
from mach.estimator.rows import Reservoir, Rows
from mach.estimator.targets import Targets, from_json, grown, ids_of, to_json

values = st.one_of(
    st.integers(-5, 5), st.text(max_size=2), st.none(), st.tuples(st.integers(0, 2), st.text(max_size=1))
)
rows_of_classes = st.lists(st.lists(values, max_size=3), min_size=1, max_size=6)


@settings(max_examples=60)
@given(rows_of_classes, rows_of_classes)
def test_ids_stay_and_stand_for_their_values(first: list[Any], second: list[Any]):
    before = Targets.of_lists(first)
    classes = grown(np.empty(0), before)
    more = grown(classes, Targets.of_lists(second))
    assert more.tolist()[: len(classes)] == classes.tolist()
    assert set(more.tolist()) == {value for row in first + second for value in row}
    found = ids_of(more, before)
    for n, row in enumerate(first):
        ids = found.indices[found.indptr[n] : found.indptr[n + 1]]
        assert {more.tolist()[k] for k in ids} == set(row)
        assert (np.diff(ids) > 0).all()
    again = from_json(json.loads(json.dumps(to_json(more))))
    assert again.tolist() == more.tolist()
    assert again.dtype == more.dtype


def test_numbers_never_become_strings():
    classes = grown(grown(np.empty(0), Targets.read([3, 1])), Targets.read(["1", "three"]))
    assert classes.tolist() == [1, 3, "1", "three"]
    times = np.array(["2026-01-02", "2025-01-01"], "datetime64[D]")
    assert from_json(json.loads(json.dumps(to_json(times)))).dtype == times.dtype


def test_unknown_classes_are_the_last_column():
    classes = grown(np.empty(0), Targets.read(["a", "b"]))
    found = ids_of(classes, Targets.read([["c", "b", "b"], ["c"], []]))
    np.testing.assert_array_equal(found.toarray(), [[0, 1, 1], [0, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize("matrix", [[[0, 2], [1, 0]], [[0.5, 1.0], [0.0, 1.0]]])
def test_an_indicator_holds_0_and_1(matrix):
    with pytest.raises(DataError, match="Unknown label type"):
        Targets.read(np.array(matrix))


def test_what_cannot_be_hashed_is_refused():
    with pytest.raises(DataError, match="give hashable values"):
        grown(np.empty(0), Targets.read([{"a": 1}, {"b": 2}]))


def numbered(begin: int, end: int, *, sparse: bool) -> Rows:
    """Rows whose only feature and only class are their number."""
    numbers = np.arange(begin, end)
    features: Any = numbers[:, None].astype(np.float32)
    classes = csr_array((np.ones(end - begin, np.int8), (numbers - begin, numbers)), shape=(end - begin, end))
    return Rows(csr_array(features) if sparse else features, classes)


@pytest.mark.parametrize("sparse", [False, True])
def test_kept_rows_are_an_even_draw_of_all(sparse: bool):
    times_kept = np.zeros(60)
    for seed in range(400):
        generator = np.random.default_rng(seed)
        kept = Reservoir.of(numbered(0, 30, sparse=sparse), 10, generator)
        kept = kept.extended(numbered(30, 60, sparse=sparse), 10, generator)
        features: Any = kept.rows.features
        numbers = (features.toarray() if sparse else features)[:, 0]
        assert np.array_equal(numbers, kept.rows.classes.indices)  # features stay with their classes
        assert len(np.unique(numbers)) == 10
        times_kept[numbers.astype(int)] += 1
    assert abs(times_kept[:30].mean() - 400 / 6) < 5  # neither earlier nor later ones more often
    assert times_kept.min() > 30
    assert len(kept.drawn(4, generator)) == 4
    assert len(kept.rows.joined(kept.drawn(99, generator))) == 20
