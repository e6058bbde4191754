"""Pilots: runs on four fifths of a run's rows, thrown away once they have taught the order on the other fifth.

What a finished run says of its own training rows is too good to learn from: networks and classifiers know these rows. A
pilot is a run of its own in the folder ``pilots``, of the same configuration and trained by the same conductor, so it
stops and goes on as the run itself does; what it leaves is one file of examples (`mach.reranking`). A pilot has
half of the repetitions: the order that it teaches is worth as much (docs/log.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.config import MAX_PILOTS, Config, DataConfig
from mach.data.joining import chunks_of_store
from mach.data.store import Store
from mach.data.writer import StoreWriter
from mach.files.caches import cache_folder
from mach.files.names import named
from mach.files.places import Place, kept, remove_folder
from mach.reranking.fitting import RerankerTraining
from mach.runs.run import Run

LEARNED = 1 - 1 / MAX_PILOTS  # of the rows: what a pilot learns from


def teach(training: RerankerTraining, train: Callable[[Config, Place], Run], say: Callable[[str], None]) -> None:
    """Have every pilot that has not taught yet trained to its end, and keep its examples.

    ``train`` trains repetitions and re-ranker of a configuration into a folder; ``say`` is told of every pilot.
    """
    n_pilots = training.config.pilots
    for pilot in training.missing_pilots():
        say(
            f"re-ranker: pilot {pilot + 1} of {n_pilots}, on {LEARNED:.0%} of the rows, whose other rows "
            "teach the order of candidates"
        )
        learned, taught = fold(training.rows, pilot, training.run.config.training.seed)
        folder = training.run.path / "pilots"
        own = folder if isinstance(folder, Path) else named(cache_folder(), f"pilots-{training.fingerprint}")
        rows = kept(own / f"rows{pilot}", partial(_write, training.store, learned))
        path = folder / str(pilot)
        training.examine(pilot, train(_config(training, rows, path), path), taught)
        for place in {folder, own}:
            _remove(place)


def fold(rows: NDArray[np.int64], pilot: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows that a pilot learns from, and the fifth of them that it teaches on, both ascending; fifths are disjoint.

    Examples
    --------
    >>> learned, taught = fold(np.arange(10), 0, seed=0)
    >>> sorted([*learned.tolist(), *taught.tolist()]) == list(range(10)), len(taught)
    (True, 2)
    """
    is_taught = np.zeros(len(rows), np.bool_)
    is_taught[np.random.default_rng([seed, MAX_PILOTS]).permutation(len(rows))[pilot::MAX_PILOTS]] = True
    return rows[~is_taught], rows[is_taught]


def repetitions_of(config: Config) -> int:
    """How many of them a pilot has."""
    return -(-config.hashing.repetitions // 2)


def _config(training: RerankerTraining, rows: Path, path: Place) -> Config:
    config = training.run.config
    is_begun = Run.is_at(path)  # perhaps by an earlier version, where one of several had all repetitions
    n_repetitions = Run.open(path).config.hashing.repetitions if is_begun else repetitions_of(config)
    data = DataConfig(
        train=str(rows),
        validation_fraction=config.data.validation_fraction,
        row_features=training.store.row_features,
        cache=config.data.cache,
    )
    return config.changed(data=data, hashing={"repetitions": n_repetitions}, reranking={"pilots": 0})


def _write(store: Store, rows: NDArray[np.int64], path: Path) -> None:
    sizes: dict[str, Any] = {"n_features": store.n_features, "n_classes": store.n_classes}
    with StoreWriter(path, source=str(store.path), row_features=store.row_features, **sizes) as writer:
        for chunk in chunks_of_store(store, rows):
            writer.append(chunk)
        writer.class_names, writer.text_features = store.class_names, store.text_features  # signals read them,
        writer.class_texts = store.class_texts  # and these


def _remove(folder: Place) -> None:
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        remove_folder(folder, first="manifest.json")
