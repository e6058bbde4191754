"""Classes that networks treat alike: cosines of the output rows of their buckets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mach.errors import ConfigError
from mach.model.classes.answerer import Answerer
from mach.networks.inference import wide_matrix
from mach.runs.ensemble import Ensemble
from mach.runs.scorer import LocalScorer


def similar(
    answerer: Answerer, rows: list[NDArray[np.float32]], k: int, n: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The n classes most like class k by `output_rows`, and their cosines; -1 and -inf where there are fewer."""
    edits, ensemble = answerer.edits, answerer.ensemble
    trained_RK = ensemble.assignment.buckets(np.arange(edits.n_trained))
    buckets_RK = np.concatenate([trained_RK, answerer.memory.table_RA.astype(np.int32)], axis=1)
    scores_K = np.zeros(edits.n_classes, np.float32)
    for row_BH, buckets_K in zip(rows, buckets_RK, strict=True):  # one table of B products a function
        scores_K += (row_BH @ row_BH[buckets_K[k]])[buckets_K]
    scores_K /= len(rows)
    if edits.is_there_K is not None:
        scores_K[~edits.is_there_K] = -np.inf
    scores_K[k] = -np.inf
    best = np.argsort(-scores_K, kind="stable")[:n]
    return np.where(np.isneginf(scores_K[best]), -1, best), scores_K[best]


def output_rows(ensemble: Ensemble) -> list[NDArray[np.float32]]:
    """Rows of the output layers brought to length 1, (B, H) for every hash function."""
    if not isinstance(ensemble.scorer, LocalScorer):
        raise ConfigError("similar classes are read from the weights: load the model with the launcher local")
    rows: list[NDArray[np.float32]] = []
    for weights in ensemble.scorer.weights:
        if "output.weight" not in weights:
            raise ConfigError("similar classes need an output layer: this network has none")
        wide = wide_matrix(weights, "output")
        for rows_BH in wide.reshape(-1, ensemble.n_buckets, wide.shape[1]):
            rows.append(rows_BH / np.maximum(np.linalg.norm(rows_BH, axis=1, keepdims=True), 1e-12))
    return rows
