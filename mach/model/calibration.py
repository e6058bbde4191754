"""Calibration of a run: ``calibration.json`` holds curves that turn its scores into probabilities.

There is one curve for plain and one for re-ranked scores, and the prior of plain scores that held-out rows chose. All
is fitted to rows that the networks have not learned from. Held-out rows may have taught an order; then each is answered
by the network of it that has not seen that row (`mach.reranking.order`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mach.config import Section
from mach.data.batch import SparseBatch, read_batch, right_of
from mach.data.omissions import require_classes
from mach.data.store import Store
from mach.errors import ConfigError, counted
from mach.files.records import Digest, find_json, write_json
from mach.model.ask import Answer, Ask
from mach.model.classes.answerer import Answerer
from mach.model.classes.edits import Edits
from mach.model.curves import TOP, Curve, fit, pairs_of
from mach.reranking.blend import precisions
from mach.reranking.fitting import learned_counts
from mach.reranking.model import Reranker
from mach.reranking.record import Record
from mach.reranking.record import is_due as reranker_is_due
from mach.runs.ensemble import Ensemble
from mach.runs.run import Run
from mach.sketch.answers import TopK
from mach.sketch.terms import CANDIDATES, prior_terms

FORMAT: Literal[2] = 2
LEAST_ROWS, MOST_ROWS = 50, 20_000
MOST_PRIOR = 1e9  # beyond, scores are no finite float32
PRIORS = (0.0, -0.02, -0.05, -0.1, -0.15, -0.2, -0.3, 0.05, -0.5, -0.8, -1.2, -1.8)  # the first of equal ones is taken


class Calibration(Section):
    """The content of calibration.json; ``prior`` is that of plain scores.

    Curves of format 1 are of all queries; later ones are of those with a known feature.
    """

    format: Literal[1, 2] = FORMAT
    fingerprint: Digest
    n_rows: int = Field(ge=1)
    prior: float = Field(ge=-MOST_PRIOR, le=MOST_PRIOR)
    plain: Curve
    reranked: Curve | None

    @classmethod
    def load(cls, run: Run) -> Self | None:
        """That of a run; None where it has none."""
        return find_json(run.calibration_file, cls)


def configured_prior(run: Run) -> float | None:
    """The prior that an old run's configuration states; later ones leave it to their calibration."""
    prior = run.retired.get("decoding.prior")
    return None if prior is None else float(prior)


def prior_of(run: Run, calibration: Calibration | None) -> float:
    """Strength of ``log(1 + training rows)`` of a class in plain scores, see `mach.sketch.terms.prior_terms`."""
    configured = configured_prior(run)
    return configured if configured is not None else calibration.prior if calibration else 0.0


def fingerprint(run: Run, repetitions: Sequence[int]) -> str:
    """Digest of all that decides the scores of a model by these repetitions; it begins with its own version."""
    config = run.config
    digests = [run.repetition(r).summary().weights_digest for r in sorted(repetitions)]
    parts: tuple[Any, ...] = (1, config.decoding.aggregate, configured_prior(run), digests)
    if config.reranking.candidates and (done := find_json(run.reranked, Record)):
        parts = (*parts, done.digest, done.weight, done.candidates)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def calibrate_when_due(run: Run, store: Store) -> Calibration | None:
    """Calibrate a finished run on its held-out rows, if there are enough and it was not done for these weights."""
    held, finished = held_out(run, store), run.finished()
    if len(finished) < run.config.hashing.repetitions or len(held) < LEAST_ROWS or reranker_is_due(run):
        return None
    made = Calibration.load(run)
    if made is not None and made.fingerprint == fingerprint(run, finished):
        return None
    with Ensemble(run, finished) as ensemble:
        prior = configured_prior(run)
        prior = best_prior(ensemble, store, _some_of(held)) if prior is None else prior
        answerer = Answerer(ensemble, Reranker.load(run), prior, Edits(run.manifest.n_classes))
        return calibrate(answerer, store, held)


def described(calibration: Calibration) -> str:
    """A line about a calibration: its rows, its prior and its errors."""
    parts = [
        f"{name} scores {curve.method}, expected calibration error {100 * curve.ece_before:.1f} % before and "
        f"{100 * curve.ece_after:.1f} % after"
        for name, curve in (("plain", calibration.plain), ("re-ranked", calibration.reranked))
        if curve is not None
    ]
    return f"calibration by {calibration.n_rows:,} rows, prior {calibration.prior:g}: {'; '.join(parts)}"


def validated(calibration: Calibration) -> str:
    """A line about how often the best class of the rows of a new calibration is right."""
    shares = [f"{100 * (curve.precision or 0):.1f} %" for curve in (calibration.reranked, calibration.plain) if curve]
    but = f", {shares[1]} without the re-ranker" if len(shares) > 1 else ""
    return f"P@1 of {counted(calibration.n_rows, 'held-out row')}: {shares[0]}{but}"


def held_out(run: Run, store: Store) -> NDArray[np.int64]:
    """Rows of the training data that nothing has learned from; ConfigError when the store is other data."""
    if store.fingerprint != run.manifest.data_fingerprint:
        raise ConfigError(
            f"{run.path} was trained on data with fingerprint {run.manifest.data_fingerprint}, {run.config.data.train} "
            f"has {store.fingerprint}: give DATA that it was not trained on"
        )
    return store.split(run.config.data.validation_fraction, run.config.training.seed)[1]


def calibrate(answerer: Answerer, store: Store, rows: NDArray[np.int64] | None = None) -> Calibration:
    """Fit curves to rows that the run has not learned from, by default all of the store, and write them into the run.

    The store is prepared like the run's training data. Of more than 20,000 rows some are taken, evenly. Raises
    ConfigError when there are fewer than 50, DataError when none has a class that the run knows.
    """
    require_classes(store)
    rows = np.arange(store.n_rows) if rows is None else rows
    if len(rows) < LEAST_ROWS:
        raise ConfigError(
            f"{counted(len(rows), 'row')} to calibrate on: need at least {LEAST_ROWS} that the run was not trained on: "
            "give DATA, or train with data.validation_fraction, such as 0.03"
        )
    run, parts = answerer.ensemble.run, _blind(answerer, store, _some_of(rows))
    rows = np.concatenate([part for _, part in parts])
    asks = [Ask(rerank=False), *([] if answerer.reranker is None else [Ask()])]
    k = min(TOP, answerer.edits.n_classes)
    found = [
        [one.answer(scores, k, ask) for ask in asks]
        for one, part in parts
        for scores in one.ensemble.answered(_queries(store, part))
    ]

    def curve(answers: Sequence[Answer]) -> Curve:
        top = Answer.concatenate(answers)
        if not (top.ids_Nk >= 0).any():
            raise ConfigError(f"{run.path} answers with no class, all are removed: there is nothing to calibrate")
        known = top.known_N  # of others probabilities are shares of rows
        if not known.any():
            raise ConfigError(f"no row to calibrate on has a feature that {run.path} knows: give others")
        right_Nk = right_of(store, rows, top.ids_Nk)
        fitted = fit(*pairs_of(top.ids_Nk[known], top.scores_Nk[known], right_Nk[known]), answerer.ensemble.aggregate)
        return fitted.model_copy(update={"precision": float(right_Nk[:, 0].mean())})

    plain, *reranked = map(curve, zip(*found, strict=True))
    made = Calibration(
        fingerprint=fingerprint(run, answerer.ensemble.repetitions),
        n_rows=len(rows),
        prior=answerer.prior,
        plain=plain,
        reranked=reranked[0] if reranked else None,
    )
    write_json(run.calibration_file, made.model_dump())
    return made


def best_prior(ensemble: Ensemble, store: Store, rows: NDArray[np.int64]) -> float:
    """The strength of the best mean of P@1, P@3 and P@5 among the candidates of the aggregate alone."""
    run = ensemble.run
    top = TopK.concatenate(list(ensemble.search(_queries(store, rows), CANDIDATES)))
    right_NC = right_of(store, rows, top.ids_Nk)
    counts_K = learned_counts(run, store, rows)

    def gain(prior: float) -> float:
        terms_NC = prior_terms(counts_K, prior)[np.maximum(top.ids_Nk, 0)]
        return float(precisions(top.scores_Nk + terms_NC, right_NC).mean())

    return max(PRIORS, key=gain)


def _blind(answerer: Answerer, store: Store, rows: NDArray[np.int64]) -> list[tuple[Answerer, NDArray[np.int64]]]:
    """Rows in parts, each with what answers as if it had not seen them: held-out rows may have taught an order."""
    run, reranker = answerer.ensemble.run, answerer.reranker
    n_folds = reranker.order.n_folds if reranker is not None and reranker.order is not None else 0
    if reranker is None or not n_folds or store.fingerprint != run.manifest.data_fingerprint:
        return [(answerer, rows)]
    folds = np.searchsorted(held_out(run, store), rows) % n_folds
    return [
        (Answerer(answerer.ensemble, reranker.blind(fold), answerer.prior, answerer.edits), rows[folds == fold])
        for fold in np.unique(folds).tolist()
    ]


def _some_of(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).astype(np.int64)]


def _queries(store: Store, rows: NDArray[np.int64]) -> Any:
    batch = read_batch(store, rows)
    return batch.matrix(store.n_features) if isinstance(batch, SparseBatch) else batch.values_ND
