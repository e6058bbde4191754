"""Counts of what was seen: how many training rows with the same set of features as a query have a class.

A hash table of fixed size, one uint32 an entry: a tag of 24 bits, and 8 bits for a count up to 255. An entry is found
by a hash of the row's set of features and the class, in the first slots from its own on; `ANY` in place of a class
counts all rows alike. About one look in a million finds a count that is another entry's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel

ANY = -1
LOAD = 0.8  # of the slots are taken
MAX_SLOTS = 2**32
MAX_PROBES = 4096  # of a search: a table that is damaged or too full holds nobody up
Array = NDArray[Any]


@kernel()
def _mixed(key: np.uint64) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


@kernel()
def _row_key(indices: Array, values: Array, begin: int, end: int) -> Any:
    """The same for rows with the same set of features other than 0, in whatever order."""
    key = np.uint64(end - begin)
    for j in range(begin, end):
        if values[j] == 0:
            key -= np.uint64(1)
        else:
            key += _mixed(np.uint64(indices[j]) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1))
    return _mixed(key)


@kernel()
def _slot(table: Array, row_key: np.uint64, k: int) -> Any:
    """Where the entry of a row and a class is or would be, -1 if that is too far, and its tag."""
    key = _mixed(row_key + np.uint64(k + 2) * np.uint64(0xC2B2AE3D27D4EB4F))
    tag = np.uint32(key & np.uint64(0xFFFFFF))
    slot: Any = np.int64(((key >> np.uint64(32)) * np.uint64(len(table))) >> np.uint64(32))
    for _ in range(min(len(table), MAX_PROBES)):
        if table[slot] == 0 or table[slot] >> np.uint32(8) == tag:
            return slot, tag
        slot += 1
        if slot == len(table):
            slot = 0
    return -1, tag


@kernel()
def count_rows(
    csr: tuple[Array, Array, Array], class_indptr: Array, class_ids: Array, rows: Array, n_slots: int
) -> tuple[Array, Any]:
    """Count the given rows by features and class: the table, uint32 of shape (n_slots,), and how many entries it has.

    ``csr`` are indptr, indices and values of the features of all rows. Of more entries than slots, those that come last
    are not counted.
    """
    table, n_entries = np.zeros(n_slots, np.uint32), 0
    indptr, indices, values = csr
    for row in rows:
        key = _row_key(indices, values, indptr[row], indptr[row + 1])
        for j in range(class_indptr[row] - 1, class_indptr[row + 1]):
            slot, tag = _slot(table, key, ANY if j < class_indptr[row] else class_ids[j])
            if slot < 0:
                continue
            if table[slot] == 0:
                if n_entries == n_slots - 1:  # one stays free, where searches end
                    continue
                table[slot] = tag << np.uint32(8)
                n_entries += 1
            if table[slot] & np.uint32(255) < 255:
                table[slot] += np.uint32(1)
    return table, n_entries


@kernel()
def counts_of(table: Array, csr: tuple[Array, Array, Array], ids_NC: Array, out_NC: Array, totals_N: Array) -> None:
    """Counts of queries' candidates, uint8 of shape (N, C), none above that of all rows alike; 0 below id 0."""
    indptr, indices, values = csr
    for n in range(len(indptr) - 1):
        key = _row_key(indices, values, indptr[n], indptr[n + 1])
        slot, _ = _slot(table, key, ANY)
        totals_N[n] = table[slot] & np.uint32(255) if slot >= 0 else 0
        for c in range(ids_NC.shape[1]):
            out_NC[n, c] = 0
            if totals_N[n] and ids_NC[n, c] >= 0:
                slot, _ = _slot(table, key, ids_NC[n, c])
                if slot >= 0:
                    out_NC[n, c] = min(table[slot] & np.uint32(255), np.uint32(totals_N[n]))
