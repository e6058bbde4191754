"""Training a classifier on rows in memory, for the first time (`fit`) and further (`go_on`).

Further training begins with the present weights (`mach.training.finetuning`), on the new rows and on some of those kept
of earlier ones. Where every class has a bucket of its own a new class gets a new one: outputs are added to the stored
weights. Where classes are hashed it comes into the buckets that are there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from mach.config import Config, parse_config
from mach.data.batch import SparseBatch, read_batch, read_classes
from mach.data.class_texts import ClassTexts
from mach.data.gaps import refuse_gaps
from mach.data.store import Chunk, Store
from mach.data.writer import StoreWriter
from mach.estimator.engine import BLOCK_SCORES, FEW_CLASSES, FEW_PARAMETERS, RUN, Engine, Folder
from mach.estimator.parameters import Tree
from mach.estimator.rows import Reservoir, Rows
from mach.files.places import atomic_file, short_lived
from mach.files.records import write_json
from mach.files.tensors import map_tensors
from mach.model.calibration import LEAST_ROWS, held_out
from mach.networks.inference import stored_weights, wide_matrix
from mach.networks.trunk import Trunk
from mach.runs.run import Run
from mach.sketch.tables import TableAssignment
from mach.training import recipe
from mach.training.conductor import train

if TYPE_CHECKING:
    from rich.console import Console

    from mach.data.text import TextFeatures

Texts: TypeAlias = "Callable[[int], ClassTexts | None]"  # of so many classes, the classifier's and spare ones
LEAST_STEPS, MOST_EPOCHS = 300, 60
TEMPERATURES = (0.1, 10.0)
LEAST_REPLAYED = 512
LATER_SHARE = 1 / 3  # of passes and rate, where training goes on without new classes
STORE, START = "store", "start"
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
    texts: Texts,
    minutes: float | None,
) -> Engine:
    """Train a new run on rows in memory, at the cost of ``mach train``; they are on disk once more until it is done.

    What the ``given`` sections of a configuration leave open is chosen by `_small_choices` and the recipe. Exclusive
    are classes of which a row has exactly one, now and in future. ``most_kept`` rows are kept for further training.
    """
    folder = Folder()
    with short_lived():
        store = _prepared(
            rows, parse_config(_merged({"data": {"train": ""}}, given), WHERE), folder.path / STORE, texts
        )
        shape = recipe.Shape.of(store)
        tree = _merged(_small_choices(shape, is_exclusive=is_exclusive, seed=seed), given)
        tree["data"]["train"] = str(store.path)
        _own_buckets(tree.setdefault("hashing", {}), shape.n_classes, folder.path / "table.npy")
        config = parse_config(tree, WHERE)
        options: dict[str, Any] = {"device": device, "console": console, "trunk": trunk, "minutes": minutes}
        run = train(config, folder.path / RUN, **options).run
        engine = Engine(folder.path / RUN, rows.n_classes, folder=folder, rate=run.config.training.rate, trunk=trunk)
        held = held_out(run, store)
        if is_exclusive and len(held) >= LEAST_ROWS:
            engine.temperature = _best_temperature(engine, store, held)
        learned = Rows(store.features(0, store.n_rows), rows.classes)
        engine.reservoir = Reservoir.of(learned, most_kept, np.random.default_rng(seed))
        shutil.rmtree(folder.path / STORE)
    return engine


def go_on(
    engine: Engine,
    rows: Rows,
    given: Tree,
    *,
    seed: int,
    most_kept: int,
    device: str | None,
    console: Console,
    texts: Texts,
) -> Engine:
    """Train on: a new engine that has learned the rows as well, of old and new classes; the given one stays as it is.

    Of the ``given`` sections of a configuration those on training and launch count.
    """
    run, folder = engine.model.run, Folder()
    generator = np.random.default_rng(seed)
    rows = replace(rows, features=_as_read(rows.features, run))
    reservoir = engine.reservoir or Reservoir.of(rows, 0, generator)
    shape = recipe.Shape(2 * len(rows), run.manifest.n_features, rows.n_classes, run.manifest.dense_input)
    stated = _small_choices(shape, is_exclusive=engine.is_exclusive, seed=0)["training"] | given.get("training", {})
    share = 1.0 if rows.n_classes > engine.n_classes else LATER_SHARE
    with short_lived():
        start = _start(run, engine, rows.n_classes, folder.path / START)
        store = _write_store(
            rows.joined(reservoir.drawn(max(len(rows), LEAST_REPLAYED), generator)),
            folder.path / STORE,
            n_classes=max(start.manifest.n_classes, rows.n_classes),
            row_features=run.manifest.row_features,
            text_features=run.text_features,
            texts=texts,
        )
        training = {"start": str(start.path), "replay": 0.0, "batch": stated["batch"], "seed": seed}
        training |= {"epochs": max(1, round(share * stated.get("epochs", 12))), "rate": share * engine.rate}
        tree: Tree = {
            "data": {"train": str(store.path), "cache": str(folder.path / "cache"), "validation_fraction": 0.0},
            "training": training,
            "launch": given["launch"],
        }
        train(parse_config(tree, WHERE), folder.path / RUN, device=device, console=console, trunk=run.trunk)
        for name in (START, STORE, "cache"):
            shutil.rmtree(folder.path / name, ignore_errors=True)
    return Engine(
        folder.path / RUN,
        rows.n_classes,
        temperature=engine.temperature,
        folder=folder,
        reservoir=reservoir.extended(rows, most_kept, generator),
        rate=engine.rate,
        trunk=run.trunk,
    )


def _write_store(
    rows: Rows, path: Path, *, n_classes: int, row_features: int, text_features: TextFeatures | None, texts: Texts
) -> Store:
    """Rows of numbers as a store."""
    features: Any = rows.features
    is_dense = isinstance(features, np.ndarray)
    counts = {"n_features": features.shape[1], "n_classes": n_classes, "row_features": row_features}
    with StoreWriter(path, source=rows.name, dense=is_dense, **counts) as writer:
        arrays = features if is_dense else (features.indptr, features.indices, features.data)
        writer.append(Chunk(rows.classes.indptr, rows.classes.indices, arrays))
        writer.text_features, writer.class_texts = text_features, texts(n_classes)
    return Store.open(path)


def _featurised(text_features: TextFeatures, texts: list[str]) -> csr_array:
    """Texts as the rows of numbers that networks read."""
    indptr, indices, values = text_features.transform(texts)
    return csr_array((values, indices, indptr), shape=(len(texts), text_features.n_features))


def _prepared(rows: Rows, config: Config, path: Path, texts: Texts) -> Store:
    """Rows as a store; text features are fitted to texts. One class gets a spare one beside it."""
    text_features: TextFeatures | None = None
    features: Any = rows.features
    row_features = recipe.before_reading(config).data.row_features
    if isinstance(features, list):
        from mach.data.text import TextFeatures

        known = texts(rows.n_classes)
        class_texts = () if known is None else map(known.whole, range(len(known)))
        text_features = TextFeatures(config.text).fit(features, class_texts)
        rows = replace(rows, features=_featurised(text_features, features))
    elif not isinstance(features, np.ndarray) and "row_features" not in config.data.model_fields_set:
        values = features.data  # of values that are all equal none is the largest
        row_features = row_features if len(values) and values.min() < values.max() else 0
    n_classes = max(rows.n_classes, 2)
    made: dict[str, Any] = {"row_features": row_features, "text_features": text_features, "texts": texts}
    store = _write_store(rows, path, n_classes=n_classes, **made)
    refuse_gaps(store, "X", "y")
    return store


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


def _small_choices(shape: recipe.Shape, *, is_exclusive: bool, seed: int) -> Tree:
    """What a configuration leaves open where rows or classes are fewer than `mach.training.recipe` was made for.

    Batches are shorter and epochs more, so that there are some hundred steps. Up to `FEW_CLASSES` classes get a bucket
    each, in one network for dense rows or two for sparse ones. Rows are held out for probabilities if there are enough.
    """
    n_rows = max(shape.n_rows, 1)
    batch = min(max(2 ** int(np.log2(max(n_rows / 20, 1))), 16), 256 if shape.is_dense else 512)
    tree: Tree = {
        "data": {"validation_fraction": recipe.held_out_fraction(n_rows, teach=not shape.is_dense)},
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
    features = batch.matrix(store.n_features) if isinstance(batch, SparseBatch) else batch.values_ND
    logits_NK = np.concatenate(list(engine.logits(features))).astype(np.float64)
    classes, _ = read_classes(store, rows)
    logits_NK -= logits_NK.max(axis=1, keepdims=True)
    right_N = logits_NK[np.arange(len(rows)), classes]

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.mean(np.log(np.exp(logits_NK / temperature).sum(1)) - right_N / temperature))

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def _as_read(features: Any, run: Run) -> Any:
    """Features of the kind that the run's networks read; X may be dense now and sparse then."""
    if isinstance(features, list):
        assert run.text_features is not None, "texts are refused where numbers were fitted"
        return _featurised(run.text_features, features)
    if isinstance(features, np.ndarray) == run.manifest.dense_input:
        return features
    return features.toarray() if run.manifest.dense_input else csr_array(features)


def _start(run: Run, engine: Engine, n_classes: int, path: Path) -> Run:
    """The run to start from: as it is, or a copy without names, with outputs for new classes where it needs them."""
    n_ids, assignment = run.manifest.n_classes, engine.model.assignment
    own = np.arange(n_ids)
    has_own_buckets = assignment.n_buckets == n_ids and bool(np.all(assignment.buckets(own) == own))
    must_grow = n_classes > n_ids and has_own_buckets
    names = run.class_names_file.name
    if not must_grow and not (engine.path / names).exists():
        return run
    shutil.copytree(engine.path, path)
    (path / names).unlink(missing_ok=True)
    copy = Run.open(path)
    if must_grow:
        _grow(copy, n_classes)
    return Run.open(path)


def _grow(run: Run, n_classes: int) -> None:
    """Give new classes outputs of their own, in place: weights of 0 and the bias of a class that is rarely seen."""
    config, manifest = run.config, run.manifest
    n_heads, n_before = config.hashing.heads, manifest.n_classes
    rare = np.float32(np.log(0.1 / manifest.n_rows))
    for r in run.finished():
        files = run.repetition(r)
        arrays = {name: np.array(array) for name, array in map_tensors(files.weights_file())[0].items()}
        if "output.weight" in arrays:
            for name in {"output.weight", "output.bias", "output.scale"} & set(arrays):
                value = rare if name == "output.bias" else 0
                arrays[name] = _padded(arrays[name], n_heads, n_before, n_classes, value)
        else:  # a linear network over sparse rows
            wide_DB = wide_matrix(arrays, "input")
            arrays.pop("input.scale", None)
            arrays["input.weight"] = np.ascontiguousarray(_padded(wide_DB.T, n_heads, n_before, n_classes, 0).T)
            arrays["input.bias"] = _padded(arrays["input.bias"], n_heads, n_before, n_classes, rare)
            arrays = stored_weights(arrays, config.network.weights)
        digest = files.save_weights(arrays)
        write_json(files.done, files.summary().model_copy(update={"weights_digest": digest}).model_dump())
    if run.class_texts is not None:
        with atomic_file(run.class_texts_file) as file:
            run.class_texts.and_also(ClassTexts.of([""] * (n_classes - n_before))).write(file)
    with atomic_file(run.path / "class_counts.npy") as file:
        np.save(file, np.pad(run.class_counts_K(), (0, n_classes - n_before)))
    n_functions = config.hashing.repetitions * n_heads
    own = TableAssignment.from_table(np.tile(np.arange(n_classes), (n_functions, 1)), n_classes)
    hashing = config.hashing.model_copy(update={"buckets": n_classes})
    described = manifest.model_copy(update={"n_classes": n_classes, "assignment": own.describe()})
    run.update(config.model_copy(update={"hashing": hashing}), described, own)


def _padded(array: NDArray[Any], n_heads: int, n_before: int, n_after: int, value: Any) -> NDArray[Any]:
    """Outputs, head by head, with more at the end of each; their axis is the first."""
    by_head = array.reshape(n_heads, n_before, *array.shape[1:])
    widths = [(0, 0), (0, n_after - n_before), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(by_head, widths, constant_values=value).reshape(n_heads * n_after, *array.shape[1:])
