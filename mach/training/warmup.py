"""Compile what training and answering need, before anybody waits for it: two small runs of made-up rows, and steps."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from mach.config import NetworkConfig
from mach.data.batch import SparseBatch, Targets
from mach.files.compiled import n_compiled
from mach.networks.inference import stored_weights
from mach.networks.kernels.losses import LOSSES
from mach.networks.light import LightNetwork
from mach.networks.precision import native_precision, suits_light
from mach.networks.steps import Steps
from mach.sketch.decoder import Decoder
from mach.sketch.hashing import UniversalAssignment
from mach.training.conductor import train

if TYPE_CHECKING:
    from mach.networks.network import Network

N_ROWS, N_CLASSES, N_WORDS = 200, 40, 120
LITTLE: dict[str, Any] = {
    "training": {"epochs": 1, "batch": 32},
    "hashing": {"repetitions": 2},
    "network": {"hidden": [64]},
}


def warm_up() -> int:
    """Compile the kernels of the default path that are not in this machine's cache yet; returns how many those were.

    Rows of one class and of several, text and features, products of features and rows that are cut, a learned order,
    one query and many; networks of little work, and those in the precision that this processor is trained with. Costs
    about a minute of processor, or some seconds where all are there.
    """
    before = n_compiled()
    for loss in LOSSES:
        _make_steps(loss)
    with TemporaryDirectory(prefix="mach-warm-up-") as folder:
        _train(_text_of_one_class(Path(folder, "one.csv")), {}, n_pilots=1)  # as of 5,000 rows and more
        _train(_features_of_classes(Path(folder, "several.txt")), {"row_features": 20}, n_pilots=0)
    _decode_together()
    return n_compiled() - before


def _make_steps(loss: str) -> None:
    """Of a network that is no little work, and how its weights are stored."""
    D, B, N = 50, 32, 40
    options: dict[str, Any] = {"n_features": D, "n_outputs": 2 * B, "seed": 0, "loss": loss}
    options |= {"bias": np.zeros(2 * B, np.float32)}
    shape: dict[str, Any] = {"n_rows": N, "n_buckets": B, "dense_input": False, "loss": loss}
    batch = SparseBatch(np.arange(N + 1), np.arange(N, dtype=np.int32), np.ones(N, np.float32))
    targets = Targets(np.arange(2 * N) // 2, np.arange(2 * N) % 2 * B + np.arange(2 * N) // 2 % B, 2)
    networks: list[Network | LightNetwork] = []
    if suits_light(loss):
        how = Steps.of(NetworkConfig(), precision="bfloat16", light=True, **shape)
        networks.append(LightNetwork(NetworkConfig(hidden=[64]), half=True, dither=how.dither, **options))
    precision = native_precision()
    if precision == "bfloat16" or not networks:  # torch has those of many buckets
        from mach.networks.network import Network

        how = Steps.of(NetworkConfig(), precision=precision, **shape)
        given: dict[str, Any] = {"dense_input": False, "precision": precision, "dither": how.dither}
        networks.append(Network(NetworkConfig(hidden=[64]), **given, **options))
    for network in networks:
        network.step(batch, targets, 1e-3, measured=True)
        stored_weights(network.weights(), "int4", np.ones(D, np.int64))


def _train(rows: Path, data: dict[str, Any], n_pilots: int) -> None:
    data |= {"train": str(rows), "cache": str(rows.parent / "cache"), "validation_fraction": 0.2}
    config = LITTLE | {"data": data, "reranking": {"pilots": n_pilots}}
    with train(config, rows.with_suffix(""), launcher="here") as model:
        queries = ["word1 word2 word3"] if rows.suffix == ".csv" else np.eye(model.n_features, dtype=np.float32)
        model.topk(queries[:1], k=3)
        model.topk(queries, k=3, rerank=False)
        if rows.suffix == ".csv":
            model.classes.add(["another"], [["word1 word2"]])


def _text_of_one_class(path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["text,classes"]
    for n in range(N_ROWS):
        words = " ".join(f"word{word}" for word in rng.integers(0, N_WORDS, 6))
        lines.append(f"name{n % N_CLASSES} {words},class {n % N_CLASSES}")
    path.write_text("\n".join(lines) + "\n")
    return path


def _features_of_classes(path: Path) -> Path:
    """Rows of 30 features and two classes, in repository format."""
    rng = np.random.default_rng(1)
    lines = [f"{N_ROWS} {N_WORDS} {N_CLASSES}"]
    for n in range(N_ROWS):
        features = np.sort(rng.choice(N_WORDS, 30, replace=False))
        entries = " ".join(f"{feature}:{rng.uniform(0.1, 1):.3f}" for feature in features)
        lines.append(f"{n % N_CLASSES},{(n + 1) % N_CLASSES} {entries}")
    path.write_text("\n".join(lines) + "\n")
    return path


def _decode_together() -> None:
    """Noise, for which all classes are scanned, many queries at once."""
    assignment = UniversalAssignment.draw(n_classes=2000, n_buckets=32, n_repetitions=4, seed=0)
    probs_NRB = np.random.default_rng(0).random((80, 4, 32), np.float32)
    Decoder(assignment).topk(probs_NRB, k=10)
