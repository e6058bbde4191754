"""The contract of a signal: one thing that is known of a query and a class of its shortlist."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch, read_batch, read_classes
from mach.errors import StorageError
from mach.files.arrays import ascends
from mach.reranking.settings import FitSettings

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from mach.data.class_texts import ClassTexts
    from mach.data.store import Store
    from mach.data.text import TextFeatures

Floats = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]
Number = TypeVar("Number", int, float)
PROPOSED = 20  # classes that a signal proposes, at most
MOST = 1e12  # of numbers of a file: sums and products of a few stay finite in float32


@dataclass(frozen=True, eq=False)
class Shortlist:
    """N queries, and for each of them C classes that may answer it."""

    batch: SparseBatch
    ids_NC: NDArray[np.int64]  # -1 is none
    scores_NC: NDArray[np.float32]  # their aggregates, log-means of bucket probabilities
    probs_NRB: NDArray[np.float32]  # the bucket probabilities that these come from
    proposed_NP: NDArray[np.int64] | None = None  # classes that signals propose, -1 for none, where that is known

    @property
    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """indptr, indices and values of the queries, as compiled functions take them."""
        return self.batch.indptr, self.batch.indices, self.batch.values


@dataclass(frozen=True, eq=False)
class Material:
    """What signals are fitted to."""

    store: Store  # all training rows
    rows: NDArray[np.int64]  # those that are learned from, ascending; the others are held out
    settings: FitSettings
    counts_K: NDArray[np.int64]  # training rows of every class: all,
    learned_K: NDArray[np.int64]  # and without those held out
    counts_repeats: bool  # whether rows are to be counted by their features (`mach.reranking.signals.repeats`)
    parts: Sequence[Arrays]  # fitted classifiers of consecutive classes: offsets, features, weights and biases
    teaches: bool  # whether held-out rows may teach an order
    scratch: Path  # a folder for large arrays, which are mapped

    @cached_property
    def features(self) -> csr_array:
        """Features of the rows, shape (N, D)."""
        return features_of(self.store, self.rows)

    @cached_property
    def classes(self) -> csr_array:
        """Ones at the classes of the rows, shape (N, K)."""
        from scipy.sparse import csr_array

        ids, counts = read_classes(self.store, self.rows)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        return csr_array((np.ones(len(ids), np.float32), ids, indptr), shape=(len(self.rows), self.store.n_classes))


def features_of(store: Store, rows: NDArray[np.int64]) -> csr_array:
    """Features of some rows of a sparse store, shape (N, D)."""
    batch = read_batch(store, rows)
    assert isinstance(batch, SparseBatch)
    return batch.matrix(store.n_features)


def inserted(
    offsets: NDArray[np.int64], groups: NDArray[Any], *columns: tuple[NDArray[Any], NDArray[Any]]
) -> tuple[NDArray[Any], ...]:
    """Offsets of groups, and columns that they cut, with more entries at the end of these groups, which ascend.

    >>> inserted(np.array([0, 1, 2]), np.array([0, 1]), (np.array([5, 6]), np.array([7, 8])))
    (array([0, 2, 4]), array([5, 7, 6, 8]))
    """
    at, more = offsets[groups + 1], np.bincount(groups, minlength=len(offsets) - 1)
    return offsets + np.append(0, np.cumsum(more)), *(np.insert(old, at, new) for old, new in columns)


@dataclass(frozen=True, eq=False)
class SignalFile:
    """Arrays and notes of a re-ranker's file, for the signals that find theirs in it."""

    where: object
    arrays: Arrays
    notes: Mapping[str, str]
    n_classes: int
    n_features: int

    def array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """The array of this name; a length of -1 is any. A StorageError where it is missing or does not fit."""
        found = self.arrays.get(name)
        fits = found is not None and found.dtype == dtype and len(found.shape) == len(shape)
        if found is None or not fits or any(b not in (a, -1) for a, b in zip(found.shape, shape, strict=True)):
            raise StorageError(f"{self.where}: {name} is missing or not of shape {shape}: train it again")
        if found.dtype == np.float32 and not (np.abs(found) <= MOST).all():
            raise StorageError(f"{self.where}: {name} holds NaN or numbers beyond {MOST:g}: train it again")
        return np.asarray(found)  # not memmap: calls cost less

    def offsets(self, name: str, n: int, end: int) -> NDArray[np.int64]:
        """Where n parts of an array of ``end`` entries begin and end; a StorageError where they do not ascend to it."""
        found = self.array(name, np.int64, (n + 1,))
        if not ascends(found, end):
            raise StorageError(f"{self.where}: {name} does not ascend from 0 to {end}: train it again")
        return found

    def size(self, name: str) -> int:
        """How many entries the array of this name has; 0: there is none."""
        return self.arrays[name].size if name in self.arrays else 0

    def number(self, name: str, default: Number, least: float = -MOST, most: float = MOST) -> Number:
        """A note that is a number of the default's type from least to most; else a StorageError."""
        text = self.notes.get(name, default)
        try:
            number = type(default)(text)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:  # NaN is not, either
            raise StorageError(
                f"{self.where}: its metadata are damaged ({name} is {text!r:.60}, no number of {least:g} to {most:g}): "
                "train it again"
            )
        return number


@dataclass(frozen=True)
class Scale:
    """Sizes by which signals tell how many bytes they will take."""

    n_classes: int
    n_features: int
    n_rows: int
    n_positives: int  # pairs of a training row and a class of it
    row_features: float  # mean number of features of a row
    pairs: int = 0
    counts_repeats: bool = False  # whether rows may be counted by their features
    is_learned: bool = False  # whether an order is learned
    has_names: bool = False  # whether classes have names, and features are words


@dataclass(frozen=True, eq=False)
class Newcomers:
    """Classes that came after the training, K, K + 1, ... in a signal: no training row has them."""

    texts: ClassTexts
    features: TextFeatures | None  # of the run
    n_rows: int  # that it was trained on
    rarest: int  # the trained class of fewest of them

    def __len__(self) -> int:
        return len(self.texts)

    def row_frequencies(self) -> NDArray[np.float64]:
        """In how many training rows each feature is, shape (D,), by its inverse row frequency."""
        assert self.features is not None
        idf_D = 1 / np.maximum(self.features.counts_of_values(), np.float32(1e-6)).astype(np.float64)
        return np.clip((1 + self.n_rows) / np.exp(np.minimum(idf_D, 99) - 1) - 1, 0, self.n_rows)


@dataclass(frozen=True)
class Evidence:
    """What features of a query add to the first column of a signal, beyond what it says of a query without any."""

    features: tuple[int, ...]  # one, or those that count together
    amount: float
    name: int | None = None  # which of the names of the class they spell


@dataclass(eq=False)
class Signal(ABC):
    """One thing that is known of a query and a class of its shortlist, as numbers.

    A learned order weighs the `columns` of all signals; a blend adds up those that are a `BlendedSignal`. A signal is
    safe to share between threads.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]  # one plain sentence: what a value of it means to a person
    labels: ClassVar[tuple[str, ...]]  # what each column is
    needs_arrays: ClassVar[bool] = True  # whether its columns come from arrays
    is_young: ClassVar[bool] = False  # whether it is left out where it has no data: older orders do not weigh it

    lifts: ClassVar[bool] = True  # whether a class that it proposes may lack rows, so that its aggregate says little

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)  # by their names in the file
    _of_thread: threading.local = field(default_factory=threading.local, init=False, repr=False)  # what kernels reuse

    @classmethod
    def fit(cls, material: Material) -> Self:
        """Make it from training rows; one that only looks at queries has nothing to fit."""
        return cls()

    @classmethod
    def load(cls, file: SignalFile) -> Self:
        """Find its arrays in a file, where absent ones are legal.

        A StorageError where they are damaged: of other types or shapes, or some of several.
        """
        return cls()

    def arrays_for(self, strength: float, *, in_order: bool) -> dict[str, NDArray[Any]]:
        """Arrays that a file needs where a blend gives it such a strength (0: none), or an order may weigh it."""
        return self.arrays if strength or in_order else {}

    @property
    def notes(self) -> dict[str, str]:
        """What a file notes of it beside the arrays."""
        return {}

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        """How many bytes its arrays will take, about."""
        return 0

    @property
    def n_columns(self) -> int:
        return len(self.labels)

    @property
    def has_columns(self) -> bool:
        """Whether it has the data that its columns come from."""
        return bool(self.arrays) or not self.needs_arrays

    @abstractmethod
    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        """Its values for every query and class, float32 of shape (N, C, `n_columns`).

        A value depends on its query and its class alone, not on the others of the batch or shortlist.
        """

    def candidates(self, batch: SparseBatch) -> NDArray[np.int64] | None:
        """Classes that may answer beside those that the networks find; None of a signal that proposes none.

        Ids of shape (N, `PROPOSED`), best first, -1 for none, none twice in a row; those of a query depend on it alone.
        """
        return None

    def and_also(self, more: Newcomers) -> Self:
        """The same with further classes; itself where it holds nothing of single classes."""
        return self

    def evidence(self, shortlist: Shortlist) -> list[Evidence] | None:
        """Why its value is as it is, for one query and class; None of a signal that cannot tell.

        It is asked for explanations alone (`mach.reranking.breakdown`).
        """
        return None


class BlendedSignal(Signal):
    """A signal that a blend can give a strength: then it adds what the signal says, its `terms`, to the aggregate."""

    strength: ClassVar[str]  # the name of its strength on disk
    choices: ClassVar[tuple[float, ...]] = ()  # strengths that held-out rows try alone, the usual one first

    @property
    def has_terms(self) -> bool:
        """Whether it has the data that its terms come from."""
        return bool(self.arrays)

    @abstractmethod
    def terms(self, columns_NCI: Floats, ids_NC: NDArray[np.int64], strength: float) -> Floats:
        """What a blend adds to the aggregates, at most 0, by its columns and a strength; float32 of shape (N, C)."""
