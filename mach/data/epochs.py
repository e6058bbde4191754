"""Which rows of a store an epoch of training sees, and in which order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mach.config import Config
from mach.data.batch import read_classes
from mach.data.store import Store


class Epochs:
    """All training rows in every epoch; of a run that starts from another, all new rows and some old ones.

    ``n_rows`` is the number of rows of an epoch, and ``validation_rows`` are those held out.
    """

    def __init__(self, store: Store, config: Config) -> None:
        training = config.training
        self.seed, self._store = training.seed, store
        rows, self.validation_rows = store.split(config.data.validation_fraction, training.seed)
        n_old = int(np.searchsorted(rows, store.n_old_rows)) if training.start is not None else 0
        self._old, self._new = rows[:n_old], rows[n_old:]
        self._n_replayed = min(n_old, round((training.replay or 0.0) * len(self._new)))
        self.n_rows = len(self._new) + self._n_replayed

    def order(self, epoch: int, repetition: int) -> NDArray[np.int64]:
        """Rows of an epoch as a repetition sees them; old ones are drawn anew in every epoch."""
        generator = np.random.default_rng([self.seed, repetition, epoch])
        rows = self._new
        if self._n_replayed:
            replayed = generator.choice(self._old, self._n_replayed, replace=False, shuffle=False)
            rows = np.concatenate([rows, replayed])
        return generator.permutation(rows)

    def counts_K(self) -> NDArray[np.float64]:
        """How many rows of an epoch have each class, on average."""
        counts_K = np.zeros(self._store.n_classes)
        for rows, n_seen in ((self._new, len(self._new)), (self._old, self._n_replayed)):
            if n_seen:
                seen_K = np.bincount(read_classes(self._store, rows)[0], minlength=self._store.n_classes)
                counts_K += seen_K * (n_seen / len(rows))
        return counts_K
