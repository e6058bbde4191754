"""What columns of signals and scores of a learned order must equal, in plain numpy or Python, however slowly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from mach.data.batch import SparseBatch
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
LEAST_SHARE = -9.0  # logarithm of a share


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
    logs_NC5 = np.log(np.maximum(numbers_NC5, LEAST_SHARES))
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


def mention(signal: Signal, shortlist: Shortlist) -> NDArray:
    columns_NCI = np.zeros((*shortlist.ids_NC.shape, 9))
    if not signal.arrays:
        return columns_NCI
    names_K = signal.arrays["mention.classes"].tolist()
    for n, ids in enumerate(shortlist.ids_NC.tolist()):
        levels, values, longest, found = _mentions(signal, shortlist.batch, n)
        for c, k in enumerate(ids):
            if k < 0:
                continue
            told = []
            for name in range(names_K[k], names_K[k + 1]):
                tokens = _tokens(signal, name)
                level = min((levels.get(t, 0) for t in tokens), default=0)
                hit = sum(t in levels for t in tokens) / max(len(tokens), 1)
                value = sum(values.get(t, 0) for t in tokens) / max(len(tokens), 1)
                one = [hit, 0, LEAST_SHARE, 0, 0, 0, value, np.log1p(len(found)), 0]
                if level:
                    code, rows = (signal.arrays[f"mention.{x}"][name, level - 1] / 255 for x in ("shares", "rows"))
                    one[1:6] = level, (1 - code) * LEAST_SHARE, rows * 14, len(tokens), _is_covered(tokens, longest)
                    one[8] = level == 4
                told.append((bool(level), one[2] if level else hit, one))
            columns_NCI[n, c] = max(told, default=(0, 0, [0, 0, LEAST_SHARE, 0, 0, 0, 0, np.log1p(len(found)), 0]))[2]
    return columns_NCI


def best_mentions(signal: Signal, batch: SparseBatch, n_most: int) -> NDArray:
    """Classes of the best mentions, shape (N, P)."""
    ids_NP = np.full((len(batch), n_most), -1)
    class_M = np.repeat(np.arange(len(signal.arrays["mention.classes"]) - 1), np.diff(signal.arrays["mention.classes"]))
    for n in range(len(batch)):
        levels, _, longest, found = _mentions(signal, batch, n)
        ranked: dict[int, float] = {}
        for name in found:
            tokens = _tokens(signal, name)
            code = float(signal.arrays["mention.shares"][name, min(levels[t] for t in tokens) - 1])
            rank = code - 2 * 255 / 9 * _is_covered(tokens, longest)
            ranked[int(class_M[name])] = max(rank, ranked.get(int(class_M[name]), -np.inf))
        best = sorted(ranked, key=lambda k: (-ranked[k], k))[:n_most]
        ids_NP[n, : len(best)] = best
    return ids_NP


def _tokens(signal: Signal, name: int) -> list[int]:
    offsets = signal.arrays["mention.names.offsets"]
    return signal.arrays["mention.names.tokens"][offsets[name] : offsets[name + 1]].tolist()


def _mentions(
    signal: Signal, batch: SparseBatch, n: int
) -> tuple[dict[int, int], dict[int, float], dict[int, int], list[int]]:
    """Levels and values of the tokens that a row marks, tokens of the longest name of each, and names."""
    offsets, tokens, spelt = (signal.arrays[f"mention.links.{x}"] for x in ("offsets", "tokens", "levels"))
    levels: dict[int, int] = {}
    values: dict[int, float] = {}
    for j in range(batch.indptr[n], batch.indptr[n + 1]):
        f, value = int(batch.indices[j]), abs(float(batch.values[j]))
        for link in range(offsets[f], offsets[f + 1]):
            t = int(tokens[link])
            levels[t], values[t] = max(levels.get(t, 0), int(spelt[link])), max(values.get(t, 0), value)
    names = range(len(signal.arrays["mention.names.offsets"]) - 1)
    found = [name for name in names if _tokens(signal, name) and all(t in levels for t in _tokens(signal, name))]
    longest: dict[int, int] = {}
    for name in found:
        for t in _tokens(signal, name):
            longest[t] = max(longest.get(t, 0), len(_tokens(signal, name)))
    return levels, values, longest, found


def _is_covered(tokens: list[int], longest: dict[int, int]) -> bool:
    return all(longest.get(t, 0) > len(tokens) for t in tokens)


def likeness(signal: Signal, shortlist: Shortlist) -> NDArray:
    columns_NC3 = np.zeros((*shortlist.ids_NC.shape, 3))
    if not signal.arrays:
        return columns_NC3
    totals_K = signal.arrays["likeness.totals"].astype(np.float64)
    sums_NK = shared(signal, shortlist.batch)
    for n, ids in enumerate(shortlist.ids_NC.tolist()):
        for c, k in enumerate(ids):
            if k >= 0:
                value, most = sums_NK[n, k], sums_NK[n].max()
                log = np.log(1 + value * signal.arrays["likeness.scale"][0])
                columns_NC3[n, c] = [log, value / max(most, 1), value / max(totals_K[k], 1)]
    return columns_NC3


def shared(signal: Signal, batch: SparseBatch) -> NDArray:
    """What rows and all classes share, in codes, shape (N, K)."""
    offsets, classes, codes, counts_D = (
        signal.arrays[f"likeness.{x}"] for x in ("offsets", "classes", "codes", "counts")
    )
    sums_NK = np.zeros((len(batch), len(signal.arrays["likeness.totals"])))
    for n in range(len(batch)):
        span = slice(batch.indptr[n], batch.indptr[n + 1])
        features, sizes = batch.indices[span], np.abs(batch.values[span]) * counts_D[batch.indices[span]]
        once = sizes[sizes > 0].min(initial=np.inf)
        for f, size in zip(features.tolist(), sizes.tolist(), strict=True):
            for entry in range(offsets[f], offsets[f + 1]):
                sums_NK[n, classes[entry]] += max(round(size / once), 1) * int(codes[entry])
    return sums_NK


ORACLES: dict[str, Callable[[Signal, Shortlist], NDArray]] = {
    "aggregate": aggregate,
    "prior": prior,
    "context": context,
    "classifiers": classifiers,
    "rules": rules,
    "repeats": repeats,
    "mention": mention,
    "likeness": likeness,
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
