"""Fine-tuning: a run that starts from another one's weights, features and classes, on new rows and old ones.

The new run is an ordinary one, of a store that holds the old rows and then the new ones. Old classes keep their numbers
and buckets, new ones get the next numbers. Every epoch goes through all new rows and as many old ones, drawn anew, as
``training.replay`` asks for, against forgetting. The re-ranker is trained anew, on all rows of both: a classifier needs
the rows of its class and those that look like them, whichever run saw them first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.config import Config, completed, differing_keys
from mach.data.joining import find, join
from mach.data.meta import OldPart
from mach.data.omissions import refuse
from mach.data.prepare import prepare
from mach.data.store import Reference, Store
from mach.data.transfer import META, fetch_store
from mach.errors import ConfigError, DataError, IncompleteRunError, StorageError
from mach.files.places import Place, is_there
from mach.model.classes.edits import Edits
from mach.model.classes.versions import Versions
from mach.runs.run import Run
from mach.sketch.hashing import Assignment
from mach.sketch.tables import TableAssignment, grown

STORE = "store"  # folder of the training data in a remote run
RATE_SHARE = 2 / 3  # of the run's own, for the first that starts from it; lower ones learn rare classes less
BOUND = ("text.", "hashing.", "network.hidden", "network.power", "network.trunk", "data.row_features", "training.loss")
# What each run says of its own rows, whatever those of the other were.
OWN = ("classes", "strong_columns", "weak_columns")
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Origin:
    """A finished run that others start from."""

    run: Run
    replay: float  # old rows a new one; 0: the run's data are not needed

    @classmethod
    def of(cls, config: Config) -> Origin | None:
        """What a configuration starts from, if from anything; an error when that is no run or not finished."""
        if config.training.start is None:
            return None
        run = Run.open(config.training.start)
        replay = run.config.training.replay if config.training.replay is None else config.training.replay
        n_repetitions = run.config.hashing.repetitions
        if len(run.finished()) < n_repetitions:
            raise IncompleteRunError(
                f"training.start: {run.path} has finished {len(run.finished())} of {n_repetitions} repetitions: train "
                "them first"
            )
        return cls(run, 1.0 if replay is None else replay)

    def complete(self, config: Config) -> Config:
        """Take what a configuration leaves open from the run, but for what suits a start.

        ConfigError when it asks for what the run's weights do not fit.
        """
        theirs = self.run.config
        training: dict[str, Any] = {"replay": self.replay, "precision": "auto", "effort": None}
        if theirs.training.start is None:
            training["rate"] = RATE_SHARE * theirs.training.rate
        updates: dict[str, dict[str, Any]] = {
            "data": dict.fromkeys(OWN),
            "training": training,
            "reranking": {"candidates": theirs.reranking.candidates if self.replay else 0, "pilots": 0},
        }
        mine = completed(config, theirs.changed(**updates))
        bound = [key for key in differing_keys(mine, theirs) if key.startswith(BOUND)]
        if bound:
            raise ConfigError(f"training.start: {self.run.path} has other weights than asked for: {'; '.join(bound)}")
        if mine.reranking.candidates and not self.replay:
            raise ConfigError(
                f"reranking.candidates = {mine.reranking.candidates} with training.replay = 0: classifiers of old "
                "classes need old rows: set one of them otherwise"
            )
        return mine

    @cached_property
    def edits(self) -> Edits:
        """What was done to the run's classes after its training."""
        return Versions(self.run).load()

    @cached_property
    def reference(self) -> Reference:
        """Number and names of its classes, those added after training as well, and the features of rows."""
        return Versions(self.run).reference(self.edits)

    @cached_property
    def buckets(self) -> Assignment:
        """Of all these classes, by all hash functions."""
        trained, edits = self.run.trained_assignment(range(self.run.config.hashing.repetitions)), self.edits
        if not edits.n_added:
            return trained
        before_FK = trained.buckets(np.arange(edits.n_trained))
        added_FA = edits.buckets(range(trained.n_repetitions), trained.n_buckets)
        table_FK = np.concatenate([before_FK, added_FA.astype(np.int32)], axis=1)
        return TableAssignment.from_table(table_FK, trained.n_buckets)

    def counts_K(self, store: Store) -> NDArray[np.int64]:
        """Rows of every class, those that the run has seen and the new ones of a store of `store`."""
        new_ids = store.class_ids[store.class_indptr[store.n_old_rows] :]
        counts_K = np.bincount(new_ids, minlength=store.n_classes)
        seen_K = np.concatenate([self.run.class_counts_K(), self.edits.counts_A])
        counts_K[: len(seen_K)] += seen_K
        return counts_K

    def n_rows(self, store: Store) -> int:
        """Rows that the run has seen, and new ones."""
        return self.run.manifest.n_rows + store.n_rows - store.n_old_rows

    def assignment(self, counts_K: NDArray[np.int64]) -> Assignment:
        """The run's assignment with buckets for new classes, by the rows of all (`mach.sketch.tables.grown`)."""
        seed = self.run.retired.get("hashing.seed", self.run.config.training.seed)
        return grown(self.buckets, counts_K, seed)

    def store(self, config: Config, report: Report) -> Store:
        """Old rows, if any are replayed, and then the new ones; ConfigError when the old ones are out of reach."""
        data = config.data
        new = prepare(data, config.text, data.train, like=self.reference, grows=True, check=refuse, report=report)
        options: dict[str, Any] = {"removed": self.edits.removed, "cache": data.cache, "report": report}
        if not self.replay:
            return join(new, None, self.reference, **options)
        try:
            old = training_store(self.run, report)
        except (DataError, StorageError) as error:
            raise ConfigError(
                f"the training rows of {self.run.path} cannot be replayed ({error}): bring them back, or set "
                "training.replay=0, which forgets more"
            ) from error
        theirs = self.run.config
        fraction, seed = theirs.data.validation_fraction, theirs.training.seed
        rest = OldPart(n_rows=old.n_rows - old.n_old_rows, fraction=fraction, seed=seed)
        return join(new, old, self.reference, [*old.old_parts, rest], **options)

    def keep_removed(self, run: Run) -> None:
        """Tell a run that started from here which classes it shall not return, and of the named sets of classes."""
        edits, versions = self.edits, Versions(run)
        if not (len(edits.removed) or edits.subsets):
            return
        with versions.turn() as current:
            if current.version == 0:
                kept = Edits(run.manifest.n_classes, removed=edits.removed, subsets=edits.subsets)
                versions.write(current, kept, "start", f"removed classes and subsets as in {self.run.path}")

    def weights(self) -> dict[int, Path]:
        """The file of every repetition's weights, on this machine."""
        return {r: self.run.repetition(r).weights_file() for r in self.run.finished()}


def training_store(run: Run, report: Report = lambda stage, fraction: None) -> Store:
    """The data that a run was trained on, from wherever they can be had; an error when they are gone or changed.

    They are found in the cache that the run names, but not written there (`Run.reading`).
    """
    wanted, config = run.manifest.data_fingerprint, run.config.model_copy(update={"data": run.reading})
    for cache in (run.config.data.cache, None):
        if (kept := find(wanted, cache)) is not None:
            return kept
    try:
        store = training_data(config, run.path, report)
    except (ConfigError, DataError) as error:
        raise StorageError(str(error)) from error
    if store.fingerprint == wanted:
        return store
    raise StorageError(f"{config.data.train} has fingerprint {store.fingerprint}, the run was trained on {wanted}")


def training_data(config: Config, run: Place | None, report: Report) -> Store:
    """The data that the configuration names; where they are out of reach, those that the remote run took along.

    A run that has begun from another one goes on with the rows that it began with, as long as they are in the cache:
    the other may be gone, or its classes may have changed since.
    """
    if run is not None and config.training.start is not None:
        begun = Run.open(run)
        joined = find(begun.manifest.data_fingerprint, config.data.cache)
        if joined is not None and begun.config.data.train == config.data.train:
            return joined
    try:
        start = Origin.of(config)
        if start is not None:
            return start.store(config, report)
        if run is None:
            return prepare(config.data, config.text, config.data.train, check=refuse, report=report)
        return prepare(config.data, config.text, config.data.train, former=Run.open(run).reference(), report=report)
    except (ConfigError, DataError, StorageError):
        if run is not None and not isinstance(run, Path) and is_there(run / STORE / META):
            return fetch_store(run / STORE)
        raise
