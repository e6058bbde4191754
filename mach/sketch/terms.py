"""Order by aggregate and what is counted of a class: its rows (a prior), or its propensity (for the tail).

Every term is at most 0, so no class scores above its aggregate. Hence the best C classes of the aggregate hold the best
k of the sum whenever the k-th sum exceeds what the aggregate of all others can reach; where it does not, C grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mach.sketch.answers import TopK
from mach.sketch.metrics import propensities

Floats = NDArray[np.float32]
CANDIDATES = 100  # C to begin with: enough for a certificate in nearly every query, and little beside the search
MAX_CANDIDATES = 10_000  # of a query, whatever it takes for a certificate: 120 KB
GROWTH = 8  # of C, for the queries that have no certificate yet


def prior_terms(counts_K: NDArray[np.int64], prior: float) -> NDArray[np.float32]:
    """``prior * log(1 + n_k)`` by the training rows of each class, less its largest value; float32 of shape (K,).

    Positive strengths favour frequent classes, negative ones rare classes.

    Examples
    --------
    >>> prior_terms(np.array([0, 1, 3]), -1.0).astype(float).round(2).tolist()
    [0.0, -0.69, -1.39]
    """
    return _at_most_0(prior * np.log1p(counts_K))


def tail_terms(counts_K: NDArray[np.int64], n_rows: int, tail: float) -> NDArray[np.float32]:
    """``-tail * log(p_k)`` by the propensity of each class, less its largest value; float32 of shape (K,).

    Divided by its propensity, the probability that a class is right is what it adds to PSP@k on average (Jain, Prabhu &
    Varma, "Extreme multi-label loss functions", KDD 2016): a tail of 1 ranks scores that are log-probabilities by it.

    Examples
    --------
    >>> tail_terms(np.array([0, 1, 100]), 1000, 1.0).astype(float).round(2).tolist()
    [0.0, -0.24, -1.61]
    """
    return _at_most_0(-tail * np.log(propensities(counts_K, n_rows)))


def reorder(top: TopK, scores_NC: NDArray[np.float32], k: int) -> TopK:
    """The best k of the candidates ``top`` by other scores; equal ones break to the smaller id.

    ``bound_N`` stays what it says, of the new scores: no other class's exceeds its old one, which the candidates bound.
    """
    order_Nk = np.lexsort((top.ids_Nk, -scores_NC), axis=1)[:, :k]
    rows_N1 = np.arange(len(order_Nk))[:, None]
    scores_Nk = scores_NC[rows_N1, order_Nk]
    bound_N = np.maximum(top.bound_N, scores_Nk[:, -1])
    return replace(top, ids_Nk=top.ids_Nk[rows_N1, order_Nk], scores_Nk=scores_Nk, bound_N=bound_N)


def topk_with_terms(
    search: Callable[[Floats, int], TopK], probs_NRB: Floats, k: int, terms_K: Floats, n_candidates: int
) -> TopK:
    """Best k classes by aggregate plus term, from the best C by aggregate, more where these give no certificate.

    ``search`` finds the best C classes by aggregate, of bucket scores and C. C begins with ``n_candidates`` and grows
    up to `MAX_CANDIDATES` where a query needs them. Terms are at most 0. ``exact_N`` says of all classes, not of the
    candidates alone, that none is better.
    """
    K = len(terms_K)
    n_candidates = max(k, min(n_candidates, K))
    top = search(probs_NRB, n_candidates)
    found = reorder(top, top.scores_Nk + terms_K[top.ids_Nk], k)  # padding stays at -inf
    is_whole_N = (top.ids_Nk[:, -1] < 0) | (n_candidates >= K)  # every class that may be returned is a candidate
    is_sure_N = is_whole_N | (found.scores_Nk[:, -1] > top.bound_N)
    open_N = top.exact_N & ~is_sure_N
    found = replace(found, exact_N=top.exact_N & is_sure_N)
    if not open_N.any() or n_candidates >= min(K, MAX_CANDIDATES):
        return found
    wider = topk_with_terms(search, probs_NRB[open_N], k, terms_K, min(GROWTH * n_candidates, MAX_CANDIDATES))
    for name, column in vars(found).items():
        column[open_N] = getattr(wider, name)
    return found


def _at_most_0(terms_K: NDArray[np.float64]) -> NDArray[np.float32]:
    return (terms_K - terms_K.max(initial=-np.inf)).astype(np.float32)
