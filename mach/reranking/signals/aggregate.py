"""The aggregate: what the networks' buckets say of a class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mach.reranking.signals.contract import Shortlist, Signal

LARGEST_LOG = np.float32(-1e-3)  # of an aggregate, where its odds are still finite in float32
LEAST_LOG = np.float32(-30)


class Aggregate(Signal):
    """The mean of the logarithms of a class's bucket probabilities."""

    name = "aggregate"
    meaning = "The networks give the class's buckets this probability on average: its logarithm, its odds, and itself."
    labels = ("aggregate", "log odds", "probability")

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        logs_NC = np.clip(shortlist.scores_NC, LEAST_LOG, LARGEST_LOG)
        chances_NC = np.exp(logs_NC)
        return np.stack([logs_NC, logs_NC - np.log1p(-chances_NC), chances_NC], axis=2)

    def oracle(self, shortlist: Shortlist) -> NDArray[np.floating]:
        chances_NC = np.exp(np.clip(shortlist.scores_NC.astype(np.float64), LEAST_LOG, LARGEST_LOG))
        return np.stack([np.log(chances_NC), np.log(chances_NC / (1 - chances_NC)), chances_NC], axis=2)
