"""How rows are seen: the one door through which features come to networks and classifiers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch, DenseBatch, SparseBatch


@dataclass(frozen=True)
class RowView:
    """What a reader sees of a row. The steps are taken in the order of the attributes.

    A store and its queries, the networks, and each set of classifiers have one view each, made once from the run.

    Attributes
    ----------
    most : int
        Features that count, those of largest magnitude, of equal ones the first; 0: all. What is left is rescaled to
        the norm of the whole row. Dense rows keep all.
    presence : float
        Value of every feature in place of its own; 0: its own.
    power : float
        Values are raised to it, signs stay, and the row is rescaled to the norm that it had.
    pairs : int
        Largest features whose products follow behind the row's own features (`mach.data.kernels.views`); below 2: none.
    n_features : int
        D, behind which products begin.

    Examples
    --------
    >>> rows = DenseBatch(np.array([[3.0, -4.0]], np.float32))
    >>> RowView().batch(rows) is rows
    True
    >>> RowView(power=2.0).batch(rows).values_ND.round(2).astype(str).tolist()
    [['2.45', '-4.36']]
    """

    most: int = 0
    presence: float = 0.0
    power: float = 1.0
    pairs: int = 0
    n_features: int = 0

    @property
    def n_columns(self) -> int:
        """Features of the rows that are seen: D, and those of products."""
        from mach.data.kernels.views import N_HASHED

        return self.n_features + (N_HASHED if self.pairs > 1 else 0)

    def batch(self, batch: Batch) -> Batch:
        """The rows as they are seen, float32; the batch itself where nothing is changed. Cost O(nnz)."""
        if isinstance(batch, DenseBatch):
            return batch if self.power == 1.0 else DenseBatch(_raised(batch.values_ND, self.power))
        return self.sparse(batch)

    def sparse(self, batch: SparseBatch) -> SparseBatch:
        """`batch` of sparse rows."""
        from mach.data.kernels import views

        indptr, indices, values = batch.indptr, batch.indices, batch.values
        if self.most:
            indptr, indices, values = views.keep_largest(indptr, indices, values, self.most)
        if self.presence:
            values = np.full(len(values), self.presence, np.float32)
        if self.pairs > 1:
            options = np.arange(len(batch)), self.pairs, self.n_features, self.power
            return SparseBatch(*views.with_pairs(indptr, indices, values, *options))
        if self.power != 1.0:
            values = views.raise_values(indptr, values, self.power)
        return batch if values is batch.values else SparseBatch(indptr, indices, values)

    def members(self, batch: SparseBatch) -> list[tuple[int, ...]]:
        """The feature behind each entry of `sparse` of one row, or the two whose product it is.

        >>> row = SparseBatch(np.array([0, 2]), np.array([3, 8], np.int32), np.array([1, 2], np.float32))
        >>> RowView(pairs=2, n_features=10).members(row)
        [(3,), (8,), (3, 8)]
        """
        own = replace(self, pairs=0, power=1.0).sparse(batch)
        largest = np.argsort(-np.abs(own.values), kind="stable")[: self.pairs if self.pairs > 1 else 0]
        pairs = [(own.indices[i], own.indices[j]) for n, i in enumerate(largest) for j in largest[:n]]
        return [(i,) for i in own.indices.tolist()] + [(int(min(pair)), int(max(pair))) for pair in pairs]

    def row(self, features: NDArray[Any], values: NDArray[Any]) -> dict[int, float]:
        """One sparse row as it is seen, by the definition: the oracle of `sparse`."""
        from mach.data.kernels.views import LENGTH, hashed

        values = np.asarray(values, np.float64)
        order = np.argsort(-np.abs(values), kind="stable")
        if self.most:
            largest = np.sort(order[: self.most])
            values, features = _rescaled(values[largest], values), features[largest]
        if self.presence:
            values = np.full(len(values), self.presence)
        order = np.argsort(-np.abs(values), kind="stable")[: self.pairs]
        values = _rescaled(np.copysign(np.abs(values) ** self.power, values), values)
        row = dict(zip(features.tolist(), values.tolist(), strict=True))
        products = {(i, j): values[i] * values[j] for n, i in enumerate(order) for j in order[:n]}
        lengths = _rescaled(np.array([*products.values()]), LENGTH * values)
        for (i, j), product in zip(products, lengths.tolist(), strict=True):
            column = self.n_features + int(hashed(int(features[i]), int(features[j])))
            row[column] = row.get(column, 0.0) + product
        return row


def _raised(values_ND: NDArray[np.float32], power: float) -> NDArray[np.float32]:
    raised_ND = np.copysign(np.abs(values_ND) ** power, values_ND)
    norms_N2 = np.linalg.norm(np.stack([values_ND, raised_ND], axis=1), axis=2)
    return (raised_ND * (norms_N2[:, :1] / np.maximum(norms_N2[:, 1:], 1e-30))).astype(np.float32)


def _rescaled(values: NDArray[np.float64], like: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values of the norm of others."""
    return values * (np.linalg.norm(like) / max(float(np.linalg.norm(values)), 1e-30))
