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
from mach.estimator.rows import Reservoir, Rows, concatenated
from mach.estimator.vocabulary import Targets, Vocabulary

values = st.one_of(
    st.integers(-5, 5), st.text(max_size=2), st.none(), st.tuples(st.integers(0, 2), st.text(max_size=1))
)
rows_of_classes = st.lists(st.lists(values, max_size=3), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows_of_classes, rows_of_classes)
def test_ids_stay_and_stand_for_their_values(first: list[Any], second: list[Any]):
    before = Targets._of_lists(first)
    vocabulary = Vocabulary.of(before)
    grown = vocabulary.grown(Targets._of_lists(second))
    assert grown.array.tolist()[: len(vocabulary)] == vocabulary.array.tolist()
    assert set(grown.array.tolist()) == {value for row in first + second for value in row}
    indptr, ids = grown.rows(before)
    for n, row in enumerate(first):
        found = ids[indptr[n] : indptr[n + 1]]
        assert {grown.array.tolist()[k] for k in found} == set(row)
        assert (np.diff(found) > 0).all()
    again = Vocabulary.from_json(json.loads(json.dumps(grown.to_json())))
    assert again.array.tolist() == grown.array.tolist()
    assert again.array.dtype == grown.array.dtype


def test_numbers_never_become_strings():
    vocabulary = Vocabulary.of(Targets.read([3, 1])).grown(Targets.read(["1", "three"]))
    assert vocabulary.array.tolist() == [1, 3, "1", "three"]
    times = Vocabulary(np.array(["2026-01-02", "2025-01-01"], "datetime64[D]"))
    assert Vocabulary.from_json(json.loads(json.dumps(times.to_json()))).array.dtype == times.array.dtype


def test_unknown_classes_have_no_id():
    vocabulary = Vocabulary.of(Targets.read(["a", "b"]))
    assert vocabulary.ids(Targets.read(["b", "c"])).tolist() == [1, -1]
    indptr, ids = vocabulary.rows(Targets.read([["c", "b"], ["c"]]))
    assert (indptr.tolist(), ids.tolist()) == ([0, 1, 1], [1])


@pytest.mark.parametrize("matrix", [[[0, 2], [1, 0]], [[0.5, 1.0], [0.0, 1.0]]])
def test_an_indicator_holds_0_and_1(matrix):
    with pytest.raises(DataError, match="Unknown label type"):
        Targets.read(np.array(matrix))


def test_what_cannot_be_hashed_is_refused():
    with pytest.raises(DataError, match="give hashable values"):
        Vocabulary.of(Targets.read([{"a": 1}, {"b": 2}]))


def numbered(begin: int, end: int, *, sparse: bool) -> Rows:
    """Rows whose only feature and only class are their number."""
    features: Any = np.arange(begin, end, dtype=np.float32)[:, None]
    n = end - begin
    return Rows(
        csr_array(features) if sparse else features, np.arange(n + 1), np.arange(begin, end, dtype=np.int32), end
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_kept_rows_are_an_even_draw_of_all(sparse: bool):
    times_kept = np.zeros(60)
    for seed in range(400):
        generator = np.random.default_rng(seed)
        kept = Reservoir.of(numbered(0, 30, sparse=sparse), 10, generator)
        kept = kept.joined(numbered(30, 60, sparse=sparse), 10, generator)
        features: Any = kept.rows.features
        numbers = (features.toarray() if sparse else features)[:, 0]
        assert np.array_equal(numbers, kept.rows.class_ids)  # features stay with their classes
        assert len(np.unique(numbers)) == 10
        times_kept[numbers.astype(int)] += 1
    assert abs(times_kept[:30].mean() - 400 / 6) < 5  # neither earlier nor later ones more often
    assert times_kept.min() > 30
    assert len(kept.drawn(4, generator)) == 4
    assert len(concatenated(kept.rows, kept.drawn(99, generator))) == 20
