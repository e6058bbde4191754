"""What was changed about the classes of a run since it was trained: added, removed, renamed, shown by example.

No weight is touched. An added class has a bucket of every hash function and *exemplars*: rows that it was given, as
the networks read them. They are an associative memory: a query that resembles one raises the class that it is of. So
it does for classes that feedback was given about, trained ones as well. A value of `Edits` is one version, whole by
itself; scores are made of it in `mach.model.classes.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.data.batch import Batch, DenseBatch, SparseBatch, concatenated, has_features, rows_of, unit_rows
from mach.data.class_names import ClassNames
from mach.data.class_texts import ClassTexts
from mach.errors import StorageError
from mach.files.arrays import ascends

if TYPE_CHECKING:
    from scipy.sparse import csr_array

FORMAT = "1"
EXAMPLE, TEXT, UPVOTE, ASSOCIATE = range(4)  # kinds of exemplars; texts are told from examples in older files alone
MOST_SCORE = 1_000_000  # of anchors and lifts
_KNUTH = 0x9E3779B97F4A7C15  # spreads consecutive ids over buckets


class Pairs(NamedTuple):
    """Pairs of query and exemplar that resemble each other."""

    rows: NDArray[np.int64]
    exemplars: NDArray[np.int64]
    cosines: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Exemplars:
    """M rows of length 1, each of a class, and how far each lifts it."""

    batch: Batch  # as the networks read queries
    classes_M: NDArray[np.int64]
    kinds_M: NDArray[np.uint8]  # `EXAMPLE`, `TEXT`, `UPVOTE` or `ASSOCIATE`
    # of the plain and the re-ranked score, where a query is the exemplar, see memory.near
    lifts_M2: NDArray[np.float32]

    @classmethod
    def none(cls) -> Exemplars:
        """No rows, sparse ones."""
        return cls.of(SparseBatch(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)), [], EXAMPLE)

    @classmethod
    def of(cls, batch: Batch, classes: ArrayLike, kinds: ArrayLike) -> Exemplars:
        """Rows that lift nothing yet, brought to length 1; rows without features are left out."""
        batch, classes_M = unit_rows(batch), np.asarray(classes, np.int64)
        M, is_kept = len(classes_M), has_features(batch)
        made = cls(batch, classes_M, np.full(M, kinds, np.uint8), np.zeros((M, 2), np.float32))
        return made if is_kept.all() else made.where(is_kept)

    def __len__(self) -> int:
        return len(self.classes_M)

    def where(self, keep_M: NDArray[np.bool_]) -> Exemplars:
        """Some of them."""
        rows = rows_of(self.batch, np.flatnonzero(keep_M))
        return Exemplars(rows, self.classes_M[keep_M], self.kinds_M[keep_M], self.lifts_M2[keep_M])

    def and_also(self, others: Exemplars) -> Exemplars:
        """These, then the others."""
        if not len(self) or not len(others):
            return self if len(self) else others
        arrays = ((getattr(self, name), getattr(others, name)) for name in ("classes_M", "kinds_M", "lifts_M2"))
        return Exemplars(concatenated([self.batch, others.batch]), *map(np.concatenate, arrays))

    def centroids(self) -> Exemplars:
        """The mean of each class's examples and texts, brought to length 1; classes ascend."""
        from scipy.sparse import csr_array

        shown = self.where(self.kinds_M <= TEXT)
        classes, owners = np.unique(shown.classes_M, return_inverse=True)
        M = len(shown)
        is_of_CM = csr_array((np.ones(M, np.float32), (owners, np.arange(M))), shape=(len(classes), M))
        if isinstance(shown.batch, DenseBatch):
            return Exemplars.of(DenseBatch(is_of_CM @ shown.batch.values_ND), classes, EXAMPLE)
        sums_CD = is_of_CM @ shown.batch.matrix(int(shown.batch.indices.max(initial=0)) + 1)
        indptr, indices = sums_CD.indptr.astype(np.int64), sums_CD.indices.astype(np.int32)
        return Exemplars.of(SparseBatch(indptr, indices, sums_CD.data), classes, EXAMPLE)

    def resembling(self, batch: Batch, least: float, most: int = 2**30) -> Pairs:
        """Pairs of a query and an exemplar with a cosine of at least ``least``, above 0: the ``most`` closest a query.

        Equal cosines at the edge are all taken. Cost: the exemplars that share a feature with a query, once a shared
        feature; dense rows: all of them.
        """
        if not len(self) or not len(batch):
            none = np.empty(0, np.int64)
            return Pairs(none, none, none.astype(np.float32))
        if isinstance(self.batch, DenseBatch):
            unit = unit_rows(batch)
            assert isinstance(unit, DenseBatch)
            cosines_NM = unit.values_ND @ self.batch.values_ND.T
            floors_N = np.full(len(batch), least, np.float32)
            if most < len(self):
                floors_N = np.maximum(floors_N, np.partition(cosines_NM, -most, axis=1)[:, -most])
            rows, exemplars = np.nonzero(cosines_NM >= floors_N[:, None])
            return Pairs(rows, exemplars, cosines_NM[rows, exemplars])
        assert isinstance(batch, SparseBatch)
        n_features = self._by_feature.shape[0]
        indices = np.minimum(batch.indices, n_features - 1)  # the last is a feature of no exemplar
        products_NM = SparseBatch(batch.indptr, indices, batch.values).matrix(n_features) @ self._by_feature
        squares_N1 = SparseBatch(batch.indptr, np.zeros_like(indices), np.square(batch.values)).matrix(1)
        lengths_N = np.sqrt(squares_N1 @ np.ones(1, np.float32))
        floors_N = np.float32(least) * lengths_N
        for n in np.flatnonzero(np.diff(products_NM.indptr) > most):
            products = products_NM.data[products_NM.indptr[n] : products_NM.indptr[n + 1]]
            floors_N[n] = max(floors_N[n], np.partition(products, -most)[-most])
        rows = np.repeat(np.arange(len(batch)), np.diff(products_NM.indptr))
        at = np.flatnonzero((products_NM.data >= floors_N[rows]) & (products_NM.data > 0))
        rows = rows[at]
        return Pairs(rows, products_NM.indices[at].astype(np.int64), products_NM.data[at] / lengths_N[rows])

    @cached_property
    def _by_feature(self) -> csr_array:
        """Features times exemplars, with a last feature that none of them has."""
        assert isinstance(self.batch, SparseBatch)
        return self.batch.matrix(int(self.batch.indices.max(initial=0)) + 2).T.tocsr()


@dataclass(frozen=True, eq=False)
class Edits:
    """One version of a run's classes: K0 trained ones, and A added ones with the ids K0, K0 + 1, ..."""

    n_trained: int
    version: int = 0  # as trained
    names: tuple[str, ...] = ()  # of the A added classes
    texts: ClassTexts | None = None  # of the same, where one has more than a name
    renamed: Mapping[int, str] = field(default_factory=dict)  # trained classes
    # ids, ascending; never given anew
    removed: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    # buckets of the added classes by all F hash functions that the run had when they were added
    table_FA: NDArray[np.uint32] = field(default_factory=lambda: np.empty((0, 0), np.uint32))
    counts_A: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # examples that each was given
    exemplars: Exemplars = field(default_factory=Exemplars.none)
    # the scale of added classes: mean scores of the tenth and of the best trained class on the examples, in both modes
    anchors_22: NDArray[np.float32] = field(default_factory=lambda: np.zeros((2, 2), np.float32))
    n_anchored: int = 0  # examples behind them
    subsets: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)  # ids ascending

    @property
    def n_added(self) -> int:
        """A, removed ones among them."""
        return len(self.names)

    @property
    def n_classes(self) -> int:
        """K0 + A: the number of ids ever given."""
        return self.n_trained + self.n_added

    @property
    def is_trained_only(self) -> bool:
        """Whether scores are those of the trained classes: none was added, and nothing was shown."""
        return not self.n_added and not len(self.exemplars)

    @cached_property
    def is_there_K(self) -> NDArray[np.bool_] | None:
        """Whether a class may be returned, shape (K0 + A,); None where all may."""
        if not len(self.removed):
            return None
        is_there_K = np.ones(self.n_classes, np.bool_)
        is_there_K[self.removed] = False
        return is_there_K

    def is_removed(self, ids: ArrayLike) -> NDArray[np.bool_]:
        """Whether classes have been removed, in the shape of the ids."""
        return np.isin(np.asarray(ids), self.removed)

    def buckets(self, functions: Sequence[int], n_buckets: int) -> NDArray[np.uint32]:
        """Buckets of the added classes by some hash functions, shape (n, A); hashed where they have not been placed."""
        hashed_nA = hashed_buckets(self.n_added, functions, n_buckets, first=self.n_trained)
        is_placed = np.asarray(functions) < len(self.table_FA)
        hashed_nA[is_placed] = self.table_FA[np.asarray(functions)[is_placed]]
        return hashed_nA

    def without(self, ids: NDArray[np.int64]) -> Edits:
        """With some more classes removed, and what was known of them forgotten but for their ids and names."""
        removed = np.union1d(self.removed, ids).astype(np.int64)
        left = self.exemplars.where(~np.isin(self.exemplars.classes_M, removed))
        subsets = {name: np.setdiff1d(members, removed) for name, members in self.subsets.items()}
        return replace(self, removed=removed, exemplars=left, subsets=subsets)

    def called(self, k: int, name: str) -> Edits:
        """With another name of a class."""
        if k < self.n_trained:
            return replace(self, renamed={**self.renamed, k: name})
        a = k - self.n_trained
        names = (*self.names[:a], name, *self.names[a + 1 :])
        return replace(self, names=names, texts=self.texts and replace(self.texts, names=names))

    def texts_and(self, said: ClassTexts | None, names: Sequence[str]) -> ClassTexts | None:
        """Texts of the added classes and of further ones; None where all have names alone."""
        if said is None and self.texts is None:
            return None
        return (self.texts or ClassTexts.of(self.names)).and_also(said or ClassTexts.of(names))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """All of it as arrays for a file; `from_arrays` reads them."""
        arrays: dict[str, NDArray[Any]] = {
            "removed": self.removed,
            "table": self.table_FA,
            "counts": self.counts_A,
            "anchors": self.anchors_22,
            "n_anchored": np.array([self.n_anchored], np.int64),
            "renamed": np.array(list(self.renamed), np.int64),
        }
        for prefix, texts in (("names", self.names), ("renamed", self.renamed.values())):
            encoded = ClassNames.of(texts)
            arrays |= {f"{prefix}.offsets": encoded.offsets, f"{prefix}.utf8": encoded.utf8}
        if self.texts is not None:
            arrays |= {f"texts.{name}": array for name, array in self.texts.to_arrays().items()}
        if len(self.exemplars):
            shown = self.exemplars
            stored = {"classes": shown.classes_M, "kinds": shown.kinds_M, "lifts": shown.lifts_M2, **vars(shown.batch)}
            arrays |= {f"exemplars.{name}": np.asarray(array) for name, array in stored.items()}
        return arrays | {f"subset.{name}": members for name, members in self.subsets.items()}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], *, version: int, n_trained: int, n_features: int, n_buckets: int
    ) -> Self:
        """Read what `to_arrays` made; StorageError when something is missing, of another kind, or out of range."""
        take = _FileArrays(arrays)
        n_names = max(arrays["names.offsets"].size if "names.offsets" in arrays else 0, 1) - 1
        names = take.texts("names", n_names)
        K = n_trained + n_names
        renamed = take("renamed", np.int64, (None,), 0, n_trained)
        table_FA = take("table", np.uint32, (None, n_names) if n_names else (None, None), 0, n_buckets)
        exemplars = Exemplars.none()
        if "exemplars.classes" in arrays:
            classes_M = take("exemplars.classes", np.int64, (None,), 0, K)
            M = len(classes_M)
            batch: Batch
            if "exemplars.values_ND" in arrays:
                batch = DenseBatch(take("exemplars.values_ND", np.float32, (M, n_features)))
            else:
                indptr = take.offsets("exemplars.indptr", M)
                indices = take("exemplars.indices", np.int32, (int(indptr[-1]),), 0, n_features)
                batch = SparseBatch(indptr, indices, take("exemplars.values", np.float32, (len(indices),)))
            kinds_M = take("exemplars.kinds", np.uint8, (M,), 0, ASSOCIATE + 1)
            lifts_M2 = take("exemplars.lifts", np.float32, (M, 2), -MOST_SCORE, MOST_SCORE)
            exemplars = Exemplars(batch, classes_M, kinds_M, lifts_M2)
            _refuse_unlike_unit(batch)
        subsets = [name for name in arrays if name.startswith("subset.")]
        made = cls(
            n_trained=n_trained,
            version=version,
            names=names,
            texts=take.class_texts("texts", n_names),
            renamed=dict(zip(renamed.tolist(), take.texts("renamed", len(renamed)), strict=True)),
            removed=np.unique(take("removed", np.int64, (None,), 0, K)),
            table_FA=table_FA,
            counts_A=take("counts", np.int64, (n_names,), 0, 2**62),
            exemplars=exemplars,
            anchors_22=take("anchors", np.float32, (2, 2), -MOST_SCORE, MOST_SCORE),
            n_anchored=int(take("n_anchored", np.int64, (1,), 0, 2**62)[0]),
            subsets={name.removeprefix("subset."): np.unique(take(name, np.int64, (None,), 0, K)) for name in subsets},
        )
        take.refuse_others()
        return made


class _FileArrays:
    """Arrays of a file, each looked at before it is used."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays, self._left = arrays, set(arrays)

    def refuse_others(self) -> None:
        """Raise a StorageError where the file holds what nobody asked for."""
        if self._left:
            raise StorageError(f"{min(self._left)!r:.80} is no array of such a file")

    def __call__(
        self, name: str, dtype: Any, shape: tuple[int | None, ...], least: int | None = None, end: int | None = None
    ) -> NDArray[Any]:
        array = self.arrays.get(name)
        self._left.discard(name)
        if array is None:
            raise StorageError(f"{name} is missing")
        fits = array.ndim == len(shape) and all(
            want in (None, got) for got, want in zip(array.shape, shape, strict=True)
        )
        if not fits or array.dtype != dtype:
            raise StorageError(f"{name} has shape {array.shape} and type {array.dtype}")
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise StorageError(f"{name} holds NaN or infinity")
        if least is not None and end is not None and array.size and not (array.min() >= least and array.max() < end):
            raise StorageError(f"{name} holds {array.min()} to {array.max()}: need {least} to {end - 1}")
        return np.asarray(array)

    def class_texts(self, prefix: str, n: int) -> ClassTexts | None:
        mine = {name: array for name, array in self.arrays.items() if name.startswith(f"{prefix}.")}
        self._left -= mine.keys()
        arrays = {name.removeprefix(f"{prefix}."): array for name, array in mine.items()}
        return ClassTexts.from_arrays(arrays, n, prefix) if arrays else None

    def offsets(self, name: str, n: int) -> NDArray[np.int64]:
        offsets = self(name, np.int64, (n + 1,), 0, 2**62)
        if not ascends(offsets, offsets[-1]):
            raise StorageError(f"{name} does not ascend from 0")
        return offsets

    def texts(self, name: str, n: int) -> tuple[str, ...]:
        offsets = self.offsets(f"{name}.offsets", n)
        utf8 = self(f"{name}.utf8", np.uint8, (int(offsets[-1]),))
        return tuple(ClassNames.of_file(offsets, utf8, name))


def _refuse_unlike_unit(batch: Batch) -> None:
    """Raise a StorageError where a row has not about length 1, of which cosines are made."""
    if isinstance(batch, DenseBatch):
        squares_M = np.square(batch.values_ND, dtype=np.float64).sum(axis=1)
    else:
        rows = np.repeat(np.arange(len(batch)), np.diff(batch.indptr))
        squares_M = np.bincount(rows, np.square(batch.values, dtype=np.float64), len(batch))
    if not (np.abs(squares_M - 1) < 1e-3).all():
        raise StorageError(f"exemplars: row {int(np.argmax(np.abs(squares_M - 1)))} has not length 1")


def hashed_buckets(n: int, functions: Sequence[int], n_buckets: int, *, first: int) -> NDArray[np.uint32]:
    """Buckets of ``n`` classes from id ``first`` on that depend on the id and the function alone, shape (F, n).

    Examples
    --------
    >>> hashed_buckets(3, [0, 5], 512, first=100).shape
    (2, 3)
    """
    ids = np.arange(first, first + n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed_Fn = (ids[None, :] + np.uint64(1)) * np.uint64(_KNUTH) ^ (
            (np.asarray(functions, np.uint64)[:, None] + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
        )
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64
            mixed_Fn = (mixed_Fn ^ (mixed_Fn >> np.uint64(shift))) * np.uint64(factor)
    return (mixed_Fn % np.uint64(n_buckets)).astype(np.uint32)
