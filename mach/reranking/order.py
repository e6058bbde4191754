"""The learned order: a small network over all that is known of a candidate, taught by rows that nothing had seen.

Stacked generalisation (Wolpert, Neural Networks 5, 1992): what aggregates and margins are worth beside each other can
only be learned where they were computed for rows that neither networks nor classifiers learned from. Such rows come
from pilots, runs on a part of the rows that are thrown away afterwards (`mach.training.pilot`). Without pilots they are
those that are held out. These also judge the order and calibrate it, so it is taught crosswise: by several networks,
each of which has not seen one fold of the rows, and answers for it in the others' place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mach.errors import StorageError
from mach.networks.blas import blas_threads
from mach.networks.kernels.adam import adam_step
from mach.reranking.candidates import without
from mach.reranking.kernels.order import CUT, objections
from mach.reranking.signals.contract import SignalFile

Array = NDArray[Any]
HIDDEN, NETWORKS = 64, 2
FEW_HIDDEN, FEW_STEPS, FOLDS = 16, 2_000, 2  # where held-out rows teach, which are few
SECTION = "stacker."  # of its arrays' names in a re-ranker's file
ROOM = 8.0  # log-odds of a class are its score and this: room below the aggregate for whatever the network says
FLOOR = -2.0  # aggregate that a proposed class has at least
LEAST_LOG = np.float32(-30)
TAUGHT = 12  # candidates of a row that it learns from, those of best blend
OTHERS = 8  # and others, where networks are wide: of what they have never seen they may think too well (docs/log.md)
EPOCHS, LEAST_STEPS, BATCH, RATE, DECAY = 10, 2_000, 64, 1e-2, 0.05
FOLDED = "folds"
NAMES = ("means", "scales", "w_IH", "b_H", "w_HG", "b_G", "w_G1", "b_1")


class LearnedOrder:
    """Scores of the classes of a shortlist, from the columns of all signals.

    Its arrays are `NAMES`: means and one over standard deviations of the inputs, weights and biases of three layers.
    One that was taught crosswise also has ``folds``, the last bias of each of its networks (`blind`).
    It takes aggregates that are raised to its ``floor`` where classes are proposed
    (`mach.reranking.candidates.lifted`); orders of earlier versions have none.
    """

    def __init__(self, arrays: Mapping[str, NDArray[np.float32]], floor: float = -np.inf) -> None:
        # copies: a map's arrays cannot be written to, and for each mixture of both the kernel would be compiled anew
        self.arrays = {name: np.array(array, np.float32, order="C") for name, array in arrays.items()}
        self._layers = tuple(self.arrays[name] for name in NAMES)
        self.floor = floor

    @classmethod
    def load(cls, file: SignalFile) -> Self | None:
        """The order of a file, None where it has none; a StorageError where its arrays do not fit each other."""
        if not any(name.startswith(SECTION) for name in file.arrays):
            return None
        n_in, H, G = (file.array(SECTION + name, np.float32, (-1,)).size for name in ("means", "b_H", "b_G"))
        shapes = ((n_in,), (n_in,), (n_in, H), (H,), (H, G), (G,), (G, 1), (1,))
        arrays = {n: file.array(SECTION + n, np.float32, shape) for n, shape in zip(NAMES, shapes, strict=True)}
        if n_folds := file.size(SECTION + FOLDED):
            arrays[FOLDED] = file.array(SECTION + FOLDED, np.float32, (n_folds,))
            if H % n_folds or G % n_folds:
                raise StorageError(f"{file.where}: {SECTION}{FOLDED} is not of {H} and {G} units: train it again")
        return cls(arrays, file.number("floor", -np.inf, -np.inf, 0.0))

    @property
    def n_folds(self) -> int:
        """Of the held-out rows that taught it; 0 where pilots did."""
        return self.arrays[FOLDED].size if FOLDED in self.arrays else 0

    def blind(self, fold: int) -> LearnedOrder:
        """Its network that has not seen this fold, rows ``fold``, ``fold + n_folds``, ... of those that taught it."""
        H, G = (self.arrays[name].size // self.n_folds for name in ("b_H", "b_G"))
        h, g = slice(fold * H, fold * H + H), slice(fold * G, fold * G + G)
        means, scales, w_IH, b_H, w_HG, b_G, w_G1, _ = self._layers
        last = (w_G1[g] * np.float32(self.n_folds), self.arrays[FOLDED][[fold]])
        layers = (means, scales, w_IH[:, h], b_H[h], w_HG[h, g], b_G[g], *last)
        return LearnedOrder(dict(zip(NAMES, layers, strict=True)), self.floor)

    def scores(self, scores_NC: NDArray[np.float32], inputs_NCI: NDArray[np.float32]) -> NDArray[np.float32]:
        """``aggregate - log(1 + exp(objection))``, so at most what is given; `ROOM` more are log-odds of the class."""
        objections_NC = np.empty(scores_NC.shape, np.float32)
        objections(inputs_NCI, self._layers, objections_NC)
        return scores_NC - np.logaddexp(np.float32(0), objections_NC)

    def crosswise(self, scores_NC: NDArray[np.float32], inputs_NCI: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores of the rows that taught it, in their order, each by the network that has not seen it."""
        found_NC = np.empty_like(scores_NC)
        for fold in range(self.n_folds):
            rows = slice(fold, None, self.n_folds)
            found_NC[rows] = self.blind(fold).scores(scores_NC[rows], np.ascontiguousarray(inputs_NCI[rows]))
        return found_NC

    @classmethod
    def learn(
        cls, inputs_NCI: Array, scores_NC: Array, right_NC: NDArray[np.bool_], seed: int, *, crosswise: bool = False
    ) -> Self:
        """Teach networks which candidates of rows that nothing had seen are right.

        They learn from the columns of all signals and the aggregates, by the logistic loss of `ROOM` and their scores,
        and stand side by side in one, whose objections are the mean of theirs. Of rows of pilots, all of which nobody
        will ask again, `NETWORKS` learn. Taught crosswise, `FOLDS` smaller ones leave out a fold each. Cost: 6 FLOPs a
        weight, candidate and epoch, some seconds each. The same examples and seed give the same bits.
        """
        from scipy.linalg import block_diag

        n_networks = FOLDS if crosswise else NETWORKS
        width, n_least = (FEW_HIDDEN, FEW_STEPS) if crosswise else (HIDDEN, LEAST_STEPS)
        means = inputs_NCI.mean(axis=(0, 1), dtype=np.float64)
        deviations = inputs_NCI.std(axis=(0, 1), dtype=np.float64)
        scales = np.where(deviations > 1e-6, 1 / np.maximum(deviations, 1e-6), 0.0)
        x_NCI = standardised(inputs_NCI, means, scales)
        found = []
        for network in range(n_networks):
            seen = np.arange(len(x_NCI)) % FOLDS != network if crosswise else slice(None)
            found.append(_teach(x_NCI[seen], scores_NC[seen], right_NC[seen], seed + network, width, n_least))
        w_IH, b_H, w_HG, b_G, w_G1, b_1 = zip(*found, strict=True)
        layers = (np.hstack(w_IH), np.hstack(b_H), block_diag(*w_HG), np.hstack(b_G))
        last = (np.vstack(w_G1) / n_networks, np.mean(b_1, axis=0))
        arrays = dict(zip(NAMES, (means, scales, *layers, *last), strict=True))
        return cls(arrays | ({FOLDED: np.concatenate(b_1)} if crosswise else {}), FLOOR)


def taught(
    scores_NC: NDArray[np.float32], ids_NC: NDArray[np.int64], proposed_NP: NDArray[np.int64], n_others: int = 0
) -> NDArray[np.int64]:
    """Places of the candidates that an order learns from, shape (N, T).

    They are the `TAUGHT` of best score, up to ``n_others`` at ranks that grow by a constant factor to the last, and the
    first `TAUGHT` that signals propose; where these are fewer or among them, more of best score.
    """
    proposed_NP, C = proposed_NP[:, :TAUGHT], ids_NC.shape[1]
    ranks = np.arange(min(TAUGHT, C))
    if n_others and C > TAUGHT:
        ranks = np.union1d(ranks, np.geomspace(TAUGHT, C - 1, n_others).astype(int))
    n = min(len(ranks) + proposed_NP.shape[1], C)
    is_proposed_NC = (ids_NC >= 0) & (without(ids_NC, proposed_NP) < 0)
    first_NC = np.argsort(-scores_NC, axis=1, kind="stable")
    is_first_NC = np.zeros_like(is_proposed_NC)
    np.put_along_axis(is_first_NC, first_NC[:, ranks], True, axis=1)
    places_NC = np.lexsort((-scores_NC, ~(is_first_NC | is_proposed_NC)), axis=1)
    return np.asarray(places_NC[:, :n])


def standardised(inputs_NCI: Array, means_I: Array, scales_I: Array) -> NDArray[np.float32]:
    """Inputs less their means, in standard deviations, at most `CUT` of them."""
    return np.clip((inputs_NCI - np.float32(means_I)) * np.float32(scales_I), -CUT, CUT)


def _teach(
    inputs_NCI: Array, aggregates_NC: Array, is_right_NC: NDArray[np.bool_], seed: int, width: int, n_least: int
) -> list[Array]:
    """Weights and biases of one network of a width, by Adam with decoupled decay; torch takes longer to be imported.

    There are `EPOCHS`, or more for ``n_least`` steps.
    """
    generator = np.random.default_rng(seed)
    layers: list[Array] = []
    for n_in, n_out in ((inputs_NCI.shape[2], width), (width, width), (width, 1)):
        drawn = generator.random((n_in, n_out), np.float32)
        layers += [(2 * drawn - 1) * np.float32(n_in**-0.5), np.zeros(n_out, np.float32)]
    scores_NC = np.maximum(aggregates_NC, LEAST_LOG) + np.float32(ROOM)  # finite where candidates are too few
    flat = [layer.reshape(-1) for layer in layers]
    moments = [(np.zeros_like(weights), np.zeros_like(weights)) for weights in flat]
    n_batches, step = -(-len(inputs_NCI) // BATCH), 0
    n_epochs = max(EPOCHS, -(-n_least // n_batches))
    with blas_threads(1):  # products are small, and bits do not depend on the machine's cores
        for _ in range(n_epochs):
            shuffled = generator.permutation(len(inputs_NCI))
            for begin in range(0, len(shuffled), BATCH):
                rows = shuffled[begin : begin + BATCH]
                example = inputs_NCI[rows].reshape(-1, inputs_NCI.shape[2])
                gradients = _gradients(layers, example, scores_NC[rows].reshape(-1), is_right_NC[rows].reshape(-1))
                rate, step = RATE * (1 - step / (n_epochs * n_batches)), step + 1
                for weights, gradient, (mean, square) in zip(flat, gradients, moments, strict=True):
                    np.multiply(weights, np.float32(1 - rate * DECAY), out=weights)
                    adam_step(weights, np.ascontiguousarray(gradient).reshape(-1), mean, square, rate, step)
    return layers


def _gradients(layers: list[Array], x_MI: Array, scores_M: Array, right_M: Array) -> list[Array]:
    """Of the mean logistic loss of examples by the layers: weight and bias of each in turn."""
    w_IH, b_H, w_HG, b_G, w_G1, b_1 = layers
    first_MH = x_MI @ w_IH + b_H
    open_MH = _sigmoid(first_MH)
    hidden_MH = first_MH * open_MH
    second_MG = hidden_MH @ w_HG + b_G
    open_MG = _sigmoid(second_MG)
    hidden_MG = second_MG * open_MG
    objections_M = (hidden_MG @ w_G1 + b_1)[:, 0]
    odds_M = scores_M - np.logaddexp(np.float32(0), objections_M)
    back_M1 = ((right_M - _sigmoid(odds_M)) * _sigmoid(objections_M))[:, None] / np.float32(len(x_MI))
    back_MG = (back_M1 @ w_G1.T) * (open_MG + hidden_MG * (1 - open_MG))
    back_MH = (back_MG @ w_HG.T) * (open_MH + hidden_MH * (1 - open_MH))
    found: list[Array] = []
    ones_M = np.ones(len(x_MI), np.float32)  # a product adds columns up ten times as fast as `sum`
    for given, back in ((x_MI, back_MH), (hidden_MH, back_MG), (hidden_MG, back_M1)):
        found += [given.T @ back, ones_M @ back]
    return found


def _sigmoid(x: Array) -> Array:
    return np.float32(0.5) * np.tanh(np.float32(0.5) * x) + np.float32(0.5)
