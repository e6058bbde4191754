import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.errors import ConfigError, DataError
from mach.sketch.metrics import evaluate, propensities

LOG = math.log2(3)  # 1 / LOG is the discount of rank 2


def test_by_hand():
    # row 0: true {2, 5}, returned 7 2 9; row 1: true {1}, returned 1 and padding; row 2: nothing true
    ids_Nk = [[7, 2, 9], [1, -1, -1], [3, 4, 5]]
    weights_K = [0.5, 0.25, 0.5, 1, 1, 0.1, 1, 1, 1, 1]
    found = evaluate(ids_Nk, ([0, 2, 3, 3], [2, 5, 1]), ks=(1, 2, 3), propensities=weights_K)
    expected = {
        "P@1": 1 / 3,
        "P@2": (1 / 2 + 1 / 2) / 3,
        "P@3": (1 / 3 + 1 / 3) / 3,
        "nDCG@1": 1 / 3,
        "nDCG@2": ((1 / LOG) / (1 + 1 / LOG) + 1) / 3,
        "recall@1": 1 / 3,
        "recall@2": (1 / 2 + 1) / 3,
        "hit@1": 1 / 3,
        "hit@2": 2 / 3,
        "coverage@1": 1 / 3,
        "coverage@2": 2 / 3,
        "PSP@1": 4 / (10 + 4),
        "PSP@2": (2 + 4) / (10 + 2 + 4),
        "PSnDCG@1": 4 / (10 + 4),
        "PSnDCG@2": (2 / LOG / (1 + 1 / LOG) + 4) / ((10 + 2 / LOG) / (1 + 1 / LOG) + 4),
    }
    assert found == pytest.approx({**found, **expected})
    assert len(found) == 21


def test_perfect_answers_reach_one_except_for_precision():
    found = evaluate([[2, 4, -1]], ([0, 2], [2, 4]), ks=(3,), propensities=np.linspace(0.1, 1, 5))
    assert found == pytest.approx({**dict.fromkeys(found, 1.0), "P@3": 2 / 3})


def brute_force(ids_Nk: np.ndarray, truth: list[list[int]], k: int, weights_K: np.ndarray) -> dict[str, float]:
    rows = [[i for i in row[:k] if i >= 0] for row in ids_Nk]
    hits = [[(rank, i) for rank, i in enumerate(row) if i in true] for row, true in zip(rows, truth, strict=True)]
    best = [sorted(true, key=lambda i: weights_K[i])[:k] for true in truth]
    norms = [sum(1 / math.log2(i + 2) for i in range(min(k, max(1, len(true))))) for true in truth]
    n, classes = len(rows), {i for true in truth for i in true}

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 0

    return {
        "P": sum(len(h) / k for h in hits) / n,
        "nDCG": sum(sum(1 / math.log2(rank + 2) for rank, _ in h) / m for h, m in zip(hits, norms, strict=True)) / n,
        "recall": sum(len(h) / max(1, len(true)) for h, true in zip(hits, truth, strict=True)) / n,
        "hit": sum(len(h) > 0 for h in hits) / n,
        "coverage": ratio(len({i for h in hits for _, i in h}), len(classes)),
        "PSP": ratio(
            sum(1 / weights_K[i] for h in hits for _, i in h),
            sum(1 / weights_K[i] for b in best for i in b),
        ),
        "PSnDCG": ratio(
            sum(1 / weights_K[i] / math.log2(rank + 2) / m for h, m in zip(hits, norms, strict=True) for rank, i in h),
            sum(
                1 / weights_K[i] / math.log2(rank + 2) / m
                for b, m in zip(best, norms, strict=True)
                for rank, i in enumerate(b)
            ),
        ),
    }


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    n_rows, n_classes = rng.integers(1, 8), 12
    truth = [rng.permutation(n_classes)[: rng.integers(0, 7)].tolist() for _ in range(n_rows)]
    ids_Nk = np.stack([rng.permutation(n_classes)[:5] for _ in range(n_rows)])
    ids_Nk[np.arange(5) >= rng.integers(0, 6, n_rows)[:, None]] = -1
    weights_K = rng.uniform(0.05, 1, n_classes)
    indptr = np.cumsum([0, *map(len, truth)])
    flat = np.array([i for true in truth for i in true], dtype=int)
    found = evaluate(ids_Nk, (indptr, flat), ks=(1, 3, 5), propensities=weights_K)
    expected = {
        f"{name}@{k}": value for k in (1, 3, 5) for name, value in brute_force(ids_Nk, truth, k, weights_K).items()
    }
    assert found == pytest.approx(expected)
    matrix = sp.csr_array((np.ones(len(flat)), flat, indptr), shape=(n_rows, n_classes))
    assert evaluate(ids_Nk, matrix, propensities=weights_K) == found


def test_propensities_by_hand():
    C = (math.log(1000) - 1) * 2.5**0.55
    expected = [1 / (1 + C * 1.5**-0.55), 1 / (1 + C * 101.5**-0.55)]
    assert propensities([0, 100], 1000) == pytest.approx(expected)
    assert propensities([100], 1000, a=0.6, b=2.6) < propensities([900], 1000, a=0.6, b=2.6)
    with pytest.raises(ConfigError, match="2 training rows"):
        propensities([1], 2)


def test_misfits():
    with pytest.raises(ConfigError, match="1..2"):
        evaluate([[1, 2]], ([0, 1], [1]), ks=(3,))
    with pytest.raises(DataError, match="2 rows"):
        evaluate([[1, 2]], ([0, 1, 1], [1]), ks=(1,))
