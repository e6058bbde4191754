"""What classes say of themselves: names, alternative names, a description, an address, and the classes above them.

A prepared store and a run keep all of it in one file, ``class_texts.safetensors``; one without has names at most.
`class_names` of both are what rows call their classes: here are the names that people read, which two may share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from mach.data.class_names import ClassNames
from mach.data.names import class_name, ids_by_name, shown
from mach.errors import DataError, StorageError
from mach.files.arrays import ascends
from mach.files.tensors import map_tensors, write_tensors

FILE = "class_texts.safetensors"
Value = TypeVar("Value")


class Groups(Sequence[tuple[Value, ...]], Generic[Value]):
    """A tuple of values for every class, cut out of all values when it is asked for.

    >>> list(Groups(np.array([0, 2, 2]), ["a", "b"]))
    [('a', 'b'), ()]
    """

    def __init__(self, indptr: NDArray[np.int64], values: Sequence[Value]) -> None:
        self.indptr, self.values = indptr, values

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @overload
    def __getitem__(self, k: int) -> tuple[Value, ...]: ...
    @overload
    def __getitem__(self, k: slice) -> list[tuple[Value, ...]]: ...
    def __getitem__(self, k: int | slice) -> tuple[Value, ...] | list[tuple[Value, ...]]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        if not -len(self) <= k < len(self):
            raise IndexError(f"class {k} of {len(self)}")
        k %= len(self)
        return tuple(self.values[int(self.indptr[k]) : int(self.indptr[k + 1])])


@dataclass(frozen=True, eq=False)
class ClassTexts:
    """Texts of K classes, in the order of their ids; sequences that may stay on disk until an entry is asked for.

    Attributes
    ----------
    names : sequence of str
        What people call the class; equal ones are allowed.
    alternatives : sequence of tuples of str
        Other names: synonyms, spellings, other languages.
    texts : sequence of str
        A description, "" where there is none.
    uris : sequence of str
        An address or identifier elsewhere, "" where there is none.
    parents : sequence of tuples of int
        Ids of the classes directly above it.

    Examples
    --------
    >>> texts = ClassTexts.of(["apple", "fruit"], [("pomme",), ()], parents=[(1,), ()])
    >>> texts.spellings(0), texts.texts[0], texts.parents[0]
    (('apple', 'pomme'), '', (1,))
    """

    names: Sequence[str]
    alternatives: Sequence[tuple[str, ...]]
    texts: Sequence[str]
    uris: Sequence[str]
    parents: Sequence[tuple[int, ...]]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        alternatives: Sequence[tuple[str, ...]] | None = None,
        texts: Sequence[str] | None = None,
        uris: Sequence[str] | None = None,
        parents: Sequence[tuple[int, ...]] | None = None,
    ) -> Self:
        """Texts of classes of which names are known, and the rest perhaps."""
        K = len(names)
        none: Groups[Any] = Groups(np.zeros(K + 1, np.int64), [])
        empty = ClassNames(np.zeros(K + 1, np.int64), np.empty(0, np.uint8))
        return cls(
            names,
            none if alternatives is None else alternatives,
            empty if texts is None else texts,
            empty if uris is None else uris,
            none if parents is None else parents,
        )

    @classmethod
    def given(
        cls,
        names: Sequence[str],
        alternatives: Sequence[Any] | None,
        texts: Sequence[Any] | None,
        uris: Sequence[Any] | None,
    ) -> Self | None:
        r"""Texts as a caller gives them, one or several a class; None where there are names alone.

        Raises DataError where one is no string.

        >>> ClassTexts.given(["a"], [["b ", "a"]], ["red"], None).whole(0)
        'a\nb\nred'
        """
        if alternatives is texts is uris is None:
            return None
        columns: list[list[tuple[str, ...]]] = []
        for what, column in (("alternatives", alternatives), ("text", texts), ("uri", uris)):
            columns.append([])
            for name, value in zip(names, [()] * len(names) if column is None else column, strict=True):
                is_one = isinstance(value, str) or not isinstance(value, Iterable)
                several = () if value is None else (value,) if is_one else tuple(value)
                if not all(isinstance(text, str) for text in (name, *several)):
                    raise DataError(f"class {name!r:.60}: {what} {value!r:.60}: need strings")
                columns[-1].append(several)
        others, said, addresses = columns
        spelt = [dict.fromkeys(filter(None, map(class_name, values))) for values in others]
        return cls.of(
            names,
            [tuple(other for other in values if other != name) for name, values in zip(names, spelt, strict=True)],
            ["\n".join(shown(text).strip() for text in values) for values in said],
            [" ".join(map(class_name, values)) for values in addresses],
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_uris(self) -> bool:
        """Whether any class has an address."""
        return len(self.uris.utf8) > 0 if isinstance(self.uris, ClassNames) else any(self.uris)

    def spellings(self, k: int) -> tuple[str, ...]:
        """The name of a class and its alternatives."""
        return (self.names[k], *self.alternatives[k])

    def whole(self, k: int) -> str:
        """All that a class says of itself, line by line."""
        return "\n".join(filter(None, (*self.spellings(k), self.texts[k])))

    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        """Classes by what rows may call them: their keys, then addresses and names that only one class has."""
        ids = ids_by_name(keys)
        for names in () if self.names is keys else (self.uris, self.names):
            of_one: dict[str, int] = {}
            for k, name in enumerate(map(class_name, names)):
                of_one[name] = k if name not in of_one else -1
            for name, k in of_one.items():
                if name and k >= 0:
                    ids.setdefault(name, k)
        return ids

    def and_also(self, more: ClassTexts) -> ClassTexts:
        """These classes, then the others; parents are ids of all of them."""
        return ClassTexts(*([*getattr(self, name), *getattr(more, name)] for name in self.__dataclass_fields__))

    def changed(self, n_classes: int, ids: NDArray[Any], told: NDArray[Any], more: ClassTexts | None) -> ClassTexts:
        """Of so many classes, with what others say in place: their class k, of those ``told``, is our ``ids[k]``."""
        none = ClassTexts.of([""] * (n_classes - len(self)))
        columns: dict[str, list[Any]] = {name: list(column) for name, column in vars(self.and_also(none)).items()}
        for k in [] if more is None else told.tolist():
            for name, column in columns.items():
                value = getattr(more, name)[k]
                column[ids[k]] = tuple(int(ids[parent]) for parent in value) if name == "parents" else value
        return ClassTexts(**columns)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All of it as arrays for a file; `from_arrays` reads them."""
        arrays: dict[str, NDArray[Any]] = {}
        columns: dict[str, Iterable[str]] = {"names": self.names, "texts": self.texts, "uris": self.uris}
        columns["alternatives"] = [name for names in self.alternatives for name in names]
        for name, strings in columns.items():
            encoded = strings if isinstance(strings, ClassNames) else ClassNames.of(strings)
            arrays |= {f"{name}.offsets": encoded.offsets, f"{name}.utf8": encoded.utf8}
        for name in ("alternatives", "parents"):
            sizes = [len(group) for group in getattr(self, name)]
            arrays[f"{name}.indptr"] = np.append(0, np.cumsum(sizes, dtype=np.int64)).astype(np.int64)
        arrays["parents.ids"] = np.array([k for ids in self.parents for k in ids], np.int32)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], n_classes: int, where: object) -> Self:
        """Read what `to_arrays` made; StorageError when something is missing, of another kind, or out of range."""
        left = dict(arrays)

        def take(name: str, dtype: Any, length: int | None = None) -> NDArray[Any]:
            array = left.pop(name, None)
            if array is None:
                raise StorageError(f"{where} lacks {name}: copy it anew")
            if array.dtype != dtype or array.ndim != 1 or length not in (None, len(array)):
                needed = "" if length is None else f" of shape ({length},)"
                raise StorageError(
                    f"{where}: {name} is {array.dtype} of shape {array.shape}, need {np.dtype(dtype)}{needed}: "
                    "it is of other classes, or damaged"
                )
            return array

        def strings(name: str, n: int) -> ClassNames:
            offsets = take(f"{name}.offsets", np.int64, n + 1)
            return ClassNames.of_file(offsets, take(f"{name}.utf8", np.uint8), f"{where}: {name}")

        def groups(name: str) -> NDArray[Any]:
            indptr = take(f"{name}.indptr", np.int64, n_classes + 1)
            if indptr[-1] >= 2**48 or not ascends(indptr, indptr[-1]):
                raise StorageError(f"{where}: {name}.indptr does not ascend from 0: copy it anew")
            return indptr

        alternatives, parents = groups("alternatives"), groups("parents")
        ids = take("parents.ids", np.int32, int(parents[-1]))
        if len(ids) and not (ids.min() >= 0 and ids.max() < n_classes):
            raise StorageError(f"{where}: parents.ids holds {ids.min()} to {ids.max()}, there are {n_classes} classes")
        made = cls(
            strings("names", n_classes),
            Groups(alternatives, strings("alternatives", int(alternatives[-1]))),
            strings("texts", n_classes),
            strings("uris", n_classes),
            Groups(parents, _Ints(ids)),
        )
        if left:
            raise StorageError(f"{where}: {min(left)!r:.80} is no array of such a file")
        return made

    def write(self, file: BinaryIO) -> None:
        """Write all of it to an open file; `read` reads it."""
        write_tensors(file, self.to_arrays(), {})

    @classmethod
    def read(cls, path: Path, n_classes: int, where: object = None) -> Self:
        """Read what `write` wrote, as a map; StorageError where it is damaged or of another number of classes."""
        return cls.from_arrays(map_tensors(path)[0], n_classes, where or path)


class _Ints(Sequence[int]):
    """Ids of an array as Python's integers."""

    def __init__(self, ids: NDArray[np.int32]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: Any) -> Any:
        return self.ids[k].tolist()
