"""How classes come into the buckets of explicit tables: at random, balanced, by similarity, or as networks learn.

``random`` draws every bucket by itself, as hashing is meant to. The others are one rule: every class, frequent ones
first, goes to the least loaded of a few buckets, its *choices* (kappa). A class weighs as many training rows as it has,
at least one. The choices are

- ``balanced``: drawn at random ("the power of two choices", Mitzenmacher, IEEE TPDS 12, 2001);
- ``clustered``: every bucket of a hash function has a class drawn as its centre, frequent ones more often, and a
  class chooses the centres whose rows have the most similar mean features. Classes of the same rows have similar means,
  so those that occur together share buckets; other centres in every function part them again;
- ``learned``: the buckets with the largest affinity, the sum over the class's rows of the bucket probabilities that the
  repetition's own network gives (BLISS, Gupta et al., KDD 2022; IRLI, Gupta et al., 2021). It begins from the universal
  family.

The buckets of a hash function drawn at set-up depend on the seed, on its number and on the training rows, not on R, so
raising R appends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.config import HashingConfig
from mach.data.store import Store
from mach.errors import ConfigError
from mach.kernels.balance import add_probabilities, place_least_loaded
from mach.networks.batch import read_classes
from mach.theory import AFFINITY_BYTES

CHOICES = {"balanced": 2, "clustered": 10, "learned": 50}
DRAWN = ("random", "balanced", "clustered")  # at set-up
SKETCH = 128  # dimensions of a class's mean features: errors of similarities are about its square root's inverse
CHUNK_ROWS = 1024


def draw_table(
    hashing: HashingConfig, store: Store, rows: NDArray[np.int64], n_buckets: int, functions: range
) -> NDArray[np.int32]:
    """Buckets of all classes by some hash functions of a table drawn at set-up, shape (n, K).

    Parameters
    ----------
    hashing : HashingConfig
        Resolved; its assignment is "random", "balanced" or "clustered".
    store : Store
    rows : int64 array
        The training rows; others are not looked at.
    n_buckets : int
    functions : range
        Their numbers.

    Notes
    -----
    Cost: O(K kappa) a function; clustered O(`SKETCH` K B) a function and one pass over the rows, with `SKETCH` floats
    a class and `AFFINITY_BYTES` of similarities in memory.
    """
    K = store.n_classes
    counts_K = np.bincount(read_classes(store, rows)[0], minlength=K)
    means_KS = mean_features(store, rows, hashing.seed) if hashing.assignment == "clustered" else None
    table_RK = np.empty((len(functions), K), np.int32)
    for buckets_K, r in zip(table_RK, functions, strict=True):
        generator = np.random.default_rng([hashing.seed, r])
        if hashing.assignment == "random":
            buckets_K[:] = generator.integers(0, n_buckets, K)
            continue
        assert hashing.choices is not None, "the configuration is resolved"
        n_choices = min(hashing.choices, n_buckets)
        choices_KC = generator.integers(0, n_buckets, (K, n_choices), np.int32)
        if means_KS is not None:
            _choose_similar(choices_KC, means_KS, counts_K, n_buckets, generator)
        buckets_K[:] = balanced(choices_KC, counts_K, n_buckets)
    return table_RK


def balanced(
    choices_KC: NDArray[Any], counts_K: NDArray[np.int64], n_buckets: int, rank_K: NDArray[Any] | None = None
) -> NDArray[np.int32]:
    """The least loaded of every class's choices, those with the most rows first; equal loads: the first choice.

    So no bucket is heavier than the lightest of the choices of its last class, and that class, together. With
    ``rank_K`` those of the largest rank come first.
    """
    order_K = np.argsort(-(counts_K if rank_K is None else rank_K), kind="stable")
    buckets_K: NDArray[np.int32] = place_least_loaded(order_K, choices_KC, np.maximum(counts_K, 1), n_buckets)
    return buckets_K


def top_buckets(affinities_CB: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """The n buckets of largest affinity of every class, best first, equal ones in their order; overwrites them."""
    top_Cn = np.empty((len(affinities_CB), n), np.int64)
    for column in top_Cn.T:  # a partition would break ties by the processor's instructions
        column[:] = affinities_CB.argmax(1)
        affinities_CB[np.arange(len(column)), column] = -np.inf
    return top_Cn


def relearned(
    store: Store,
    rows: NDArray[np.int64],
    table_JK: NDArray[Any],
    n_buckets: int,
    n_choices: int,
    probabilities: Callable[[NDArray[np.int64]], NDArray[np.float32]],
) -> NDArray[np.int32]:
    """A repetition's buckets after every class has moved to the least loaded of its top buckets; shape (J, K).

    Parameters
    ----------
    store : Store
    rows : int64 array
        The training rows.
    table_JK : integer array
        Buckets so far; a class without rows stays where it is.
    n_buckets, n_choices : int
        B and kappa.
    probabilities : callable
        Bucket probabilities (n, J B) of some rows.

    Notes
    -----
    Affinities are summed for as many classes at a time as `AFFINITY_BYTES` hold, by all J functions together because
    the network gives them together. Each time the rows of these classes go through the network, so it is asked for
    at most min(n_chunks N, pairs of a row and a class) rows, with n_chunks = 4 J B K / `AFFINITY_BYTES`.
    """
    n_functions, K = table_JK.shape
    classes, counts = read_classes(store, rows)
    row_of = np.repeat(np.arange(len(rows)), counts)
    counts_K = np.bincount(classes, minlength=K)
    n_choices = min(n_choices, n_buckets)
    choices_JKC = np.repeat(table_JK[:, :, None], n_choices, axis=2)
    with_rows, n_outputs = np.flatnonzero(counts_K), n_functions * n_buckets
    place_K = np.empty(K, np.int64)
    n_at_once = max(1, AFFINITY_BYTES // (4 * n_outputs))
    for begin in range(0, len(with_rows), n_at_once):
        chunk = with_rows[begin : begin + n_at_once]
        place_K[chunk] = np.arange(len(chunk))
        affinities_CO = np.zeros((len(chunk), n_outputs), np.float32)
        pairs = np.flatnonzero((classes >= chunk[0]) & (classes <= chunk[-1]))
        asked, row_of_pair = np.unique(row_of[pairs], return_inverse=True)
        bounds = np.searchsorted(row_of_pair, np.arange(0, len(asked) + CHUNK_ROWS, CHUNK_ROWS))
        for i, (first, end) in enumerate(itertools.pairwise(bounds)):
            probs_NO = probabilities(rows[asked[i * CHUNK_ROWS : (i + 1) * CHUNK_ROWS]])
            places = place_K[classes[pairs[first:end]]]
            add_probabilities(places, row_of_pair[first:end] - i * CHUNK_ROWS, probs_NO, affinities_CO)
        for j, affinities_CB in enumerate(np.split(affinities_CO, n_functions, axis=1)):
            choices_JKC[j, chunk] = top_buckets(affinities_CB, n_choices)
    return np.stack([balanced(choices_KC, counts_K, n_buckets) for choices_KC in choices_JKC])


def refuse_large(n_functions: int, n_buckets: int) -> None:
    """Raise a ConfigError where the affinities of one class alone are too large."""
    n_bytes = 4 * n_functions * n_buckets
    if n_bytes > AFFINITY_BYTES:
        raise ConfigError(
            f"hashing.assignment = 'learned': affinities of one class for {n_functions} heads of {n_buckets} buckets "
            f"take {n_bytes} bytes, at most {AFFINITY_BYTES} are held: take fewer heads or buckets"
        )


def mean_features(store: Store, rows: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
    """Direction of every class's mean features over the given rows, sketched; zero for classes without rows; (K, S).

    The sketch adds each feature, with a random sign, to one of S = `SKETCH` sums: inner products keep their
    expectation (Charikar et al., "Finding frequent items in data streams", 2002).
    """
    from scipy.sparse import csr_array

    generator = np.random.default_rng([seed, 2**32])
    D = store.n_features
    signs_D = generator.integers(0, 2, D).astype(np.float32) * 2 - 1
    slots_D = generator.integers(0, SKETCH, D)
    sketch_DS = csr_array((signs_D, slots_D, np.arange(D + 1)), shape=(D, SKETCH))
    is_asked_N = np.zeros(store.n_rows, np.bool_)
    is_asked_N[rows] = True
    means_KS = np.zeros((store.n_classes, SKETCH), np.float32)
    for begin in range(0, store.n_rows, CHUNK_ROWS):
        asked = begin + np.flatnonzero(is_asked_N[begin : begin + CHUNK_ROWS])
        sums_NS: Any = store.features(begin, begin + CHUNK_ROWS) @ sketch_DS
        sums_NS = np.asarray(sums_NS if store.is_dense else sums_NS.toarray(), np.float32)
        classes, counts = read_classes(store, asked)
        add_probabilities(classes.astype(np.int64), np.repeat(asked - begin, counts), sums_NS, means_KS)
    lengths_K = np.sqrt(np.square(means_KS).sum(1, keepdims=True))
    return np.divide(means_KS, lengths_K, out=means_KS, where=lengths_K > 0)


def _choose_similar(
    choices_KC: NDArray[np.int32],
    means_KS: NDArray[np.float32],
    counts_K: NDArray[np.int64],
    n_buckets: int,
    generator: np.random.Generator,
) -> None:
    """Overwrite the choices of classes with rows by the buckets whose centres are most similar."""
    with_rows = np.flatnonzero(counts_K)
    shares = counts_K[with_rows] / counts_K.sum()
    centres_B = generator.choice(with_rows, n_buckets, replace=len(with_rows) < n_buckets, p=shares)
    n_at_once = max(1, AFFINITY_BYTES // (4 * n_buckets))
    for begin in range(0, len(with_rows), n_at_once):
        chunk = with_rows[begin : begin + n_at_once]
        choices_KC[chunk] = top_buckets(means_KS[chunk] @ means_KS[centres_B].T, choices_KC.shape[1])
