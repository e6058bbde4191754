"""Assignments and bucket scores that the tests of aggregates and of the decoder share."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mach.sketch.answers import TopK
from mach.sketch.decoder import Decoder
from mach.sketch.hashing import Assignment, UniversalAssignment
from mach.sketch.tables import TableAssignment

SHAPES = [
    (3000, 64, 4),
    (1000, 37, 5),
    (700, 200, 1),
    (5, 8, 3),
    (20_000, 60, 6),
]  # K, B, R: B off powers of two and of 64, R = 1, K < B, more members of a bucket than are looked up at once


@functools.cache
def assignments(K: int, B: int, R: int) -> tuple[Assignment, Assignment, Assignment]:
    """The same buckets twice (implicit and as a table), and a table with empty and crowded buckets."""
    implicit = UniversalAssignment.draw(n_classes=K, n_buckets=B, n_repetitions=R, seed=0, capacity=K + 50)
    crowded_RK = np.random.default_rng(1).geometric(0.1, (R, K)) % (B // 2)
    table = TableAssignment.from_table(implicit.buckets(np.arange(K)), B)
    return implicit, table, TableAssignment.from_table(crowded_RK, B)


def bucket_scores(style: str, assignment: Assignment, n: int, rng: np.random.Generator) -> np.ndarray:
    shape = (n, assignment.n_repetitions, assignment.n_buckets)
    probs_NRB = np.exp(rng.normal(-7, 1, shape))
    if style == "sharp":
        for probs_RB in probs_NRB:
            classes = rng.integers(0, assignment.n_classes, 6)
            probs_RB[np.arange(shape[1])[:, None], assignment.buckets(classes)] = rng.uniform(0.2, 1, (shape[1], 6))
    elif style == "ties":
        probs_NRB = rng.integers(0, 3, shape) / 2  # zeros and ones saturate the logarithms
    elif style == "equal":
        probs_NRB = np.full(shape, 0.25)
    elif style == "damaged":
        probs_NRB[rng.random(shape) < 0.1] = np.nan
        probs_NRB[rng.random(shape) < 0.05] = 0
        probs_NRB[rng.random(shape) < 0.05] = np.inf
    return probs_NRB.astype(np.float32)


STYLES = ["sharp", "noise", "ties", "equal", "damaged"]


def assert_same(found: TopK, expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(found.ids_Nk, expected[0])
    np.testing.assert_array_equal(found.scores_Nk, expected[1])  # to the last bit


def topk(probs_NRB: Any, assignment: Assignment, k: int = 10, *, aggregate: str = "log-mean", **how: Any) -> TopK:
    return Decoder(assignment, aggregate).topk(probs_NRB, k, **how)
