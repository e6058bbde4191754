"""Measures of ranked classes against the truth, as the Extreme Classification Repository defines them.

``ids_Nk`` holds the distinct classes returned for each row, best first, padded with -1; the truth is CSR,
``(indptr, ids)``. With ``hit_i`` 1 when the i-th returned class of a row is true and ``m`` true classes:

- ``P@k = sum_{i<=k} hit_i / k``: divided by k even when ``m < k``.
- ``nDCG@k = sum_{i<=k} hit_i / log2(i + 1)`` over its best value, ``sum_{i<=min(k, m)} 1 / log2(i + 1)``.
- ``recall@k = sum_{i<=k} hit_i / m``.
- ``hit@k``: 1 where any of the k is true.
- ``PSP@k``: hits weighted by inverse propensities, summed over *all* rows, over the largest such sum.
- ``PSnDCG@k``: the same ratio of nDCG terms, both with the normaliser of nDCG@k.
- ``coverage@k``: share of the classes in the truth that are hit at least once.

P, nDCG, recall and hit are means over all rows, and a row without a true class counts as zero (the convention
of the repository's scripts and of pyxclib); the propensities are those of Jain, Prabhu & Varma, "Extreme
multi-label loss functions", KDD 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError, DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_array, csr_matrix

Array = NDArray[Any]


def propensities(class_counts: ArrayLike, n_rows: int, a: float = 0.55, b: float = 1.5) -> NDArray[np.float64]:
    """Propensity of each class, shape (K,): ``1 / (1 + C (n_k + b)^-a)`` with ``C = (log n_rows - 1) (b + 1)^a``.

    Parameters
    ----------
    class_counts : int array of shape (K,)
        Training rows of every class.
    n_rows : int
        Training rows in all, at least 3 (``C`` must not be negative).
    a, b : float
        0.55 and 1.5 in general; the repository uses 0.5, 0.4 for Wikipedia and 0.6, 2.6 for Amazon.

    Raises
    ------
    ConfigError
        When there are fewer than 3 rows.
    """
    if n_rows < 3:
        raise ConfigError(f"propensities of {n_rows} training rows are undefined: need at least 3 rows")
    scale = (np.log(n_rows) - 1) * (b + 1) ** a
    return 1 / (1 + scale * (np.asarray(class_counts) + b) ** -a)


def evaluate(
    ids_Nk: ArrayLike,
    truth: tuple[ArrayLike, ArrayLike] | csr_array | csr_matrix,
    ks: Sequence[int] = (1, 3, 5),
    propensities: ArrayLike | None = None,
) -> dict[str, float]:
    """All measures at every k, as fractions; cost O((N k + n_true) log n_true).

    Parameters
    ----------
    ids_Nk : int array of shape (N, k)
        Returned classes, best first, -1 where there are fewer; distinct within a row.
    truth : (indptr, ids), or scipy.sparse CSR matrix
        Row n has the true classes ``ids[indptr[n]:indptr[n + 1]]``, distinct; a matrix's values are not read.
    ks : sequence of int
        Each in ``1..k``.
    propensities : float array of shape (K,), optional
        Adds PSP@k and PSnDCG@k.

    Returns
    -------
    dict of str to float
        ``"P@1"``, ``"nDCG@1"``, ``"recall@1"``, ``"hit@1"``, ``"coverage@1"``, ``"PSP@1"``, ``"PSnDCG@1"``, ...

    Raises
    ------
    ConfigError, DataError
        When a k is out of range or the shapes disagree.

    Examples
    --------
    >>> evaluate([[7, 2, 9]], ([0, 2], [2, 5]), ks=(1, 2))["P@2"]
    0.5
    """
    ids_Nk = np.asarray(ids_Nk)
    parts = truth if isinstance(truth, tuple) else (truth.indptr, truth.indices)
    indptr, true_ids = (np.asarray(part, dtype=np.int64) for part in parts)
    if ids_Nk.ndim != 2 or len(indptr) != len(ids_Nk) + 1 or len(ids_Nk) == 0 or indptr[-1] != len(true_ids):
        raise DataError(
            f"ids of shape {ids_Nk.shape} do not match a truth of {len(indptr) - 1} rows and {len(true_ids)} entries"
        )
    if not all(1 <= k <= ids_Nk.shape[1] for k in ks):
        raise ConfigError(f"cannot evaluate at k = {list(ks)}: each must be in 1..{ids_Nk.shape[1]}")
    ids_Nk, n_true_N = ids_Nk[:, : max(ks)], np.diff(indptr)
    rows = np.repeat(np.arange(len(ids_Nk)), n_true_N)
    span = 1 + max(int(true_ids.max(initial=0)), int(ids_Nk.max(initial=0)))  # pairs of row and class as integers
    hits_Nk = np.isin(np.arange(len(ids_Nk))[:, None] * span + ids_Nk, rows * span + true_ids) & (ids_Nk >= 0)
    discounts_k = 1 / np.log2(np.arange(max(ks)) + 2)
    best_dcg_k = np.cumsum(discounts_k)
    weighted = None
    if propensities is not None:
        weighted = _weighted(ids_Nk, hits_Nk, rows, true_ids, indptr, np.asarray(propensities))

    measures: dict[str, float] = {}
    for k in ks:
        n_hits_N = hits_Nk[:, :k].sum(axis=1)
        normaliser_N = best_dcg_k[np.clip(n_true_N, 1, k) - 1]
        measures[f"P@{k}"] = n_hits_N.mean() / k
        measures[f"nDCG@{k}"] = (hits_Nk[:, :k] @ discounts_k[:k] / normaliser_N).mean()
        measures[f"recall@{k}"] = (n_hits_N / np.maximum(n_true_N, 1)).mean()
        measures[f"hit@{k}"] = (n_hits_N > 0).mean()
        found = np.unique(ids_Nk[:, :k][hits_Nk[:, :k]])
        measures[f"coverage@{k}"] = _ratio(len(found), len(np.unique(true_ids)))
        if weighted is not None:
            gains_Nk, best_Nk = weighted
            measures[f"PSP@{k}"] = _ratio(gains_Nk[:, :k].sum(), best_Nk[:, :k].sum())
            gained, attainable = (gains[:, :k] @ discounts_k[:k] / normaliser_N for gains in weighted)
            measures[f"PSnDCG@{k}"] = _ratio(gained.sum(), attainable.sum())
    return {name: float(value) for name, value in measures.items()}


def _weighted(
    ids_Nk: Array, hits_Nk: Array, rows: Array, true_ids: Array, indptr: Array, propensities_K: Array
) -> tuple[Array, Array]:
    """Inverse propensities of the hits, and of the true classes in descending order: the best attainable hits."""
    gains_Nk, best_Nk = np.zeros(ids_Nk.shape), np.zeros(ids_Nk.shape)
    gains_Nk[hits_Nk] = 1 / propensities_K[ids_Nk[hits_Nk]]
    weights = 1 / propensities_K[true_ids]
    weights = weights[np.lexsort((-weights, rows))]  # rows ascend already, so only the order within a row changes
    ranks = np.arange(len(rows)) - indptr[rows]
    kept = ranks < ids_Nk.shape[1]
    best_Nk[rows[kept], ranks[kept]] = weights[kept]
    return gains_Nk, best_Nk


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
