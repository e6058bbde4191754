"""Joining old rows and new ones into one store, whose classes are the old ones and then the new ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch, read_batch, read_classes
from mach.data.class_texts import FILE, ClassTexts
from mach.data.meta import OldPart
from mach.data.names import class_name, ids_by_name
from mach.data.omissions import NOTES
from mach.data.store import Chunk, Reference, Store
from mach.data.writer import StoreWriter
from mach.errors import DataError, StorageError
from mach.files.caches import cache_folder
from mach.files.places import kept
from mach.files.tensors import digest_of

BLOCK_ROWS = 2**16


def join(
    new: Store,
    old: Store | None,
    like: Reference,
    old_parts: Sequence[OldPart] = (),
    *,
    removed: NDArray[np.int64] | None = None,
    cache: str | None = None,
    report: Callable[[str, float], None] = lambda stage, fraction: None,
) -> Store:
    """All old rows, then all new ones, as a store of the cache; made once.

    Cost: reading and writing all rows once; memory is bounded by blocks of them and the class names.

    Parameters
    ----------
    new : Store
        Rows with the features of ``like``. Its classes are found by their names among those of ``like``; where it has
        none, its ids are taken as they stand. DataError when one of its rows has a class that was removed.
    old : Store or None
        Rows that ``like`` learned from, split into ``old_parts``, if they shall be learned from again.
    like : Reference
        Features and known classes: 0 to K - 1. New names follow as K, K + 1, ...
    removed : int64 array, optional
        Ids of known classes that are no more: old rows lose them.
    cache, report : optional
        As of `mach.data.prepare.prepare`.
    """
    names, ids_K = None, None
    if like.class_names is not None:
        names = list(like.class_names)
    elif new.class_names is not None and new.n_classes >= like.n_classes:
        names = list(new.class_names)
    if like.class_names is not None and new.class_names is not None:
        known, names = ids_by_name(like.class_names), list(like.class_names)
        for name in new.class_names:
            if name not in known and class_name(name) not in known:
                known[name] = known[class_name(name)] = len(names)
                names.append(name)
        ids_K = np.array([known[name if name in known else class_name(name)] for name in new.class_names], np.int32)
    n_classes = max(like.n_classes, new.n_classes) if names is None else len(names)
    texts = _texts(new, like, ids_K, n_classes)
    gone = [] if removed is None else removed.tolist()
    _refuse_removed(new, ids_K, gone, like)
    of = [
        new.fingerprint,
        old and old.fingerprint,
        like.fingerprint,
        n_classes,
        [part.model_dump() for part in old_parts],
    ]
    of += [gone] if gone else []
    of += [] if texts is None else [digest_of(texts.to_arrays())]
    key = hashlib.blake2b(json.dumps(of).encode(), digest_size=16).hexdigest()

    def make(path: Path) -> None:
        with StoreWriter(
            path,
            source=str(new.meta["source"]),
            dense=like.is_dense,
            n_features=like.n_features,
            n_classes=n_classes,
            row_features=like.row_features,
            key=key,
            old_parts=old_parts if old is not None else (),
        ) as writer:
            n_rows = new.n_rows + (0 if old is None else old.n_rows)
            for store, mapping in ((old, None), (new, ids_K)):
                for chunk in [] if store is None else chunks_of_store(store, np.arange(store.n_rows), mapping, gone):
                    writer.append(chunk)
                    report("joining", writer.n_rows / n_rows)
            writer.class_names, writer.text_features, writer.class_texts = names, like.text_features, texts
            writer.n_unknown_classes = new.meta["n_unknown_classes"]
            writer.notes = {name: new.meta[name] for name in NOTES if name in new.meta}

    return Store.open(kept(cache_folder(cache) / f"joined-{key}", make))


def _texts(new: Store, like: Reference, ids_K: NDArray[np.int32] | None, n_classes: int) -> ClassTexts | None:
    """What old classes and new ones say of themselves: what the new data say, or else the old; None for names alone."""
    theirs = new.class_texts if FILE in new.meta["bytes"] else None
    if theirs is None and (like.class_texts is None or like.class_texts.names is like.class_names):
        return None
    own, more = like.class_texts or ClassTexts.of([""] * like.n_classes), theirs or new.class_texts
    ids = np.arange(new.n_classes) if ids_K is None else ids_K
    is_told = ids >= (0 if theirs is not None else like.n_classes)
    return own.changed(n_classes, ids, np.flatnonzero(is_told), more)


def find(fingerprint: str, cache: str | None = None) -> Store | None:
    """A store of the cache with this content, whatever it was made of; None where there is none."""
    for meta in sorted(cache_folder(cache).glob("*/meta.json")):
        with suppress(StorageError):  # another process may be removing it
            if (store := Store.open(meta.parent)).fingerprint == fingerprint:
                return store
    return None


def chunks_of_store(
    store: Store, rows: NDArray[np.int64], ids_K: NDArray[np.int32] | None = None, removed: Sequence[int] = ()
) -> Iterator[Chunk]:
    """Some rows of a store, their classes renumbered where ``ids_K`` says how, and without those that are removed."""
    for begin in range(0, len(rows), BLOCK_ROWS):
        block = rows[begin : begin + BLOCK_ROWS]
        ids, counts = read_classes(store, block)
        places = np.repeat(np.arange(len(block)), counts)
        if ids_K is not None:
            ids = ids_K[ids]
            ids = ids[np.lexsort((ids, places))]
        stays = ~np.isin(ids, removed)
        counts = np.bincount(places[stays], minlength=len(block))
        batch = read_batch(store, block)
        features = (batch.indptr, batch.indices, batch.values) if isinstance(batch, SparseBatch) else batch.values_ND
        yield Chunk(np.append(0, np.cumsum(counts)), ids[stays], features)


def _refuse_removed(new: Store, ids_K: NDArray[np.int32] | None, gone: list[int], like: Reference) -> None:
    with_rows = np.flatnonzero(new.class_counts()) if gone else np.empty(0, np.int64)
    found = np.intersect1d(with_rows if ids_K is None else ids_K[with_rows], gone)
    if len(found):
        name = f" ({like.class_names[int(found[0])]!r:.60})" if like.class_names is not None else ""
        raise DataError(
            f"{new.meta['source']} has rows of class {found[0]}{name}, which was removed from {like.path}: leave them "
            "out, name the class otherwise, or undo its removal"
        )
