"""Whether the arrays of a store are what kernels take them for: looked at once, where a store is somebody's file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.class_texts import FILE
from mach.data.store import Store
from mach.errors import StorageError
from mach.files.arrays import ascends

BLOCK = 2**22  # entries looked at together


def sound(store: Store) -> Store:
    """The store itself, once all its arrays are seen to be sound; cost of reading them once.

    Offsets ascend from 0 to the end, features and classes are in range, ascending and unique within a row, and values
    are finite. Kernels trust that.

    Raises
    ------
    StorageError
        When something is not so; the message names the array and the row.
    """
    if store.is_dense:
        _refuse_wild(store, "features", store.dense_ND.reshape(-1))
    else:
        _refuse_disorder(store, "feature", store.feature_indptr, store.feature_indices, store.n_features)
        _refuse_wild(store, "feature_values", store.feature_values)
    _refuse_disorder(store, "class", store.class_indptr, store.class_ids, store.n_classes)
    if store.class_names is not None:
        for k in range(0, store.n_classes, 2**16):
            store.class_names[k : k + 2**16]
    if (texts := store.class_texts) is not None and FILE in store.meta["bytes"]:
        for k in range(store.n_classes):
            texts.whole(k), texts.uris[k]
    if store.text_features is not None and store.text_features.n_features != store.n_features:
        raise _damaged(store, f"its text features have D = {store.text_features.n_features}, it has {store.n_features}")
    return store


def _refuse_disorder(store: Store, what: str, indptr: NDArray[Any], ids: NDArray[Any], end: int) -> None:
    if not ascends(indptr, len(ids)):
        raise _damaged(store, f"{what}_indptr does not ascend from 0 to {len(ids)}")
    for begin in range(0, len(ids), BLOCK):
        part = ids[max(begin - 1, 0) : begin + BLOCK]
        if part.min() < 0 or part.max() >= end:
            wrong = max(begin - 1, 0) + int(np.argmax((part < 0) | (part >= end)))
            raise _damaged(store, f"{what} {ids[wrong]} of row {_row(indptr, wrong)} is none of 0..{end - 1}")
        falls = max(begin, 1) + np.flatnonzero(np.diff(part) <= 0)
        inside = falls[indptr[np.searchsorted(indptr, falls)] != falls]
        if len(inside):
            raise _damaged(store, f"{what} ids of row {_row(indptr, int(inside[0]))} do not ascend")


def _refuse_wild(store: Store, what: str, values: NDArray[Any]) -> None:
    for begin in range(0, len(values), BLOCK):
        is_finite = np.isfinite(values[begin : begin + BLOCK])
        if not is_finite.all():
            raise _damaged(store, f"{what} {begin + int(np.argmin(is_finite))} is NaN or infinity")


def _row(indptr: NDArray[Any], entry: int) -> int:
    return int(np.searchsorted(indptr, entry, side="right")) - 1


def _damaged(store: Store, what: str) -> StorageError:
    return StorageError(f"store {store.path} is damaged: {what}: prepare it anew")
