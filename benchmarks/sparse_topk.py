"""Approximate top 5 by hash tables beside the full product, over planted rows of 404,000 classes.

    .venv/bin/python benchmarks/sparse_topk.py

Rows are planted as trained ones may lie: in 8,000 clusters, each at a cosine of 0.8 to its centre, with lengths of 1 to
1.5; queries lie at 0.8 to a row. One thread, processor time, medians. The table goes to
benchmarks/results/sparse-topk-DATE.md, and docs/output-layers.md shows it.
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import numpy as np
import torch
from hardware import commit, processor
from torch import Tensor
from torch.nn import functional

from mach.nn import HashTables, SampledHead

K, H, CLUSTERS, COSINE, N_QUERIES, TOP = 404_000, 128, 8_000, 0.8, 128, 5
TABLES = ((64, 14), (64, 13), (128, 14), (96, 12))  # how many, and bits of each


def near(points: Tensor, generator: torch.Generator) -> Tensor:
    """Directions at a cosine to those of the points."""
    noise = functional.normalize(torch.randn(points.shape, generator=generator))
    return COSINE * functional.normalize(points) + (1 - COSINE**2) ** 0.5 * noise


def seconds(head: SampledHead, hidden: Tensor, size: int, *, is_exact: bool) -> float:
    """Median processor seconds a row, of batches of a size."""
    found = []
    for part in torch.split(hidden, size):
        started = time.thread_time()
        head.topk(part, TOP, is_exact=is_exact)
        found.append((time.thread_time() - started) / len(part))
    return float(np.median(found))


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    head = SampledHead(H, K)
    lines = [
        "# Answers by hash tables",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. K = {K:,}, H = {H}. Command: "
        "`.venv/bin/python benchmarks/sparse_topk.py`.",
        "",
    ]
    with torch.no_grad():
        centres, owners = (
            torch.randn(CLUSTERS, H, generator=generator),
            torch.randint(CLUSTERS, (K,), generator=generator),
        )
        for part in torch.split(torch.arange(K), 50_000):
            lengths = 1 + torch.rand(len(part), 1, generator=generator) / 2
            head.weight[part] = near(centres[owners[part]], generator) * lengths
        head.bias.zero_()
        hidden = 4 * near(head.weight[torch.randint(K, (N_QUERIES,), generator=generator)], generator)
        exact = head.topk(hidden, TOP).ids
        full = [seconds(head, hidden[:n], size, is_exact=True) for size, n in ((64, N_QUERIES), (1, 12))]
        lines.append(
            f"The full product takes {1e3 * full[0]:.1f} ms a row in batches of 64, and {1e3 * full[1]:.0f} alone."
        )
        lines += ["", "| tables | bits | recall@5 | ms a row, of 64 | of one | times faster, of 64 | of one |"]
        lines.append("|---" * 7 + "|")
        for n_tables, bits in TABLES:
            head.tables = HashTables(H + 1, n_tables, bits)
            head.build_tables()
            found = head.topk(hidden, TOP, is_exact=False).ids
            recall = (found[:, :, None] == exact[:, None]).any(dim=1).float().mean()
            sparse = [seconds(head, hidden[:n], size, is_exact=False) for size, n in ((64, N_QUERIES), (1, 32))]
            times = " | ".join(f"{1e3 * one:.1f}" for one in sparse)
            ratios = " | ".join(f"{whole / one:.1f}" for whole, one in zip(full, sparse, strict=True))
            lines.append(f"| {n_tables} | {bits} | {100 * recall:.0f} % | {times} | {ratios} |")
            print(lines[-1], flush=True)
    out = Path(__file__).resolve().parent / f"results/sparse-topk-{datetime.date.today()}.md"
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
