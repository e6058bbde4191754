"""What a run will take, before it is trained: its ledger, and how many of its repetitions fit a GPU together."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import get_args

from mach.config import IDENTITY, Config, LaunchConfig
from mach.data.store import Store
from mach.errors import ConfigError
from mach.networks.inference import KEEP
from mach.networks.steps import Steps, repetition_flops
from mach.reranking.fitting import LEAST_TEACHING_ROWS
from mach.reranking.signals import expected_bytes
from mach.reranking.signals.contract import Scale
from mach.runs.run import Run
from mach.sketch import bounds
from mach.sketch.ledger import HostMemory, Ledger

USABLE = 0.9  # of a GPU, or of our share of it
FLOPS_A_SECOND = 2e10  # of one core, at least
FEW_SECONDS = 4.0  # of work that is sooner done here: a worker of this machine takes 2 to begin, and there may be two


def plan_of(config: Config, store: Store, n_workers: int = 1) -> Ledger:
    """The ledger of a resolved configuration, as it will be trained on these rows."""
    return plan_by_counts(
        config,
        n_classes=store.n_classes,
        n_features=store.n_features,
        n_rows=store.n_rows,
        n_positives=len(store.class_ids),
        nonzeros_per_row=store.n_features if store.is_dense else store.n_nonzeros / store.n_rows,
        dense_input=store.is_dense,
        n_workers=n_workers,
        has_names=store.class_names is not None and bool(store.meta["text_features"]),
    )


def is_little_work(config: Config, store: Store) -> bool:
    """Whether all of a run is sooner trained by this process than another process has begun; a user's trunk is not."""
    if config.network.trunk is not None:
        return False
    return config.hashing.repetitions * repetition_flops(config, store) < FEW_SECONDS * FLOPS_A_SECOND


def repetitions_together(
    launch: LaunchConfig, run: Run, store: Store, device_bytes: int | None = None
) -> tuple[int, HostMemory]:
    """Repetitions of a shard, and what of them stays in main memory: as little as lets the shard fit a GPU.

    The GPU is by default this machine's first. Without any, as on the head of a cluster, shards are of one repetition
    unless ``launch.shard`` says otherwise. ConfigError when not even one fits, or fewer than ``launch.shard``.
    """
    config, n_bytes = run.config, (device_bytes or gpu_bytes()) if launch.gpus else 0
    if not n_bytes:  # torch is not needed to find that out
        return launch.shard or 1, "none"
    from mach.networks.batched import can_be_batched

    if not can_be_batched(config.network, dense_input=store.is_dense):
        return launch.shard or 1, "none"
    ledger = plan_of(config, store)
    options = {"n_rows": config.training.batch, "number_bytes": 2 if run.manifest.precision == "bfloat16" else 4}
    n_ours = int(n_bytes * launch.gpus * USABLE)
    n_workers = launch.workers or int(1 / launch.gpus)
    fitting: dict[HostMemory, int] = {
        where: ledger.repetitions_within(n_ours, host_memory=where, **options) for where in get_args(HostMemory)
    }
    for host_memory, n in fitting.items():
        if n >= (launch.shard or 1):
            return launch.shard or min(n, -(-config.hashing.repetitions // n_workers)), host_memory
    host_memory, n_most = max(fitting.items(), key=lambda item: item[1])
    n_wanted = launch.shard if n_most and launch.shard else 1
    wanted = ledger.device_bytes(n_wanted, host_memory=host_memory, **options)
    sizes = f"about {wanted / 1e9:.1f} GB of a GPU, {n_ours / 1e9:.1f} GB are ours"
    raise ConfigError(
        f"{n_wanted} repetitions together take {sizes}: set launch.shard to at most {n_most}, or a smaller "
        "training.batch"
        if n_most
        else f"a repetition takes {sizes}: set a smaller training.batch, or launch.gpus = 0 to train on processors"
    )


def refuse_too_large(ledger: Ledger, launch: LaunchConfig) -> None:
    """ConfigError where one worker takes more memory than this machine has, if it is to work here without a GPU."""
    if launch.launcher == "ray" or launch.gpus:
        return
    if ledger.worker_bytes > (n_bytes := machine_bytes()):
        raise ConfigError(
            f"a worker takes about {ledger.worker_bytes / 1e9:.1f} GB for D = {ledger.n_features} and K = "
            f"{ledger.n_classes}, this machine has {n_bytes / 1e9:.1f} GB of memory: set fewer hashing.buckets or a "
            "narrower network.hidden, give fewer features, or use a larger machine"
        )


def machine_bytes() -> int:
    """Memory that a process of this machine may have: all there is, or what its limits leave."""
    most = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    most += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with suppress(OSError, ValueError):  # "max"
            most.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(most)


def gpu_bytes() -> int:
    """Memory of this machine's first GPU; 0: there is none."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def plan_by_counts(
    config: Config,
    *,
    n_classes: int,
    n_features: int,
    n_rows: int,
    n_positives: int,
    nonzeros_per_row: float,
    dense_input: bool,
    n_workers: int = 1,
    has_names: bool = False,
) -> Ledger:
    """As `plan_of`, where the rows themselves are not at hand.

    ``n_positives`` are pairs of a row and a class of it, ``has_names`` says whether classes have names and rows words.
    """
    reranking = config.reranking
    is_chosen = reranking.repeats is None and (config.data.validation_fraction or 0) > 0
    may_count = is_chosen or bool(reranking.repeats) or (bool(reranking.pilots) and reranking.repeats is None)
    scale = Scale(
        n_classes=n_classes,
        n_features=n_features,
        n_rows=n_rows,
        n_positives=n_positives,
        row_features=nonzeros_per_row,
        pairs=reranking.pairs,
        counts_repeats=may_count,
        is_learned=reranking.pilots > 0 or n_rows * (config.data.validation_fraction or 0) >= LEAST_TEACHING_ROWS,
        has_names=has_names,
    )
    return bounds.plan(
        n_classes,
        n_features,
        n_workers=n_workers,
        hidden=tuple(config.network.hidden),
        n_repetitions=config.hashing.repetitions,
        n_buckets=config.hashing.buckets,
        n_heads=config.hashing.heads,
        dense_input=dense_input,
        weight_bytes=4 if config.network.weights == "float32" else 2,
        input_bytes={"int4": KEEP if config.network.hidden else 1, "int8": 1}.get(config.network.weights),
        output_bytes=1 if config.network.weights in {"int4", "int8"} else None,
        nonzeros_per_row=nonzeros_per_row,
        reranking_bytes=expected_bytes(scale) if reranking.candidates else 0,
        table_assignment=config.hashing.table is not None,
        sampled=_sampled(config, n_rows, dense_input=dense_input),
    )


def _sampled(config: Config, n_rows: int, *, dense_input: bool) -> float:
    """Share of the outputs that a step computes on a processor, as far as the configuration says what they are."""
    buckets, loss, precision = config.hashing.buckets, config.training.loss, config.training.precision
    if not buckets or "auto" in (loss, precision) or config.launch.gpus:
        return 1.0
    return Steps.of(
        config.network,
        n_rows=n_rows,
        n_buckets=buckets,
        dense_input=dense_input,
        loss=loss,
        precision=precision,
        has_classes=config.hashing.table == IDENTITY,
    ).sampled
