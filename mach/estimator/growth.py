"""What an engine learns later: more rows, more classes, and old rows that keep it from forgetting.

Training goes on from the present weights (`mach.training.finetuning`) on the new rows and on some of those kept of
earlier ones. Where every class has a bucket of its own a new class gets a new one: outputs are added to the stored
weights. Where classes are hashed it comes into the buckets that are there.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.config import parse_config
from mach.estimator.engine import RUN, Engine, Folder
from mach.estimator.fitting import STORE, WHERE, featurised, small_choices, write_store
from mach.estimator.parameters import Tree
from mach.estimator.rows import Reservoir, Rows
from mach.files.places import atomic_file, short_lived
from mach.files.records import write_json
from mach.files.tensors import map_tensors
from mach.networks.inference import stored_weights, wide_matrix
from mach.runs.run import Run
from mach.sketch.tables import TableAssignment
from mach.training import recipe
from mach.training.conductor import train

if TYPE_CHECKING:
    from rich.console import Console

LEAST_REPLAYED = 512
LATER_SHARE = 1 / 3  # of passes and rate, where training goes on without new classes
START = "start"


def go_on(
    engine: Engine, rows: Rows, given: Tree, *, seed: int, most_kept: int, device: str | None, console: Console
) -> Engine:
    """Train on: a new engine, which has learned the rows as well. The given one stays as it is.

    Parameters
    ----------
    engine : Engine
    rows : Rows
        Their class ids may go beyond those of the run.
    given : dict
        Sections of a configuration, of which those on epochs, batch and launch count.
    seed : int
        Of row order, dropout and the rows that are replayed.
    most_kept : int
        Rows to keep for the next time.
    device, console
        As for `mach.train`.
    """
    run, folder = engine.model.run, Folder()
    generator = np.random.default_rng(seed)
    rows = replace(rows, features=_as_read(rows.features, run))
    reservoir = engine.reservoir or Reservoir.of(rows, 0, generator)
    shape = recipe.Shape(2 * len(rows), run.manifest.n_features, rows.n_classes, run.manifest.dense_input)
    stated = small_choices(shape, is_exclusive=engine.is_exclusive, seed=0)["training"] | given.get("training", {})
    share = 1.0 if rows.n_classes > engine.n_classes else LATER_SHARE
    with short_lived():
        start = _start(run, engine, rows.n_classes, folder.path / START)
        store = write_store(
            rows.joined(reservoir.drawn(max(len(rows), LEAST_REPLAYED), generator)),
            folder.path / STORE,
            n_classes=max(start.manifest.n_classes, rows.n_classes),
            row_features=run.manifest.row_features,
            text_features=run.text_features,
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


def _as_read(features: Any, run: Run) -> Any:
    """Features of the kind that the run's networks read; X may be dense now and sparse then."""
    if isinstance(features, list):
        assert run.text_features is not None, "texts are refused where numbers were fitted"
        return featurised(run.text_features, features)
    if isinstance(features, np.ndarray) == run.manifest.dense_input:
        return features
    from scipy.sparse import csr_array

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
            arrays["output.weight"] = _padded(arrays["output.weight"], n_heads, n_before, n_classes, 0)
            arrays["output.bias"] = _padded(arrays["output.bias"], n_heads, n_before, n_classes, rare)
            if "output.scale" in arrays:
                arrays["output.scale"] = _padded(arrays["output.scale"], n_heads, n_before, n_classes, 0)
        else:  # a linear network over sparse rows
            wide_DB = wide_matrix(arrays, "input")
            arrays.pop("input.scale", None)
            arrays["input.weight"] = np.ascontiguousarray(_padded(wide_DB.T, n_heads, n_before, n_classes, 0).T)
            arrays["input.bias"] = _padded(arrays["input.bias"], n_heads, n_before, n_classes, rare)
            arrays = stored_weights(arrays, config.network.weights)
        digest = files.save_weights(arrays)
        write_json(files.done, files.summary().model_copy(update={"weights_digest": digest}).model_dump())
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
