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
        columns_NC3 = np.empty((*shortlist.ids_NC.shape, self.n_columns), np.float32)
        columns_NC3[:, :, 0] = logs_NC = np.minimum(np.maximum(shortlist.scores_NC, LEAST_LOG), LARGEST_LOG)
        columns_NC3[:, :, 2] = chances_NC = np.exp(logs_NC)
        columns_NC3[:, :, 1] = logs_NC - np.log1p(-chances_NC)
        return columns_NC3


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
        columns_NI = np.zeros((N, self.n_columns), np.float32)
        columns_NI[:, 0] = shortlist.batch.indptr[1:] - shortlist.batch.indptr[:-1]
        for n, probs_RB in enumerate(probs_NRB):
            columns_NI[n, 2:] = [np.count_nonzero(probs_RB > p) / R for p in LIKELY]
        np.log1p(columns_NI, out=columns_NI)
        columns_NI[:, 1] = np.log(np.maximum(probs_NRB.sum(axis=2).sum(axis=1) / R, 1e-3))
        return np.repeat(columns_NI[:, None], shortlist.ids_NC.shape[1], axis=1)
