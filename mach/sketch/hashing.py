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
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.errors import ConfigError

if TYPE_CHECKING:
    from mach.sketch.kernels.sweep import Index

N_CANDIDATES = 32
MAX_DISTANCES = 4096  # the shortest multiples of B, at which the largest shares of pairs meet
MAX_CAPACITY = 2**31 - 1  # a prime: no p exceeds it, sums of two images fit uint32, and a * k + b stays below 2**62


class Assignment(Protocol):
    """What every assignment of K classes to B buckets in R repetitions can answer."""

    @property
    def n_classes(self) -> int: ...

    @property
    def n_buckets(self) -> int: ...

    @property
    def n_repetitions(self) -> int: ...

    @property
    def index(self) -> Index:
        """The arrays by which compiled functions decode it, prepared once."""
        ...

    def buckets(self, classes: ArrayLike) -> NDArray[np.int32]:
        """Buckets of the given classes, shape (R, n), int32; cost O(R n)."""
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
    """Smallest prime >= n, by trial division; some milliseconds below 2**31."""
    candidate = max(2, n)
    while not (candidate % np.arange(2, math.isqrt(candidate) + 1)).all():
        candidate += 1
    return candidate


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
    >>> assignment.buckets([0, 1, 999]).shape
    (3, 3)
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

    @cached_property
    def index(self) -> Index:
        from mach.sketch.kernels.sweep import LENGTH, Index, modulus_of

        p, multipliers_R = self.prime, self.multipliers_R
        strides_Q = np.append(self.inverses_R * self.n_buckets % p, 1)  # from one member of a bucket to the next
        steps_QR = strides_Q[:, None] * multipliers_R[None, :] % p
        return Index(
            n_classes=self.n_classes,
            n_buckets=self.n_buckets,
            prime=p,
            modulus=modulus_of(p, self.n_buckets),
            multipliers_R=multipliers_R,
            offsets_R=self.offsets_R,
            inverses_R=self.inverses_R,
            steps_QRL=(steps_QR[:, :, None] * np.arange(LENGTH) % p).astype(np.uint32),
        )

    def buckets(self, classes: ArrayLike) -> NDArray[np.int32]:
        classes_N = np.asarray(classes, dtype=np.int64)
        images_RN = self.multipliers_R[:, None] * classes_N[None, :]  # < 2**62: exact
        images_RN += self.offsets_R[:, None]
        images_RN %= self.prime
        images_RN %= self.n_buckets
        return images_RN.astype(np.int32)

    def select(self, repetitions: list[int]) -> UniversalAssignment:
        return replace(self, multipliers_R=self.multipliers_R[repetitions], offsets_R=self.offsets_R[repetitions])

    def describe(self) -> dict[str, Any]:
        sizes = {"n_classes": self.n_classes, "n_buckets": self.n_buckets, "prime": self.prime}
        functions = {"multipliers": self.multipliers_R.tolist(), "offsets": self.offsets_R.tolist()}
        return {"family": "universal", **sizes, **functions, "checksum": self.checksum()}

    def checksum(self) -> str:
        """Digest of the parameters and of 1,024 probed buckets a repetition: a changed formula changes it."""
        probes = np.unique(np.linspace(0, self.n_classes - 1, 1024).astype(np.int64))
        parameters = np.array([self.n_classes, self.n_buckets, self.prime], dtype="<i8")
        return digest_of(parameters, self.multipliers_R, self.offsets_R, self.buckets(probes))


def digest_of(*arrays: NDArray[Any]) -> str:
    """Of arrays, in little-endian order of bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
