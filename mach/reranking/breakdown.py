"""What each signal adds to the score of a class: parts that add up to the score, and features behind them.

In a blend a part is the signal's term. In a learned order it is a Shapley value: how much the score changes when the
order learns what the signal says of this query and class, averaged over all sequences in which it may learn that of all
signals (Lundberg & Lee, "A unified approach to interpreting model predictions", NeurIPS 2017). Before, it knows of a
signal with evidence what that says of a query without features, and of any other one the mean over the candidates that
the order learned from. These parts add up to the score less what the order says when it knows nothing, the start.

Within a part, features share what the signal says beyond a query without features, in proportion to what they add to
its first column, such as weight times value of a classifier.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import factorial

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch
from mach.reranking.model import Reranker
from mach.reranking.order import LearnedOrder
from mach.reranking.signals.contract import BlendedSignal, Evidence, Shortlist, Signal
from mach.reranking.signals.networks import Aggregate

LEAST_SUM = 1e-3  # of evidence: what is less is not shared, rounding would be


@dataclass(frozen=True)
class Part:
    """What one signal adds to a score; its evidence is in units of the score, and adds up to it less the rest."""

    signal: Signal
    added: float
    evidence: tuple[Evidence, ...] = ()


def breakdown(reranker: Reranker, shortlist: Shortlist) -> tuple[float, list[Part]]:
    """The start and the parts of the score of one class of one query; they add up to ``reranker.rescore`` of it."""
    if reranker.order is None:
        return 0.0, _blended(reranker, shortlist)
    return _ordered(reranker, reranker.order, shortlist)


def shapley(values_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shapley values of S players by the values of their 2^S coalitions; bit s of a number says that s is in it.

    They add up to the last value less the first.

    Examples
    --------
    >>> shapley(np.array([0.0, 1.0, 2.0, 7.0])).tolist()
    [3.0, 4.0]
    """
    n_players = len(values_M).bit_length() - 1
    members_M = np.arange(len(values_M))
    sizes_M = np.array([number.bit_count() for number in members_M.tolist()])
    shares = np.array([factorial(n) * factorial(n_players - n - 1) for n in range(n_players)]) / factorial(n_players)
    found = []
    for player in range(n_players):
        without = members_M[(members_M >> player) & 1 == 0]
        found.append(shares[sizes_M[without]] @ (values_M[without | 1 << player] - values_M[without]))
    return np.array(found)


def _blended(reranker: Reranker, shortlist: Shortlist) -> list[Part]:
    bare, parts = _bare(shortlist), []
    for signal in reranker.signals:
        if isinstance(signal, Aggregate):
            parts.append(Part(signal, float(shortlist.scores_NC[0, 0])))
        elif isinstance(signal, BlendedSignal) and (strength := reranker.blend.of(signal)):
            added, before = (
                float(signal.terms(signal.columns(one), one.ids_NC, strength)[0, 0]) for one in (shortlist, bare)
            )
            parts.append(_part(signal, shortlist, added, added - before))
    return parts


def _ordered(reranker: Reranker, order: LearnedOrder, shortlist: Shortlist) -> tuple[float, list[Part]]:
    bare, ends = _bare(shortlist), np.cumsum([signal.n_columns for signal in reranker.signals])
    means = np.split(order.arrays["means"], ends[:-1])
    known = [signal.columns(shortlist)[0, 0] for signal in reranker.signals]
    start = [
        mean if signal.evidence(bare) is None else signal.columns(bare)[0, 0]
        for signal, mean in zip(reranker.signals, means, strict=True)
    ]
    n_coalitions = 2 ** len(reranker.signals)
    inputs_1MI = np.empty((1, n_coalitions, int(ends[-1])), np.float32)
    scores_1M = np.empty((1, n_coalitions), np.float32)
    is_lifted_M = np.zeros(n_coalitions, np.bool_)
    for number, (signal, end) in enumerate(zip(reranker.signals, ends, strict=True)):
        is_in_M = (np.arange(n_coalitions) >> number & 1).astype(np.bool_)
        inputs_1MI[0, :, end - signal.n_columns : end] = np.where(is_in_M[:, None], known[number], start[number])
        if isinstance(signal, Aggregate):
            scores_1M[0] = np.where(is_in_M, shortlist.scores_NC[0, 0], start[number][0])
        proposed_1P = signal.candidates(shortlist.batch) if signal.lifts else None
        if proposed_1P is not None and shortlist.ids_NC[0, 0] in proposed_1P:
            is_lifted_M |= is_in_M
    scores_1M = np.where(is_lifted_M, np.maximum(scores_1M, np.float32(order.floor)), scores_1M)
    values_M = order.scores(scores_1M, inputs_1MI)[0].astype(np.float64)
    added = shapley(values_M).tolist()
    parts = [_part(signal, shortlist, one, one) for signal, one in zip(reranker.signals, added, strict=True)]
    return float(values_M[0]), parts


def _part(signal: Signal, shortlist: Shortlist, added: float, shared: float) -> Part:
    found = signal.evidence(shortlist) or []
    total = sum(one.amount for one in found)
    slope = shared / total if abs(total) > LEAST_SUM else 0.0
    return Part(signal, added, tuple(replace(one, amount=slope * one.amount) for one in found if slope))


def _bare(shortlist: Shortlist) -> Shortlist:
    """The same of a query without features."""
    nothing = SparseBatch(np.zeros(2, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
    return replace(shortlist, batch=nothing)
