"""The context: what is known of a query, whichever class is asked about."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mach.reranking.signals.contract import Shortlist, Signal

LIKELY = np.array([0.5, 0.2, 0.05, 0.01], np.float32)  # probabilities, buckets of which are counted


class Context(Signal):
    """How many features a query has, and how many classes the networks expect.

    The sum of a hash function's bucket probabilities, and how many of them are above each of `LIKELY`, tell how many
    classes to expect; they are means over the functions.
    """

    name = "context"
    meaning = "So many features has the query, and so many classes do the networks expect of it (as logarithms)."
    labels = ("log features", "log expected buckets", *(f"log buckets above {p:g}" for p in LIKELY))

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        probs_NRB = shortlist.probs_NRB
        found_NI = [np.log1p(np.diff(shortlist.batch.indptr), dtype=np.float32)]
        found_NI.append(np.log(np.maximum(probs_NRB.sum(axis=2).mean(axis=1), 1e-3)))
        for p in LIKELY:
            found_NI.append(np.log1p(np.count_nonzero(probs_NRB > p, axis=2).mean(axis=1), dtype=np.float32))
        columns_NI = np.stack(found_NI, axis=1)
        return np.broadcast_to(columns_NI[:, None], (*shortlist.ids_NC.shape, self.n_columns))

    def oracle(self, shortlist: Shortlist) -> NDArray[np.floating]:
        columns_NCI = np.empty((*shortlist.ids_NC.shape, self.n_columns))
        for n, probs_RB in enumerate(shortlist.probs_NRB.astype(np.float64)):
            n_features = shortlist.batch.indptr[n + 1] - shortlist.batch.indptr[n]
            n_above = [sum(int((probs_B > p).sum()) for probs_B in probs_RB) / len(probs_RB) for p in LIKELY]
            expected = max(probs_RB.sum() / len(probs_RB), 1e-3)
            columns_NCI[n] = [np.log(1 + n_features), np.log(expected), *(np.log(1 + m) for m in n_above)]
        return columns_NCI
