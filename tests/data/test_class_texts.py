"""What classes say of themselves: on disk and back, and damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mach.data.class_texts import FILE, ClassTexts
from mach.errors import StorageError
from mach.files.places import atomic_file

TEXTS = ClassTexts.of(
    ["Äpfel", "Obst", "Obst"], [("apple", "pomme"), (), ("fruit",)], ["rund", "", ""], ["", "u:1", ""], [(1, 2), (), ()]
)


def columns(texts: ClassTexts) -> list[list[Any]]:
    return [list(getattr(texts, name)) for name in ("names", "alternatives", "texts", "uris", "parents")]


def written(path: Path, texts: ClassTexts) -> Path:
    with atomic_file(path / FILE) as file:
        texts.write(file)
    return path / FILE


@pytest.mark.parametrize("texts", [TEXTS, ClassTexts.of(["a", ""]), ClassTexts.of([])])
def test_texts_come_back_as_they_were_written(tmp_path: Path, texts: ClassTexts) -> None:
    assert columns(ClassTexts.read(written(tmp_path, texts), len(texts))) == columns(texts)


def test_classes_follow_those_that_were_there(tmp_path: Path) -> None:
    both = ClassTexts.read(written(tmp_path, TEXTS), 3).and_also(ClassTexts.of(["new"], parents=[(0,)]))
    assert columns(both)[0] == [*TEXTS.names, "new"]
    assert both.parents[3] == (0,)
    assert both.spellings(0) == ("Äpfel", "apple", "pomme")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("names.offsets", np.array([0, 9, 3, 99])),
        ("alternatives.indptr", np.array([0, 2, 1, 3])),
        ("alternatives.indptr", np.array([0, 2, 2, 2**60])),
        ("parents.ids", np.array([1, 3], np.int32)),
        ("parents.ids", np.array([1, -1], np.int32)),
        ("texts.utf8", np.array([0.5])),
        ("uris.utf8", None),
        ("more", np.zeros(1)),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_array(tmp_path: Path, name: str, array: Any) -> None:
    arrays = TEXTS.to_arrays() | {name: array}
    with pytest.raises(StorageError, match=name.partition(".")[0]) as caught:
        ClassTexts.from_arrays({key: value for key, value in arrays.items() if value is not None}, 3, tmp_path / FILE)
    assert str(tmp_path / FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"shape \(4,\), need int64 of shape \(5,\)"):
        ClassTexts.read(written(tmp_path, TEXTS), 4)
