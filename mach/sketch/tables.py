"""Explicit assignments, wherever their buckets come from; how assignments are read, compared and given more classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError, StorageError
from mach.sketch.hashing import MAX_CAPACITY, Assignment, UniversalAssignment, digest_of
from mach.sketch.ledger import N_PEERS

if TYPE_CHECKING:
    from mach.sketch.kernels.sweep import Index

_DAMAGED = "the file is damaged or was made by an incompatible version"


@dataclass(frozen=True, eq=False)
class TableAssignment:
    """Explicit assignment by a table, for learned or balanced placements; R K integers of 1, 2 or 4 bytes.

    Parameters
    ----------
    table_RK : unsigned integer array of shape (R, K)
        Bucket of every class; build it with `from_table`, which picks the narrowest type.
    n_buckets : int
        B.
    """

    table_RK: NDArray[np.unsignedinteger[Any]]
    n_buckets: int

    @classmethod
    def from_table(cls, table: ArrayLike, n_buckets: int) -> TableAssignment:
        """Check a table of shape (R, K) and narrow it to the smallest unsigned type that holds B - 1."""
        table_RK = np.asarray(table)
        if table_RK.ndim != 2 or table_RK.size == 0:
            raise ConfigError(f"an assignment table needs shape (R, K) with entries, got shape {table_RK.shape}")
        outside = np.argwhere((table_RK < 0) | (table_RK >= n_buckets))
        if len(outside):
            r, k = map(int, outside[0])
            raise ConfigError(
                f"repetition {r} places class {k} in bucket {table_RK[r, k]}: buckets are 0..{n_buckets - 1}"
            )
        return cls(np.ascontiguousarray(table_RK, dtype=np.min_scalar_type(n_buckets - 1)), n_buckets)

    @property
    def n_classes(self) -> int:
        return self.table_RK.shape[1]

    @property
    def n_repetitions(self) -> int:
        return self.table_RK.shape[0]

    @cached_property
    def index(self) -> Index:
        from mach.sketch.kernels.lanes import LANES
        from mach.sketch.kernels.sweep import Index

        (R, K), B = self.table_RK.shape, self.n_buckets
        table_RK = self.table_RK.astype(np.uint16 if B <= 2**16 else np.uint32, copy=False)
        firsts_RB1 = np.zeros((R, B + 1), np.int64)
        np.cumsum([np.bincount(row, minlength=B) for row in table_RK], axis=1, out=firsts_RB1[:, 1:])
        members_RK = np.argsort(table_RK, axis=1, kind="stable").astype(np.int32)
        peers_RGK = np.zeros((R, min(N_PEERS, R - 1), K + LANES), dtype=table_RK.dtype)
        for r in range(R):
            for g in range(peers_RGK.shape[1]):
                peers_RGK[r, g, :K] = table_RK[(r + 1 + g) % R, members_RK[r]]
        return Index(
            is_table=True,
            n_classes=K,
            n_buckets=B,
            table_1RK=table_RK[None],
            table_1KR=np.ascontiguousarray(table_RK.T)[None],
            firsts_RB1=firsts_RB1,
            members_RK=members_RK,
            peers_RGK=peers_RGK,
        )

    def buckets(self, classes: ArrayLike) -> NDArray[np.int32]:
        return self.table_RK[:, np.asarray(classes, dtype=np.int64)].astype(np.int32)

    def select(self, repetitions: list[int]) -> TableAssignment:
        return TableAssignment(self.table_RK[repetitions], self.n_buckets)

    def describe(self) -> dict[str, Any]:
        sizes = {"n_classes": self.n_classes, "n_buckets": self.n_buckets}
        return {"family": "table", **sizes, "checksum": self.checksum()}

    def checksum(self) -> str:
        """Digest of the whole table."""
        return digest_of(np.array([self.n_buckets], dtype="<i8"), self.table_RK)


def from_description(description: dict[str, Any], table: ArrayLike | None = None) -> Assignment:
    """Rebuild an assignment from `Assignment.describe` (and its array, for tables) and verify the checksum.

    A StorageError where the family is unknown, an entry is missing or impossible, or the checksum differs.
    """
    family = description.get("family")
    if family not in ("universal", "table"):
        raise StorageError(f"unknown hash family {family!r}: this version knows 'universal' and 'table'")
    n_buckets, checksum = _entry(description, "n_buckets"), _entry(description, "checksum", str)
    assignment: Any
    if family == "universal":
        n_classes, prime = _entry(description, "n_classes"), _entry(description, "prime")
        a_R, b_R = (np.array(_entry(description, name, list), np.int64) for name in ("multipliers", "offsets"))
        if len(a_R) != len(b_R) or not 1 <= n_classes <= prime or n_buckets < 2:
            raise StorageError(
                f"{n_classes} classes, {n_buckets} buckets, prime {prime}, {len(a_R)} multipliers, {len(b_R)} offsets: "
                f"{_DAMAGED}"
            )
        wrong_R = (np.gcd(a_R, prime) != 1) | (a_R >= prime)  # kernels go through a bucket by the inverse of a_r mod p
        if wrong_R.any() or (b_R >= prime).any():
            name, value = ("multiplier", a_R[wrong_R][0]) if wrong_R.any() else ("offset", b_R.max())
            raise StorageError(f"{name} {value} does not suit the prime {prime}: {_DAMAGED}")
        assignment = UniversalAssignment(n_classes, n_buckets, prime, a_R, b_R)
    else:
        if table is None:
            raise StorageError("the assignment is a table but its array is missing")
        try:
            assignment = TableAssignment.from_table(table, n_buckets)
        except ConfigError as error:
            raise StorageError(f"{error}: {_DAMAGED}") from None
    if assignment.checksum() != checksum:
        raise StorageError(f"assignment checksum is {assignment.checksum()}, described as {checksum}: {_DAMAGED}")
    return assignment


def extends(longer: Assignment, shorter: Assignment) -> bool:
    """Whether the first repetitions of one assignment are exactly those of another, and both serve the same classes.

    Examples
    --------
    >>> two, five = (UniversalAssignment.draw(n_classes=99, n_buckets=9, n_repetitions=R, seed=4) for R in (2, 5))
    >>> extends(five, two), extends(two, five)
    (True, False)
    """
    n = shorter.n_repetitions
    return longer.n_repetitions >= n and longer.select(list(range(n))).describe() == shorter.describe()


def grown(known: Assignment, counts_K: NDArray[np.int64], seed: int) -> Assignment:
    """An assignment that serves more classes, with the buckets of those that it served before.

    Hash functions go on where their prime has room. Otherwise the buckets become a table. In it every new class, those
    of most rows first, takes the less loaded of two buckets drawn at random; a class is as heavy as its rows are many,
    and at least 1 ("the power of two choices", Mitzenmacher, IEEE TPDS 12, 2001). ``counts_K`` are the training rows of
    all classes, the old ones first.
    """
    n_known, n_classes = known.n_classes, len(counts_K)
    if n_classes == n_known:
        return known
    if isinstance(known, UniversalAssignment) and n_classes <= known.prime:
        return replace(known, n_classes=n_classes)
    loads_K = np.maximum(counts_K, 1)
    order = (n_known + np.argsort(-counts_K[n_known:], kind="stable")).tolist()
    table_RK = np.empty((known.n_repetitions, n_classes), np.int32)
    table_RK[:, :n_known] = known.buckets(np.arange(n_known))
    for r, buckets_K in enumerate(table_RK):
        drawn_KC = np.random.default_rng([seed, r, n_known]).integers(0, known.n_buckets, (n_classes, 2), np.int32)
        loads_B = np.bincount(buckets_K[:n_known], loads_K[:n_known], known.n_buckets).tolist()
        for k, (first, second), load in zip(order, drawn_KC[order].tolist(), loads_K[order].tolist(), strict=True):
            buckets_K[k] = bucket = second if loads_B[second] < loads_B[first] else first
            loads_B[bucket] += load
    return TableAssignment.from_table(table_RK, known.n_buckets)


def _entry(description: dict[str, Any], name: str, kind: type = int) -> Any:
    """One entry of a description: an integer of 0 to `MAX_CAPACITY`, a list of them, or a string."""
    value: Any = description.get(name)
    numbers: Any = {int: [value], list: value}.get(kind, [])
    if type(value) is not kind or not all(type(number) is int and 0 <= number <= MAX_CAPACITY for number in numbers):
        raise StorageError(f"assignment: {name} is {'missing' if value is None else f'{value!r:.60}'}: {_DAMAGED}")
    return value
