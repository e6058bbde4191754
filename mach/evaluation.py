"""Accuracy of a model on a data set, for all its repetitions and for every prefix of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from mach.data.store import Store
from mach.decoding import Decoder
from mach.metrics import evaluate as evaluate_ids
from mach.metrics import propensities
from mach.model import MachModel


def evaluate(
    model: MachModel,
    store: Store,
    *,
    ks: tuple[int, ...] = (1, 3, 5),
    curve: bool = True,
    rerank: bool = True,
    report: Callable[[str, float], None] = lambda stage, fraction: None,
) -> list[dict[str, Any]]:
    """Metrics of a model on the rows of a store.

    Parameters
    ----------
    model : MachModel
    store : Store
        Prepared like the model's training data.
    ks : tuple of int
        Cut-offs of P@k, nDCG@k, PSP@k, recall@k.
    curve : bool
        Also for the first 1, 2, ... repetitions (of those that answer), from the same bucket scores.
    rerank : bool
        Whether to measure the model's re-ranker as well, if it has one.
    report : callable
        Called with a stage and the fraction done, once a chunk of rows.

    Returns
    -------
    list of dict
        One a number of repetitions, ascending, then all of them with the re-ranker, as ``reranked`` says. Metrics are
        shares in 0..1, and so is ``degraded``: of rows that were answered by fewer repetitions than the model has.
    """
    n_repetitions = model.n_repetitions
    sizes = range(1, n_repetitions + 1) if curve else [n_repetitions]
    decoders: dict[tuple[int, ...], Decoder] = {}
    found: list[list[Any]] = [[] for _ in sizes]
    n_degraded = 0
    reranked: list[Any] = []
    for batch, probs_NRB, columns in model.answered(store):
        n_degraded += len(probs_NRB) * (len(columns) < n_repetitions)
        for size, ids in zip(sizes, found, strict=True):
            first = columns[:size]
            if first not in decoders:
                decoders[first] = Decoder(model.assignment_of(first), model.aggregate)
            ids.append(decoders[first].topk(np.ascontiguousarray(probs_NRB[:, : size * model.n_heads]), max(ks)).ids_Nk)
        if model.reranker is not None and rerank:
            reranked.append(model.decode(batch, probs_NRB, columns, max(ks)).ids_Nk)
        report("evaluating", sum(map(len, found[-1])) / store.n_rows)
    truth = csr_array(
        (np.ones(len(store.class_ids), np.int8), store.class_ids, store.class_indptr),
        shape=(store.n_rows, model.n_classes),
    )
    weights_K = propensities(model.run.class_counts_K(), model.run.manifest.n_rows)
    degraded = n_degraded / store.n_rows
    measured = [(size, False, ids) for size, ids in zip(sizes, found, strict=True)]
    if reranked:
        measured.append((n_repetitions, True, reranked))
    return [
        {
            "n_repetitions": size,
            "reranked": is_reranked,
            **evaluate_ids(np.concatenate(ids), truth, ks=ks, propensities=weights_K),
            "degraded": degraded,
        }
        for size, is_reranked, ids in measured
    ]
