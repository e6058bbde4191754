"""Accuracy of a model on a data set, for all its repetitions and for every prefix of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from mach.data.batch import right_of
from mach.data.omissions import require_classes
from mach.data.store import Store
from mach.errors import ConfigError
from mach.files.places import place
from mach.model.ask import DEFAULTS, Ask
from mach.model.curves import TOP, calibration_error, pairs_of
from mach.model.model import MachModel
from mach.runs.run import Run
from mach.sketch.aggregates import naive
from mach.sketch.answers import TopK
from mach.sketch.metrics import evaluate as evaluate_ids
from mach.sketch.metrics import propensities


def test_rows(run: Run) -> str | None:
    """A run's own ``data.test``, where a caller names no rows.

    ConfigError where it is a URL: a stranger's run would say what to fetch, and from whom.
    """
    source = run.config.data.test
    if source is not None and not isinstance(place(source), Path):
        raise ConfigError(f"{run.path} names data.test = {source}: give it as DATA if it is to be fetched")
    return source


def trained_on(run: Run, source: str, store: Store | None = None) -> str | None:
    """What a person is told of rows to measure on that are those of training: the same file, or the same rows."""
    mine, theirs = place(source), place(run.config.data.train)
    is_file = mine.absolute() == theirs.absolute() if isinstance(mine, Path) else str(mine) == str(theirs)
    if not is_file and (store is None or store.fingerprint != run.manifest.data_fingerprint):
        return None
    return f"{source}: {run.path} was trained on these rows, so all looks better than it is: give others"


def evaluate(
    model: MachModel,
    store: Store,
    *,
    ks: tuple[int, ...] = (1, 3, 5),
    curve: bool = True,
    ask: Ask = DEFAULTS,
    reliability: bool = False,
    report: Callable[[str, float], None] = lambda stage, fraction: None,
) -> list[dict[str, Any]]:
    """Metrics of a model on the rows of a store.

    Parameters
    ----------
    model, store
        The store is prepared like the model's training data.
    ks : tuple of int
        Cut-offs of P@k, nDCG@k, PSP@k, recall@k.
    curve : bool
        Also for the first 1, 2, ... repetitions (of those that answer), from the same bucket scores.
    ask : Ask
        What to measure: with ``rerank`` the model's re-ranker as well, if it has one.
    reliability : bool
        Add ``ECE``, the expected calibration error of the model's probabilities for its best 10 classes, and
        ``ECE uncalibrated``, that of `mach.sketch.aggregates.naive`, where all repetitions answer.
    report : callable
        Called with a stage and the fraction done, once a chunk of rows.

    Returns
    -------
    list of dict
        One a number of repetitions, ascending, then all of them with the re-ranker, as ``reranked`` says. Metrics are
        shares in 0..1, and so is ``degraded``: of rows that were answered by fewer repetitions than the model has.

    Raises
    ------
    DataError
        When no row has a class that the model knows.
    """
    require_classes(store)
    n_repetitions, answerer, plainly = model.n_repetitions, model.answerer, replace(ask, rerank=False)
    sizes = range(1, n_repetitions + 1) if curve else [n_repetitions]
    answers: dict[tuple[int, bool], list[TopK]] = {(size, False): [] for size in sizes}
    if model.reranker is not None and ask.rerank:
        answers[n_repetitions, True] = []
    n_rows = n_degraded = 0
    known: list[NDArray[np.bool_]] = []
    most = max(*ks, TOP if reliability else 0)
    if reliability:
        model.curve(rerank=ask.rerank)  # missing, it is missed before the work
    for scores in model.ensemble.answered(store):
        n_degraded += len(scores.batch) * (len(scores.columns) < n_repetitions)
        for (size, is_reranked), parts in answers.items():
            parts.append(answerer.topk(scores.first(size), most, ask if is_reranked else plainly))
        known.append(answerer.known(scores, ask))
        n_rows += len(scores.batch)
        report("evaluating", n_rows / store.n_rows)
    truth = csr_array(
        (np.ones(len(store.class_ids), np.int8), store.class_ids, store.class_indptr),
        shape=(store.n_rows, model.n_classes),
    )
    weights_K = propensities(answerer.class_counts_K(), model.run.manifest.n_rows)
    rows = []
    for (size, is_reranked), parts in answers.items():
        top = TopK.concatenate(parts)
        row: dict[str, Any] = {"n_repetitions": size, "reranked": is_reranked}
        row |= evaluate_ids(top.ids_Nk[:, : max(ks)], truth, ks=ks, propensities=weights_K)
        if reliability and size == n_repetitions:
            ids_Nk, scores_Nk = top.ids_Nk[:, :TOP], top.scores_Nk[:, :TOP]
            values, right, _ = pairs_of(ids_Nk, scores_Nk, right_of(store, np.arange(store.n_rows), ids_Nk))
            options: dict[str, Any] = {"rerank": is_reranked, "tail": ask.tail, "known": np.concatenate(known)}
            calibrated_Nk = model.probabilities(ids_Nk, scores_Nk, **options)
            row["ECE"] = calibration_error(calibrated_Nk[ids_Nk >= 0], right)
            row["ECE uncalibrated"] = calibration_error(naive(values, model.aggregate), right)
        rows.append(row | {"degraded": n_degraded / store.n_rows})
    return rows


def measures(ks: Sequence[int]) -> list[str]:
    """Metrics as tables show them; nDCG@1 and hit@1 are left out, as they equal P@1."""
    names = [f"{name}@{k}" for name in ("P", "nDCG", "PSP", "recall", "hit") for k in ks]
    return [name for name in names if name not in ("nDCG@1", "hit@1")]
