"""Where a run is strong and weak: how full its buckets are; on rows of known classes, recall by class and examples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import read_classes, right_of
from mach.data.store import Store
from mach.errors import ConfigError
from mach.evaluation.accuracy import evaluate
from mach.model.curves import TOP, calibration_error, pairs_of, reliability
from mach.model.model import MachModel
from mach.runs.run import Run
from mach.sketch.aggregates import naive
from mach.sketch.answers import TopK

SHOWN = 5  # classes of a query that recall counts and examples show
_BLOCK = 2**20  # classes whose buckets are looked up at once


@dataclass(frozen=True, eq=False)
class BucketLoad:
    """How full the buckets are, by each of the hash functions ``functions``.

    Attributes
    ----------
    classes_RB, rows_RB : int64 arrays of shape (n_functions, B)
        Classes of a bucket; the training rows of these classes together, a row once for each of its classes.
    """

    functions: list[int]
    classes_RB: NDArray[np.int64]
    rows_RB: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClassRecall:
    """How often each class is among the best k of the rows that have it.

    Attributes
    ----------
    n_rows_K, n_found_K : int64 arrays of shape (K,)
        Rows that have the class, and those of them that find it.
    """

    k: int
    n_rows_K: NDArray[np.int64]
    n_found_K: NDArray[np.int64]

    def worst(self, n: int) -> NDArray[np.int64]:
        """Classes of least recall, those of most rows first among equals."""
        return self._ordered(1)[:n]

    def best(self, n: int) -> NDArray[np.int64]:
        """Classes of highest recall, those of most rows first among equals."""
        return self._ordered(-1)[:n]

    def by_training_rows(self, counts_K: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Recall of classes by their training rows, in groups of 0, 1, 2 to 3, 4 to 7 and so on.

        Returns
        -------
        list of dict
            ``least`` and ``most`` training rows, ``n_classes`` and ``n_rows`` that were asked for, ``recall``.
        """
        groups_K = np.where(counts_K > 0, 1 + np.log2(np.maximum(counts_K, 1)).astype(np.int64), 0)
        groups = []
        for group in np.unique(groups_K[self.n_rows_K > 0]):
            is_in_K = (groups_K == group) & (self.n_rows_K > 0)
            n_rows = int(self.n_rows_K[is_in_K].sum())
            groups.append(
                {
                    "least": int(2 ** (group - 1)) if group else 0,
                    "most": int(2**group - 1),
                    "n_classes": int(is_in_K.sum()),
                    "n_rows": n_rows,
                    "recall": float(self.n_found_K[is_in_K].sum() / n_rows),
                }
            )
        return groups

    def _ordered(self, sign: int) -> NDArray[np.int64]:
        asked = np.flatnonzero(self.n_rows_K)
        recalls = self.n_found_K[asked] / self.n_rows_K[asked]
        return asked[np.lexsort((asked, -self.n_rows_K[asked], sign * recalls))]


@dataclass(frozen=True, eq=False)
class Trust:
    """How far probabilities of some scores can be trusted: bins as of `mach.model.curves.reliability`, and errors."""

    scores: str
    bins: dict[str, NDArray[np.float64]]
    errors: dict[str, float]


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a model says to the rows of a store.

    Attributes
    ----------
    curve : list of dict
        From `mach.evaluation.accuracy.evaluate`.
    top : TopK
        The best `mach.model.curves.TOP` classes of every row, re-ranked where the model can.
    right_Nk : bool array of shape (N, k)
        Whether each of them is one of its row's own.
    recall : ClassRecall
    trust : list of Trust
        Of plain scores, and of re-ranked ones where there are any.
    """

    curve: list[dict[str, Any]]
    top: TopK
    right_Nk: NDArray[np.bool_]
    recall: ClassRecall
    trust: list[Trust]


def bucket_load(run: Run) -> BucketLoad:
    """Count classes and rows of all buckets; cost O(R K). Learned assignments count where they are finished."""
    if run.has_learned_tables:
        repetitions = run.finished()
        functions = run.functions(repetitions)
    else:
        repetitions, functions = [], run.functions(range(run.config.hashing.repetitions))
    counts_K, n_buckets = run.class_counts_K(), int(run.manifest.assignment["n_buckets"])
    classes_RB = np.zeros((len(functions), n_buckets), np.int64)
    rows_RB = np.zeros_like(classes_RB)
    if functions:
        assignment = run.trained_assignment(repetitions) if repetitions else run.assignment()
        for begin in range(0, len(counts_K), _BLOCK):
            counts = counts_K[begin : begin + _BLOCK]
            for r, buckets in enumerate(assignment.buckets(np.arange(begin, begin + len(counts)))):
                classes_RB[r] += np.bincount(buckets, minlength=n_buckets)
                rows_RB[r] += np.bincount(buckets, counts, n_buckets).astype(np.int64)
    return BucketLoad(functions, classes_RB, rows_RB)


def diagnose(
    model: MachModel, store: Store, report: Callable[[str, float], None] = lambda stage, fraction: None
) -> Diagnosis:
    """Ask a model for the best classes of all rows of a store that knows their classes.

    ``report`` is called with a stage and the fraction done. Raises DataError when no row has a class that the model
    knows.
    """
    curve = evaluate(model, store, report=report)
    trust = []
    for rerank in (False, True) if model.reranker is not None else (False,):
        top = model.search(store, TOP, rerank=rerank)
        right_Nk = right_of(store, np.arange(store.n_rows), top.ids_Nk)
        trust.append(_trust(model, top, right_Nk, rerank=rerank))
        report("asking", 1.0)
    return Diagnosis(curve, top, right_Nk, class_recall(store, top.ids_Nk[:, :SHOWN]), trust)


def class_recall(store: Store, ids_Nk: NDArray[np.int64]) -> ClassRecall:
    """How often each class of a store is among the given ones of its rows, ids of shape (N, k)."""
    found = ids_Nk[right_of(store, np.arange(store.n_rows), ids_Nk)]
    return ClassRecall(ids_Nk.shape[1], store.class_counts(), np.bincount(found, minlength=store.n_classes))


def mistaken_for(store: Store, k: int, top: TopK, right_Nk: NDArray[np.bool_]) -> tuple[int, int]:
    """The class that most often comes first, wrongly, in rows of class k, and in how many; (-1, 0) where none does."""
    rows = np.searchsorted(store.class_indptr, np.flatnonzero(store.class_ids == k), side="right") - 1
    wrong = top.ids_Nk[rows, 0][~right_Nk[rows, 0]]
    ids, counts = np.unique(wrong[wrong >= 0], return_counts=True)
    return (int(ids[counts.argmax()]), int(counts.max())) if len(ids) else (-1, 0)


def example_rows(store: Store, right_Nk: NDArray[np.bool_], n: int) -> NDArray[np.int64]:
    """Rows drawn at random (always the same): up to n whose first class is right, then up to n others with a class."""
    has_class_N = np.diff(store.class_indptr) > 0
    generator = np.random.default_rng(0)
    chosen = []
    for is_wanted_N in (right_Nk[:, 0], has_class_N & ~right_Nk[:, 0]):
        rows = np.flatnonzero(is_wanted_N)
        chosen.append(np.sort(generator.choice(rows, min(n, len(rows)), replace=False)))
    return np.concatenate(chosen)


def classes_of(store: Store, row: int) -> list[int]:
    """Classes of one row."""
    return read_classes(store, np.array([row]))[0].tolist()


def _trust(model: MachModel, top: TopK, right_Nk: NDArray[np.bool_], *, rerank: bool) -> Trust:
    scores, right, _ = pairs_of(top.ids_Nk, top.scores_Nk, right_Nk)
    probabilities = {"before": naive(scores, model.aggregate)}
    with contextlib.suppress(ConfigError):  # it has no calibration that fits
        probabilities["after"] = model.curve(rerank=rerank)(scores).astype(np.float64)
    return Trust(
        "re-ranked" if rerank else "plain",
        {kind: reliability(values, right) for kind, values in probabilities.items()},
        {kind: calibration_error(values, right) for kind, values in probabilities.items()},
    )
