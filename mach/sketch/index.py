"""What the compiled decoder knows of an assignment: its arrays, prepared once for every assignment object."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mach.errors import ConfigError
from mach.sketch.hashing import Assignment, UniversalAssignment
from mach.sketch.kernels.lanes import LANES
from mach.sketch.kernels.sweep import LENGTH, Index
from mach.sketch.ledger import N_PEERS
from mach.sketch.tables import TableAssignment

_indexes: WeakKeyDictionary[Any, Index] = WeakKeyDictionary()


def index_of(assignment: Assignment) -> Index:
    """The arrays of an assignment."""
    if assignment not in _indexes:
        if isinstance(assignment, UniversalAssignment):
            _indexes[assignment] = _universal_index(assignment)
        elif isinstance(assignment, TableAssignment):
            _indexes[assignment] = _table_index(assignment)
        else:
            raise ConfigError(f"cannot decode a {type(assignment).__name__}: need a universal or a table assignment")
    return _indexes[assignment]


def _universal_index(assignment: UniversalAssignment) -> Index:
    p = assignment.prime
    multipliers_R, inverses_R = assignment.multipliers_R, assignment.inverses_R
    strides_Q = np.append(inverses_R * assignment.n_buckets % p, 1)  # from one member of a bucket to the next
    steps_QR = strides_Q[:, None] * multipliers_R[None, :] % p
    return Index(
        n_classes=assignment.n_classes,
        n_buckets=assignment.n_buckets,
        prime=p,
        modulus=modulus_of(p, assignment.n_buckets),
        multipliers_R=multipliers_R,
        offsets_R=assignment.offsets_R,
        inverses_R=inverses_R,
        steps_QRL=(steps_QR[:, :, None] * np.arange(LENGTH) % p).astype(np.uint32),
    )


def modulus_of(prime: int, n_buckets: int) -> tuple[Any, Any, Any, Any]:
    """p, B, and the multiplier and shift that divide numbers below 2**31 by B.

    With ``2**(l - 1) < B <= 2**l`` the multiplier ``ceil(2**(31 + l) / B)`` has 32 bits and is exact enough (Granlund &
    Montgomery, "Division by invariant integers using multiplication", PLDI 1994).
    """
    shift = 31 + (n_buckets - 1).bit_length()
    return np.uint32(prime), np.uint32(n_buckets), np.uint32(-(-(2**shift) // n_buckets)), np.uint64(shift)


def _table_index(assignment: TableAssignment) -> Index:
    R, K = assignment.n_repetitions, assignment.n_classes
    table_RK = assignment.table_RK.astype(np.uint16 if assignment.n_buckets <= 2**16 else np.uint32, copy=False)
    firsts_RB1, members_RK = assignment.inverse
    peers_RGK = np.zeros((R, min(N_PEERS, R - 1), K + LANES), dtype=table_RK.dtype)
    for r in range(R):
        for g in range(peers_RGK.shape[1]):
            peers_RGK[r, g, :K] = table_RK[(r + 1 + g) % R, members_RK[r]]
    return Index(
        is_table=True,
        n_classes=K,
        n_buckets=assignment.n_buckets,
        table_1RK=table_RK[None],
        table_1KR=np.ascontiguousarray(table_RK.T)[None],
        firsts_RB1=firsts_RB1,
        members_RK=members_RK,
        peers_RGK=peers_RGK,
    )
