"""What the networks say: of a class by its buckets, and of a query, whichever class is asked about."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mach.reranking.signals.contract import Shortlist, Signal

LARGEST_LOG = np.float32(-1e-3)  # of an aggregate, where its odds are still finite in float32
LEAST_LOG = np.float32(-30)
LIKELY = np.array([0.5, 0.2, 0.05, 0.01], np.float32)  # probabilities, buckets of which are counted


class Aggregate(Signal):
    """The mean of the logarithms of a class's bucket probabilities."""

    name = "aggregate"
    meaning = "The networks give the class's buckets this probability on average: its logarithm, its odds, and itself."
    labels = ("aggregate", "log odds", "probability")
    needs_arrays = False

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        logs_NC = np.clip(shortlist.scores_NC, LEAST_LOG, LARGEST_LOG)
        chances_NC = np.exp(logs_NC)
        return np.stack([logs_NC, logs_NC - np.log1p(-chances_NC), chances_NC], axis=2)


class Context(Signal):
    """How many features a query has, and how many classes the networks expect.

    The sum of a hash function's bucket probabilities, and how many of them are above each of `LIKELY`, tell how many
    classes to expect; they are means over the functions.
    """

    name = "context"
    meaning = "So many features has the query, and so many classes do the networks expect of it (as logarithms)."
    labels = ("log features", "log expected buckets", *(f"log buckets above {p:g}" for p in LIKELY))
    needs_arrays = False

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        probs_NRB = shortlist.probs_NRB
        N, R, _ = probs_NRB.shape
        columns_NI = np.empty((N, self.n_columns), np.float32)
        columns_NI[:, 0] = np.log1p(np.diff(shortlist.batch.indptr), dtype=np.float32)
        columns_NI[:, 1] = np.log(np.maximum(probs_NRB.sum(axis=2).sum(axis=1) / R, 1e-3))
        n_above_NI = [[np.count_nonzero(probs_RB > p) for p in LIKELY] for probs_RB in probs_NRB]
        columns_NI[:, 2:] = np.log1p(np.reshape(n_above_NI, (N, len(LIKELY))) / R, dtype=np.float32)
        return np.repeat(columns_NI[:, None], shortlist.ids_NC.shape[1], axis=1)
