"""Set up a run on the driver: prepare the data, resolve the configuration, create or reopen the run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mach import __version__, theory
from mach.config import Config, differing_keys
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import ConfigError
from mach.hashing import UniversalAssignment
from mach.storage import Manifest, Run, copy_folder

# Sections and keys that do not change what is learned, or that a run may change on the way.
FREE_KEYS = (
    "launch.",
    "decoding.",
    "data.train",
    "data.test",
    "data.cache",
    "hashing.repetitions",
    "training.checkpoint_seconds",
)


def set_up(
    config: Config, path: str | Path, report: Callable[[str, float], None] = lambda stage, fraction: None
) -> tuple[Run, Store]:
    """Prepare the training data and open the run, creating it if it does not exist.

    Raises
    ------
    ConfigError
        When an existing run was made with another configuration or from other data; the message names the keys.
    DataError, StorageError
        From reading the data and writing the run.
    """
    store = prepare(config.data, config.text, config.data.train, report=report)
    if store.n_rows == 0 or len(store.class_ids) == 0:
        raise ConfigError(
            f"{config.data.train} has {store.n_rows} rows and no class in them: there is nothing to learn"
        )
    path = Path(path)
    run = _reopen(config, store, path) if (path / "manifest.json").exists() else _create(config, store, path)
    if store.class_names is not None and not run.class_names_file.exists():
        run.write_class_names(store.class_names)
    if store.text_features is not None and not run.text_folder.exists():
        copy_folder(store.path / "text_features", run.text_folder)
    return run, store


def resolve(config: Config, store: Store) -> tuple[Config, Manifest]:
    """Fill in everything that is left to choose, and describe the run to be."""
    from mach.networks.network import native_precision

    n_buckets = config.hashing.buckets or _default_buckets(config, store)
    if n_buckets > store.n_classes:
        raise ConfigError(
            f"hashing.buckets = {n_buckets} exceeds the {store.n_classes} classes: take fewer, or leave it out"
        )
    loss = config.training.loss
    if loss == "auto":
        loss = "softmax" if np.all(np.diff(store.class_indptr) == 1) else "binary"
    precision = config.training.precision
    if precision == "auto":
        precision = native_precision()
    config = config.model_copy(
        update={
            "hashing": config.hashing.model_copy(update={"buckets": n_buckets}),
            "training": config.training.model_copy(update={"loss": loss, "precision": precision}),
        }
    )
    assignment = UniversalAssignment.draw(
        n_classes=store.n_classes,
        n_buckets=n_buckets,
        n_repetitions=config.hashing.repetitions,
        seed=config.hashing.seed,
        capacity=config.hashing.capacity,
    )
    manifest = Manifest(
        n_classes=store.n_classes,
        n_features=store.n_features,
        n_rows=store.n_rows,
        dense_input=store.is_dense,
        loss=loss,
        precision=precision,
        data_fingerprint=store.fingerprint,
        assignment=assignment.describe(),
        mach_version=__version__,
    )
    return config, manifest


def _default_buckets(config: Config, store: Store) -> int:
    repetitions = config.hashing.repetitions
    return theory.plan(store.n_classes, store.n_features, n_repetitions=repetitions).ledger.n_buckets


def _create(config: Config, store: Store, path: Path) -> Run:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is no run: give an empty or new folder, or remove it")
    return Run.create(path, *resolve(config, store), store.class_counts())


def _reopen(config: Config, store: Store, path: Path) -> Run:
    run = Run.open(path)
    if run.manifest.data_fingerprint != store.fingerprint:
        raise ConfigError(
            f"data.train: {path} was trained on data with fingerprint {run.manifest.data_fingerprint}, "
            f"{config.data.train} has {store.fingerprint}: give that data, or another run folder"
        )
    config, manifest = resolve(config, store)
    differences = differing_keys(config, run.config, ignore=FREE_KEYS)
    mine, theirs = config.hashing.repetitions, run.config.hashing.repetitions
    if mine < theirs:
        differences.append(f"hashing.repetitions: {mine} here, {theirs} there (it can only be raised)")
    if differences:
        raise ConfigError(f"{path} was made with another configuration: {'; '.join(differences)}")
    run.update(config, manifest if mine > theirs else run.manifest)
    return run
