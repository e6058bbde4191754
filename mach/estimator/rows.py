"""Rows in memory: features and classes, and a random draw of them that later training replays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mach.estimator.features import Features

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MOST_BYTES = 2**26  # of a reservoir


@dataclass(frozen=True, eq=False)
class Rows:
    """Training rows in memory.

    Attributes
    ----------
    features : list of str, csr_array or float32 array of shape (N, D)
    classes : csr_array of shape (N, K)
        The classes of a row are its column numbers, ascending; values say nothing.
    """

    features: Features
    classes: csr_array

    def __len__(self) -> int:
        return int(self.classes.shape[0])

    @property
    def n_classes(self) -> int:
        """K."""
        return int(self.classes.shape[1])

    def chosen(self, rows: NDArray[np.int64]) -> Rows:
        """Some of the rows, of numbers."""
        features: Any = self.features
        return Rows(features[rows], self.classes[rows])

    def joined(self, other: Rows) -> Rows:
        """These rows and others behind them, all of numbers and of one kind."""
        from scipy.sparse import csr_array, vstack

        first: Any = self.features
        if isinstance(first, np.ndarray):
            features: Any = np.concatenate([first, other.features])
        else:
            features = csr_array(vstack([first, other.features], format="csr", dtype=np.float32))
        n_classes = max(self.n_classes, other.n_classes)
        parts = [
            csr_array((c.data, c.indices, c.indptr), (c.shape[0], n_classes)) for c in (self.classes, other.classes)
        ]
        return Rows(features, vstack(parts, format="csr"))

    @property
    def n_bytes(self) -> int:
        """Memory that they take, of numbers."""
        features: Any = self.features
        classes = self.classes
        arrays: list[Any] = [classes.data, classes.indices, classes.indptr]
        arrays += [features] if isinstance(features, np.ndarray) else [features.data, features.indices, features.indptr]
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True, eq=False)
class Reservoir:
    """Rows of numbers drawn at random, evenly from all that were seen: those with the smallest of random keys."""

    rows: Rows
    keys: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Rows, most: int, generator: np.random.Generator) -> Self:
        """At most so many of some rows, and no more than `MOST_BYTES`."""
        return cls(rows.chosen(np.empty(0, np.int64)), np.empty(0)).extended(rows, most, generator)

    def extended(self, rows: Rows, most: int, generator: np.random.Generator) -> Self:
        """After further rows were seen."""
        keys = generator.random(len(rows))
        most = min(most, int(MOST_BYTES / max(1.0, rows.n_bytes / max(1, len(rows)))))
        new = np.sort(np.argsort(keys, kind="stable")[:most])  # before all are joined, which copies
        joined, keys = self.rows.joined(rows.chosen(new)), np.concatenate([self.keys, keys[new]])
        chosen = np.sort(np.argsort(keys, kind="stable")[:most])
        return type(self)(joined.chosen(chosen), keys[chosen])

    def drawn(self, n: int, generator: np.random.Generator) -> Rows:
        """So many of them, or all."""
        return self.rows.chosen(generator.permutation(len(self.rows))[:n])
