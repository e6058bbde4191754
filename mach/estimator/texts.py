"""What a caller says of classes, by class value, in the order of a classifier's classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.class_table import read_classes
from mach.data.class_texts import ClassTexts
from mach.data.names import class_name
from mach.errors import DataError

FIELDS = ("name", "alternatives", "text", "uri")


def told_of(class_texts: Any) -> dict[Any, dict[str, Any]]:
    """Of every class value that ``class_texts`` has, the fields of `FIELDS` that are given.

    Raises DataError where it is neither a dictionary nor a table with a column ``id`` nor the path of one.

    >>> told_of({"C1": "apple", "C2": {"name": "pear", "text": "a fruit"}})
    {'C1': {'name': 'apple'}, 'C2': {'name': 'pear', 'text': 'a fruit'}}
    """
    if class_texts is None:
        return {}
    if isinstance(class_texts, str):
        table = read_classes(class_texts, None, None, are_numbered=False)
        texts = table.texts or ClassTexts.of(table.keys)
        columns = zip(table.keys, texts.names, texts.alternatives, texts.texts, texts.uris, strict=True)
        return {key: dict(zip(FIELDS, values, strict=True)) for key, *values in columns}
    if not isinstance(class_texts, Mapping):
        import pyarrow as pa

        try:
            rows = pa.table(class_texts).to_pylist()
        except (pa.ArrowException, TypeError, ValueError):
            rows = []
        if not rows or "id" not in rows[0]:
            raise DataError("class_texts is no dictionary, and no table with rows and a column id: give one of these")
        class_texts = {row["id"]: {name: row[name] for name in FIELDS if row.get(name) is not None} for row in rows}
    told = {}
    for label, said in class_texts.items():
        record = {"name": said} if isinstance(said, str) else said
        if not isinstance(record, Mapping) or not set(record) <= set(FIELDS):
            need = f"a name, or a dictionary with some of {', '.join(FIELDS)}"
            raise DataError(f"class_texts: {said!r:.60} of class {label!r:.60}: need {need}")
        told[class_name(label) if isinstance(label, str) else label] = dict(record)
    return told


def texts_of(classes: NDArray[Any], told: Mapping[Any, Mapping[str, Any]], n_classes: int) -> ClassTexts | None:
    """Texts of the classes, and of spare ones without any; None where nothing is told."""
    if not told:
        return None
    rows = [told.get(value, told.get(str(value), {})) for value in classes.tolist()]
    names = [row.get("name") or str(value) for row, value in zip(rows, classes.tolist(), strict=True)]
    made = ClassTexts.given(names, *([row.get(name) for row in rows] for name in FIELDS[1:]))
    assert made is not None
    return made.and_also(ClassTexts.of([""] * (n_classes - len(made))))


def untold(classes: NDArray[Any], told: Mapping[Any, Any]) -> list[Any]:
    """Class values with texts that are none of the classes; numbers where those are numbers."""
    if not told:
        return []
    known = {*classes.tolist(), *map(str, classes.tolist())}
    left = [value for value in told if value not in known]
    are_numbers = np.asarray(classes).dtype.kind in "iu"
    return [int(v) if are_numbers and isinstance(v, str) and v.isdecimal() else v for v in left]
