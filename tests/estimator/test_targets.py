"""Class values and ids, and rows kept against forgetting."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from mach.data.frames import texts_of
from mach.data.missing import is_missing
from mach.data.names import class_name
from mach.errors import DataError, OmissionWarning
from mach.estimator.classifier import MACHClassifier
from mach.estimator.rows import Reservoir, Rows
from mach.estimator.targets import Targets, from_json, grown, ids_of, to_json

values = st.one_of(
    st.integers(-5, 5), st.text(max_size=2), st.none(), st.tuples(st.integers(0, 2), st.text(max_size=1))
)
rows_of_classes = st.lists(st.lists(values, max_size=3), min_size=1, max_size=6)


def spelt(value: Any) -> Any:
    return class_name(value) if isinstance(value, str) else value


@settings(max_examples=60)
@given(rows_of_classes, rows_of_classes)
@example([["a\0", "\0 "]], [["\0"]])
def test_ids_stay_and_stand_for_their_values(first: list[Any], second: list[Any]):
    before = Targets.of_lists(first)
    classes = grown(np.empty(0), before)
    more = grown(classes, Targets.of_lists(second))
    assert more.tolist()[: len(classes)] == classes.tolist()
    assert set(more.tolist()) == {spelt(value) for row in first + second for value in row if not is_missing(value)}
    found = ids_of(more, before)
    for n, row in enumerate(first):
        ids = found.indices[found.indptr[n] : found.indptr[n + 1]]
        assert {more.tolist()[k] for k in ids} == {spelt(value) for value in row if not is_missing(value)}
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


class NAType:
    """What pandas has for a missing value: it cannot be compared, and is neither true nor false."""

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    __hash__ = object.__hash__


MISSING: list[Any] = [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), Decimal("sNaN"), NAType(), "", " \t"]


@pytest.mark.parametrize("nothing", MISSING, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("y", "values", "indptr"),
    [
        (lambda nothing: ["b", nothing, "a"], ["b", "a"], [0, 1, 1, 2]),
        (lambda nothing: np.array([3, nothing, 5], object), [3, 5], [0, 1, 1, 2]),
        (lambda nothing: [["b", nothing], nothing, [nothing], ["a"]], ["b", "a"], [0, 1, 1, 1, 2]),
        (lambda nothing: [nothing, ("a", nothing)], 1, [0, 0, 1]),
    ],
)
def test_what_is_missing_is_no_class(nothing: Any, y: Any, values: Any, indptr: list[int]):
    found = Targets.read(y(nothing))
    assert found.indptr.tolist() == indptr
    assert len(found.values) == 1 if values == 1 else found.values.tolist() == values
    known = grown(np.empty(0), Targets.read(["z"]), ["a", nothing])
    assert known.tolist() == ["a", "z"]


@pytest.mark.parametrize(
    ("y", "values"),
    [
        (np.array([2.0, np.nan, 1.0]), [2, 1]),
        (np.array(["2026-01-02", "NaT"], "datetime64[D]"), [date(2026, 1, 2)]),
        (np.array(["b", "", " "]), ["b"]),
        ([[1, None], [0, float("nan")], [0, 1]], [0, 1]),
        (np.array([[1, np.nan], [0, 1]]), [0, 1]),
        (np.array([[1, None], [0, 1]], object), [0, 1]),
        (csr_array((np.array([1.0, 0.0, np.nan, 1.0]), ([0, 0, 1, 1], [0, 1, 0, 1])), shape=(2, 2)), [0, 1]),
    ],
)
def test_what_is_missing_in_arrays_and_indicators(y: Any, values: list[Any]):
    before = None if isinstance(y, list | np.ndarray) else y.copy()
    found = Targets.read(y)
    assert found.values.tolist() == values
    if before is not None:  # the caller's matrix is left as it was
        np.testing.assert_array_equal(y.data, before.data)


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


@pytest.mark.parametrize("nothing", [None, float("nan"), ""])
def test_rows_without_a_class_teach_nothing(nothing: Any):
    """Where a row has one class it is left out; where it may have several it is a row of none."""
    X = np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    y: list[Any] = ["a" if n % 2 else "b" for n in range(40)]
    some = [nothing if n % 5 == 0 else value for n, value in enumerate(y)]
    kept = np.flatnonzero(np.arange(40) % 5)
    small: dict[str, Any] = {"epochs": 2, "random_state": 0}
    with pytest.warns(OmissionWarning, match="^y: 8 of 40 rows have no class, such as row 0, row 5, row 10; they are"):
        fitted = MACHClassifier(**small).fit(X, some)
    alone = MACHClassifier(**small).fit(X[kept], [y[n] for n in kept])
    np.testing.assert_array_equal(fitted.predict_proba(X), alone.predict_proba(X))
    with pytest.warns(OmissionWarning, match="^y: 8 of 40"):
        score = fitted.score(X, some, np.arange(40))
    assert score == alone.score(X[kept], [y[n] for n in kept], kept)
    with pytest.warns(OmissionWarning, match="^y: 8 of 40"):
        fitted.partial_fit(X, some, classes=["c", nothing])
    assert fitted.classes_.tolist() == ["a", "b", "c"]
    with pytest.raises(DataError, match="y has 40 rows and no class in them: there is nothing to learn"):
        fitted.partial_fit(X, [nothing] * 40)
    lists = MACHClassifier(**small).fit(X, [[value, nothing] if n % 5 else nothing for n, value in enumerate(y)])
    assert lists.classes_.tolist() == ["a", "b"]


def test_a_column_is_what_all_of_its_values_are():
    with pytest.raises(DataError, match="X, row 0 is None, no text"):
        texts_of([None] * 200 + ["red apple"])
    with pytest.raises(DataError, match="X, row 0 is nan, no text"):
        texts_of(np.array([float("nan")] * 150 + ["red apple"], object))


class Frame(dict[str, Any]):
    """A table with a column twice, as pandas allows."""

    columns = ("text", "more", "text")


def test_a_table_with_a_column_twice_is_refused():
    with pytest.raises(DataError, match="X has 2 columns 'text': rename or remove all but one"):
        texts_of(Frame(text=["a"], more=["b"]))


def test_features_that_follow_the_largest_are_refused():
    X = csr_array((np.ones(4), ([0, 1, 2, 3], [0, 1, 2, 2 * 10**9])), shape=(4, 2 * 10**9 + 1))
    with pytest.raises(DataError, match="X has D = 2000000001, and only 4 feature indices occur"):
        MACHClassifier(epochs=1).fit(X, ["a", "b", "a", "b"])


def test_names_that_differ_in_form_alone_are_one_class():
    targets = Targets.read(["caf\u00e9", " cafe\u0301", "tea "])
    classes = grown(np.empty(0), targets)
    assert classes.tolist() == ["caf\u00e9", "tea"]
    assert len(set(ids_of(classes, targets).indices[:2].tolist())) == 1
    lists = Targets.read([["tea", "tea "], [1, " tea"]])
    assert sorted(map(str, grown(np.empty(0), lists).tolist())) == ["1", "tea"]
    assert grown(classes, targets, ["tea\n", "new"]).tolist()[2:] == ["new"]


def test_classes_of_an_earlier_version_are_found_as_they_are_spelt():
    former = np.array(["tea ", "cafe\u0301"])
    assert grown(former, Targets.read(["tea", "caf\u00e9"])).tolist() == former.tolist()
    assert ids_of(former, Targets.read(["caf\u00e9", "tea", "tea "])).indices.tolist() == [1, 0, 0]
