"""Where a run is strong and weak: how full its buckets are; on rows of known classes, recall by class and examples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import right_of
from mach.data.store import Store
from mach.errors import ConfigError
from mach.model.accuracy import evaluate
from mach.model.ask import Answer
from mach.model.curves import TOP, calibration_error, pairs_of, reliability
from mach.model.model import MachModel
from mach.runs.run import Run
from mach.sketch.aggregates import naive
from mach.sketch.answers import TopK

SHOWN = 5  # classes of a query that recall counts and examples show
_BLOCK = 2**20  # classes whose buckets are looked up at once

# of probabilities before and after calibration: bins of `mach.model.curves.reliability`, expected calibration error
Reliability: TypeAlias = "dict[str, tuple[NDArray[np.float64], float]]"


@dataclass(frozen=True, eq=False)
class BucketLoad:
    """Classes of every bucket, by each of some hash functions, and their training rows, once for each class."""

    functions: list[int]
    classes_RB: NDArray[np.int64]
    rows_RB: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClassRecall:
    """Rows that have each of K classes, and those of them that find it among their best k."""

    k: int
    n_rows_K: NDArray[np.int64]
    n_found_K: NDArray[np.int64]

    def surprise(self, counts_K: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows that classes are expected to be found in, and how far off they are, in standard errors; below 0: worse.

        A class is expected to have the recall p of its group by training rows (`by_training_rows`). Found in f of n
        rows, it is ``(f - n p) / sqrt(n p (1 - p))`` off: few rows are no verdict, and rare classes are not to blame.
        """
        p_K = np.zeros(len(counts_K))
        for group in self.by_training_rows(counts_K):
            p_K[(group["least"] <= counts_K) & (counts_K <= group["most"])] = group["recall"]
        expected_K, variance_K = self.n_rows_K * p_K, self.n_rows_K * p_K * (1 - p_K)
        off_K = self.n_found_K - expected_K
        return expected_K, np.divide(off_K, np.sqrt(variance_K), np.zeros_like(off_K), where=variance_K > 1e-9)

    def by_training_rows(self, counts_K: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Recall of classes by their training rows, in groups of 0, 1, 2 to 3, 4 to 7 and so on.

        A group has ``least`` and ``most`` training rows, ``n_classes``, the ``n_rows`` that have them, and ``recall``.
        """
        groups_K = np.frexp(counts_K.astype(float))[1]  # 0, or 1 + the binary logarithm
        groups = []
        for group in np.unique(groups_K[self.n_rows_K > 0]).tolist():
            is_in_K = (groups_K == group) & (self.n_rows_K > 0)
            n_rows = int(self.n_rows_K[is_in_K].sum())
            sizes = {"least": 2**group // 2, "most": 2**group - 1, "n_classes": int(is_in_K.sum()), "n_rows": n_rows}
            groups.append(sizes | {"recall": float(self.n_found_K[is_in_K].sum() / n_rows)})
        return groups


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What a model says to the rows of a store."""

    curve: list[dict[str, Any]]  # from `mach.model.accuracy.evaluate`
    top: Answer  # the best `TOP` classes of every row, re-ranked where the model can
    right_Nk: NDArray[np.bool_]  # whether each of them is one of its row's own
    recall: ClassRecall  # among the best `SHOWN`
    reliability: dict[str, Reliability]  # of plain scores, and of re-ranked ones where there are any


def bucket_load(run: Run) -> BucketLoad:
    """Count classes and rows of all buckets; cost O(R K). Of learned assignments those that are finished count."""
    repetitions = run.finished() if run.has_learned_tables else range(run.config.hashing.repetitions)
    functions, counts_K = run.functions(repetitions), run.class_counts_K()
    n_buckets = run.manifest.n_buckets
    classes_RB, rows_RB = np.zeros((2, len(functions), n_buckets), np.int64)
    if functions:
        assignment = run.trained_assignment(repetitions)
        for begin in range(0, len(counts_K), _BLOCK):
            counts = counts_K[begin : begin + _BLOCK]
            for r, buckets in enumerate(assignment.buckets(np.arange(begin, begin + len(counts)))):
                classes_RB[r] += np.bincount(buckets, minlength=n_buckets)
                rows_RB[r] += np.bincount(buckets, counts, n_buckets).astype(np.int64)
    return BucketLoad(functions, classes_RB, rows_RB)


def diagnose(
    model: MachModel, store: Store, report: Callable[[str, float], None] = lambda stage, fraction: None
) -> Diagnosis:
    """Ask a model for the best classes of all rows, and compare them with the rows' own; errors as of `evaluate`."""
    curve = evaluate(model, store, report=report)
    by_scores = {}
    for rerank in (False, True) if model.reranker is not None else (False,):
        top = model.search(store, min(TOP, model.n_classes), rerank=rerank)
        right_Nk = right_of(store, np.arange(store.n_rows), top.ids_Nk)
        by_scores["re-ranked" if rerank else "plain"] = _reliability(model, top, right_Nk, rerank=rerank)
        report("asking", 1.0)
    return Diagnosis(curve, top, right_Nk, class_recall(store, top.ids_Nk[:, :SHOWN]), by_scores)


def class_recall(store: Store, ids_Nk: NDArray[np.int64]) -> ClassRecall:
    """How often each class of a store is among the given ones of its rows, ids of shape (N, k)."""
    right = ids_Nk[right_of(store, np.arange(store.n_rows), ids_Nk)]
    return ClassRecall(ids_Nk.shape[1], store.class_counts(), np.bincount(right, minlength=store.n_classes))


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


def _reliability(model: MachModel, top: Answer, right_Nk: NDArray[np.bool_], *, rerank: bool) -> Reliability:
    scores, right, _ = pairs_of(top.ids_Nk, top.scores_Nk, right_Nk)
    probabilities = {"before": naive(scores, model.aggregate)}
    with contextlib.suppress(ConfigError):  # it has no calibration that fits
        after_Nk = model.probabilities(top.ids_Nk, top.scores_Nk, rerank=rerank, known=top.known_N)
        probabilities["after"] = after_Nk[top.ids_Nk >= 0].astype(np.float64)
    return {kind: (reliability(p, right), calibration_error(p, right)) for kind, p in probabilities.items()}
