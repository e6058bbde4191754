"""One sparse linear classifier a class: how sets of them differ, how they are stored, and their margins.

A set holds, for K classes, ``offsets`` (int64, K + 1), ``scales`` and ``biases`` (float32, K), and for every stored
weight its feature as a step from the class's feature before (``gaps``, int16; the first from 0) and its value
(``codes``, int8, times the class's scale): 3 bytes a weight and 16 a class. Steps above 32,767 are cut by codes of 0.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.config import RerankingConfig, RerankingLoss, ViewName
from mach.data.rows import RowView

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from mach.data.batch import SparseBatch

ARRAYS = ("offsets", "gaps", "codes", "scales", "biases")
DTYPES = dict(zip(ARRAYS, (np.int64, np.int16, np.int8, np.float32, np.float32), strict=True))


@dataclass(frozen=True)
class View:
    """What a set of classifiers sees of a row, and how it is fitted.

    Attributes
    ----------
    loss, cost, threshold, class_weights, pairs, power
        As in `mach.config.RerankingConfig`.
    presence : float
        Value of every feature of a row, in place of its own; 0: its own.
    """

    loss: RerankingLoss
    cost: float
    threshold: float
    class_weights: int | None = None
    pairs: int = 0
    power: float = 1.0
    presence: float = 0.0

    def rows(self, n_features: int) -> RowView:
        """How the set sees rows of so many features."""
        return RowView(presence=self.presence, power=self.power, pairs=self.pairs, n_features=n_features)


# Further sets whose margins a learned order weighs, unlike each other: presence alone tells long rows from short ones
# by their length, which other sets take away; small and large costs differ in how far rare features are believed.
FURTHER: dict[ViewName, View] = {
    "presence": View("logistic", cost=4.0, threshold=0.2, presence=1.0),
    "cautious": View("logistic", cost=1.0, threshold=0.1),
    "bold": View("logistic", cost=16.0, threshold=0.3),
}


def own_view(settings: RerankingConfig) -> View:
    """That of the settings themselves."""
    names = ("loss", "cost", "threshold", "class_weights", "pairs", "power")
    return View(**{name: getattr(settings, name) for name in names})


def further_view(name: ViewName, row_features: float) -> View:
    """One of `FURTHER`, for rows of so many features on average: those of the mean row have length 1."""
    view = FURTHER[name]
    return replace(view, presence=float(np.float32(max(row_features, 1.0) ** -0.5))) if view.presence else view


class Classifiers:
    """Linear classifiers of K classes over D features, mapped; safe to share between threads.

    Parameters
    ----------
    arrays : mapping
        `ARRAYS`.
    view : View
    n_features : int
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], view: View, n_features: int) -> None:
        self.arrays = tuple(np.asarray(arrays[name]) for name in ARRAYS)  # not memmap: calls cost less
        self.view, self.rows = view, view.rows(n_features)
        self._scratch = threading.local()

    def margins(self, batch: SparseBatch, ids_NC: NDArray[np.int64]) -> NDArray[np.float32]:
        """``w_k x_n + b_k`` of given classes, shape (N, C); reads 3 bytes for each of their weights."""
        from mach.kernels.rerank import margins

        margins_NC = np.empty(ids_NC.shape, np.float32)
        x_D = getattr(self._scratch, "x_D", None)
        if x_D is None:
            x_D = self._scratch.x_D = np.zeros(self.rows.n_columns + 1, np.float32)
        seen = self.rows.sparse(batch)
        rows = seen.indptr, seen.indices, seen.values
        offsets, gaps, codes, scales, biases = self.arrays
        margins(rows, ids_NC, offsets, gaps, codes, scales, biases, x_D, margins_NC)
        return margins_NC

    def matrix(self) -> csr_array:
        """All weights but the biases, (K, columns of `rows`), in plain numpy: the oracle of the compiled margins."""
        from scipy.sparse import csr_array

        offsets, gaps, codes, scales, _ = self.arrays
        totals = np.concatenate([[0], np.cumsum(gaps, dtype=np.int64)])
        counts_K = np.diff(offsets)
        features = totals[1:] - np.repeat(totals[offsets[:-1]], counts_K)
        weights = codes * np.repeat(scales, counts_K)
        return csr_array((weights, features, offsets), shape=(len(counts_K), self.rows.n_columns))
