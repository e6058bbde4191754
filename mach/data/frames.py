"""Tables and columns of pandas, Polars, Arrow, DuckDB and others, known by their methods; none is imported.

Whatever has ``__arrow_c_stream__`` (the Arrow PyCapsule interface) is a table or a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mach.data.limits import refuse_twice
from mach.errors import DataError, did_you_mean, one_line


def is_stream(given: Any) -> bool:
    """Whether rows can be had as a stream of Arrow only, and perhaps once only."""
    return hasattr(given, "__arrow_c_stream__") and not hasattr(given, "__array__")


def is_table(given: Any) -> bool:
    """Whether something has columns with names."""
    return hasattr(given, "columns") and hasattr(given, "__getitem__")


def arrow_of(given: Any) -> Any:
    """A stream as pyarrow's table, or as its array where it is of one column without a name; others as they are.

    Examples
    --------
    >>> import pyarrow as pa
    >>> table = pa.table({"text": ["red apple", "green apple"]})
    >>> arrow_of(table.to_reader()).column_names, arrow_of([1, 2])
    (['text'], [1, 2])
    """
    if not is_stream(given):
        return given
    import pyarrow as pa

    try:
        try:
            return pa.RecordBatchReader.from_stream(given).read_all()
        except pa.ArrowInvalid:  # no struct
            return pa.chunked_array(given)
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"{type(given).__name__} gives no rows as Arrow ({one_line(error)}): give a table") from error


def texts_of(given: Any, what: str = "X", columns: Sequence[str] | None = None) -> list[str] | None:
    """The text of every row; None where rows are numbers. A table of text columns has them joined by a blank.

    Of a table of several columns those in ``columns`` count, by default all. Raises a DataError when it is a single
    string, a text is missing or no string, a column is missing, or columns are of both kinds.

    Examples
    --------
    >>> texts_of(np.array(["red apple", "green apple"]))
    ['red apple', 'green apple']
    >>> texts_of([[0.5, 1.0]]) is None
    True
    """
    if isinstance(given, str | bytes):
        raise DataError(f"{what} is one string, {given!r:.40}: give a list of texts, one a row")
    if not is_table(given):
        return _texts_of_column(given, what)
    there = list(getattr(given, "column_names", given.columns))
    refuse_twice(what, there)
    names = there if columns is None or len(there) == 1 else columns
    for name in names:
        if name not in there:
            near = did_you_mean(name, map(str, there))
            raise DataError(f"{what} has no column {name!r}{near}; there are {', '.join(map(str, there[:20]))}")
    found = {name: _texts_of_column(given[name], f"{what}, column {name!r}") for name in names}
    texts = [column for column in found.values() if column is not None]
    if texts and len(texts) < len(found):
        text, other = (next(n for n in names if (found[n] is None) == is_other) for is_other in (False, True))
        raise DataError(f"{what} has columns of text ({text!r}) and of numbers ({other!r}): give columns of one kind")
    return [" ".join(row) for row in zip(*texts, strict=True)] if texts else None


def _texts_of_column(column: Any, where: str) -> list[str] | None:
    if not isinstance(column, list | tuple):
        array = np.asarray(column) if hasattr(column, "__array__") else np.empty(0)
        column = array.tolist() if array.ndim == 1 and array.dtype.kind in "OUT" else []
    if not any(isinstance(value, str) for value in column):
        return None
    for row, text in enumerate(column):
        if not isinstance(text, str):
            raise DataError(f"{where}, row {row} is {text!r:.40}, no text: fill it in, or leave the row out")
    return list(column)
