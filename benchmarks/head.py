"""The head of `mach.nn`: memory of a step at K = 1 M against its ledger; accuracy beside a full softmax at K = 20,000.

    python benchmarks/head.py memory              # a minute; each row in a process of its own
    python benchmarks/head.py accuracy            # validation rows, all settings: about an hour
    python benchmarks/head.py accuracy --test     # the chosen setting and the full softmax, three seeds, test rows

They write benchmarks/results/head-PART-DATE.md. Accuracy is on debfiles-name2dir (file name to directory, one class a
row): 20,000 classes drawn at random of those with the most training rows, 7, that have a test row.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import commit, processor
from torch import Tensor, nn

from mach.data.readers import read_chunks, read_shape
from mach.nn import MACHHead

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared/data/debfiles-name2dir"
BATCH = 512

# ----------------------------------------------------------------------------------------------- memory


# H, K, B, R, N, loss; None is the default of MACHHead, * gives freed blocks back
MEMORY = (
    (256, 1_000_000, None, None, 256, "softmax"),
    (256, 1_000_000, None, None, 1024, "softmax"),
    (256, 1_000_000, None, None, 64, "softmax"),
    (256, 1_000_000, None, None, 64, "softmax*"),
    (256, 1_000_000, 4096, 8, 512, "softmax"),
    (256, 1_000_000, None, None, 256, "binary"),
    (256, 100_000_000, 16384, 4, 256, "softmax"),
)


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def train_some(head: MACHHead, n_rows: int, n_steps: int) -> float:
    """Seconds a step; hidden states want a gradient, as those of an encoder do."""
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    started = time.perf_counter()
    for _ in range(n_steps):
        hidden = torch.randn(n_rows, head.in_features, requires_grad=True)
        optimizer.zero_grad()
        head(hidden, torch.randint(0, head.n_classes, (n_rows,))).loss.backward()
        optimizer.step()
    return (time.perf_counter() - started) / n_steps


def measure_memory(index: int) -> str:
    """One row of the table; in a fresh process."""
    H, K, B, R, N, name = MEMORY[index]
    loss: Any = name.removesuffix("*")
    train_some(MACHHead(H, 1000, 64, 4, loss=loss), 32, 2)  # libraries, threads and their buffers
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    head = MACHHead(H, K, B, R, loss=loss)
    seconds = train_some(head, N, 3)
    grown, ledger = status_bytes("VmHWM") - before, head.ledger(N)
    full_MB = ledger.full_peak_bytes / 1e6
    return (
        f"| {K:,} | {head.n_buckets} | {head.n_repetitions} | {H} | {N} | {name} | {ledger.peak_bytes / 1e6:.0f} "
        f"| {grown / 1e6:.0f} | {grown / ledger.peak_bytes - 1:+.1%} | {full_MB:,.0f} | {seconds:.2f} |"
    )


def memory() -> list[str]:
    lines = [
        "| K | B | R | H | rows a batch | loss | ledger, MB | measured, MB | difference | full softmax by the same "
        "ledger, MB | s a step |",
        "|---" * 11 + "|",
    ]
    for index, row in enumerate(MEMORY):
        command = [sys.executable, __file__, "memory", "--row", str(index)]
        environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "1000000"} if row[-1].endswith("*") else {})
        lines.append(
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
        )
        print(lines[-1], flush=True)
    return [
        "Peak resident memory of three steps of Adam (fused) beyond what it held after a small head was trained, "
        "against `HeadLedger.peak_bytes`. The encoder is left out: hidden states are random and want a gradient.",
        "",
        *lines,
        "",
        "The C library keeps freed blocks below 32 MB for reuse, which the ledger does not count: the row of 64 rows a "
        "batch shows it. The row marked * was measured with MALLOC_MMAP_THRESHOLD_=1000000, which gives them back.",
    ]


# --------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Rows:
    """Sparse rows with one class each, as EmbeddingBag takes them."""

    indptr: Tensor
    indices: Tensor
    values: Tensor
    classes: Tensor

    def batch(self, ids: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        begins, counts = self.indptr[ids], self.indptr[ids + 1] - self.indptr[ids]
        offsets = counts.cumsum(0) - counts
        places = torch.arange(int(counts.sum())) + (begins - offsets).repeat_interleave(counts)
        return (self.indices[places], offsets, self.values[places]), self.classes[ids]


class Encoder(nn.Module):
    """What a user would write: a sum of embeddings, a bias, ReLU."""

    def __init__(self, n_features: int, width: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(n_features, width, mode="sum", sparse=True)
        nn.init.normal_(self.bag.weight, std=0.1)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
        return torch.relu(self.bag(indices, offsets, per_sample_weights=values) + self.bias)


class FullSoftmax(nn.Module):
    """``Linear(H, K)`` and cross-entropy in the shape of the other head."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, n_classes)

    def forward(self, hidden: Tensor, target: Tensor) -> tuple[None, Tensor]:
        return None, nn.functional.cross_entropy(self.linear(hidden), target)

    def log_prob(self, hidden: Tensor, classes: Tensor) -> Tensor:
        return self.linear(hidden).log_softmax(1).gather(1, classes)

    def predict(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).argmax(1)


@dataclass(frozen=True)
class Setting:
    """A head and how both it and its encoder are trained: B = 0 is the full softmax."""

    n_buckets: int
    n_repetitions: int
    width: int = 128
    rate: float = 1e-2
    epochs: int = 5
    seed: int = 0

    @property
    def name(self) -> str:
        return f"R={self.n_repetitions}, B={self.n_buckets}" if self.n_buckets else "full softmax"


def read(part: str) -> tuple[np.ndarray, ...]:
    path = DATA / f"{part}.txt.xz"
    shape = read_shape(path, "repository")
    classes, indptr, indices, values = [], [np.zeros(1, np.int64)], [], []
    for chunk in read_chunks(path, "repository", shape):
        assert (np.diff(chunk.class_indptr) == 1).all()
        assert isinstance(chunk.features, tuple)
        classes.append(chunk.class_ids)
        indptr.append(chunk.features[0][1:] + indptr[-1][-1])
        indices.append(chunk.features[1])
        values.append(chunk.features[2])
    return tuple(np.concatenate(column) for column in (classes, indptr, indices, values))


def load(n_classes: int = 20_000) -> tuple[Rows, Rows, int]:
    """Training and test rows of the chosen classes, and the features that the training rows have."""
    from scipy.sparse import csr_matrix

    parts = [read(part) for part in ("train", "test")]
    counts, held_out = (np.bincount(part[0], minlength=500_000) for part in parts)
    most = counts[held_out > 0].max()
    random = np.random.default_rng(0)
    chosen = np.sort(random.choice(np.flatnonzero((counts == most) & (held_out > 0)), n_classes, replace=False))
    found: list[Rows] = []
    used = np.empty(0, np.int64)
    for classes, indptr, indices, values in parts:
        places = np.searchsorted(chosen, classes).clip(max=n_classes - 1)
        keep = chosen[places] == classes
        matrix = csr_matrix((values, indices, indptr))[keep]
        used = used if found else np.unique(matrix.indices)
        matrix = matrix[:, used]
        arrays = (matrix.indptr, matrix.indices, places[keep])
        ints = [torch.from_numpy(array.astype(np.int64)) for array in arrays]
        found.append(Rows(ints[0], ints[1], torch.from_numpy(matrix.data.astype(np.float32)), ints[2]))
    return found[0], found[1], len(used)


def train(setting: Setting, rows: Rows, ids: Tensor, n_features: int, n_classes: int) -> tuple[Encoder, Any]:
    torch.manual_seed(setting.seed)
    encoder = Encoder(n_features, setting.width)
    head: Any = FullSoftmax(setting.width, n_classes)
    if setting.n_buckets:
        head = MACHHead(setting.width, n_classes, setting.n_buckets, setting.n_repetitions, seed=setting.seed)
    dense = torch.optim.Adam([encoder.bias, *head.parameters()], fused=True)
    optimizers = [torch.optim.SparseAdam([encoder.bag.weight]), dense]
    n_steps, step = setting.epochs * -(-len(ids) // BATCH), 0
    for _ in range(setting.epochs):
        for part in torch.split(ids[torch.randperm(len(ids))], BATCH):
            inputs, target = rows.batch(part)
            loss = head(encoder(*inputs), target)[1]
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = setting.rate * (1 - step / n_steps)
                optimizer.step()
            step += 1
    return encoder, head


@torch.no_grad()
def evaluate(encoder: Encoder, head: Any, rows: Rows, ids: Tensor) -> dict[str, float]:
    """P@1 in percent; mean log-likelihood of the right class by every estimate of the head."""
    estimates = ("log-mean", "unbiased", "normalized") if isinstance(head, MACHHead) else (None,)
    sums: dict[str, float] = {}
    for part in torch.split(ids, BATCH):
        inputs, target = rows.batch(part)
        hidden = encoder(*inputs)
        found = {"P@1": 100 * (head.predict(hidden) == target).float()}
        for estimate in estimates:
            given = {} if estimate is None else {"estimate": estimate}
            found[f"log-likelihood {estimate or 'softmax'}"] = head.log_prob(hidden, target[:, None], **given)
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    return {name: total / len(ids) for name, total in sums.items()}


CHOSEN = Setting(1024, 8)
FULL = Setting(0, 0)
TRIED = (FULL, Setting(1024, 4), CHOSEN, Setting(512, 8), Setting(2048, 4))


def accuracy(settings: list[Setting], on_test: bool) -> list[str]:
    rows, test, n_features = load()
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(rows.classes)))
    n_classes = int(rows.classes.max()) + 1
    held_out = 0 if on_test else len(order) // 20
    lines = [
        f"debfiles-name2dir, K = {n_classes:,}, D = {n_features:,}, {len(order) - held_out:,} training rows, "
        + (f"{len(test.classes):,} test rows." if on_test else f"{held_out:,} of the training rows held out."),
        "",
        "| head | seed | H | rate | epochs | parameters | P@1 | mean log-likelihood of the right class | CPU s |",
        "|---" * 9 + "|",
    ]
    for setting in settings:
        started = time.process_time()
        encoder, head = train(setting, rows, order[held_out:], n_features, n_classes)
        seconds = time.process_time() - started
        measured = test if on_test else rows
        found = evaluate(encoder, head, measured, torch.arange(len(test.classes)) if on_test else order[:held_out])
        likelihoods = " · ".join(
            f"{name.removeprefix('log-likelihood ')} {value:.2f}" for name, value in found.items() if name != "P@1"
        )
        lines.append(
            f"| {setting.name} | {setting.seed} | {setting.width} | {setting.rate:g} | {setting.epochs} "
            f"| {sum(w.numel() for w in head.parameters()):,} | {found['P@1']:.2f} | {likelihoods} | {seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("memory", "accuracy"))
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--test", action="store_true")
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(measure_memory(arguments.row))
        return
    name = arguments.part
    if name == "memory":
        lines = memory()
    elif arguments.test:
        name = "test"
        lines = accuracy([replace(setting, seed=seed) for seed in range(3) for setting in (FULL, CHOSEN)], True)
    else:
        lines = accuracy(list(TRIED), False)
    path = HERE / "results" / f"head-{name}-{datetime.date.today()}.md"
    command = " ".join(["python benchmarks/head.py", *sys.argv[1:]])
    head = [
        f"# mach.nn head, {name}, {datetime.date.today()}",
        "",
        f"`{command}`, {processor()}, commit {commit()}.",
        "",
    ]
    path.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
