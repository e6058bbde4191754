"""The head of `mach.nn`: memory of a step at K = 1 M against its ledger; accuracy beside a full softmax on real data.

    python benchmarks/head.py memory                    # a minute; each row in a process of its own
    python benchmarks/head.py accuracy                  # gnd-core, test rows: six processor minutes
    python benchmarks/head.py accuracy --data ../shared/data/debfiles-name2dir  # ten processor minutes
    python benchmarks/head.py accuracy --validation     # a tenth of the training rows in place of test rows

They write benchmarks/results/head-PART-DATE.md. Both heads see the same encoder, rows, epochs and optimisers. gnd-core
(K = 26,296): each epoch trains on one class a row, drawn anew of its classes, and P@1 asks for any of them.
debfiles-name2dir has one class a row, of which 20,000 are drawn at random from those with most training rows, 7, and a
test row.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import commit, processor
from torch import Tensor, nn

from mach.data.formats import FORMATS
from mach.nn import MACHHead

HERE = Path(__file__).resolve().parent
BATCH = 128
REPOSITORY: Any = FORMATS["repository"]

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


def memory() -> Iterator[str]:
    """Lines of the table as they come."""
    yield (
        "Peak resident memory of three steps of Adam (fused) beyond what it held after a small head was trained, "
        "against `HeadLedger.peak_bytes`. The encoder is left out: hidden states are random and want a gradient."
    )
    yield ""
    yield (
        "| K | B | R | H | rows a batch | loss | ledger, MB | measured, MB | difference "
        "| full softmax by the same ledger, MB | s a step |"
    )
    yield "|---" * 11 + "|"
    for index, row in enumerate(MEMORY):
        command = [sys.executable, __file__, "memory", "--row", str(index)]
        environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "1000000"} if row[-1].endswith("*") else {})
        yield subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
    yield ""
    yield (
        "The C library keeps freed blocks below 32 MB for reuse, which the ledger does not count: the row of 64 rows a "
        "batch shows it. The row marked * was measured with MALLOC_MMAP_THRESHOLD_=1000000, which gives them back."
    )


# --------------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Rows:
    """Sparse rows, as EmbeddingBag takes them, and the classes of each."""

    indptr: Tensor
    indices: Tensor
    values: Tensor
    class_indptr: Tensor
    class_ids: Tensor

    def inputs(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        begins, counts = self.indptr[ids], self.indptr[ids + 1] - self.indptr[ids]
        offsets = counts.cumsum(0) - counts
        places = torch.arange(int(counts.sum())) + (begins - offsets).repeat_interleave(counts)
        return self.indices[places], offsets, self.values[places]

    def one_class(self, ids: Tensor) -> Tensor:
        """A class of each row, drawn at random."""
        begins, counts = self.class_indptr[ids], self.class_indptr[ids + 1] - self.class_indptr[ids]
        return self.class_ids[begins + (torch.rand(len(ids)) * counts).long().minimum(counts - 1)]

    def have(self, ids: Tensor, classes: Tensor) -> Tensor:
        """Whether each row has that class."""
        pairs = zip(ids.tolist(), classes.tolist(), strict=True)
        return torch.tensor([k in self.class_ids[self.class_indptr[n] : self.class_indptr[n + 1]] for n, k in pairs])


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
    epochs: int = 6
    seed: int = 0

    @property
    def name(self) -> str:
        return f"R={self.n_repetitions}, B={self.n_buckets}" if self.n_buckets else "full softmax"


def load(path: Path) -> Rows:
    """All rows of a file."""
    columns: list[list[np.ndarray]] = [[np.zeros(1, np.int64)], [], [], [np.zeros(1, np.int64)], []]
    for chunk in REPOSITORY.chunks(path, REPOSITORY.shape(path)):
        assert isinstance(chunk.features, tuple)
        indptr, indices, values = chunk.features
        columns[0].append(indptr[1:] + columns[0][-1][-1])
        columns[1].append(indices)
        columns[2].append(values)
        columns[3].append(chunk.class_indptr[1:] + columns[3][-1][-1])
        columns[4].append(chunk.class_ids)
    joined = [np.concatenate(column) for column in columns]
    return Rows(*(torch.from_numpy(a.astype(np.float32 if a.dtype.kind == "f" else np.int64)) for a in joined))


def chosen_classes(train: Rows, test: Rows, n_classes: int) -> tuple[Rows, Rows]:
    """Classes drawn of those with most training rows, numbered anew; other rows of both lose theirs."""
    counts, held_out = (rows.class_ids.bincount(minlength=500_000).numpy() for rows in (train, test))
    most = np.flatnonzero((counts == counts[held_out > 0].max()) & (held_out > 0))
    chosen = np.sort(np.random.default_rng(0).choice(most, n_classes, replace=False))
    found = []
    for rows in (train, test):
        places = np.searchsorted(chosen, rows.class_ids).clip(max=n_classes - 1)
        keep = torch.from_numpy(chosen[places] == rows.class_ids.numpy())
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)])  # these rows have one class each
        found.append(replace(rows, class_indptr=indptr, class_ids=torch.from_numpy(places)[keep]))
    return found[0], found[1]


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
            loss = head(encoder(*rows.inputs(part)), rows.one_class(part))[1]
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
    """P@1 in percent; mean log-likelihood of a right class by every estimate of the head."""
    estimates = ("log-mean", "unbiased", "normalized") if isinstance(head, MACHHead) else (None,)
    sums: dict[str, float] = {}
    for part in torch.split(ids, BATCH):
        hidden, target = encoder(*rows.inputs(part)), rows.one_class(part)
        found = {"P@1": 100 * rows.have(part, head.predict(hidden)).float()}
        for estimate in estimates:
            given = {} if estimate is None else {"estimate": estimate}
            found[f"log-likelihood {estimate or 'softmax'}"] = head.log_prob(hidden, target[:, None], **given)
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    return {name: total / len(ids) for name, total in sums.items()}


SETTINGS = {
    "gnd-core": [Setting(1024, 8), Setting(0, 0), Setting(1024, 4)],
    "debfiles-name2dir": [Setting(0, 0, epochs=4), Setting(1024, 4, epochs=4), Setting(1024, 8, epochs=4)],
}


def accuracy(folder: Path, validation: bool) -> Iterator[str]:
    """Lines of the table as they come."""
    data, train_rows, test = folder.name, load(folder / "train.txt.xz"), load(folder / "test.txt.xz")
    n_features = int(max(rows.indices.max() for rows in (train_rows, test))) + 1
    n_classes = int(max(rows.class_ids.max() for rows in (train_rows, test))) + 1
    if data == "debfiles-name2dir":
        n_classes = 20_000
        train_rows, test = chosen_classes(train_rows, test, n_classes)
    with_class, measured = (rows.class_indptr.diff().nonzero()[:, 0] for rows in (train_rows, test))
    order = with_class[torch.from_numpy(np.random.default_rng(1).permutation(len(with_class)))]
    if validation:
        n_held_out = len(order) // 10
        test, measured, order = train_rows, order[:n_held_out], order[n_held_out:]
    yield f"{data}, K = {n_classes:,}, {len(order):,} training rows, {len(measured):,} rows asked for."
    yield ""
    yield "| head | H | rate | batch | epochs | seed | parameters | P@1 | mean log-likelihood of a class | CPU s |"
    yield "|---" * 10 + "|"
    for setting in SETTINGS[data]:
        started = time.process_time()
        encoder, head = train(setting, train_rows, order, n_features, n_classes)
        seconds = time.process_time() - started
        found = evaluate(encoder, head, test, measured)
        likelihoods = " · ".join(
            f"{name.removeprefix('log-likelihood ')} {value:.2f}" for name, value in found.items() if name != "P@1"
        )
        yield (
            f"| {setting.name} | {setting.width} | {setting.rate:g} | {BATCH} | {setting.epochs} | {setting.seed} "
            f"| {sum(w.numel() for w in head.parameters()):,} | {found['P@1']:.2f} | {likelihoods} | {seconds:.0f} |"
        )
    yield ""
    yield "Of the estimates, log-mean is no distribution, and unbiased is floored at -87: see mach.nn."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("memory", "accuracy"))
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data/gnd-core")
    parser.add_argument("--validation", action="store_true")
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(measure_memory(arguments.row))
        return
    name, lines = "memory", memory()
    if arguments.part == "accuracy":
        name = f"accuracy-{arguments.data.name}{'-validation' if arguments.validation else ''}"
        lines = accuracy(arguments.data, arguments.validation)
    path = HERE / "results" / f"head-{name}-{datetime.date.today()}.md"
    command = " ".join(["python benchmarks/head.py", arguments.part, *(["--validation"] * arguments.validation)])
    written = [f"# mach.nn head, {name}, {datetime.date.today()}", ""]
    written += [f"`{command}`, {processor()}, commit {commit()}.", ""]
    for line in lines:
        print(line, flush=True)
        written.append(line)
        path.write_text("\n".join(written) + "\n")


if __name__ == "__main__":
    main()
