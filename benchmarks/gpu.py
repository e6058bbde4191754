"""Every figure of a GPU in one call of under eight minutes, one table at the end.

    .venv/bin/python benchmarks/gpu.py [--device cuda:0] [--seconds 15] [--write]
    .venv/bin/python benchmarks/gpu.py --tiny --device cpu       # a smoke test of the same path, seconds

Rows are synthetic, of the shapes of public sets: features and classes are drawn with frequencies like 1 / rank. Steps
are run for --seconds a figure, after a warm-up; the time of a whole training is that of a step times their number, and
is called projected. Shares of a peak count the products of dense layers alone, 6 N H B a repetition, against the bf16
product measured here. With --write the table goes to benchmarks/results/gpu-DATE.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import commit, processor

from mach.config import NetworkConfig
from mach.networks.batched import BatchedNetwork
from mach.networks.feed import Feed
from mach.networks.network import Network
from mach.sketch.hashing import UniversalAssignment
from mach.sketch.ledger import HostMemory

WARM_UP, LEAST = 5, 5  # steps
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Shape:
    """A set of rows and what is trained on it."""

    name: str
    n_rows: int
    n_features: int
    n_classes: int
    nonzeros: int
    classes: int
    n_buckets: int
    hidden: tuple[int, ...]
    n_repetitions: int
    batch: int
    epochs: int

    @property
    def config(self) -> NetworkConfig:
        return NetworkConfig(hidden=list(self.hidden), dropout=0.3)

    def tiny(self) -> Shape:
        sizes = {"n_rows": 400, "n_features": 900, "n_classes": 300, "nonzeros": 9, "classes": 3, "batch": 32}
        hidden = (16,) * len(self.hidden)
        return replace(self, n_buckets=16, hidden=hidden, n_repetitions=min(3, self.n_repetitions), **sizes)  # type: ignore[arg-type]


AMAZON = Shape("Amazon-670K-shaped", 490_449, 135_909, 670_091, 75, 5, 10_000, (512,), 16, 4096, 20)
ODP = Shape("ODP-shaped", 1_084_404, 422_713, 105_033, 60, 1, 512, (), 25, 4096, 10)
SMALL = Shape("gnd-shaped", 200_000, 26_000, 26_000, 40, 1, 1024, (512,), 16, 256, 12)
WIDE = Shape("8 M features", 400_000, 8_000_000, 1_000_000, 75, 3, 32_768, (512,), 1, 16_384, 1)


class Rows:
    """What a feed asks of a store, of rows drawn at random."""

    is_dense = False

    def __init__(self, shape: Shape) -> None:
        generator = np.random.default_rng(0)

        def ranks(n: int, most: int) -> Any:
            drawn = np.empty(n, np.int32)
            for begin in range(0, n, 2**24):  # temporaries stay small
                part = generator.random(min(2**24, n - begin), dtype=np.float32)
                drawn[begin : begin + 2**24] = np.minimum(np.exp(part * np.log(most)) - 1, most - 1)
            return drawn

        self.n_rows, self.n_features, self.n_classes = shape.n_rows, shape.n_features, shape.n_classes
        self.n_nonzeros = shape.n_rows * shape.nonzeros
        self.feature_indptr = np.arange(shape.n_rows + 1, dtype=np.int64) * shape.nonzeros
        self.feature_indices = ranks(self.n_nonzeros, shape.n_features)
        self.feature_values = np.full(self.n_nonzeros, shape.nonzeros**-0.5, np.float32)
        self.class_indptr = np.arange(shape.n_rows + 1, dtype=np.int64) * shape.classes
        self.class_ids = ranks(shape.n_rows * shape.classes, shape.n_classes)


class Bench:
    """Figures on one device."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = torch.device(device), seconds
        self.is_cuda = self.device.type == "cuda"
        self.table: list[tuple[str, str, str]] = []
        self._drawn: tuple[Any, Network] | None = None

    def add(self, figure: str, value: str, bar: str = "") -> None:
        self.table.append((figure, value, bar))
        print(f"{figure:<64} {value:>22}   {bar}", flush=True)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def timed(self, act: Callable[[int], Any], share: float = 1.0) -> float:
        """Seconds of one call, the mean of as many as fit the time."""
        for i in range(WARM_UP):
            act(i)
        self.synchronize()
        started, n = time.perf_counter(), 0
        while n < LEAST or time.perf_counter() - started < self.seconds * share:
            act(WARM_UP + n)
            n += 1
            if n % 10 == 0:
                self.synchronize()  # else the processor runs ahead of the clock
        self.synchronize()
        return (time.perf_counter() - started) / n

    def peak(self, size: int) -> float:
        """FLOPs a second of a bf16 product of random matrices."""
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        return 2 * size**3 / self.timed(lambda i: a @ b, 0.1)

    def bandwidth(self, n_bytes: int) -> float:
        """Bytes a second of a copy, read and written."""
        source = torch.empty(n_bytes, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * n_bytes / self.timed(lambda i: target.copy_(source), 0.1)

    @contextlib.contextmanager
    def shard(
        self, shape: Shape, rows: Rows, n_together: int, *, host_memory: HostMemory = "none"
    ) -> Iterator[Stepper]:
        stepper = Stepper(self.network(shape), shape, rows, n_together, str(self.device), host_memory)
        try:
            yield stepper
        finally:
            stepper.feed.close()
            del stepper
            if self.is_cuda:
                torch.cuda.empty_cache()

    def network(self, shape: Shape) -> Network:
        """With which every repetition begins; the last is kept, for millions of features take minutes to draw."""
        key = (shape.n_features, shape.hidden, shape.n_buckets)
        if self._drawn is None or self._drawn[0] != key:
            self._drawn = None
            drawn = Network(
                shape.config,
                n_features=shape.n_features,
                n_outputs=shape.n_buckets,
                dense_input=False,
                loss="softmax" if shape.classes == 1 else "binary",
                precision="bfloat16",
                bias=np.full(shape.n_buckets, -8.0, np.float32),
                seed=0,
            )
            self._drawn = (key, drawn)
        return self._drawn[1]

    def step_seconds(
        self, shape: Shape, rows: Rows, n_together: int, *, host_memory: HostMemory = "none"
    ) -> tuple[float, int]:
        """Of a step, and the device's memory at most."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.shard(shape, rows, n_together, host_memory=host_memory) as stepper:
            seconds = self.timed(stepper.step)
        return seconds, torch.cuda.max_memory_allocated(self.device) if self.is_cuda else 0


class Stepper:
    """A batched network and its steps; every repetition begins with the same weights."""

    def __init__(
        self, network: Network, shape: Shape, rows: Rows, n_together: int, device: str, host_memory: HostMemory
    ) -> None:
        options: dict[str, Any] = {"device": device, "host_memory": host_memory}
        self.network = BatchedNetwork(network, shape.config, n_repetitions=n_together, **options)
        self.feed = Feed(rows, self.network.device, self.network.view, self.network.host)  # type: ignore[arg-type]
        drawn = UniversalAssignment.draw(
            n_classes=shape.n_classes, n_buckets=shape.n_buckets, n_repetitions=n_together, seed=0
        )
        for r in range(n_together):
            self.network.adopt(network, drawn.select([r]))
        self.order, self.batch = np.random.default_rng(1).permutation(shape.n_rows), shape.batch

    def rows(self, i: int) -> Any:
        n_batches = len(self.order) // self.batch
        return self.order[i % n_batches * self.batch :][: self.batch]

    def step(self, i: int) -> None:
        batch = self.feed.batch(self.rows(i), self.rows(i + 1))
        figures = self.network.step(batch, 1e-3, measured=i % 8 == 0)
        assert figures is None or all(np.isfinite(each.loss) for each in figures)


def dense_flops(shape: Shape, n_together: int) -> float:
    widths = (*shape.hidden, shape.n_buckets)
    return 6.0 * shape.batch * n_together * sum(a * b for a, b in itertools.pairwise(widths))


def run(bench: Bench, tiny: bool) -> None:
    small, amazon, odp, wide = (shape.tiny() if tiny else shape for shape in (SMALL, AMAZON, ODP, WIDE))
    peak = bench.peak(64 if tiny else 8192)
    bench.add("bf16 product, measured", f"{peak / 1e12:.1f} TFLOP/s")
    bench.add("copy, read and written, measured", f"{bench.bandwidth(2**16 if tiny else 2**31) / 1e9:.0f} GB/s")
    for shape in (small, amazon):
        rows = Rows(shape)
        seconds = {n: bench.step_seconds(shape, rows, n) for n in (1, shape.n_repetitions)}
        n = shape.n_repetitions
        together, alone = seconds[n][0], seconds[1][0]
        bars = {"ratio": ">= 5x", "share": ""} if shape is small else {"ratio": "", "share": ">= 40 %"}
        bench.add(f"{shape.name}: step of {n} repetitions together", f"{together * 1e3:.2f} ms")
        bench.add(f"{shape.name}: step of one", f"{alone * 1e3:.2f} ms")
        bench.add(
            f"{shape.name}: throughput together over one at a time", f"{n * alone / together:.1f}x", bars["ratio"]
        )
        share = dense_flops(shape, n) / together / peak
        bench.add(f"{shape.name}: share of the bf16 product", f"{100 * share:.0f} %", bars["share"])
        if shape is amazon:
            total = together * -(-shape.n_rows // shape.batch) * shape.epochs
            bench.add(f"{shape.name}: {shape.epochs} epochs, R={n}, projected", f"{total / 60:.2f} min", "<= 10 min")
            bench.add(f"{shape.name}: device memory", f"{seconds[n][1] / 1e9:.1f} GB")
            larger = replace(shape, batch=4 * shape.batch)
            share = dense_flops(larger, n) / bench.step_seconds(larger, rows, n)[0] / peak
            bench.add(f"{shape.name}, batches of {larger.batch}: the same share", f"{100 * share:.0f} %", bars["share"])
        del rows
    rows = Rows(odp)
    for n_buckets in (32, 512):
        shape = odp if tiny else replace(odp, n_buckets=n_buckets)
        step, n_bytes = bench.step_seconds(shape, rows, shape.n_repetitions)
        total = step * -(-shape.n_rows // shape.batch) * shape.epochs
        name = f"{shape.name}, linear, B={n_buckets}"
        bench.add(f"{name}: step of {shape.n_repetitions} repetitions", f"{step * 1e3:.2f} ms")
        bench.add(f"{name}: {shape.epochs} epochs, projected", f"{total / 60:.2f} min", "<= 3 min")
        bench.add(f"{name}: device memory", f"{n_bytes / 1e9:.1f} GB")
    rows = Rows(wide)
    figures = [bench.step_seconds(wide, rows, wide.n_repetitions, host_memory=on_host) for on_host in ("none", "input")]
    bench.add(f"{wide.name}: resident step", f"{figures[0][0] * 1e3:.2f} ms")
    bench.add(f"{wide.name}: from main memory over resident, time", f"{figures[1][0] / figures[0][0]:.2f}x", "<= 1.3x")
    if bench.is_cuda:
        ratio = figures[0][1] / figures[1][1]
        bench.add(f"{wide.name}: resident over from main memory, device memory", f"{ratio:.1f}x", ">= 3x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a figure")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.tiny:
        torch.set_num_threads(1)
    bench = Bench(options.device, 0.0 if options.tiny else options.seconds)
    name = torch.cuda.get_device_name(bench.device) if bench.is_cuda else processor()
    run(bench, options.tiny)
    lines = [f"| {' | '.join(row)} |" for row in [("figure", "value", "bar"), ("---",) * 3, *bench.table]]
    try:
        of = commit()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        of = "unknown"
    head = f"{name}, torch {torch.__version__}, commit {of}, {time.perf_counter() - started:.0f} s in all"
    text = "\n".join(["# Figures of a GPU", "", head, "", *lines, ""])
    print(text)
    if options.write:
        date = datetime.datetime.now(tz=datetime.UTC).date()
        (ROOT / f"benchmarks/results/gpu-{date}.md").write_text(text)


if __name__ == "__main__":
    main()
