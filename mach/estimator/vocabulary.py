"""Classes as people hold them, any hashable values, and the ids 0, 1, ... that stand for them.

Targets come in three forms: ``classes``, one value a row; ``lists``, any number of values a row; ``indicator``, a
matrix with a column a class. A `Vocabulary` numbers the values and never changes a number that it gave.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from mach.errors import DataError, StorageError
from mach.estimator.frames import values_of

Form = Literal["classes", "lists", "indicator"]
_NATIVE = "biufUO"  # kinds of arrays whose elements JSON knows, or that are spelled one by one


@dataclass(frozen=True)
class Layout:
    """In which form y came, and answers go."""

    form: Form
    dtype: Any
    is_sparse: bool = False


@dataclass(frozen=True, eq=False)
class Targets:
    """The classes of all rows: ``values[indptr[n] : indptr[n + 1]]`` are those of row n; in an indicator, columns.

    Attributes
    ----------
    values : array of shape (n_pairs,)
    indptr : int64 array of shape (N + 1,)
    form : {"classes", "lists", "indicator"}
    n_columns : int
        Columns of an indicator, else 0.
    dtype : numpy dtype
        Of the indicator, or of the values.
    is_sparse : bool
        Whether the indicator came as a sparse matrix.
    """

    values: NDArray[Any]
    indptr: NDArray[np.int64]
    form: Form
    n_columns: int = 0
    dtype: Any = None
    is_sparse: bool = False

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @classmethod
    def read(cls, y: Any) -> Self:
        """Targets of any form.

        Parameters
        ----------
        y : array-like or sparse matrix
            One-dimensional: a class a row, any hashable value (a tuple is one value). Rows that are lists, sets or
            arrays: the classes of each. A matrix, or lists of one length that hold nothing but 0 and 1, as
            scikit-learn has them: an indicator. Series and tables of pandas, polars and pyarrow as well.

        Raises
        ------
        DataError
            When an indicator holds anything but 0 and 1, or a class is not hashable.

        Examples
        --------
        >>> Targets.read(["b", "a"]).form, Targets.read([["b", "a"], []]).form, Targets.read([[0, 1], [1, 0]]).form
        ('classes', 'lists', 'indicator')
        """
        y = values_of(y)
        if hasattr(y, "tocsr"):
            return cls._of_matrix(y, is_sparse=True)
        if isinstance(y, np.ndarray) and y.ndim == 2:
            return cls._of_matrix(y)
        if not isinstance(y, np.ndarray):
            y = list(y) if hasattr(y, "__iter__") else np.asarray(y)
        if len(y) and not (isinstance(y, np.ndarray) and y.dtype.kind != "O") and any(map(_is_row, y)):
            matrix = _as_matrix(y)
            return cls._of_lists(y) if matrix is None else cls._of_matrix(matrix)
        values = _as_array(y)
        return cls(values, np.arange(len(values) + 1), "classes", dtype=values.dtype)

    @classmethod
    def _of_lists(cls, rows: Iterable[Any]) -> Self:
        parts = [[part] if not _is_row(part) else _members(part) for part in rows]
        values = _as_array([value for part in parts for value in part])
        indptr = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        return cls(values, indptr, "lists", dtype=values.dtype)

    @classmethod
    def _of_matrix(cls, matrix: Any, *, is_sparse: bool = False) -> Self:
        from scipy.sparse import csr_array

        rows = csr_array(matrix)
        rows.sum_duplicates()
        rows.eliminate_zeros()
        if not np.all(rows.data == 1):
            wrong = rows.data[rows.data != 1][0]
            raise DataError(f"y of shape {rows.shape} holds {wrong}: Unknown label type, an indicator has 0 and 1 only")
        columns, indptr = rows.indices.astype(np.int64), rows.indptr.astype(np.int64)
        return cls(columns, indptr, "indicator", n_columns=rows.shape[1], dtype=matrix.dtype, is_sparse=is_sparse)


class Vocabulary:
    """Class values and their ids; equal values are one class, as in a dictionary.

    Parameters
    ----------
    values : sequence of hashable
        Classes 0, 1, ..., no two equal.

    Attributes
    ----------
    array : array of shape (K,)
        The same, of the type of the values if they share one, else of objects.

    Examples
    --------
    >>> vocabulary = Vocabulary.of(Targets.read(["pear", "apple", "pear"]))
    >>> vocabulary.ids(Targets.read(["pear"])), list(vocabulary.array)
    (array([1]), [np.str_('apple'), np.str_('pear')])
    >>> list(vocabulary.grown(Targets.read(["banana"])).array)  # ids stay, what is new comes last
    [np.str_('apple'), np.str_('pear'), np.str_('banana')]
    """

    def __init__(self, values: Sequence[Hashable] | NDArray[Any]) -> None:
        self.array = _as_array(values)

    def __len__(self) -> int:
        return len(self.array)

    @classmethod
    def of(cls, targets: Targets, more: Any = None) -> Self:
        """All classes of some targets, and ``more``: ascending where they can be sorted, else as they first appear."""
        return cls(np.empty(0, targets.values.dtype)).grown(targets, more)

    def grown(self, targets: Targets, more: Any = None) -> Self:
        """With the classes of further targets, and ``more``, behind those that are known."""
        found = _distinct(targets.values)
        if targets.form == "indicator":
            found = np.arange(targets.n_columns)
        if more is not None:
            found = _distinct(_joined(found, _as_array(values_of(more))))
        new = [value for value in found.tolist() if value not in self._ids]
        return self if not new else type(self)(_joined(self.array, _as_array(new, like=found)))

    def ids(self, targets: Targets) -> NDArray[np.int64]:
        """Ids of all values, -1 for an unknown one."""
        if targets.form == "indicator" or targets.values.dtype.kind == "O":
            return np.array([self._ids.get(value, -1) for value in targets.values.tolist()], np.int64)
        values, inverse = np.unique(targets.values, return_inverse=True)
        found = np.array([self._ids.get(value, -1) for value in values.tolist()], np.int64)
        return found[inverse] if len(found) else np.empty(0, np.int64)

    def rows(self, targets: Targets) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Ids of every row, ascending and unique, as a CSR pair; unknown ones are left out."""
        ids = self.ids(targets)
        rows = np.repeat(np.arange(len(targets)), np.diff(targets.indptr))[ids >= 0]
        keys = np.unique(rows * max(1, len(self)) + ids[ids >= 0])
        rows, ids = np.divmod(keys, max(1, len(self)))
        counts = np.bincount(rows, minlength=len(targets))
        return np.concatenate([[0], np.cumsum(counts)]), ids.astype(np.int32)

    @cached_property
    def _ids(self) -> dict[Any, int]:
        return {value: k for k, value in enumerate(self.array.tolist())}

    def to_json(self) -> dict[str, Any]:
        """A description that `from_json` reads.

        Raises
        ------
        StorageError
            When a class is no string, number, boolean, None, bytes, or tuple or frozenset of such.
        """
        kind = self.array.dtype
        if kind.kind in "mM":  # times as numbers of their own unit
            return {"dtype": kind.str, "values": self.array.astype(np.int64).tolist()}
        if kind.kind not in _NATIVE:
            raise StorageError(f"classes of type {kind} cannot be saved: use strings, numbers, or tuples of these")
        return {"dtype": kind.str, "values": [_spelled(value) for value in self.array.tolist()]}

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> Self:
        """Read what `to_json` gave."""
        dtype, values = np.dtype(description["dtype"]), description["values"]
        if dtype.kind == "O":
            return cls(_objects([_read(value) for value in values]))
        return cls(np.array(values, np.int64).astype(dtype) if dtype.kind in "mM" else np.array(values, dtype))


def _is_row(value: Any) -> bool:
    return isinstance(value, list | set | frozenset) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _members(row: Any) -> list[Any]:
    return row.tolist() if isinstance(row, np.ndarray) else list(row)


def _as_matrix(rows: Sequence[Any]) -> NDArray[Any] | None:
    """Lists of one length, at least 2, of nothing but 0 and 1, as the matrix that scikit-learn takes them for."""
    if any(isinstance(row, set | frozenset) or not _is_row(row) for row in rows):
        return None
    width = len(rows[0])
    if width < 2 or any(len(row) != width for row in rows):
        return None
    flat = [value for row in rows for value in _members(row)]
    if not all(isinstance(value, int | float) and value in (0, 1) for value in flat):
        return None
    return np.array([_members(row) for row in rows])


def _as_array(values: Any, like: NDArray[Any] | None = None) -> NDArray[Any]:
    """Values as an array of their own type, if they share one, else of objects; ``like`` has the type to keep."""
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise DataError(f"classes of shape {values.shape}: give one dimension")
        return values
    values = list(values)
    if like is not None:
        return _objects(values) if like.dtype.kind == "O" else np.array(values, like.dtype)
    kinds = set(map(type, values))
    if len(kinds) == 1 and issubclass(next(iter(kinds)), str | int | float | np.generic):
        return np.array(values)
    return _objects(values)


def _objects(values: Sequence[Any]) -> NDArray[Any]:
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def _joined(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Both, as objects where they are of unlike kinds: numbers never become strings."""
    if not len(first) or not len(second):
        return second if not len(first) else first
    numbers = "iufb"
    alike = first.dtype.kind == second.dtype.kind or (first.dtype.kind in numbers and second.dtype.kind in numbers)
    return np.concatenate([first, second]) if alike else _objects([*first.tolist(), *second.tolist()])


def _distinct(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind != "O":
        return np.unique(values)
    try:
        seen = list(dict.fromkeys(values.tolist()))
    except TypeError as error:
        raise DataError(
            f"a class cannot be told from others ({error}): give hashable values, such as tuples"
        ) from error
    try:
        return _objects(sorted(seen))
    except TypeError:
        return _objects(seen)


def _spelled(value: Any) -> Any:
    """JSON for a value; what JSON does not know becomes an object with one key, its kind."""
    if value is None or isinstance(value, str | bool | int | float):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.generic):
        return _spelled(value.item())
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
    return (tuple if kind == "tuple" else frozenset)(map(_read, members))
