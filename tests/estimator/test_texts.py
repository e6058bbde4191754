"""What a caller says of classes, in a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

import pyarrow as pa
from sklearn.base import clone

import mach
from mach import MACHClassifier
from mach.errors import DataError
from tests.data.test_class_texts import columns

SMALL: dict[str, Any] = {"hidden": 8, "epochs": 2, "random_state": 0, "candidates": 0}
TOLD = {"a": {"name": "apple", "alternatives": ["pomme"], "text": "round", "uri": "u:1"}, "b": "pear", "z": "plum"}
X, Y = ["red thing", "green thing"] * 8, ["a", "b"] * 8


def texts_of(classifier: MACHClassifier) -> list[list[Any]]:
    texts = classifier.model_.run.class_texts
    assert texts is not None
    return columns(texts)


def test_texts_of_classes_are_in_the_run_and_classes_without_rows_are_classes(tmp_path: Path) -> None:
    fitted = MACHClassifier(**SMALL, class_texts=TOLD).fit(X, Y)
    assert fitted.classes_.tolist() == ["a", "b", "z"]
    assert fitted.predict_proba(X[:2]).shape == (2, 3)
    expected = [["apple", "pear", "plum"], [("pomme",), (), ()], ["round", "", ""], ["u:1", "", ""], [(), (), ()]]
    assert texts_of(fitted) == expected
    assert fitted.model_.names([0, 2]) == ["apple", "plum"]
    features = fitted.model_.run.text_features
    assert features is not None
    assert len(features.counted(["pomme round plum pear"])[1]) == 4
    fitted.save(tmp_path / "saved")
    assert texts_of(MACHClassifier.load(tmp_path / "saved")) == expected
    model = mach.load(tmp_path / "saved")
    assert model.classes.ids_of(["a", "apple", "u:1", "plum"]).tolist() == [0, 0, 0, 2]
    assert clone(fitted).class_texts == TOLD


def test_without_texts_nothing_changes() -> None:
    plain = MACHClassifier(**SMALL).fit(X, Y)
    assert plain.model_.run.class_texts is None
    named = MACHClassifier(**SMALL, class_texts={}).fit(X, Y)
    np.testing.assert_array_equal(plain.predict_proba(X), named.predict_proba(X))


def test_classes_that_join_bring_their_texts(tmp_path: Path) -> None:
    fitted = MACHClassifier(**SMALL, class_texts=TOLD).fit(X, Y)
    fitted.save(tmp_path / "saved")
    for classifier, name in ((fitted, "cherry"), (MACHClassifier.load(tmp_path / "saved"), "")):
        if name:
            classifier.set_params(class_texts=TOLD | {"c": "cherry"})
        classifier.partial_fit(["blue thing", "red thing"] * 4, ["c", "a"] * 4)
        assert classifier.classes_.tolist() == ["a", "b", "z", "c"]
        found = texts_of(classifier)
        assert found[0] == ["apple", "pear", "plum", name]
        assert found[1][0] == ("pomme",)


def test_tables_and_files_say_the_same(tmp_path: Path) -> None:
    rows = [{"id": "1", "name": "one", "text": "first"}, {"id": "7", "name": "seven", "text": None}]
    (tmp_path / "c.csv").write_text("id,name,text\n1,one,first\n7,seven,\n")
    table = pa.Table.from_pylist(rows)
    for given in (table, table.to_reader(), str(tmp_path / "c.csv")):
        fitted = MACHClassifier(**SMALL, class_texts=given).fit(np.eye(4), [0, 1, 0, 1])
        assert fitted.classes_.tolist() == [0, 1, 7] if isinstance(given, str) else [0, 1, "7"]
        assert texts_of(fitted)[0] == ["0", "one", "seven"]
        assert texts_of(fitted)[2] == ["", "first", ""]


def test_indicators_keep_their_columns() -> None:
    fitted = MACHClassifier(**SMALL, class_texts={0: "zero", 5: "five"}).fit(np.eye(4), np.eye(4, 3, dtype=int))
    assert fitted.classes_.tolist() == [0, 1, 2]
    assert texts_of(fitted)[0] == ["zero", "1", "2"]


@pytest.mark.parametrize(
    "given", [5, [], {"a": 5}, {"a": {"title": "x"}}, {"a": {"alternatives": [1]}}, {"a": {"text": 3}}, "none.csv"]
)
def test_what_says_nothing_of_classes_is_refused_by_one_line(given: Any) -> None:
    with pytest.raises(DataError) as caught:
        MACHClassifier(**SMALL, class_texts=given).fit(X, Y)
    assert "\n" not in str(caught.value)
