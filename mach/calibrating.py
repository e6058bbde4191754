"""Fit a run's calibration to rows that its networks have not learned from, and choose the prior of plain scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.blending import mean_precision
from mach.calibration import TOP, Calibration, Curve, fingerprint, fit
from mach.data.store import Store
from mach.errors import ConfigError
from mach.model import MachModel
from mach.networks.batch import SparseBatch, read_batch, right_of
from mach.ordering import prior_terms
from mach.repetition import write_json
from mach.reranker import is_due as reranker_is_due
from mach.reranking import learned_counts
from mach.scoring import LocalScorer
from mach.storage import Run

LEAST_ROWS, MOST_ROWS = 50, 20_000
PRIORS = (0.0, -0.02, -0.05, -0.1, -0.15, -0.2, -0.3, 0.05, -0.5, -0.8, -1.2, -1.8)  # the first of equal ones is taken


def calibrate_when_due(run: Run, store: Store) -> Calibration | None:
    """Calibrate a finished run on its held-out rows, if there are enough and it was not done for these weights."""
    held = held_out(run, store)
    if len(run.finished()) < run.config.hashing.repetitions or len(held) < LEAST_ROWS or reranker_is_due(run):
        return None
    made = Calibration.load(run)
    if made is not None and made.fingerprint == fingerprint(run, run.finished()):
        return None
    with MachModel(run, run.finished(), LocalScorer(run, run.finished())) as model:
        return calibrate(model, store, held, choose_prior=True)


def held_out(run: Run, store: Store) -> NDArray[np.int64]:
    """Rows of the training data that nothing has learned from.

    Raises
    ------
    ConfigError
        When the store is not the run's training data.
    """
    if store.fingerprint != run.manifest.data_fingerprint:
        raise ConfigError(
            f"{run.path} was trained on data with fingerprint {run.manifest.data_fingerprint}, {run.config.data.train} "
            f"has {store.fingerprint}: give DATA that it was not trained on"
        )
    return store.split(run.config.data.validation_fraction, run.config.training.seed)[1]


def calibrate(
    model: MachModel, store: Store, rows: NDArray[np.int64] | None = None, *, choose_prior: bool = False
) -> Calibration:
    """Fit curves to rows, by default all of the store, and write them into the model's run.

    Parameters
    ----------
    model : MachModel
        Uses them from now on.
    store : Store
        Prepared like the model's training data.
    rows : int array, optional
        Rows that the model has not learned from; of more than 20,000 some are taken, evenly.
    choose_prior : bool
        Whether the mean of P@1, P@3 and P@5 chooses the prior of plain scores, if the configuration leaves it open.

    Raises
    ------
    ConfigError
        When there are fewer than 50 rows.
    DataError
        When no row has a class that the model knows.
    """
    store.require_classes()
    rows = np.arange(store.n_rows) if rows is None else rows
    if len(rows) < LEAST_ROWS:
        raise ConfigError(
            f"{len(rows)} rows to calibrate on: need at least {LEAST_ROWS} that the run was not trained on: give DATA, "
            "or train with data.validation_fraction, such as 0.03"
        )
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).astype(np.int64)]
    batch = read_batch(store, rows)
    queries: Any = batch.matrix(store.n_features) if isinstance(batch, SparseBatch) else batch.values_ND
    if choose_prior and model.run.config.decoding.prior is None:
        model.prior = _best_prior(model, store, rows, queries)
    found = Calibration(
        fingerprint=fingerprint(model.run, model.repetitions),
        n_rows=len(rows),
        prior=model.prior,
        plain=_curve(model, store, rows, queries, rerank=False),
        reranked=None if model.reranker is None else _curve(model, store, rows, queries, rerank=True),
    )
    write_json(model.run.calibration_file, found.model_dump())
    model.calibration = found
    return found


def pairs_of(
    ids_Nk: NDArray[np.int64], scores_Nk: NDArray[np.float32], right_Nk: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]:
    """Scores, whether they are right, and queries, of all pairs of query and class that were found."""
    is_there = ids_Nk >= 0
    return scores_Nk[is_there], right_Nk[is_there], np.nonzero(is_there)[0]


def _curve(model: MachModel, store: Store, rows: NDArray[np.int64], queries: Any, *, rerank: bool) -> Curve:
    found = model.search(queries, TOP, rerank=rerank)
    right_Nk = right_of(store, rows, found.ids_Nk)
    if not (found.ids_Nk >= 0).any():
        raise ConfigError(f"{model.run.path} answers with no class, all are removed: there is nothing to calibrate")
    return fit(*pairs_of(found.ids_Nk, found.scores_Nk, right_Nk), model.aggregate)


def _best_prior(model: MachModel, store: Store, rows: NDArray[np.int64], queries: Any) -> float:
    """The strength of the best mean of P@1, P@3 and P@5 among the candidates of the aggregate alone."""
    model.prior = 0.0
    found = model.search(queries, model.run.config.decoding.candidates, rerank=False)
    is_own = store.fingerprint == model.run.manifest.data_fingerprint
    counts_K = learned_counts(model.run, store, rows) if is_own else model.run.class_counts_K()
    right_NC = right_of(store, rows, found.ids_Nk)

    def gain(prior: float) -> float:
        terms_NC = prior_terms(counts_K, prior)[np.maximum(found.ids_Nk, 0)]
        return mean_precision(found.scores_Nk + terms_NC, right_NC)

    return max(PRIORS, key=gain)
