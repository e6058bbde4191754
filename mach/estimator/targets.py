"""y as people hold it, and the classes in it: any hashable values, and the ids 0, 1, ... that stand for them.

y comes in three forms: ``classes``, one value a row; ``lists``, any number of values a row; ``indicator``, a matrix
with a column a class. The id of a class is its position in ``classes_``, an array that only grows. What is missing
(`mach.data.missing`: None, NaN, NA, an empty string) is no class, in each form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, column_or_1d

from mach.data.frames import arrow_of
from mach.data.missing import is_missing
from mach.data.names import class_name
from mach.errors import DataError, StorageError

Form = Literal["classes", "lists", "indicator"]
NUMBERS = "iufb"  # kinds of arrays
_DTYPE = re.compile(r"[<>|=]?([biuf?][0-9]?|U[0-9]{1,9}|O[0-9]?|[mM]8(\[[0-9]*[A-Za-z]+\])?)")
SAVED = NUMBERS + "UO"  # kinds of arrays whose elements JSON knows, or that are spelled one by one


@dataclass(frozen=True)
class Layout:
    """The form of y, the type of its values or of its indicator, and whether that is a sparse matrix."""

    form: Form
    dtype: Any
    is_sparse: bool = False


@dataclass(frozen=True, eq=False)
class Targets:
    """The classes of all rows: ``values[indptr[n] : indptr[n + 1]]`` are those of row n.

    Those of an indicator are column numbers, of which there are ``n_columns``. ``indptr`` has shape (N + 1,).
    """

    values: NDArray[Any]
    indptr: NDArray[np.int64]
    layout: Layout
    n_columns: int = 0

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @classmethod
    def read(cls, y: Any) -> Self:
        """Targets of any form that `mach.MACHClassifier` takes, with scikit-learn's own refusals and warnings.

        Raises DataError when an indicator holds anything but 0 and 1, ValueError when classes are infinite or
        fractions.

        Examples
        --------
        >>> [Targets.read(y).layout.form for y in (["b", "a"], [["b", "a"], []], [[0, 1], [1, 0]])]
        ['classes', 'lists', 'indicator']
        """
        y = _as_numpy(y)
        if isinstance(y, np.ndarray) and y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if hasattr(y, "tocsr") or (isinstance(y, np.ndarray) and y.ndim == 2):
            return cls._of_matrix(y)
        rows: Any = y if isinstance(y, np.ndarray) else list(y)
        if not (isinstance(rows, np.ndarray) and rows.dtype.kind != "O") and any(map(_is_row, rows)):
            matrix = _as_matrix(rows)
            return cls.of_lists(rows) if matrix is None else cls._of_matrix(matrix)
        values, is_there_N = _present(rows)
        if values.dtype.kind in "fcO":
            assert_all_finite(values, input_name="y")
        if values.dtype.kind != "O" and len(values):
            check_classification_targets(values)
        return cls(values, np.cumsum([0, *is_there_N], dtype=np.int64), Layout("classes", values.dtype))

    def chosen(self, rows: NDArray[np.int64]) -> Targets:
        """Some of the rows, where each of them has one class."""
        return Targets(self.values[self.indptr[rows]], np.arange(len(rows) + 1), self.layout, self.n_columns)

    @classmethod
    def of_lists(cls, rows: Iterable[Any]) -> Self:
        """Any number of values a row; a row that is no list is a value."""
        members = (_members(row) if _is_row(row) else [row] for row in rows)
        parts = [[value for value in row if not is_missing(value)] for row in members]
        values = _spelt(_as_array([value for part in parts for value in part]))
        indptr = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(values, indptr, Layout("lists", values.dtype))

    @classmethod
    def _of_matrix(cls, matrix: Any) -> Self:
        if matrix.dtype.kind == "O":
            matrix = np.array([[0 if is_missing(value) else value for value in row] for row in matrix.tolist()])
        rows = csr_array(matrix, copy=True)
        rows.data[np.isnan(rows.data)] = 0
        rows.sum_duplicates()
        rows.eliminate_zeros()
        if not np.all(rows.data == 1):
            wrong = rows.data[rows.data != 1][0]
            raise DataError(f"y of shape {rows.shape} holds {wrong}: Unknown label type, an indicator has 0 and 1 only")
        layout = Layout("indicator", matrix.dtype, is_sparse=hasattr(matrix, "tocsr"))
        return cls(rows.indices.astype(np.int64), rows.indptr.astype(np.int64), layout, rows.shape[1])


def grown(classes: NDArray[Any], targets: Targets, more: Any = None) -> NDArray[Any]:
    """Classes, and behind them the new ones of targets and of ``more``: ascending, or else as they first appeared.

    Equal values are one class, as in a dictionary. The array has the type of the values if they share one, else that of
    objects. Classes that are not hashable are a DataError.

    Examples
    --------
    >>> known = grown(np.empty(0), Targets.read(["pear", "apple", "pear"]))
    >>> grown(known, Targets.read(["banana", "pear"])).tolist()
    ['apple', 'pear', 'banana']
    """
    found = np.arange(targets.n_columns) if targets.layout.form == "indicator" else _distinct(targets.values)
    if more is not None:
        found = _distinct(_joined(found, _present(_as_numpy(more))[0]))
    known = set(classes.tolist()) | set(_spelt(classes).tolist())
    return _joined(classes, found[np.array([value not in known for value in found.tolist()], bool)])


def ids_of(classes: NDArray[Any], targets: Targets) -> csr_array:
    """Ids of every row, ascending and unique, as the columns of an int8 array of shape (N, K + 1).

    The last column stands for all values that are no class.
    """
    K = len(classes)
    if targets.layout.form == "indicator" and np.array_equal(classes, np.arange(K)):  # of millions of columns
        ids = np.minimum(targets.values, K)
    else:
        known = {value: k for k, value in enumerate(_spelt(classes).tolist())}
        known |= {value: k for k, value in enumerate(classes.tolist())}  # a classifier of an earlier version, as it is
        ids = np.array([known.get(value, K) for value in targets.values.tolist()], np.int64)
    rows = csr_array((np.ones(len(ids), np.int8), ids, targets.indptr), shape=(len(targets), K + 1))
    rows.sum_duplicates()
    rows.data[:] = 1
    return rows


def to_json(classes: NDArray[Any]) -> dict[str, Any]:
    """A description of classes that `from_json` reads.

    Raises a StorageError when one is no string, number, boolean, None, bytes, or tuple or frozenset of such.
    """
    kind = classes.dtype
    if kind.kind in "mM":  # times as numbers of their own unit
        return {"dtype": kind.str, "values": classes.astype(np.int64).tolist()}
    if kind.kind not in SAVED:
        raise StorageError(f"classes of type {kind} cannot be saved: use strings, numbers, or tuples of these")
    return {"dtype": kind.str, "values": [_spelled(value) for value in classes.tolist()]}


def from_json(description: dict[str, Any]) -> NDArray[Any]:
    """Read what `to_json` gave."""
    spelled, values = description["dtype"], description["values"]
    if not isinstance(spelled, str) or not _DTYPE.fullmatch(spelled) or not isinstance(values, list):
        raise ValueError(f"classes are {spelled!r:.60} of {type(values).__name__}")
    dtype = np.dtype(spelled)
    if dtype.kind == "O":
        return _objects([_read(value) for value in values])
    kinds: tuple[type, ...] = (str,) if dtype.kind == "U" else (bool,) if dtype.kind == "b" else (int, float)
    if wrong := [value for value in values if type(value) not in kinds]:
        raise ValueError(f"class {wrong[0]!r:.60} is no {dtype}")
    if dtype.kind == "U" and dtype.itemsize > 4 * max(map(len, values), default=0):
        raise ValueError(f"classes of {dtype}, the longest has {max(map(len, values), default=0)} letters")
    return np.array(values, np.int64 if dtype.kind in "mM" else dtype).astype(dtype)


def _as_numpy(y: Any) -> Any:
    """Series, tables and Arrow arrays as numpy has them; lists and sparse matrices as they are."""
    y = arrow_of(y)
    if len(names := getattr(y, "column_names", [])) == 1:
        y = y[names[0]]
    return np.asarray(y) if hasattr(y, "__array__") else y


def _is_row(value: Any) -> bool:
    return isinstance(value, list | set | frozenset) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _members(row: Any) -> list[Any]:
    return row.tolist() if isinstance(row, np.ndarray) else list(row)


def _as_matrix(rows: Sequence[Any]) -> NDArray[Any] | None:
    """Lists of one length, at least 2, of nothing but 0 and 1, as the matrix that scikit-learn takes them for."""
    if any(isinstance(row, set | frozenset) or not _is_row(row) for row in rows):
        return None
    members = [_members(row) for row in rows]
    if len(members[0]) < 2 or len({len(row) for row in members}) > 1:
        return None
    if not all(value is None or isinstance(value, int | float) for row in members for value in row):
        return None
    cells = [[0 if is_missing(value) else value for value in row] for row in members]
    return np.array(cells) if all(value in (0, 1) for row in cells for value in row) else None


def _present(values: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values that are there as an array (`_as_array`), spelt in one way, and which of all these are."""
    if not isinstance(values, np.ndarray) or values.dtype.kind == "O":
        rows = list(values)
        is_there_N = np.array([not is_missing(value) for value in rows], np.bool_)
        array = _as_array(values) if is_there_N.all() else _as_array([v for v in rows if not is_missing(v)])
        return _spelt(array), is_there_N
    array, kind = _as_array(values), values.dtype.kind
    if kind == "U":
        is_there_N = np.char.str_len(np.char.strip(array)) > 0
    elif kind in "mM":
        is_there_N = ~np.isnat(array)
    else:
        is_there_N = ~np.isnan(array) if kind in "fc" else np.ones(len(array), np.bool_)
    return _spelt(array[is_there_N]), is_there_N


def _as_array(values: Any) -> NDArray[Any]:
    """Values as an array of their own type, if they share one that keeps them, else of objects."""
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise DataError(f"classes of shape {values.shape}: give one dimension")
        return values
    values = list(values)
    kinds = set(map(type, values))
    if kinds == {str} and any(value.endswith("\0") for value in values):  # which numpy's texts lose
        return _objects(values)
    if len(kinds) == 1 and issubclass(kinds.pop(), str | int | float | np.generic):
        return np.array(values)
    return _objects(values)


def _spelt(values: NDArray[Any]) -> NDArray[Any]:
    """Values whose texts are spelt as `mach.data.names.class_name` has it; the array itself where they are."""
    if values.dtype.kind not in "OU":
        return values
    spelling = {value: class_name(value) for value in values.tolist() if isinstance(value, str)}
    if all(value == name for value, name in spelling.items()):
        return values
    spelt = [spelling[value] if isinstance(value, str) else value for value in values.tolist()]
    return _as_array(spelt) if values.dtype.kind == "U" else _objects(spelt)


def _objects(values: Sequence[Any]) -> NDArray[Any]:
    return np.fromiter(values, object, len(values))  # np.array would take tuples for rows


def _joined(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Both, as objects where they are of unlike kinds: numbers never become strings."""
    if not len(first) or not len(second):
        return first if len(first) else second
    kinds = {"number" if array.dtype.kind in NUMBERS else array.dtype.kind for array in (first, second)}
    return np.concatenate([first, second]) if len(kinds) == 1 else _objects([*first.tolist(), *second.tolist()])


def _distinct(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind != "O":
        return np.unique(values)
    try:
        distinct = list(dict.fromkeys(values.tolist()))
    except TypeError as error:
        raise DataError(
            f"a class cannot be told from others ({error}): give hashable values, such as tuples"
        ) from error
    try:
        return _objects(sorted(distinct))
    except TypeError:
        return _objects(distinct)


def _spelled(value: Any) -> Any:
    """JSON for a value; what JSON does not know becomes an object with one key, its kind."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, tuple | frozenset):
        members = [_spelled(member) for member in value]
        return {"tuple": members} if isinstance(value, tuple) else {"frozenset": members}
    raise StorageError(
        f"class {value!r:.60} is a {type(value).__name__}, which cannot be saved: give strings, numbers or tuples"
    )


def _read(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, members),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(members)
    return {"tuple": tuple, "frozenset": frozenset}[kind](map(_read, members))
