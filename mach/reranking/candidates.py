"""The candidates of a query: the best classes of the networks, and beside them those that signals propose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch
from mach.reranking.kernels.best import drop_listed
from mach.reranking.signals.contract import Signal
from mach.sketch.answers import Subset, TopK


def proposed(signals: Sequence[Signal], batch: SparseBatch, *, lifts: bool = True) -> NDArray[np.int64]:
    """Classes that signals propose, shape (N, P): the first of every signal, then the second, and so on.

    Ids are -1 for none and for repeats. Signals are asked that know classes without rows (`Signal.lifts`), or others.
    """
    asked = [signal for signal in signals if signal.lifts == lifts]
    found = [ids_NP for signal in asked if (ids_NP := signal.candidates(batch)) is not None]
    if len(found) < 2:
        return found[0] if found else np.empty((len(batch), 0), np.int64)
    in_turns_NP = np.stack(found, axis=2).reshape(len(batch), -1)
    return without(in_turns_NP, np.empty((len(batch), 0), np.int64))


def widened(
    top: TopK,
    proposed_NP: NDArray[np.int64],
    score: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    allowed: Subset | None = None,
) -> TopK:
    """Candidates with those proposed ones that are allowed and not among them; ``score`` gives their aggregates.

    What `TopK.bound_N` says of all other classes holds as before.
    """
    if not proposed_NP.shape[1]:
        return top
    if allowed is not None:
        proposed_NP = np.where(allowed.mask_K[proposed_NP], proposed_NP, -1)
    more_NP = without(proposed_NP, top.ids_Nk)
    return replace(
        top,
        ids_Nk=np.concatenate((top.ids_Nk, more_NP), axis=1),
        scores_Nk=np.concatenate((top.scores_Nk, score(more_NP)), axis=1),
        n_scored_N=top.n_scored_N + (more_NP >= 0).sum(axis=1),
    )


def lifted(
    scores_NC: NDArray[np.float32], ids_NC: NDArray[np.int64], proposed_NP: NDArray[np.int64], floor: float
) -> NDArray[np.float32]:
    """Aggregates, raised to the floor where classes are proposed: networks know nothing of a class without rows.

    >>> lifted(np.float32([[-9, -9, -1]]), np.array([[3, 5, 7]]), np.array([[7, 3, -1]]), -4.0).tolist()
    [[-4.0, -9.0, -1.0]]
    """
    if floor == -np.inf or not proposed_NP.shape[1]:
        return scores_NC
    is_proposed_NC = (ids_NC >= 0) & (ids_NC[:, :, None] == proposed_NP[:, None, :]).any(axis=2)
    return np.where(is_proposed_NC, np.maximum(scores_NC, np.float32(floor)), scores_NC)


def without(ids_NP: NDArray[np.int64], others_NC: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids of every row, -1 in place of those that stand in the same row of others, or before among these.

    >>> without(np.array([[3, 5, 3, 7]]), np.array([[5, 9]])).tolist()
    [[3, -1, -1, 7]]
    """
    found_NP = np.array(ids_NP, np.int64)
    drop_listed(found_NP, np.asarray(others_NC, np.int64))
    return found_NP
