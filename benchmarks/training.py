"""A training step of one repetition on the CPU against the best plain PyTorch one, and where its time goes.

    python benchmarks/training.py            # about four minutes
    python benchmarks/training.py --write    # also writes benchmarks/results/training-<date>.md

Two shapes, errors dithered where the recipe does so. Features follow a power law and targets are planted, so that both
methods have something to learn: after as many steps on the same batches the loss must be no higher. Methods take turns
in one process; figures are medians and, above all, their ratios. Both multiply in bfloat16 where the processor does so
natively, and in float32 where it would only emulate it. Floors: bytes over the bandwidth, FLOPs over the rate of
torch's 2048^3 product in that precision, both measured on as many threads in the same turns; those of dithered errors
are of the entries that are left.

The plain baseline (`PlainStep`) is frozen: later versions of mach are measured against this very code.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import commit, processor
from torch import nn
from turns import medians

import mach.networks.kernels.loss
import mach.networks.layers
import mach.networks.network
import mach.networks.output
from mach.config import NetworkConfig
from mach.data.batch import SparseBatch, Targets, concatenated, rows_of
from mach.networks.network import Network
from mach.networks.precision import native_precision
from mach.networks.steps import DITHER

RATE, DROPOUT, SEED, ROUNDS, CURVE = 3e-3, 0.2, 0, 15, 192
PRECISION = native_precision()
HALF = PRECISION == "bfloat16"
ROUNDED = 0.0 if HALF else DITHER
N_BATCHES = 24  # that the steps go through again and again


@dataclass(frozen=True)
class Shape:
    """N rows of ``n_nonzeros`` features of D, hidden width H, B buckets.

    ``sparse``: with which gradient of its EmbeddingBag the plain step is faster.
    """

    n_rows: int
    n_nonzeros: int
    n_features: int
    width: int
    n_buckets: int
    sparse: bool

    @property
    def flops(self) -> int:
        """Of the three products of the output layer."""
        return 6 * self.n_rows * self.width * self.n_buckets


SHAPES = {
    "256 x 236 nnz, D 5K, H 512, B 512": Shape(256, 236, 5_000, 512, 512, sparse=False),
    "512 x 75 nnz, D 135K, H 512, B 4096": Shape(512, 75, 135_000, 512, 4096, sparse=True),
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

    With a sparse gradient of EmbeddingBag, SparseAdam takes it; otherwise fused Adam moves all D rows. Targets are
    written into one dense matrix that is kept, and batches are tensors beforehand. Tried and slower: 64-bit indices,
    gradients zeroed in place rather than dropped, logits in float32.
    """

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(SEED)
        sparse = shape.sparse
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
            [torch.from_numpy(a) for a in (b.indices, b.indptr.astype(np.int32), b.values, t.rows, t.outputs)]
            for b, t in planted(shape)
        ]
        self.n_steps = 0

    def __call__(self) -> float:
        """One step; its mean loss a row."""
        indices, offsets, values, rows, outputs = self.batches[self.n_steps % len(self.batches)]
        self.n_steps += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=HALF):
            hidden = torch.relu(self.embedding(indices, offsets, per_sample_weights=values) + self.bias)
            logits = self.output(nn.functional.dropout(hidden, DROPOUT))
        self.targets[rows, outputs] = 1.0
        loss = nn.functional.binary_cross_entropy_with_logits(logits, self.targets, reduction="sum") / len(logits)
        loss.backward()
        self.targets[rows, outputs] = 0.0
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach())


class MachStep:
    """A step of `mach.networks.network.Network` on the same batches."""

    def __init__(self, shape: Shape) -> None:
        self.network = Network(
            NetworkConfig(hidden=[shape.width], dropout=DROPOUT),
            n_features=shape.n_features,
            n_outputs=shape.n_buckets,
            dense_input=False,
            loss="binary",
            precision=PRECISION,
            bias=np.full(shape.n_buckets, prior(shape), np.float32),
            seed=SEED,
            dither=ROUNDED,
        )
        self.batches = planted(shape)

    def __call__(self, *, measured: bool = False) -> float:
        """One step; its mean loss a row where it is measured."""
        batch = self.batches[self.network.n_steps % len(self.batches)]
        figures = self.network.step(*batch, RATE, measured=measured)
        return figures.loss if figures else float("nan")


def product(side: int = 2048) -> Callable[[], object]:
    """torch's product in the precision of the steps, whose rate is the peak."""
    dtype = torch.bfloat16 if HALF else torch.float32
    left, right, out = (torch.randn(side, side).to(dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


def pass_over(megabytes: int = 64) -> Callable[[], object]:
    """One reading and writing of memory in place, whose rate is the bandwidth."""
    array = torch.from_numpy(np.zeros(megabytes * 2**18, np.float32))
    return lambda: array.add_(1.0)


def clock() -> float:
    """CPU time on one thread, which others on the machine disturb less; on several the time on the wall."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextlib.contextmanager
def stopwatch(names: dict[str, tuple[Any, str]]) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of functions that modules refer to, by the names given to them, while it lasts."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    originals = {name: getattr(module, function) for name, (module, function) in names.items()}

    def timed(name: str, *arguments: Any, **options: Any) -> Any:
        start = clock()
        result = originals[name](*arguments, **options)
        taken[name].append(clock() - start)
        return result

    for name, (module, function) in names.items():
        setattr(module, function, functools.partial(timed, name))
    try:
        yield taken
    finally:
        for name, (module, function) in names.items():
            setattr(module, function, originals[name])


PARTS = {
    "sparse forward": (mach.networks.network, "sparse_forward"),
    "ReLU, dropout": (mach.networks.layers, "relu_dropout"),
    "products": (torch, "mm"),
    "loss, gradient": (mach.networks.kernels.loss, "binary_gradient"),
    "Adam": (mach.networks.output, "adam"),
    "ReLU, dropout back": (mach.networks.layers, "relu_dropout_backward"),
    "dither": (mach.networks.output, "dithered"),
    "products of errors": (mach.networks.output, "sparse_forward"),
    "columns of the batch": (mach.networks.network, "transpose_batch"),
    "sparse backward": (mach.networks.network, "sparse_backward"),
}


def parts(step: MachStep, rounds: int = 2 * ROUNDS) -> dict[str, float]:
    """Median seconds of the parts of a step, in the order of the step; "rest" is Python and all that is small."""
    with stopwatch(PARTS) as taken:
        whole = medians({"step": step}, rounds, clock)["step"]
    products = taken.pop("products")
    del taken["Adam"][1::2]  # of the bias
    if ROUNDED:
        taken["products of errors"] = np.sum([taken["products of errors"][i::2] for i in range(2)], axis=0).tolist()
    found = {name: float(np.median(values)) for name, values in taken.items() if values}
    names = ("logits",) if ROUNDED else ("logits", "gradient by hidden", "gradient by weights")
    for i, name in enumerate(names):
        found[name] = float(np.median(products[i :: len(names)]))
    return found | {"rest": whole - sum(found.values()), "whole step": whole}


def share_kept(step: MachStep) -> float:
    """Of the errors of a step, those that dither leaves."""
    sizes = []

    def watched(g_BN: Any, *rest: Any) -> Any:
        found = dithered(g_BN, *rest)
        sizes.append(len(found[1]) / g_BN.size)
        return found

    dithered, mach.networks.output.dithered = mach.networks.output.dithered, watched  # type: ignore[attr-defined]
    step()
    mach.networks.output.dithered = dithered  # type: ignore[attr-defined]
    return float(np.mean(sizes)) if sizes else 1.0


def work(shape: Shape, batch: SparseBatch, kept: float) -> dict[str, tuple[float, float]]:
    """Bytes and FLOPs of the parts of a step; a batch's weights count once however often its rows name them."""
    N, H, B = shape.n_rows, shape.width, shape.n_buckets
    weights = (2 if HALF else 4) * H * len(np.unique(batch.indices))
    product = 2.0 * N * H * B
    found = {
        "batch read": (16.0 * len(batch.indices), 0.0),
        "sparse forward": (weights + 4 * N * H, 0.0),
        "ReLU, dropout": (6 * N * H, 0.0),
        "logits": (0.0, product),
        "loss, gradient": (6 * N * B, 0.0),
        **(
            {"dither": (4 * N * B, 0.0), "products of errors": (0.0, 2 * kept * product)}
            if ROUNDED
            else {"gradient by hidden": (0.0, product), "gradient by weights": (0.0, product)}
        ),
        "Adam": (28 * H * B, 0.0),
        "ReLU, dropout back": (8 * N * H, 0.0),
        "columns of the batch": (16.0 * len(batch.indices), 0.0),
        "sparse backward": (2 * weights + 4 * N * H, 0.0),
    }
    found["whole step"] = tuple(np.sum(list(found.values()), axis=0))  # type: ignore[assignment]
    return found


def reading(batches: list[tuple[SparseBatch, Targets]]) -> Callable[[], object]:
    """Gathering a batch's rows out of a matrix of all batches, in random order."""
    everything, N = concatenated([batch for batch, _ in batches]), len(batches[0][0])
    generator = np.random.default_rng(SEED)
    return lambda: rows_of(everything, generator.integers(0, N * len(batches), N))


def curves(shape: Shape, n_steps: int = CURVE) -> Iterator[str]:
    """Mean losses of both over stretches of steps."""
    plain, ours = PlainStep(shape), MachStep(shape)
    losses = np.array([(plain(), ours(measured=True)) for _ in range(n_steps)])
    yield "| steps | " + " | ".join(f"{i + 1}-{i + N_BATCHES}" for i in range(0, n_steps, N_BATCHES)) + " |"
    yield "|---|" + "---:|" * (n_steps // N_BATCHES)
    for name, values in zip(("plain PyTorch", "mach"), losses.T, strict=True):
        yield f"| {name} | " + " | ".join(f"{v:.2f}" for v in values.reshape(-1, N_BATCHES).mean(axis=1)) + " |"


def report(n_threads: int) -> Iterator[str]:
    torch.set_num_threads(n_threads)
    yield f"\n## {n_threads} thread{'s' if n_threads > 1 else ''}"
    for name, shape in SHAPES.items():
        ours = MachStep(shape)
        actions = {"mach": ours, "plain": PlainStep(shape), "product": product(), "memory": pass_over()}
        taken = medians(actions | {"batch read": reading(ours.batches)}, ROUNDS, clock)
        peak, bandwidth = 2 * 2048**3 / taken["product"], 2 * 64 * 2**20 / taken["memory"]
        yield f"\n### {name}\n"
        yield (
            f"A step takes {1e3 * taken['mach']:.2f} ms, that of plain PyTorch {1e3 * taken['plain']:.2f} ms: "
            f"**{taken['plain'] / taken['mach']:.2f} times faster**. The three products of the output layer, "
            f"{shape.flops / 1e9:.2f} GFLOP, are **{shape.flops / taken['mach'] / peak:.0%} of the peak** over the "
            f"whole step{', which skips what dither rounds to 0' if ROUNDED else ''}; "
            f"peak {peak / 1e12:.2f} TFLOP/s, bandwidth {bandwidth / 1e9:.0f} GB/s.\n"
        )
        if n_threads > 1:  # our own kernels run on one all the same
            continue
        found = {"batch read": taken["batch read"]} | parts(ours)
        floors = {
            part: n_bytes / bandwidth + n_flops / peak
            for part, (n_bytes, n_flops) in work(shape, ours.batches[0][0], share_kept(ours)).items()
        }
        yield "| part | ms | floor, ms |"
        yield "|---|---:|---:|"
        for part in [*floors, "rest"]:
            floor = f"{1e3 * floors[part]:.2f}" if part in floors else ""
            yield f"| {part} | {1e3 * found[part]:.2f} | {floor} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    lines = [
        f"# Training steps, {datetime.date.today()}",
        "",
        "`python benchmarks/training.py`: medians of interleaved turns, CPU time on one thread, time on the wall on "
        "two. Batch reading is no part of the step. Floors: bytes over bandwidth plus FLOPs over peak, both measured "
        f"in the same turns. {processor()}, load {os.getloadavg()[0]:.1f}, commit {commit()}.",
        "",
    ]
    print("\n".join(lines), flush=True)
    arguments = parser.parse_args()
    sections = [report(n_threads) for n_threads in (1, 2)]
    for name, shape in SHAPES.items():
        sections.append(itertools.chain([f"\n## Losses at equal steps, {name}\n"], curves(shape)))
    for line in itertools.chain(*sections):
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        path = Path(__file__).parent / "results" / f"training-{datetime.date.today()}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
