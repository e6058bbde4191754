"""A training step of one repetition on the CPU against the best plain PyTorch one, and where its time goes.

    python benchmarks/training.py            # about three minutes
    python benchmarks/training.py --write    # also writes benchmarks/results/training-<date>.md

Two shapes. Features follow a power law and targets are planted, so that both methods have something to learn: after as
many steps on the same batches their losses must be equal. Methods take turns in one process; figures are medians and,
above all, their ratios. Floors: bytes over the bandwidth, FLOPs over the bfloat16 rate of torch's 2048^3 product, both
measured on as many threads in the same turns.

The plain baseline (`PlainStep`) is frozen: later versions of mach are measured against this very code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mach.config import NetworkConfig
from mach.networks.batch import SparseBatch, Targets
from mach.networks.network import Network

RATE, DROPOUT, SEED, ROUNDS = 3e-3, 0.2, 0, 15
N_BATCHES = 24  # that the steps go through again and again


@dataclass(frozen=True)
class Shape:
    """N rows of ``n_nonzeros`` features of D, hidden width H, B buckets."""

    n_rows: int
    n_nonzeros: int
    n_features: int
    width: int
    n_buckets: int

    @property
    def flops(self) -> int:
        """Of the three products of the output layer."""
        return 6 * self.n_rows * self.width * self.n_buckets


SHAPES = {
    "256 x 236 nnz, D 5K, H 512, B 512": Shape(256, 236, 5_000, 512, 512),
    "512 x 75 nnz, D 135K, H 512, B 4096": Shape(512, 75, 135_000, 512, 4096),
}


def planted(shape: Shape, n_batches: int = N_BATCHES, seed: int = SEED) -> list[tuple[SparseBatch, Targets]]:
    """Batches to learn from: a row has 5 of 4 B classes, whose 12 features each are a third of its own.

    All other features are drawn from a power law (the f-th most frequent in proportion to 1 / (f + 10)). A class's
    bucket is its number modulo B.
    """
    generator = np.random.default_rng(seed)
    n_classes, n_own, N = 4 * shape.n_buckets, 12, shape.n_rows
    chances_D = np.cumsum(1 / (np.arange(shape.n_features) + 10))
    draw = lambda size: np.searchsorted(chances_D, generator.random(size) * chances_D[-1])  # noqa: E731
    own_KF = draw((n_classes, n_own))
    batches = []
    for _ in range(n_batches):
        classes_NC = generator.integers(0, n_classes, (N, 5))
        own_NF = own_KF[classes_NC].reshape(N, -1)
        picked_NF = generator.permuted(own_NF, axis=1)[:, : shape.n_nonzeros // 3]
        rows = []
        for n in range(N):
            features = np.unique(np.concatenate([picked_NF[n], draw(shape.n_nonzeros)]))
            while len(features) < shape.n_nonzeros:
                features = np.unique(np.concatenate([features, draw(shape.n_nonzeros)]))
            others = generator.permutation(np.setdiff1d(features, picked_NF[n]))
            kept = np.concatenate([np.unique(picked_NF[n]), others])[: shape.n_nonzeros]
            rows.append(np.sort(kept))
        values_NF = generator.gamma(2.0, 1.0, (N, shape.n_nonzeros)).astype(np.float32)
        values_NF /= np.linalg.norm(values_NF, axis=1, keepdims=True)
        indptr = np.arange(N + 1, dtype=np.int64) * shape.n_nonzeros
        batch = SparseBatch(indptr, np.concatenate(rows).astype(np.int32), values_NF.ravel())
        pairs = np.unique(np.repeat(np.arange(N), 5) * shape.n_buckets + classes_NC.ravel() % shape.n_buckets)
        batches.append((batch, Targets(*np.divmod(pairs, shape.n_buckets))))
    return batches


def prior(shape: Shape) -> float:
    """Log odds of a bucket: both methods' initial output bias."""
    share = 5 / shape.n_buckets
    return float(np.log(share / (1 - share)))


class PlainStep:
    """A step in plain PyTorch: EmbeddingBag, autocast, binary cross-entropy on a dense target, fused Adam. FROZEN.

    ``sparse`` asks EmbeddingBag for a sparse gradient, which SparseAdam takes; otherwise fused Adam moves all D rows.
    Targets are written into one dense matrix that is kept, and batches are tensors beforehand.
    """

    def __init__(self, shape: Shape, *, sparse: bool) -> None:
        torch.manual_seed(SEED)
        self.embedding = nn.EmbeddingBag(
            shape.n_features, shape.width, mode="sum", sparse=sparse, include_last_offset=True
        )
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.bias = nn.Parameter(torch.zeros(shape.width))
        self.output = nn.Linear(shape.width, shape.n_buckets)
        nn.init.constant_(self.output.bias, prior(shape))
        dense = [self.bias, *self.output.parameters(), *([] if sparse else self.embedding.parameters())]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=RATE, fused=True)]
        self.optimizers += [torch.optim.SparseAdam(self.embedding.parameters(), lr=RATE)] if sparse else []
        self.targets = torch.zeros(shape.n_rows, shape.n_buckets)
        self.batches = [
            [torch.from_numpy(array) for array in (b.indices.astype(np.int64), b.indptr, b.values, t.rows, t.outputs)]
            for b, t in planted(shape)
        ]
        self.n_steps = 0

    def __call__(self) -> torch.Tensor:
        """One step; its mean loss a row."""
        indices, offsets, values, rows, outputs = self.batches[self.n_steps % len(self.batches)]
        self.n_steps += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = torch.relu(self.embedding(indices, offsets, per_sample_weights=values) + self.bias)
            logits = self.output(nn.functional.dropout(hidden, DROPOUT))
        self.targets[rows, outputs] = 1.0
        loss = nn.functional.binary_cross_entropy_with_logits(logits, self.targets, reduction="sum") / len(logits)
        loss.backward()
        self.targets[rows, outputs] = 0.0
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


class MachStep:
    """A step of `mach.networks.network.Network` on the same batches."""

    def __init__(self, shape: Shape) -> None:
        self.network = Network(
            NetworkConfig(hidden=[shape.width], dropout=DROPOUT),
            n_features=shape.n_features,
            n_outputs=shape.n_buckets,
            dense_input=False,
            loss="binary",
            precision="bfloat16",
            bias=np.full(shape.n_buckets, prior(shape), np.float32),
            seed=SEED,
        )
        self.batches = planted(shape)

    def __call__(self, *, measured: bool = False) -> float:
        """One step; its mean loss a row where it is measured."""
        figures = self.network.step(*self.batches[self.network.n_steps % len(self.batches)], RATE, measured=measured)
        return figures.loss if figures else float("nan")
