"""Repeats: training rows with the same features as a query (`mach.reranking.kernels.repeats`)."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from mach.reranking.kernels.repeats import LOAD, MAX_SLOTS, count_rows, counts_of
from mach.reranking.signals.contract import BlendedSignal, Floats, Material, Scale, Shortlist, SignalFile

REPEAT_BYTES = 5  # at most, of a training row and of each of its classes


class Repeats(BlendedSignal):
    """How many training rows have the query's set of features, and how many of these have the class; up to 255.

    Strengths above 0 suit data whose equal rows have equal classes. Those below 0 put classes last that the row is
    known to have: they suit data that hold no pair of row and class twice, as where one asks what a user who has bought
    these things will buy next.
    """

    name = "repeats"
    meaning = "So many training rows have the query's features: those with the class, and all (as logarithms)."
    strength = "repeats"
    choices = (0.0, 2.0, -3.0, -12.0)  # -12 puts what is known last
    labels = ("log equal rows with it", "log equal rows")

    @classmethod
    def fit(cls, material: Material) -> Self:
        if not material.counts_repeats:
            return cls()
        store, rows = material.store, material.rows
        n_most = len(rows) + int((store.class_indptr[rows + 1] - store.class_indptr[rows]).sum())
        csr = (store.feature_indptr, store.feature_indices, store.feature_values)
        for _ in range(2):  # the second time as large as need be
            n_slots = min(int(n_most / LOAD) + 2, MAX_SLOTS)
            table, n_entries = count_rows(csr, store.class_indptr, store.class_ids, rows, n_slots)
            if n_entries > LOAD * n_most:
                break
            n_most = n_entries
        return cls({"repeats": table})

    @classmethod
    def load(cls, file: SignalFile) -> Self:
        return cls({"repeats": file.array("repeats", np.uint32, (-1,))} if file.size("repeats") else {})

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        return REPEAT_BYTES * (scale.n_rows + scale.n_positives) if scale.counts_repeats else 0

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        ids_NC = shortlist.ids_NC
        counts_NC, totals_N = np.zeros(ids_NC.shape, np.uint8), np.zeros(len(ids_NC), np.uint8)
        if self.arrays:
            counts_of(self.arrays["repeats"], shortlist.rows, ids_NC, counts_NC, totals_N)
        columns_NC2 = np.empty((*counts_NC.shape, 2), np.float32)
        columns_NC2[:, :, 0] = np.log1p(counts_NC, dtype=np.float32)
        columns_NC2[:, :, 1] = np.log1p(totals_N, dtype=np.float32)[:, None]
        return columns_NC2

    def terms(self, columns_NCI: Floats, ids_NC: NDArray[np.int64], strength: float) -> Floats:
        """``strength * log((1 + n_k) / (1 + n))`` of n equal rows, n_k with the class; below 0 without the n."""
        known_NC, all_NC = columns_NCI[:, :, 0], columns_NCI[:, :, 1]
        return np.float32(strength) * (known_NC - all_NC if strength > 0 else known_NC)
