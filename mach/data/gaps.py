"""Numbers of features and classes that are far beyond those that occur: memory would follow the largest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mach.data.limits import BLOCK_BYTES, LEAST_IDS, MOST_ABSENT
from mach.data.store import Store
from mach.errors import DataError


def refuse_gaps(store: Store, name: object, of_classes: object = None, *, n_known: int | None = 0) -> None:
    """DataError where the features or classes of a store are numbered far beyond those that occur.

    ``n_known`` classes are known from elsewhere; None: all of them. Arrays have two names, the second ``of_classes``.
    Cost: one look at the store's ids, up to where enough have occurred; nothing for D and K of up to `LEAST_IDS`.
    """
    features = (name, "feature indices", "D", store.n_features, None if store.is_dense else store.feature_indices, 0)
    classes = (of_classes or name, "class ids", "K", store.n_classes, store.class_ids, n_known)
    for where, what, size, n, ids, known in (features, classes):
        if n <= LEAST_IDS or ids is None or known is None:
            continue
        n_found = _n_distinct(ids, -(-n // MOST_ABSENT) - known) + known
        if n_found * MOST_ABSENT < n:
            repair = "number those that occur from 0" + (", and keep the old ids in data.classes" * (size == "K"))
            if of_classes is not None:
                repair = "leave its empty columns out"
            raise DataError(
                f"{where} has {size} = {n}, and only {n_found} {what} occur: memory follows {size}, which may be "
                f"{LEAST_IDS} or {MOST_ABSENT} times as many as occur: {repair}"
            )


def _n_distinct(ids: NDArray[np.int32], enough: int) -> int:
    """How many ids there are, each counted once, or at least as many as are enough."""
    seen = np.empty(0, np.int32)
    for begin in range(0, len(ids), BLOCK_BYTES // 4):
        seen = np.union1d(seen, ids[begin : begin + BLOCK_BYTES // 4])
        if len(seen) >= enough:
            break
    return len(seen)
