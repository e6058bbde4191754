"""X as people hold it, rows of it with their classes, and a random draw of rows that later training replays.

X is rows of numbers by scikit-learn's rules, or texts in lists, arrays, series and tables (`mach.data.frames`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from sklearn.utils.validation import check_is_fitted, validate_data

from mach.data.frames import arrow_of, texts_of
from mach.data.queries import canonical
from mach.errors import DataError

Features: TypeAlias = "list[str] | csr_array | NDArray[np.float32]"
MOST_BYTES = 2**26  # of a reservoir
NAME = "X and y"


def features_of(estimator: Any, X: Any, y: Any = "predict", *, reset: bool = False) -> Features:
    """The rows of X as networks read them; to ``reset`` is to fit, otherwise X must be of the kind that was fitted."""
    if not reset:
        check_is_fitted(estimator)
    if y is None:
        raise ValueError("MACHClassifier requires y to be passed, but the target y is None")
    X = arrow_of(X)
    texts = None if X is None else texts_of(X)
    if not reset and (texts is None) != hasattr(estimator, "n_features_in_"):
        kinds = ("numbers", "texts") if texts is None else ("texts", "numbers")
        raise DataError(f"X holds {kinds[0]}, the classifier was fitted to {kinds[1]}: give the same kind")
    if texts is None:
        values = validate_data(estimator, X, accept_sparse="csr", dtype=np.float32, reset=reset)
        return canonical(csr_array(values)) if hasattr(values, "tocsr") else np.ascontiguousarray(values)
    if reset:
        if not texts:
            raise ValueError("Found array with 0 sample(s): give at least one text")
        for name in ("n_features_in_", "feature_names_in_"):
            estimator.__dict__.pop(name, None)
    return texts


def n_rows_of(features: Features) -> int:
    """How many rows there are, of numbers or texts."""
    return len(features) if isinstance(features, list) else int(features.shape[0])


def name_of(kept: NDArray[np.int64]) -> str:
    """What messages call rows of which these numbers were kept: other numbers than the caller's are said to be."""
    is_numbered_so = not len(kept) or kept[-1] + 1 == len(kept)
    return NAME if is_numbered_so else f"{NAME}, without the rows left out"


@dataclass(frozen=True, eq=False)
class Rows:
    """N training rows in memory; classes are columns of an array (N, K), ascending in a row, whatever its values."""

    features: Features
    classes: csr_array
    name: str = NAME  # in messages

    def __len__(self) -> int:
        return int(self.classes.shape[0])

    @property
    def n_classes(self) -> int:
        """K."""
        return int(self.classes.shape[1])

    def chosen(self, rows: NDArray[np.int64]) -> Rows:
        """Some of the rows, in this order."""
        features: Any = self.features
        if isinstance(features, list):
            return Rows([features[n] for n in rows.tolist()], self.classes[rows])
        return Rows(features[rows], self.classes[rows])

    def joined(self, other: Rows) -> Rows:
        """These rows and others behind them, all of numbers and of one kind."""
        parts: Any = [self.features, other.features]
        is_dense = isinstance(self.features, np.ndarray)
        features = np.concatenate(parts) if is_dense else csr_array(vstack(parts, format="csr", dtype=np.float32))
        classes = [rows.classes.copy() for rows in (self, other)]
        for part in classes:
            part.resize((part.shape[0], max(self.n_classes, other.n_classes)))
        return Rows(features, vstack(classes, format="csr"), f"{self.name}, and rows kept from before")

    @property
    def n_bytes(self) -> int:
        """Memory that they take, of numbers."""
        parts: list[Any] = [self.features, self.classes]
        return sum(
            part.nbytes if isinstance(part, np.ndarray) else part.data.nbytes + part.indices.nbytes + part.indptr.nbytes
            for part in parts
        )


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
