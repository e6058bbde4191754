"""Columns and tables of other libraries: texts out of them, and answers as a table of the wanted library.

pandas, polars and pyarrow are known by their methods; none is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mach.errors import ConfigError, DataError

FrameKind = Literal["pandas", "pyarrow"]
HEAD = 100  # values of a column that tell its kind


def texts_of(X: Any) -> list[str] | None:
    """The texts of the rows; None where these are numbers, which others have to read.

    Parameters
    ----------
    X : any
        Texts are a list, tuple, 1-D array, series or Arrow array of strings; or a table all of whose columns are such:
        a row's texts are joined by a blank.

    Raises
    ------
    DataError
        When X is a single string, a text is missing or no string, or a table has columns of both kinds.

    Examples
    --------
    >>> texts_of(np.array(["red apple", "green apple"]))
    ['red apple', 'green apple']
    >>> texts_of([[0.5, 1.0]]) is None
    True
    """
    if isinstance(X, str | bytes):
        raise DataError(f"X is one string, {X!r:.40}: give a list of texts, one a row")
    if is_table(X):
        return _texts_of_table(X)
    is_column = hasattr(X, "to_pylist") or hasattr(X, "to_numpy") or isinstance(X, list | tuple)
    if isinstance(X, np.ndarray):
        is_column = X.ndim == 1 and X.dtype.kind in "OUT"
    return _checked(_list_of(X), "X") if is_column and _is_text(X) else None


def is_table(X: Any) -> bool:
    """Whether it has named columns."""
    return hasattr(X, "columns") and hasattr(X, "shape") and hasattr(X, "__getitem__")


def values_of(y: Any) -> Any:
    """A series, index, table or Arrow array as a numpy array, or a list where its values are lists; others as is."""
    if hasattr(y, "to_pylist") and not is_table(y):
        values = y.to_pylist()
        return values if any(isinstance(value, list) for value in values[:HEAD]) else y.to_numpy(zero_copy_only=False)
    if is_table(y) and hasattr(y, "column_names"):
        return np.column_stack([column.to_numpy() for column in y.columns])
    return y.to_numpy() if hasattr(y, "to_numpy") else y


def frame_of(columns: Mapping[str, Any], kind: FrameKind) -> Any:
    """A table of these columns, in their order.

    Raises
    ------
    ConfigError
        When the kind is unknown or pandas is not installed.
    """
    if kind == "pyarrow":
        import pyarrow as pa

        return pa.table({name: pa.array(_for_arrow(values)) for name, values in columns.items()})
    if kind != "pandas":
        raise ConfigError(f"as_frame = {kind!r} is unknown: choose 'pandas' or 'pyarrow'")
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ConfigError("as_frame = 'pandas' needs pandas: pip install pandas, or choose 'pyarrow'") from error
    return pd.DataFrame(dict(columns))


def _for_arrow(values: Any) -> Any:
    return values.tolist() if isinstance(values, np.ndarray) and values.dtype.kind == "O" else values


def _texts_of_table(X: Any) -> list[str] | None:
    names = list(getattr(X, "column_names", X.columns))
    texts = [name for name in names if _is_text(X[name])]
    if not texts:
        return None
    if len(texts) < len(names):
        other = next(name for name in names if name not in texts)
        raise DataError(f"X has columns of text ({texts[0]!r}) and of numbers ({other!r}): give columns of one kind")
    columns = [_checked(_list_of(X[name]), f"X, column {name!r}") for name in texts]
    return [" ".join(row) for row in zip(*columns, strict=True)]


def _is_text(column: Any) -> bool:
    head = column.head(HEAD) if hasattr(column, "head") else column[:HEAD]
    return any(isinstance(value, str) for value in _list_of(head))


def _list_of(column: Any) -> list[Any]:
    for name in ("to_pylist", "to_list", "tolist"):
        if hasattr(column, name):
            values: list[Any] = getattr(column, name)()
            return values
    return list(column)


def _checked(column: list[Any], where: str) -> list[str]:
    for row, text in enumerate(column):
        if not isinstance(text, str):
            raise DataError(f"{where}, row {row} is {text!r:.40}, no text: fill it in, or leave the row out")
    return column
