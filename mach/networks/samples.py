"""Outputs that a training step computes where these are not all: its rows' targets, and some drawn beside them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Targets


@dataclass(frozen=True)
class Sample:
    """The targets of a step's rows, and outputs that are drawn by how often they are targets.

    A drawn output stands for several. So sums over all outputs, of exponentials or of gradients, are
    estimated without bias (Bengio and Senecal, "Adaptive importance sampling to accelerate training of a neural
    probabilistic language model", 2008).
    """

    outputs: NDArray[np.int64]  # shape (S,), ascending
    targets: Targets  # of the same rows, numbered within the sample
    corrections: NDArray[np.float32]  # shape (S,): logarithms of the weights
    heads: list[slice]  # the outputs of every head

    @classmethod
    def draw(
        cls, targets: Targets, ends_JB: NDArray[np.float64], n_sampled: int, generator: np.random.Generator
    ) -> Sample:
        """``n_sampled`` outputs of every head, all targets among them; those drawn are at least a quarter as many.

        An output's weight is how often it was drawn over how often that was expected. Targets are there in any case and
        stand for themselves.
        The outputs of a head lie side by side on a line, which is cut into equal stretches; one point is drawn in each
        (stratified sampling). It takes O(n_sampled log B), without a pass over the outputs.
        """
        J, B = ends_JB.shape
        own = np.unique(targets.outputs)
        firsts_J1 = np.arange(J + 1) * B
        drawn, logs = [own], [np.zeros(len(own))]
        for ends_B, first, n_own in zip(ends_JB, firsts_J1, np.diff(np.searchsorted(own, firsts_J1)), strict=False):
            n = max(n_sampled - int(n_own), n_sampled // 4, 1)
            points = (np.arange(n) + generator.random(n)) / n
            places, counts = np.unique(np.searchsorted(ends_B, points, side="right"), return_counts=True)
            lengths = ends_B[places] - np.where(places > 0, ends_B[places - 1], 0.0)
            is_new = ~np.isin(places + first, own)
            drawn.append(places[is_new] + first)
            logs.append(np.log(counts / (n * lengths))[is_new])
        outputs, corrections = np.concatenate(drawn), np.concatenate(logs)
        order = np.argsort(outputs)
        outputs = outputs[order]
        numbered = Targets(targets.rows, np.searchsorted(outputs, targets.outputs), J)
        firsts = np.searchsorted(outputs, firsts_J1).tolist()
        return cls(
            outputs, numbered, corrections[order].astype(np.float32), [slice(*ends) for ends in pairwise(firsts)]
        )

    @classmethod
    def even(
        cls, targets: Targets, n_rows: int, shares: NDArray[np.float64], n_sampled: int, generator: np.random.Generator
    ) -> Sample:
        """``n_sampled`` outputs of every head, all targets among them and at least a quarter of others, drawn alike.

        All count for what the chance is that they are in a sample, targets of other rows as well. It passes over one
        byte an output.

        ``shares`` says of every output how large a part of all rows has it as a target. Where targets leave too little
        room, every head has more.
        """
        is_in_JB = np.zeros((targets.n_heads, len(shares) // targets.n_heads), np.bool_)
        is_in_JB.reshape(-1)[targets.outputs] = True
        n_targets_J = is_in_JB.sum(axis=1)
        n_each = min(max(n_sampled, int(n_targets_J.max()) + n_sampled // 4), is_in_JB.shape[1])
        rate_J = np.empty(targets.n_heads)
        for head, n_targets in enumerate(n_targets_J):
            others = np.flatnonzero(~is_in_JB[head])
            n_drawn = n_each - int(n_targets)
            is_in_JB[head, generator.choice(others, n_drawn, replace=False, shuffle=False)] = True
            rate_J[head] = n_drawn / max(len(others), 1)
        outputs = np.flatnonzero(is_in_JB)
        is_no_target = (1.0 - shares[outputs]) ** n_rows
        corrections = -np.log1p(-is_no_target * (1.0 - np.repeat(rate_J, n_each))).astype(np.float32)
        places = np.searchsorted(outputs, targets.outputs)
        heads = [slice(first, first + n_each) for first in range(0, len(outputs), n_each)]
        return cls(outputs, Targets(targets.rows, places, targets.n_heads), corrections, heads)


def line_of(shares: NDArray[np.float64], n_heads: int) -> NDArray[np.float64]:
    """Where outputs end on the line from 0 to 1 of their head, shape (J, B), each as long as the root of its share.

    ``shares`` says of every output how large a part of all rows has it as a target; 0 counts as the least above.
    """
    least = shares[shares > 0].min(initial=1.0)
    ends_JB = np.sqrt(np.maximum(shares, least)).reshape(n_heads, -1).cumsum(axis=1)
    ends_JB /= ends_JB[:, -1:]
    return ends_JB
