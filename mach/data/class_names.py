"""Names of all classes as arrays, which may stay on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from mach.errors import StorageError
from mach.files.arrays import ascends


class ClassNames(Sequence[str]):
    """Names of all classes: K + 1 offsets and bytes, which may stay on disk; a name is decoded when it is asked for."""

    def __init__(self, offsets: NDArray[np.int64], utf8: NDArray[np.uint8], where: object = "class names") -> None:
        self.offsets, self.utf8, self._where = offsets, utf8, where

    @classmethod
    def of_file(cls, offsets: NDArray[Any], utf8: NDArray[Any], where: object) -> Self:
        """Names of a file, whose offsets are looked at here and whose UTF-8 when a name is asked for: StorageError."""
        for name, array, dtype in (("offsets", offsets, np.int64), ("utf8", utf8, np.uint8)):
            if array.ndim != 1 or array.dtype != dtype:
                raise StorageError(f"{where}: {name} of class names are {array.dtype} of shape {array.shape}")
        if not ascends(offsets, len(utf8)):
            raise StorageError(f"{where}: offsets of class names do not ascend from 0 to {len(utf8)}: copy it anew")
        return cls(offsets, utf8, where)

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Names as they are stored.

        >>> list(ClassNames.of(["apple", "blå"]))
        ['apple', 'blå']
        """
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        return cls(np.cumsum([0, *map(len, encoded)], dtype=np.int64), np.frombuffer(b"".join(encoded), np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, k: int) -> str: ...
    @overload
    def __getitem__(self, k: slice) -> list[str]: ...
    def __getitem__(self, k: int | slice) -> str | list[str]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        if not -len(self) <= k < len(self):
            raise IndexError(f"class {k} of {len(self)} named classes")
        k %= len(self)
        try:
            return self.utf8[self.offsets[k] : self.offsets[k + 1]].tobytes().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise StorageError(
                f"{self._where}: the name of class {k} is no UTF-8 ({error.reason}): copy it anew"
            ) from error
