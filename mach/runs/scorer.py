"""Bucket probabilities of a batch: what the repetitions of a model say, wherever their weights are kept."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch
from mach.data.rows import RowView
from mach.errors import StorageError
from mach.files.tensors import expect_digest
from mach.networks.inference import bucket_logits, weight_shapes
from mach.networks.kernels.losses import named
from mach.networks.stored import TABLE, wild_matrix
from mach.runs.run import Run


class Scorer(Protocol):
    """Keeps the weights of a model's repetitions, in this process (`LocalScorer`) or elsewhere (`mach.runs.actors`).

    It is safe to share between threads.
    """

    def probabilities(
        self, batch: Batch, n_repetitions: int | None = None
    ) -> tuple[NDArray[np.float32], tuple[int, ...]]:
        """Bucket probabilities of shape (N, R' J, B), and the ascending positions of the repetitions they are of.

        They are of the first ``n_repetitions`` where it is given, of all otherwise. A repetition's J hash functions
        stand one after another. Fewer answer only where some are kept in another process, and with a `DegradedWarning`.
        """

    def sizes(self) -> dict[str, int]:
        """``n_parameters`` and ``weight_bytes``."""

    def verify(self) -> None:
        """Compare all weights with the digests that training recorded; StorageError where one differs."""

    def close(self) -> None:
        """Give back what is kept elsewhere."""


class LocalScorer:
    """Weights of finished repetitions, mapped into this process; see `Scorer`.

    StorageError when a file is damaged or of another run, ConfigError when its networks have a trunk that the caller
    did not pass.
    """

    def __init__(self, run: Run, repetitions: list[int]) -> None:
        self._run, self._repetitions = run, repetitions
        self._trunk = run.agreed_trunk()
        shapes = shapes_of(run) | run.table_shapes
        self.weights = [run.load_weights(r, shapes) for r in repetitions]
        self._view = RowView(power=run.config.network.power)
        self._shape = run.config.hashing.heads, run.manifest.n_buckets

    def probabilities(
        self, batch: Batch, n_repetitions: int | None = None
    ) -> tuple[NDArray[np.float32], tuple[int, ...]]:
        n_heads, n_buckets = self._shape
        batch = self._view.batch(batch)
        asked = list(zip(self.weights, self._trunks, strict=True))[:n_repetitions]
        logits_NRB = np.empty((len(batch), len(asked) * n_heads, n_buckets), np.float32)
        for r, (weights, trunk) in enumerate(asked):
            logits_NJB = bucket_logits(weights, batch, trunk).reshape(-1, n_heads, n_buckets)
            logits_NRB[:, r * n_heads : (r + 1) * n_heads] = logits_NJB
        if not np.isfinite(logits_NRB).all():
            for r, (weights, _) in zip(self._repetitions, asked, strict=False):
                if name := wild_matrix(weights):  # else queries are beyond float32
                    where = self._run.repetition(r).weights
                    raise StorageError(f"{where}: {name} holds NaN or infinity: copy the file anew, or train it again")
        return named(self._run.manifest.loss).probabilities(logits_NRB), tuple(range(len(asked)))

    def sizes(self) -> dict[str, int]:
        return {
            "n_parameters": sum(a.size for weights in self.weights for name, a in weights.items() if name != TABLE),
            "weight_bytes": sum(self._run.repetition(r).weights_file().stat().st_size for r in self._repetitions),
        }

    def verify(self) -> None:
        for repetition, weights in zip(self._repetitions, self.weights, strict=True):
            files = self._run.repetition(repetition)
            expect_digest(files.weights, weights, files.summary().weights_digest)

    def close(self) -> None:
        pass

    @cached_property
    def _trunks(self) -> list[Any]:
        network, manifest = self._run.config.network, self._run.manifest
        if network.trunk is None:
            return [None] * len(self.weights)
        from mach.networks.layers import load_trunk

        D, is_dense = manifest.n_features, manifest.dense_input
        return [load_trunk(network, self._trunk, part, n_features=D, dense_input=is_dense) for part in self.weights]


def shapes_of(run: Run) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of each of a run's repetitions, as far as they are not a user's trunk."""
    manifest = run.manifest
    return weight_shapes(
        run.config.network,
        n_features=manifest.n_features,
        n_outputs=run.config.hashing.heads * manifest.n_buckets,
        dense_input=manifest.dense_input,
    )
