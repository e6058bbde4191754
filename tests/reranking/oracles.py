"""What columns of signals and scores of a learned order must equal, in plain numpy or Python, however slowly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from mach.reranking.kernels.associations import CODES, MOST_CONFIDENCE
from mach.reranking.kernels.repeats import ANY
from mach.reranking.order import NAMES as ORDER_ARRAYS
from mach.reranking.order import LearnedOrder, standardised
from mach.reranking.signals.classifiers import NAMES, Classifiers, ClassifierSet
from mach.reranking.signals.contract import Shortlist, Signal
from mach.reranking.signals.networks import LARGEST_LOG, LEAST_LOG, LIKELY
from mach.reranking.signals.rules import LEAST_SHARES, SUPPORT
from mach.reranking.signals.rules import NAMES as RULE_ARRAYS

WORD = 2**64 - 1


def columns_of(signal: Signal, shortlist: Shortlist) -> NDArray:
    """The columns of a signal, shape (N, C, I)."""
    return ORACLES[signal.name](signal, shortlist)


def aggregate(signal: Signal, shortlist: Shortlist) -> NDArray:
    chances_NC = np.exp(np.clip(shortlist.scores_NC.astype(np.float64), LEAST_LOG, LARGEST_LOG))
    return np.stack([np.log(chances_NC), np.log(chances_NC / (1 - chances_NC)), chances_NC], axis=2)


def context(signal: Signal, shortlist: Shortlist) -> NDArray:
    columns_NCI = np.empty((*shortlist.ids_NC.shape, signal.n_columns))
    for n, probs_RB in enumerate(shortlist.probs_NRB.astype(np.float64)):
        n_features = shortlist.batch.indptr[n + 1] - shortlist.batch.indptr[n]
        n_above = [sum(int((probs_B > p).sum()) for probs_B in probs_RB) / len(probs_RB) for p in LIKELY]
        expected = max(probs_RB.sum() / len(probs_RB), 1e-3)
        columns_NCI[n] = [np.log(1 + n_features), np.log(expected), *(np.log(1 + m) for m in n_above)]
    return columns_NCI


def prior(signal: Signal, shortlist: Shortlist) -> NDArray:
    log_rows = signal.arrays["log_rows"].tolist() if signal.has_columns else []
    found = [[log_rows[max(k, 0)] if log_rows else 0.0 for k in ids] for ids in shortlist.ids_NC.tolist()]
    return np.array(found).reshape(*shortlist.ids_NC.shape, 1)


def classifiers(signal: Signal, shortlist: Shortlist) -> NDArray:
    assert isinstance(signal, Classifiers)
    columns_NCI = np.empty((*shortlist.ids_NC.shape, signal.n_columns))
    for i, one in enumerate(signal.sets.values()):
        x = one.view.sparse(shortlist.batch).matrix(one.view.n_columns).astype(np.float64)
        margins_NK = (x @ weights_of(one).T).toarray() + one.arrays["biases"]
        found_NC = np.take_along_axis(margins_NK, np.maximum(shortlist.ids_NC, 0), axis=1)
        columns_NCI[:, :, i] = np.where(shortlist.ids_NC < 0, 0, found_NC)
    return columns_NCI


def weights_of(one: ClassifierSet) -> csr_array:
    """All weights of a set but the biases, (K, columns of its view)."""
    offsets, gaps, codes, scales, _ = (one.arrays[name] for name in NAMES)
    totals = np.concatenate([[0], np.cumsum(gaps, dtype=np.int64)])
    counts_K = np.diff(offsets)
    features = totals[1:] - np.repeat(totals[offsets[:-1]], counts_K)
    weights = codes * np.repeat(scales, counts_K)
    return csr_array((weights, features, offsets), shape=(len(counts_K), one.view.n_columns))


def rules(signal: Signal, shortlist: Shortlist) -> NDArray:
    numbers_NC5 = np.zeros((*shortlist.ids_NC.shape, 5))
    if signal.arrays:
        table = tuple(signal.arrays[f"rules.{name}"] for name in RULE_ARRAYS)
        numbers_NC5 = rule_numbers(table, shortlist.rows, shortlist.ids_NC)
    logs_NC5 = np.log(np.maximum(numbers_NC5, np.where(LEAST_SHARES, LEAST_SHARES, 1)))
    logs_NC5[:, :, SUPPORT] = np.log1p(numbers_NC5[:, :, SUPPORT])
    return logs_NC5


def rule_numbers(table: tuple[NDArray, ...], rows: tuple[NDArray, ...], ids_NC: NDArray) -> NDArray:
    """What `mach.reranking.kernels.associations.rules_for` writes."""
    offsets, classes, confidences, supports = (array.tolist() for array in table)
    indptr, indices, values = rows
    found_NC5 = np.zeros((*ids_NC.shape, 5))
    for n, ids in enumerate(ids_NC.tolist()):
        span = slice(indptr[n], indptr[n + 1])
        weights = {f: abs(x) for f, x in zip(indices[span].tolist(), values[span].tolist(), strict=True) if x}
        for c, k in enumerate(ids):
            said = [
                (confidences[rule] / CODES, supports[f], weight)
                for f, weight in weights.items()
                for rule in range(offsets[f], offsets[f + 1])
                if classes[rule] == k
            ]
            if said:
                ranked = sorted((share for share, _, _ in said), reverse=True)
                support = next(support for share, support, _ in said if share == ranked[0])
                noisy_or = -sum(np.log1p(-min(share, MOST_CONFIDENCE)) for share in ranked)
                mean = sum(share * weight for share, _, weight in said) / sum(weights.values())
                found_NC5[n, c] = [ranked[0], support, ranked[1] if len(ranked) > 1 else 0.0, noisy_or, mean]
    return found_NC5


def repeats(signal: Signal, shortlist: Shortlist) -> NDArray:
    columns_NC2 = np.zeros((*shortlist.ids_NC.shape, 2))
    table = signal.arrays.get("repeats", np.empty(0, np.uint32)).tolist()
    indptr, indices, values = shortlist.rows
    for n, ids in enumerate(shortlist.ids_NC.tolist()):
        span = slice(indptr[n], indptr[n + 1])
        features = [f for f, x in zip(indices[span].tolist(), values[span].tolist(), strict=True) if x]
        total = _count(table, features, ANY)
        counts = [min(_count(table, features, k), total) if k >= 0 else 0 for k in ids]
        columns_NC2[n] = np.log1p([[count, total] for count in counts])
    return columns_NC2


def _count(table: list[int], features: list[int], k: int) -> int:
    """The count of one entry, in Python's integers."""
    if not table:
        return 0
    row_key = _mixed((len(features) + sum(_mixed(f * 0x9E3779B97F4A7C15 + 1) for f in features)) & WORD)
    key = _mixed((row_key + (k + 2) * 0xC2B2AE3D27D4EB4F) & WORD)
    tag, slot = key & 0xFFFFFF, ((key >> 32) * len(table)) >> 32
    while table[slot] and table[slot] >> 8 != tag:
        slot = (slot + 1) % len(table)
    return table[slot] & 255


def _mixed(key: int) -> int:
    key &= WORD
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & WORD
    return key ^ (key >> 31)


ORACLES: dict[str, Callable[[Signal, Shortlist], NDArray]] = {
    "aggregate": aggregate,
    "prior": prior,
    "context": context,
    "classifiers": classifiers,
    "rules": rules,
    "repeats": repeats,
}


def ordered(order: LearnedOrder, scores_NC: NDArray, inputs_NCI: NDArray) -> NDArray:
    """Scores by a learned order, shape (N, C)."""
    means, scales, w_IH, b_H, w_HG, b_G, w_G1, b_1 = (order.arrays[name] for name in ORDER_ARRAYS)
    first_NCH = _silu(standardised(inputs_NCI, means, scales) @ w_IH + b_H)
    objections_NC = (_silu(first_NCH @ w_HG + b_G) @ w_G1 + b_1)[:, :, 0]
    return scores_NC - np.logaddexp(0, objections_NC.astype(np.float64))


def _silu(x: NDArray) -> NDArray:
    with np.errstate(over="ignore"):  # then it is 0
        return x / (1 + np.exp(-x))
