"""Assignments of classes to buckets: an invertible universal hash family and explicit tables.

Repetition ``r`` of the universal family maps class ``k`` to::

    h_r(k) = ((a_r * k + b_r) mod p) mod B,        1 <= a_r < p,  0 <= b_r < p,

with ``p`` the smallest prime that is at least the class capacity (Carter & Wegman, "Universal classes
of hash functions", JCSS 18, 1979). ``k -> (a_r * k + b_r) mod p`` is a bijection of ``0..p-1``, so the
members of bucket ``b`` are ``a_r^-1 (y - b_r) mod p`` for ``y = b, b + B, ... < p`` with those >= K
dropped: neither direction needs a table of size K, and a bucket holds at most ``ceil(p / B)`` classes.

Two classes meet in a bucket because of their difference alone: those at a distance of ``a_r^-1 m B mod p``,
``m = 1 .. p/B``, meet with a share of ``1 - m B / p``. So when two multipliers have a distance in common,
*every* class gets a partner that both repetitions confuse it with; on average over multipliers that is as
rare as it should be, but it comes all at once (at K = 26 thousand and B = 1024 in one pair of ten). Multipliers
are therefore drawn one after the other, each the best of some candidates against those before it.

Both kinds of assignment answer the same questions (`Assignment`), so nothing above this module asks
which one it holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError, StorageError

_DAMAGED = "the file is damaged or was made by an incompatible version"
N_CANDIDATES = 32
MAX_DISTANCES = 4096  # the shortest multiples of B, at which the largest shares of pairs meet
MAX_CAPACITY = 2**31 - 1  # a prime: no p exceeds it, sums of two images fit uint32, and a * k + b stays below 2**62


class Assignment(Protocol):
    """What every assignment of K classes to B buckets in R repetitions can answer.

    Attributes
    ----------
    n_classes, n_buckets, n_repetitions : int
        K, B and R.
    """

    @property
    def n_classes(self) -> int: ...

    @property
    def n_buckets(self) -> int: ...

    @property
    def n_repetitions(self) -> int: ...

    def buckets(self, classes: ArrayLike) -> NDArray[np.int32]:
        """Buckets of the given classes, shape (R, n), int32; cost O(R n)."""
        ...

    def members(self, repetition: int, bucket: int) -> NDArray[np.int64]:
        """Classes of one bucket in ascending order, shape (m,), int64; cost O(p / B)."""
        ...

    def select(self, repetitions: list[int]) -> Self:
        """The same assignment restricted to some repetitions, in the given order."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON-ready description with a checksum; tables leave out the array itself."""
        ...


def _least_common(
    candidates: Iterable[int], prime: int, n_buckets: int, taken: dict[int, float]
) -> tuple[int, dict[int, float]]:
    """The first multiplier whose meeting distances avoid those taken, else the one that meets least of them."""
    best, best_shares, least = 0, {}, math.inf
    for multiplier in candidates:
        shares = meeting_distances(multiplier, prime, n_buckets)
        common = sum(share * taken[distance] for distance, share in shares.items() if distance in taken)
        if common < least:
            best, best_shares, least = multiplier, shares, common
        if common == 0:
            break
    return best, best_shares


def meeting_distances(multiplier: int, prime: int, n_buckets: int) -> dict[int, float]:
    """Distances ``|k - l| mod p`` at which classes can share a bucket, with the share of pairs that do.

    Classes k and k + d have images that differ by ``y = a d mod p``, or by ``y - p``; they share a bucket where
    that is a multiple of B. ``d`` and ``p - d`` are the same pairs and stand under the smaller of the two.
    """
    n_multiples = min((prime - 1) // n_buckets, MAX_DISTANCES)
    inverse = pow(multiplier, -1, prime)
    shares: dict[int, float] = {}
    for m in range(1, n_multiples + 1):
        distance = inverse * (m * n_buckets) % prime
        distance = min(distance, prime - distance)
        shares[distance] = shares.get(distance, 0.0) + 1.0 - m * n_buckets / prime
    return shares


def smallest_prime_at_least(n: int) -> int:
    """Smallest prime >= n by deterministic Miller-Rabin (exact below 3.3e24); cost O(log^4 n) expected."""
    candidate = max(2, n)
    while not _is_prime(candidate):
        candidate += 1
    return candidate


def _is_prime(n: int) -> bool:
    small_primes = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    for prime in small_primes:
        if n % prime == 0:
            return n == prime
    if n < 2:
        return False
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in small_primes:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


@dataclass(frozen=True, eq=False)
class UniversalAssignment:
    """Implicit assignment by the invertible universal family; O(R) memory for any K.

    Parameters
    ----------
    n_classes : int
        K; classes are ``0..K-1``.
    n_buckets : int
        B, at least 2.
    prime : int
        p, at least K.
    multipliers_R, offsets_R : int64 arrays of shape (R,)
        ``a_r`` in ``1..p-1`` and ``b_r`` in ``0..p-1``.

    Examples
    --------
    >>> assignment = UniversalAssignment.draw(n_classes=1000, n_buckets=16, n_repetitions=3, seed=7)
    >>> buckets_RN = assignment.buckets([0, 1, 999])
    >>> buckets_RN.shape
    (3, 3)
    >>> 999 in assignment.members(2, int(buckets_RN[2, 2]))
    True
    """

    n_classes: int
    n_buckets: int
    prime: int
    multipliers_R: NDArray[np.int64]
    offsets_R: NDArray[np.int64]

    @classmethod
    def draw(
        cls, *, n_classes: int, n_buckets: int, n_repetitions: int, seed: int, capacity: int | None = None
    ) -> UniversalAssignment:
        """Draw R functions without common collisions as far as possible; raising R appends.

        Repetition r depends on the seed, on p and B, and on the repetitions before it. Cost O(R^2 p / B), with at most
        `MAX_DISTANCES` distances looked at a repetition.

        Parameters
        ----------
        n_classes, n_buckets, n_repetitions : int
            K >= 1, B >= 2, R >= 1.
        seed : int
            Non-negative.
        capacity : int, optional
            Largest number of classes that the functions shall ever serve, K by default, at most `MAX_CAPACITY`.

        Raises
        ------
        ConfigError
            When a count is out of range.
        """
        capacity = n_classes if capacity is None else capacity
        if not 1 <= n_classes <= capacity <= MAX_CAPACITY:
            raise ConfigError(
                f"n_classes {n_classes} and capacity {capacity}: need 1 <= n_classes <= capacity <= {MAX_CAPACITY}"
            )
        if not 2 <= n_buckets <= MAX_CAPACITY or n_repetitions < 1:
            raise ConfigError(
                f"n_buckets {n_buckets} must be 2 to {MAX_CAPACITY} and n_repetitions {n_repetitions} at least 1"
            )
        prime = smallest_prime_at_least(max(capacity, 2))
        multipliers: list[int] = []
        offsets: list[int] = []
        taken: dict[int, float] = {}  # distance -> share of its pairs that meet, summed over repetitions so far
        for r in range(n_repetitions):
            generator = np.random.default_rng([seed, r])
            offsets.append(int(generator.integers(0, prime)))
            candidates = (int(generator.integers(1, prime)) for _ in range(N_CANDIDATES))
            multiplier, shares = _least_common(candidates, prime, n_buckets, taken)
            multipliers.append(multiplier)
            for distance, share in shares.items():
                taken[distance] = taken.get(distance, 0.0) + share
        return cls(n_classes, n_buckets, prime, np.array(multipliers, np.int64), np.array(offsets, np.int64))

    @property
    def n_repetitions(self) -> int:
        return len(self.multipliers_R)

    @cached_property
    def inverses_R(self) -> NDArray[np.int64]:
        """``a_r^-1 mod p``, shape (R,)."""
        return np.array([pow(int(a), -1, self.prime) for a in self.multipliers_R], dtype=np.int64)

    def buckets(self, classes: ArrayLike) -> NDArray[np.int32]:
        classes_N = np.asarray(classes, dtype=np.int64)
        images_RN = self.multipliers_R[:, None] * classes_N[None, :]  # < 2**62: exact
        images_RN += self.offsets_R[:, None]
        images_RN %= self.prime
        images_RN %= self.n_buckets
        return images_RN.astype(np.int32)

    def members(self, repetition: int, bucket: int) -> NDArray[np.int64]:
        images = np.arange(bucket, self.prime, self.n_buckets, dtype=np.int64)
        shifted = (images - self.offsets_R[repetition]) % self.prime
        classes = shifted * self.inverses_R[repetition] % self.prime
        return np.sort(classes[classes < self.n_classes])

    def select(self, repetitions: list[int]) -> UniversalAssignment:
        return UniversalAssignment(
            self.n_classes,
            self.n_buckets,
            self.prime,
            self.multipliers_R[repetitions],
            self.offsets_R[repetitions],
        )

    def describe(self) -> dict[str, Any]:
        return {
            "family": "universal",
            "n_classes": self.n_classes,
            "n_buckets": self.n_buckets,
            "prime": self.prime,
            "multipliers": self.multipliers_R.tolist(),
            "offsets": self.offsets_R.tolist(),
            "checksum": self.checksum(),
        }

    def checksum(self) -> str:
        """Digest of the parameters and of 1,024 probed buckets a repetition: a changed formula changes it."""
        probes = np.unique(np.linspace(0, self.n_classes - 1, 1024).astype(np.int64))
        parameters = np.array([self.n_classes, self.n_buckets, self.prime], dtype="<i8")
        return _digest(parameters, self.multipliers_R, self.offsets_R, self.buckets(probes))


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
    def inverse(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Offsets (R, B+1) int64 and members (R, K) int32: bucket b of r holds members[r, offsets[r, b]:...[b + 1]]."""
        counts_RB = np.stack([np.bincount(row, minlength=self.n_buckets) for row in self.table_RK])
        offsets_RB1 = np.zeros((self.n_repetitions, self.n_buckets + 1), dtype=np.int64)
        np.cumsum(counts_RB, axis=1, out=offsets_RB1[:, 1:])
        members_RK = np.argsort(self.table_RK, axis=1, kind="stable").astype(np.int32)
        return offsets_RB1, members_RK

    def buckets(self, classes: ArrayLike) -> NDArray[np.int32]:
        return self.table_RK[:, np.asarray(classes, dtype=np.int64)].astype(np.int32)

    def members(self, repetition: int, bucket: int) -> NDArray[np.int64]:
        offsets_RB1, members_RK = self.inverse
        begin, end = offsets_RB1[repetition, bucket], offsets_RB1[repetition, bucket + 1]
        return members_RK[repetition, begin:end].astype(np.int64)

    def select(self, repetitions: list[int]) -> TableAssignment:
        return TableAssignment(self.table_RK[repetitions], self.n_buckets)

    def describe(self) -> dict[str, Any]:
        return {
            "family": "table",
            "n_classes": self.n_classes,
            "n_buckets": self.n_buckets,
            "checksum": self.checksum(),
        }

    def checksum(self) -> str:
        """Digest of the whole table."""
        return _digest(np.array([self.n_buckets], dtype="<i8"), self.table_RK)


def from_description(description: dict[str, Any], table: ArrayLike | None = None) -> Assignment:
    """Rebuild an assignment from `Assignment.describe` (and its array, for tables) and verify the checksum.

    Raises
    ------
    StorageError
        When the family is unknown, an entry is missing or impossible, or the checksum differs.
    """
    family = description.get("family")
    if family not in ("universal", "table"):
        raise StorageError(f"unknown hash family {family!r}: this version knows 'universal' and 'table'")
    n_buckets, checksum = _entry(description, "n_buckets"), _entry(description, "checksum", str)
    assignment: Any
    if family == "universal":
        n_classes, prime = _entry(description, "n_classes"), _entry(description, "prime")
        a_R, b_R = (np.array(_entry(description, name, list), np.int64) for name in ("multipliers", "offsets"))
        if len(a_R) != len(b_R) or n_classes > prime:
            raise StorageError(
                f"{n_classes} classes, prime {prime}, {len(a_R)} multipliers, {len(b_R)} offsets: {_DAMAGED}"
            )
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
    and at least 1 ("the power of two choices", Mitzenmacher, IEEE TPDS 12, 2001).

    Parameters
    ----------
    known : Assignment
    counts_K : int64 array
        Training rows of all classes, the old ones first.
    seed : int
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


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
