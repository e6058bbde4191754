"""Exact top 5 by rounded weights beside the full product, over 404,000 classes: planted, and trained.

    .venv/bin/python benchmarks/topk.py

Planted rows lie in 8,000 clusters, each at a cosine of 0.8 to its centre, with lengths of 1 to 1.5; queries lie at 0.8
to a row. Trained ones are those of a `SampledHead` after 100,000 rows of debfiles-name2dir, and queries are 128 others.
One thread and two, in turns, seconds of the clock and of the processor, medians. The table goes to
benchmarks/results/topk-DATE.md, and docs/output-layers.md shows it.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hardware import commit, processor
from head import load
from heads import train
from torch import Tensor
from torch.nn import functional

from mach.nn import SampledHead

K, H, CLUSTERS, COSINE, N_QUERIES, TOP = 404_000, 128, 8_000, 0.8, 128, 5
TRAINED = 100_000  # rows
SIZES = ((64, 128), (1, 32))  # of a batch, and how many queries
DATA = Path(__file__).resolve().parent.parent.parent / "shared/data/debfiles-name2dir/train.txt.xz"


def near(points: Tensor, generator: torch.Generator) -> Tensor:
    """Directions at a cosine to those of the points."""
    noise = functional.normalize(torch.randn(points.shape, generator=generator))
    return COSINE * functional.normalize(points) + (1 - COSINE**2) ** 0.5 * noise


def planted() -> tuple[SampledHead, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = SampledHead(H, K)
    centres, owners = torch.randn(CLUSTERS, H, generator=generator), torch.randint(CLUSTERS, (K,), generator=generator)
    for part in torch.split(torch.arange(K), 50_000):
        lengths = 1 + torch.rand(len(part), 1, generator=generator) / 2
        head.weight[part] = near(centres[owners[part]], generator) * lengths
    return head, 4 * near(head.weight[torch.randint(K, (N_QUERIES,), generator=generator)], generator)


def trained() -> tuple[SampledHead, Tensor]:
    rows = load(DATA)
    sizes = tuple(int(ids.max()) + 1 for ids in (rows.indices, rows.class_ids))
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(rows.indptr) - 1))
    with torch.enable_grad():
        encoder, head = train("uniform", rows, order[:TRAINED], (sizes[0], sizes[1]), H, 0.1, 1, None)[:2]
    return head, encoder(*rows.inputs(order[TRAINED : TRAINED + N_QUERIES]))


def seconds(ask: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of the processor."""
    started = time.perf_counter(), time.process_time()
    ask()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measured(name: str, head: SampledHead, hidden: Tensor, n_threads: int) -> list[str]:
    """Lines of the table."""
    torch.set_num_threads(n_threads)
    lines = []
    for size, n in SIZES:
        parts, times, n_found = torch.split(hidden[:n], size), [], 0
        for part in (*parts[:1], *parts, *parts):  # the first makes the copy, and compiles
            ways = [head.topk(part, TOP), head.topk(part, TOP, rounded=True)]
            n_found += int((ways[1].ids[:, :, None] == ways[0].ids[:, None]).any(1).sum())
            both = [seconds(lambda part=part, way=way: head.topk(part, TOP, rounded=way)) for way in (False, True)]  # type: ignore[misc]
            times.append(np.array(both) * 1e3 / size)
        (full, full_cpu), (fast, fast_cpu) = np.median(times[1:], axis=0)
        recall = n_found / (len(times) * size * TOP)
        lines.append(
            f"| {name} | {n_threads} | {size} | {100 * recall:.2f} % | {full:.1f} | {fast:.2f} | {full / fast:.1f} "
            f"| {full_cpu:.1f} | {fast_cpu:.2f} | {full_cpu / fast_cpu:.1f} |"
        )
        print(lines[-1], flush=True)
    return lines


@torch.no_grad()
def main() -> None:
    lines = [
        "# Answers by rounded weights",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. H = {H}. Command: `python benchmarks/topk.py`.",
        "",
        "| rows | threads | batch | recall@5 | full, ms a row | rounded | times | full, CPU ms | rounded | times |",
        "|---" * 10 + "|",
    ]
    torch.set_num_threads(1)
    for name, make in (("planted", planted), ("trained", trained)):
        head, hidden = make()
        head.topk(hidden[:1], TOP, rounded=True)
        for n_threads in (1, 2):
            lines += measured(name, head, hidden, n_threads)
        torch.set_num_threads(1)
        began = time.process_time()
        with torch.no_grad():
            head.weight.mul_(1.0)
        head.topk(hidden[:1], TOP, rounded=True)
        pairs = head._rounded[1].possible(hidden, TOP, None)[0]  # type: ignore[index]
        lines.append(
            f"\n{name}: {len(pairs) / len(hidden):.1f} classes a row are computed exactly; "
            f"the copy takes {time.process_time() - began:.2f} s of the processor.\n"
        )
        print(lines[-1], flush=True)
    out = Path(__file__).resolve().parent / f"results/topk-{datetime.date.today()}.md"
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
