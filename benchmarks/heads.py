"""Output layers beside each other: full softmax, chunked, adaptive, sampled, hashed.

    python benchmarks/heads.py gnd-core                 # K = 26,296, test rows
    python benchmarks/heads.py gnd-core --validation    # a tenth of the training rows in place of test rows
    python benchmarks/heads.py debfiles --validation    # 20,000 classes of debfiles-name2dir, as head.py draws them
    python benchmarks/heads.py planted                  # K = 1,000,000: step, memory, top-k; no accuracy

They write benchmarks/results/heads-NAME-DATE.md. Each layer has a process of its own with one thread, the same encoder
(a sum of embeddings, ReLU), rows and batches, and one class a row and epoch, drawn anew of the row's classes. Processor
seconds a step are those of encoder and layer, everything inside, such as tables that are built anew. All have
`RowAdam`, which moves all rows where gradients are dense, or fused Adam where the name ends in "adam"; "@" and a rate
may follow the name. Peak memory is what a process holds beyond what it held before encoder and layer were made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import commit, processor
from head import Encoder, FullSoftmax, Rows, chosen_classes, load, status_bytes
from torch import Tensor, nn

from mach.nn import MACHHead, RowAdam, SampledHead

HERE = Path(__file__).resolve().parent
BATCH, BAG_RATE = 256, 1e-2
WIDTHS = {"gnd-core": 128, "debfiles": 128, "planted": 256}
SHARE = 20  # a step of a sampled layer draws one in so many classes
N_CLASSES = {"debfiles": 20_000, "planted": 1_000_000}


class Chunked(FullSoftmax):
    """torch's linear cross-entropy, which never holds all scores."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__(width, n_classes)
        self.loss = nn.LinearCrossEntropyLoss(width, n_classes, bias=True, options=nn.LinearCrossEntropyOptions())
        self.linear = self.loss.linear

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[None, Tensor]:
        return None, self.loss(hidden, target)


class Adaptive(nn.AdaptiveLogSoftmaxWithLoss):
    """Classes by frequency, as it wants them; cut at a twentieth and a quarter of them."""

    def __init__(self, width: int, counts_K: Tensor) -> None:
        n_classes = len(counts_K)
        super().__init__(width, n_classes, [n_classes // 20, n_classes // 4], div_value=2.0)
        self.register_buffer("order", counts_K.argsort(descending=True, stable=True))
        self.register_buffer("rank", self.order.argsort())

    def forward(self, input: Tensor, target: Tensor) -> Any:
        return super().forward(input, self.rank[target])

    def predict(self, input: Tensor) -> Tensor:
        return self.order[super().predict(input)]

    def topk(self, hidden: Tensor, k: int) -> Any:
        return self.order[self.log_prob(hidden).topk(k).indices]


def made(name: str, counts_K: Tensor, width: int) -> Any:
    """The layer of that name."""
    K = len(counts_K)
    name = name.removesuffix(" adam")
    if name == "full softmax":
        return FullSoftmax(width, K)
    if name == "chunked":
        return Chunked(width, K)
    if name == "adaptive":
        return Adaptive(width, counts_K)
    if name.startswith("MACHHead"):
        R, B = (int(part.partition("=")[2]) for part in name.split()[1:])
        return MACHHead(width, K, B, R)
    given: Any = {
        "negatives": name.split(maxsplit=1)[0],
        "loss": "binary" if "binary" in name else "softmax",
        "class_counts": counts_K if "frequency" in name else None,
        "dtype": torch.bfloat16 if "bfloat16" in name else None,
    }
    return SampledHead(width, K, min(8192, K // SHARE), **given)


def optimizers_of(encoder: Encoder, head: Any, rate: float, *, is_adam: bool) -> list[torch.optim.Optimizer]:
    encoders = [RowAdam([encoder.bag.weight], BAG_RATE), torch.optim.Adam([encoder.bias], BAG_RATE, fused=True)]
    if is_adam:
        return [*encoders, torch.optim.Adam(head.parameters(), rate, fused=True)]
    return [*encoders, RowAdam(head.parameters(), rate)]


def topk(head: Any, hidden: Tensor, k: int = 5, **how: Any) -> Tensor:
    if isinstance(head, FullSoftmax):
        return head.linear(hidden).topk(k).indices
    found = head.topk(hidden, k, **how)
    return found.ids if hasattr(found, "ids") else found


def topk_ms(head: Any, hidden: Tensor, **how: Any) -> tuple[float, float]:
    """Milliseconds of processor a row, of batches of 64 and of single rows."""
    times = []
    for size in (64, 1):
        parts = torch.split(hidden[: 64 if size > 1 else 9], size)
        spent = []
        for part in (parts[0], *parts):
            started = time.thread_time()
            topk(head, part, **how)
            spent.append((time.thread_time() - started) * 1e3 / len(part))
        times.append(float(np.median(spent[1:])))
    return times[0], times[1]


def train(
    name: str,
    rows: Rows,
    ids: Tensor,
    sizes: tuple[int, int],
    width: int,
    rate: float,
    epochs: int,
    n_steps: int | None,
) -> Any:
    """Encoder, head, processor seconds of every step, bytes."""
    torch.manual_seed(0)
    counts_K = rows.class_ids.bincount(minlength=sizes[1])
    before = status_bytes("VmRSS")
    encoder = Encoder(sizes[0], width)
    head = made(name, counts_K, width)
    optimizers = optimizers_of(encoder, head, rate, is_adam=name.endswith(" adam"))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    spent: list[float] = []
    total = epochs * -(-len(ids) // BATCH)
    for _ in range(epochs):
        for part in torch.split(ids[torch.randperm(len(ids))], BATCH)[:n_steps]:
            started = time.thread_time()
            loss = head(encoder(*rows.inputs(part)), rows.one_class(part))[1]
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer, peak in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = peak * (1 - len(spent) / total)
                optimizer.step()
            spent.append(time.thread_time() - started)
    return encoder, head, spent, status_bytes("VmHWM") - before


@torch.no_grad()
def precision(encoder: Encoder, head: Any, rows: Rows, ids: Tensor) -> float:
    """P@1 in percent."""
    head.eval()
    hits = [rows.have(part, topk(head, encoder(*rows.inputs(part)), 1)[:, 0]) for part in torch.split(ids, 256)]
    return 100 * float(torch.cat(hits).float().mean())


def rows_of(name: str, validation: bool, n_chosen: int) -> tuple[Rows, Tensor, Rows, Tensor, tuple[int, int]]:
    """Training rows and their ids, measured rows and theirs, D and K."""
    if name == "planted":
        generator = torch.Generator().manual_seed(0)
        n, each = 20_000, 20
        indptr = torch.arange(n + 1) * each
        indices = torch.randint(100_000, (n * each,), generator=generator)
        classes = torch.randint(n_chosen, (n,), generator=generator)
        rows = Rows(indptr, indices, torch.ones(n * each) / each**0.5, torch.arange(n + 1), classes)
        return rows, torch.arange(n), rows, torch.arange(0), (100_000, n_chosen)
    folder = HERE.parent.parent / "shared/data" / {"debfiles": "debfiles-name2dir"}.get(name, name)
    rows, test = load(folder / "train.txt.xz"), load(folder / "test.txt.xz")
    if name == "debfiles":
        rows, test = chosen_classes(rows, test, n_chosen)
    sizes = tuple(int(max(getattr(part, key).max() for part in (rows, test))) + 1 for key in ("indices", "class_ids"))
    with_class, measured = (part.class_indptr.diff().nonzero()[:, 0] for part in (rows, test))
    order = with_class[torch.from_numpy(np.random.default_rng(1).permutation(len(with_class)))]
    if validation:
        n_held_out = len(order) // 10
        test, measured, order = rows, order[:n_held_out], order[n_held_out:]
    return rows, order, test, measured, (sizes[0], sizes[1])


def row(
    name: str, data: str, validation: bool, rate: float, epochs: int, n_steps: int | None, n_chosen: int
) -> dict[str, Any]:
    """Figures of one layer; in a process of its own."""
    torch.set_num_threads(1)
    rows, order, test, measured, sizes = rows_of(data, validation, n_chosen)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    encoder, head, spent, n_bytes = train(name, rows, order, sizes, WIDTHS[data], rate, epochs, n_steps)
    found: dict[str, Any] = {"step_ms": 1e3 * float(np.mean(spent[1:])), "peak_MB": n_bytes / 1e6, "P@1": float("nan")}
    with torch.no_grad():
        hidden = encoder(*rows.inputs(order[:64]))
        found["topk_ms"], found["topk_one_ms"] = topk_ms(head, hidden)
        if isinstance(head, SampledHead):
            found["rounded_ms"], found["rounded_one_ms"] = topk_ms(head, hidden, rounded=True)
    if len(measured):
        found["P@1"] = precision(encoder, head, test, measured)
    return found


RATE, ADAM_RATE = 0.1, 0.01  # by held-out rows of gnd-core, or as others where one or two were tried (docs/pytorch.md)
LAYERS = {
    "gnd-core": (
        *("uniform", "frequency", "lsh", "lsh frequency", "frequency binary", "frequency bfloat16"),
        *("MACHHead R=4 B=1024", "MACHHead R=8 B=1024", "adaptive", "full softmax", "full softmax adam", "chunked"),
    ),
    "debfiles": (
        *("uniform", "uniform bfloat16", "lsh", "MACHHead R=4 B=1024@0.03", "MACHHead R=4 B=4096@0.03"),
        *("adaptive", "full softmax@0.03", "full softmax adam"),
    ),
    "planted": ("full softmax", "chunked", "adaptive", "uniform", "frequency", "lsh", "MACHHead R=4 B=16384"),
}
HEADING = (
    "| layer | rate | P@1 | ms of processor a step | peak MB | top-5 ms a row, of 64 | of one "
    "| rounded, of 64 | of one |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=tuple(LAYERS))
    parser.add_argument("--layers", help="names with commas between them")
    parser.add_argument("--classes", type=int, help="of planted rows, or how many of debfiles")
    parser.add_argument("--name", help="of the file, beside the data's")
    parser.add_argument("--rate", type=float, help="of all layers")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps an epoch, at most")
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    epochs, n_steps = (1, given.steps or 5) if given.data == "planted" else (given.epochs, given.steps)
    n_classes = given.classes or N_CLASSES.get(given.data, 0)
    if given.row:
        rate = given.rate
        print(json.dumps(row(given.row, given.data, given.validation, rate, epochs, n_steps, n_classes)))
        return
    parts = [given.data, "validation" if given.validation else "", given.name or "", str(datetime.date.today())]
    name = "-".join(["heads", *filter(None, parts)])
    command_line = " ".join(sys.argv[1:])
    lines = [
        f"# Output layers, {name}",
        "",
        f"`python benchmarks/heads.py {command_line}`, {processor()}, commit {commit()}.",
    ]
    lines += [f"H = {WIDTHS[given.data]}, batch {BATCH}, {epochs} epochs, one thread, one seed.", ""]
    lines += [HEADING, "|---" * 9 + "|"]
    for asked in given.layers.split(",") if given.layers else LAYERS[given.data]:
        layer, _, own = asked.partition("@")
        rate = float(own) if own else given.rate or (ADAM_RATE if layer.endswith(" adam") else RATE)
        command = [sys.executable, __file__, given.data, "--row", layer, "--rate", str(rate), "--epochs", str(epochs)]
        command += ["--classes", str(n_classes)]
        command += ["--steps", str(n_steps)] * (n_steps is not None) + ["--validation"] * given.validation
        f = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        lines.append(
            f"| {layer} | {rate:g} | {f['P@1']:.2f} | {f['step_ms']:.1f} | {f['peak_MB']:.0f} | {f['topk_ms']:.2f} "
            f"| {f['topk_one_ms']:.1f} | {f.get('rounded_ms', nan):.2f} | {f.get('rounded_one_ms', nan):.1f} |"
        )
        print(lines[-1], flush=True)
        (HERE / "results" / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
