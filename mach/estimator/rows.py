"""Rows in memory: features and classes, and those of them that are kept against forgetting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import ranges

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Features: TypeAlias = "list[str] | csr_array | NDArray[np.float32]"
KEPT_BYTES = 2**26


def n_rows_of(features: Features) -> int:
    """How many rows there are, of numbers or texts."""
    return len(features) if isinstance(features, list) else int(features.shape[0])


@dataclass(frozen=True, eq=False)
class Rows:
    """Training rows in memory: features, and class ids as a CSR pair."""

    features: Features
    class_indptr: NDArray[np.int64]
    class_ids: NDArray[np.int32]
    n_classes: int

    def __len__(self) -> int:
        return len(self.class_indptr) - 1


@dataclass(frozen=True, eq=False)
class Reservoir:
    """Rows drawn at random, evenly from all that were seen: those with the smallest of random keys.

    Attributes
    ----------
    rows : Rows
        Of numbers, texts too.
    keys : float64 array of shape (n,)
    """

    rows: Rows
    keys: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Rows, most: int, generator: np.random.Generator) -> Self:
        """At most so many of some rows, and no more than `KEPT_BYTES`."""
        return cls(_take(rows, np.empty(0, np.int64)), np.empty(0)).joined(rows, most, generator)

    def joined(self, rows: Rows, most: int, generator: np.random.Generator) -> Self:
        """After further rows were seen."""
        keys = generator.random(len(rows))
        n_bytes = sum(array.nbytes for array in _arrays(rows)) / max(1, len(rows))
        most = min(most, int(KEPT_BYTES / max(1.0, n_bytes)))
        new = np.sort(np.argsort(keys, kind="stable")[:most])  # before all are joined, which copies
        joined, keys = concatenated(self.rows, _take(rows, new)), np.concatenate([self.keys, keys[new]])
        chosen = np.sort(np.argsort(keys, kind="stable")[:most])
        return type(self)(_take(joined, chosen), keys[chosen])

    def drawn(self, n: int, generator: np.random.Generator) -> Rows:
        """So many of them, or all."""
        return _take(self.rows, generator.permutation(len(self.rows))[:n])


def concatenated(first: Rows, second: Rows) -> Rows:
    """Rows of numbers, one after the other."""
    a: Any = first.features
    b: Any = second.features
    if isinstance(a, np.ndarray):
        features: Any = np.concatenate([a, b])
    else:
        from scipy.sparse import csr_array, vstack

        features = csr_array(vstack([a, b], format="csr", dtype=np.float32))
    indptr = np.concatenate([first.class_indptr, first.class_indptr[-1] + second.class_indptr[1:]])
    ids = np.concatenate([first.class_ids, second.class_ids])
    return Rows(features, indptr, ids, max(first.n_classes, second.n_classes))


def _take(rows: Rows, chosen: NDArray[np.int64]) -> Rows:
    counts = np.diff(rows.class_indptr)[chosen]
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    features: Any = rows.features
    ids = rows.class_ids[ranges(rows.class_indptr[chosen], counts)]
    return Rows(features[chosen], indptr, ids, rows.n_classes)


def _arrays(rows: Rows) -> list[NDArray[Any]]:
    features: Any = rows.features
    parts = [features] if isinstance(features, np.ndarray) else [features.indptr, features.indices, features.data]
    return [*parts, rows.class_indptr, rows.class_ids]
