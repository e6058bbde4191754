"""Set up a run on the driver: prepare the data, resolve the configuration, create or reopen the run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mach import __version__
from mach.config import IDENTITY, Config, completed, differing_keys, fingerprint
from mach.data.store import Store
from mach.data.transfer import META, fetch_source, upload_store
from mach.data.writer import storage_errors
from mach.errors import ConfigError, StorageError, counted
from mach.files.places import Place, is_there, names_in, place, remove_folder
from mach.networks.steps import can_be_light, is_little
from mach.networks.trunk import Trunk, agreed, name_of
from mach.reranking.record import is_due
from mach.runs.manifest import Manifest
from mach.runs.run import Run
from mach.sketch import bounds
from mach.sketch.hashing import Assignment, UniversalAssignment
from mach.sketch.tables import TableAssignment, extends
from mach.training import recipe
from mach.training.finetuning import STORE, Origin, training_data
from mach.training.launch.capacity import plan_of, refuse_too_large

LAYOUT = (
    "config.toml",
    "class_counts.npy",
    "class_names.safetensors",
    "class_texts.safetensors",
    "assignment.npy",
    "text",
    "repetitions",
    "reranking",
    STORE,
)
# Sections and keys that do not change what is learned, or that a run may change on the way.
FREE_KEYS = (
    "launch.",
    "decoding.",
    "reranking.",
    "data.train",
    "data.test",
    "data.cache",
    "hashing.repetitions",
    "training.checkpoint_seconds",
)


def set_up(
    config: Config,
    path: str | Place,
    report: Callable[[str, float], None] = lambda stage, fraction: None,
    *,
    trunk: Trunk | None = None,
    choose: Callable[[Config, Store], Config] | None = None,
) -> tuple[Run, Store]:
    """Prepare the training data and open the run, creating it if it does not exist.

    A remote run takes the prepared data along, unless they are a store behind a URL themselves: then its URL is all
    that nodes, and a driver that goes on with it elsewhere, need (`shared_store`).

    ``choose`` may set what the configuration of a new run leaves open, before the recipe does.

    ``trunk`` is what the caller passes as the class of the networks; where nothing else names one, it does. ConfigError
    when the configuration, or the run that it goes on with or starts from, has one that was not passed; when a run that
    is there was made with another configuration, of which the message names the keys, or from other data.
    """
    path = place(path)
    is_run = Run.is_at(path)
    config = with_trunk(config, trunk)
    given = completed(config, Run.open(path).config) if is_run else config
    start = None if is_run else Origin.of(given)
    if start is not None:
        given = start.complete(given)
    if config.network.trunk is not None:
        agreed(config.network.trunk, trunk, "the configuration")
    else:
        agreed(given.network.trunk, trunk, (path if start is None else start.run.path) / "config.toml")
    config = given if is_run else recipe.before_reading(given)
    store = training_data(config, path if is_run else None, report)
    if not store.is_dense and store.row_features != config.data.row_features:  # it was prepared apart
        if "row_features" in given.data.model_fields_set:
            raise ConfigError(
                f"data.row_features = {given.data.row_features}: the store {store.path} was prepared with "
                f"{store.row_features}: leave the key out, or prepare the data anew"
            )
        config = config.changed(data={"row_features": store.row_features})
    if store.n_rows == 0 or len(store.class_ids) == 0:
        raise ConfigError(
            f"{config.data.train} has {counted(store.n_rows, 'row')} and no class in them: there is nothing to learn: "
            "check data.class_column and data.classes"
        )
    if store.n_classes == 1:
        raise ConfigError(
            f"{config.data.train} has one class alone, so there is nothing to tell apart: give rows of two or more, or "
            "check data.class_column and data.class_separator (--classes, --separator)"
        )
    if is_run or Run.is_at(path):  # others may have created it while the data were read
        return _reopen(config, store, path, trunk), store
    if _holds_something_else(path) and not Run.is_at(path):
        raise ConfigError(f"{path} exists and is no run: give an empty or new folder, or remove it")
    counts_K = None if start is None else start.counts_K(store)
    known = None if start is None or counts_K is None else start.assignment(counts_K)
    if choose is not None:
        config = choose(config, store)
    config, manifest, assignment = resolve(config, store, known, trunk)
    if start is not None:
        manifest = manifest.model_copy(update={"n_rows": start.n_rows(store)})
    begun: dict[str, Any] = {} if start is None else {"weights": start.weights(), "last": start.keep_removed}
    refuse_too_large(plan_of(config, store), config.launch)
    try:
        _share(config, store, path)
        return Run.create(path, config, manifest, store, assignment, counts_K, trunk=trunk, **begun), store
    except StorageError:
        if not Run.is_at(path):
            raise
        return _reopen(config, store, path, trunk), store  # another process was faster


def with_trunk(config: Config, trunk: Trunk | None) -> Config:
    """A configuration that names the trunk that the caller passed, unless it names one itself."""
    if trunk is None or config.network.trunk is not None:
        return config
    return config.changed(network={"trunk": name_of(trunk)})


def shared_store(run: Run, store: Store) -> str:
    """Where every node of a run finds its training data: a path if the run is of this machine, else a URL."""
    if isinstance(run.path, Path):
        return str(store.path)
    return str(run.path / STORE) if is_there(run.path / STORE / META) else run.config.data.train


def drop_store(run: Run) -> None:
    """Remove the training data from a remote run that needs them no more: it is finished, its re-ranker as well."""
    if isinstance(run.path, Path) or len(run.finished()) < run.config.hashing.repetitions:
        return
    if not is_due(run):
        with storage_errors(run.path / STORE):
            remove_folder(run.path / STORE, first=META)


def _share(config: Config, store: Store, path: Place) -> None:
    train = place(config.data.train)
    is_enough = config.training.start is None and not isinstance(train, Path) and is_there(train / META)
    if not (isinstance(path, Path) or is_enough):
        upload_store(store, path / STORE)


def _holds_something_else(path: Place) -> bool:
    """Whether files are there that no creation of a run, interrupted before its manifest, could have left."""
    try:
        names = names_in(path)
    except OSError as error:  # among others, it is a file
        raise ConfigError(f"{path} exists and is no run ({error.strerror}): give an empty or new folder") from error
    return any(isinstance(path, Path) or not name.startswith((".", *LAYOUT)) for name in names)


def resolve(
    config: Config,
    store: Store,
    known: Assignment | None = None,
    trunk: Trunk | None = None,
    **drawn: int | None,
) -> tuple[Config, Manifest, Assignment]:
    """Fill in all that is left to choose (`mach.training.recipe`), and describe the run to be; a bad trunk fails here.

    With ``known`` the assignment is that, and not drawn or read anew. ``trunk`` is what the caller passed. ``drawn``
    holds the seed and capacity of hash functions where others have been drawn before.
    """
    from mach.networks.precision import native_precision, suits_light

    config = recipe.fill(config, recipe.Shape.of(store))
    n_buckets = config.hashing.buckets
    if not n_buckets:
        counts: dict[str, Any] = {"n_repetitions": config.hashing.repetitions, "n_heads": config.hashing.heads}
        n_buckets = bounds.plan(store.n_classes, store.n_features, **counts).n_buckets
    if n_buckets > store.n_classes:
        raise ConfigError(
            f"hashing.buckets = {n_buckets} exceeds the {store.n_classes} classes: take fewer, or leave it out"
        )
    if config.reranking.candidates and store.is_dense:
        raise ConfigError(
            f"reranking.candidates = {config.reranking.candidates}: the rows are dense, re-ranking takes sparse rows "
            "only: set it to 0"
        )
    loss = config.training.loss
    if loss == "auto":
        loss = "softmax" if np.all(np.diff(store.class_indptr) == 1) else "binary"
    config = config.changed(hashing={"buckets": n_buckets}, training={"loss": loss})
    precision, light, little = config.training.precision, can_be_light(config, store), is_little(config, store)
    light = light and (little or precision == "float32" or suits_light(loss))
    if precision == "auto":
        small = little and light and not config.launch.gpus
        precision = "float32" if small else "bfloat16" if light or config.launch.gpus else native_precision()
    config = config.changed(training={"precision": precision})
    if config.network.trunk is not None:
        from mach.networks.layers import build_trunk

        build_trunk(config.network, trunk, n_features=store.n_features, dense_input=store.is_dense)
    assignment = known or _assignment(config, n_buckets, store, **drawn)
    manifest = Manifest(
        n_classes=store.n_classes,
        n_features=store.n_features,
        n_rows=store.n_rows,
        dense_input=store.is_dense,
        row_features=store.row_features,
        loss=loss,
        precision=precision,
        light=light,
        data_fingerprint=store.fingerprint,
        config_fingerprint=fingerprint(config, ignore=(*FREE_KEYS, "training.effort")),
        assignment=assignment.describe(),
        mach_version=__version__,
    )
    return config, manifest, assignment


def _assignment(
    config: Config, n_buckets: int, store: Store, *, seed: int | None = None, capacity: int | None = None
) -> Assignment:
    hashing, n_classes = config.hashing, store.n_classes
    n_functions = hashing.repetitions * hashing.heads
    if hashing.table is None:
        return UniversalAssignment.draw(
            n_classes=n_classes,
            n_buckets=n_buckets,
            n_repetitions=n_functions,
            seed=config.training.seed if seed is None else seed,
            capacity=capacity,
        )
    if hashing.table == IDENTITY:
        if n_buckets != n_classes or hashing.heads > 1:
            raise ConfigError(
                f'hashing.table = "{IDENTITY}" with {n_buckets} buckets and {hashing.heads} heads: there is one bucket '
                f"for each of the {n_classes} classes, and one head: leave hashing.buckets and hashing.heads out"
            )
        return TableAssignment.from_table(np.tile(np.arange(n_classes), (n_functions, 1)), n_buckets)
    try:
        table_RK = np.load(fetch_source(hashing.table), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"hashing.table = {hashing.table!r} cannot be read: {error}") from error
    if table_RK.ndim != 2 or table_RK.dtype.kind not in "iu" or table_RK.shape[1] != n_classes:
        raise ConfigError(
            f"hashing.table = {hashing.table!r} is {table_RK.dtype} of shape {table_RK.shape}: it needs integers of "
            f"shape (R, {n_classes})"
        )
    if len(table_RK) < n_functions:
        raise ConfigError(
            f"hashing.table = {hashing.table!r} has {len(table_RK)} rows: {hashing.repetitions} repetitions of "
            f"{hashing.heads} heads take {n_functions}"
        )
    return TableAssignment.from_table(table_RK[:n_functions], n_buckets)


def _reopen(config: Config, store: Store, path: Place, trunk: Trunk | None) -> Run:
    run = Run.open(path, trunk)
    if run.manifest.data_fingerprint != store.fingerprint:
        _refuse(path, differing_keys(config, run.config, ignore=(*FREE_KEYS, "hashing.", "network.", "training.")))
        raise ConfigError(
            f"data.train: {path} was trained on other rows than {config.data.train} has now: give those rows, or "
            f"a new folder, with --from {path} (training.start) to go on from its weights"
        )
    config = completed(config, run.config)
    if config.training.precision == "auto":  # what it meant on the machine that began the run
        config = config.changed(training={"precision": run.manifest.precision})
    if config.training.effort == "best" and run.config.training.effort is None:  # all that there was before the dial
        config = config.changed(training={"effort": None})
    mine, theirs = config.hashing, run.config.hashing
    before, kind = run.assignment(), run.retired.get("hashing.assignment", "universal")
    is_whole = mine.repetitions <= theirs.repetitions
    if kind == "learned":
        is_whole &= len(run.finished()) == theirs.repetitions
    if kind != "universal" and not is_whole:
        raise ConfigError(
            f"{path} has {kind} buckets, which this version reads and does not make: train its other repetitions with "
            f"version {run.manifest.mach_version}, or begin a new run"
        )
    is_same_table = mine.table is not None and (mine.table, mine.repetitions) == (theirs.table, theirs.repetitions)
    is_started = config.training.start is not None
    is_known = is_same_table or is_started or kind in {"random", "balanced", "clustered"}
    drawn = {"seed": run.retired.get("hashing.seed"), "capacity": getattr(before, "prime", None)}
    config, manifest, assignment = resolve(config, store, before if is_known else None, trunk, **drawn)
    begun = {"n_rows": run.manifest.n_rows, "light": run.manifest.light}
    manifest = manifest.model_copy(update=begun)  # rows with those that are not replayed
    differences = differing_keys(config, run.config, ignore=FREE_KEYS)
    numbers = f"hashing.repetitions: {mine.repetitions} here, {theirs.repetitions} there"
    if mine.repetitions < theirs.repetitions:
        differences.append(f"{numbers} (it can only be raised)")
    if mine.repetitions > theirs.repetitions and is_started:
        differences.append(f"{numbers} (as in {config.training.start}, which training starts from)")
    _refuse(path, differences)
    if not extends(assignment, before):
        raise ConfigError(
            f"this version of mach would place classes in other buckets than {path} does: go on with version "
            f"{run.manifest.mach_version}, or begin a new run"
        )
    if config != run.config:
        run.update(config, manifest, assignment)
    if len(run.finished()) < mine.repetitions or is_due(run):
        _share(config, store, path)
    return run


def _refuse(path: Place, differences: list[str]) -> None:
    """Raise a ConfigError where keys of a run would be others."""
    if differences:
        told = "; ".join(differences)
        raise ConfigError(f"{path} was made with another configuration: {told}: give a new folder, or leave them out")
