"""Training a classifier on rows in memory: a store, a configuration, a run, a temperature for its probabilities."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.config import Config, parse_config
from mach.data.batch import SparseBatch, read_batch, read_classes
from mach.data.store import Chunk, Store
from mach.data.writer import StoreWriter
from mach.estimator.engine import BLOCK_SCORES, FEW_CLASSES, FEW_PARAMETERS, RUN, Engine, Folder
from mach.estimator.parameters import Tree
from mach.estimator.rows import Reservoir, Rows
from mach.files.places import short_lived
from mach.model.calibration import LEAST_ROWS, held_out
from mach.networks.trunk import Trunk
from mach.training import recipe
from mach.training.conductor import train

if TYPE_CHECKING:
    from rich.console import Console
    from scipy.sparse import csr_array

    from mach.data.text import TextFeatures

LEAST_STEPS, MOST_EPOCHS = 300, 60
TEMPERATURES = (0.1, 10.0)
STORE = "store"
WHERE = "MACHClassifier"  # what messages about its configuration begin with


def fit(
    rows: Rows,
    given: Tree,
    *,
    seed: int,
    is_exclusive: bool,
    most_kept: int,
    device: str | None,
    console: Console,
    trunk: Trunk | None,
) -> Engine:
    """Train a new run on rows in memory.

    Parameters
    ----------
    rows : Rows
    given : dict
        Sections of a configuration; what they leave open is chosen by `small_choices` and `mach.training.recipe`.
    seed : int
        Of hash functions, weights, row order and dropout.
    is_exclusive : bool
        Whether every row has exactly one class, now and in future.
    most_kept : int
        Rows to keep for further training.
    device, console, trunk
        As for `mach.train`.

    Notes
    -----
    Cost: that of ``mach train``; the rows are on disk once more until it is done.
    """
    folder = Folder()
    with short_lived():
        store = _prepared(rows, parse_config(_merged({"data": {"train": ""}}, given), WHERE), folder.path / STORE)
        shape = recipe.Shape.of(store)
        tree = _merged(small_choices(shape, is_exclusive=is_exclusive, seed=seed), given)
        tree["data"]["train"] = str(store.path)
        _own_buckets(tree.setdefault("hashing", {}), shape.n_classes, folder.path / "table.npy")
        config = parse_config(tree, WHERE)
        run = train(config, folder.path / RUN, device=device, console=console, trunk=trunk).run
        engine = Engine(folder.path / RUN, rows.n_classes, folder=folder, rate=run.config.training.rate, trunk=trunk)
        held = held_out(run, store)
        if is_exclusive and len(held) >= LEAST_ROWS:
            engine.temperature = _best_temperature(engine, store, held)
        learned = Rows(store.features(0, store.n_rows), rows.classes)
        engine.reservoir = Reservoir.of(learned, most_kept, np.random.default_rng(seed))
        shutil.rmtree(folder.path / STORE)
    return engine


def write_store(
    rows: Rows, path: Path, *, n_classes: int, row_features: int, text_features: TextFeatures | None
) -> Store:
    """Rows of numbers as a store."""
    features: Any = rows.features
    is_dense = isinstance(features, np.ndarray)
    with StoreWriter(
        path,
        source="memory",
        dense=is_dense,
        n_features=features.shape[1],
        n_classes=n_classes,
        row_features=row_features,
    ) as writer:
        arrays = features if is_dense else (features.indptr, features.indices, features.data)
        writer.append(Chunk(rows.classes.indptr, rows.classes.indices, arrays))
        writer.text_features = text_features
    return Store.open(path)


def featurised(text_features: TextFeatures, texts: list[str]) -> csr_array:
    """Texts as the rows of numbers that networks read."""
    from scipy.sparse import csr_array

    indptr, indices, values = text_features.transform(texts)
    return csr_array((values, indices, indptr), shape=(len(texts), text_features.n_features))


def _prepared(rows: Rows, config: Config, path: Path) -> Store:
    """Rows as a store; text features are fitted to texts. One class gets a spare one beside it."""
    text_features: TextFeatures | None = None
    features: Any = rows.features
    row_features = recipe.before_reading(config).data.row_features
    if isinstance(features, list):
        from mach.data.text import TextFeatures

        text_features = TextFeatures(config.text).fit(features)
        rows = Rows(featurised(text_features, features), rows.classes)
    elif not isinstance(features, np.ndarray) and "row_features" not in config.data.model_fields_set:
        values = features.data  # of values that are all equal none is the largest
        row_features = row_features if len(values) and values.min() < values.max() else 0
    n_classes = max(rows.n_classes, 2)
    return write_store(rows, path, n_classes=n_classes, row_features=row_features, text_features=text_features)


def _merged(tree: Tree, more: Tree) -> Tree:
    """Sections of both; where both have a key, that of the second."""
    return {name: tree.get(name, {}) | more.get(name, {}) for name in tree | more}


def _own_buckets(hashing: dict[str, Any], n_classes: int, table: Path) -> None:
    """Give every class a bucket of its own where there are few, and never ask for more buckets than classes."""
    n_buckets = hashing.get("buckets") or n_classes
    if n_classes <= FEW_CLASSES and n_buckets >= n_classes and "table" not in hashing:
        n_functions = hashing["repetitions"] * hashing["heads"]
        np.save(table, np.tile(np.arange(n_classes, dtype=np.int32), (n_functions, 1)))
        hashing |= {"table": str(table), "buckets": n_classes}
    elif "buckets" in hashing:
        hashing["buckets"] = min(n_buckets, n_classes)


def small_choices(shape: recipe.Shape, *, is_exclusive: bool, seed: int) -> Tree:
    """What a configuration leaves open where rows or classes are fewer than `mach.training.recipe` was made for.

    Shorter batches and more epochs, so that there are some hundred steps; up to `FEW_CLASSES` classes a bucket for
    each, in one network for dense rows or two for sparse ones; held-out rows for probabilities if there are enough.
    """
    n_rows = max(shape.n_rows, 1)
    batch = min(max(2 ** int(np.log2(max(n_rows / 20, 1))), 16), 256 if shape.is_dense else 512)
    tree: Tree = {
        "data": {"validation_fraction": recipe.held_out_fraction(n_rows)},
        "training": {"loss": "softmax" if is_exclusive else "binary", "batch": batch, "seed": seed},
    }
    if not is_exclusive and not tree["data"]["validation_fraction"]:
        tree["reranking"] = {"candidates": 0}  # its scores are far from probabilities, and nothing could mend them
    epochs = min(-(-LEAST_STEPS // -(-n_rows // batch)), MOST_EPOCHS)
    if epochs > 12:
        tree["training"]["epochs"] = epochs
    if shape.is_dense and n_rows < 5000:
        tree["training"]["rate"] = 6e-3
    if shape.n_classes <= FEW_CLASSES:
        if "reranking" in tree:
            tree["decoding"] = {"aggregate": "logit-mean"}  # the mean of logarithms would be shy of 0.5
        width = 128 if n_rows < 1000 else 512
        tree["network"] = {"hidden": [width]}
        if not shape.is_dense and n_rows >= 1000:
            tree["training"]["rate"] = 3e-3
        tree["hashing"] = {"repetitions": 1 if shape.is_dense else 2, "heads": 1}
        if (shape.n_features + shape.n_classes) * width <= FEW_PARAMETERS:
            tree["network"]["weights"] = tree["training"]["precision"] = "float32"
    return tree


def _best_temperature(engine: Engine, store: Store, rows: NDArray[np.int64]) -> float:
    """The temperature under which held-out rows are most likely.

    Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    from scipy.optimize import minimize_scalar

    rows = rows[: max(LEAST_ROWS, 8 * BLOCK_SCORES // engine.n_classes)]
    batch = read_batch(store, rows)
    features: Any = batch.matrix(store.n_features) if isinstance(batch, SparseBatch) else batch.values_ND
    logits_NK = np.concatenate(list(engine.logits(features))).astype(np.float64)
    classes, _ = read_classes(store, rows)
    logits_NK -= logits_NK.max(axis=1, keepdims=True)
    right_N = logits_NK[np.arange(len(rows)), classes]

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.mean(np.log(np.exp(logits_NK / temperature).sum(1)) - right_N / temperature))

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))
