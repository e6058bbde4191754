"""What test rows, queries and further training rows must have in common with the rows that a model learned from."""

from __future__ import annotations

from collections.abc import Sequence

from mach.data.sources import Shape
from mach.data.store import Reference, Store
from mach.errors import DataError


def agreed_shape(
    source: str,
    shape: Shape,
    is_dense: bool,
    like: Store | Reference | None = None,
    names: Sequence[str] | None = None,
    grows: bool = False,
) -> Shape:
    """The shape of a store of a source that states ``shape``: its D and K are those of ``like`` and of the names.

    Raises DataError when they do not agree; with ``grows`` more classes than those of ``like`` agree with it.
    """
    _, n_features, n_classes = shape
    if like is not None:
        is_wider = n_features is not None and n_features > like.n_features
        if is_wider or like.is_dense != is_dense or (is_dense and n_features != like.n_features):
            raise DataError(
                f"{source} has {_features(is_dense, n_features)}, the training store {like.path} has "
                f"{_features(like.is_dense, like.n_features)}: prepare both in the same way"
            )
        if n_classes is not None and n_classes > like.n_classes and not grows:
            raise DataError(
                f"{source} has K = {n_classes} classes, the training store {like.path} has K = {like.n_classes}: "
                "prepare both in the same way"
            )
        n_features = like.n_features
        if n_classes is not None or not grows:
            n_classes = max(n_classes or 0, like.n_classes)
    if names is not None:
        if n_classes is not None and (n_classes > len(names) or (n_classes < len(names) and not grows)):
            raise DataError(
                f"data.classes has {len(names)} names, {source} has K = {n_classes} classes: set it to a "
                "file that names each once"
            )
        n_classes = len(names)
    return Shape(shape.n_rows, n_features, n_classes)


def agreed_store(store: Store, like: Store | Reference | None, grows: bool = False) -> Store:
    """A store that is a source; DataError where its features and classes do not mean what those of ``like`` do."""
    if like is None or store.fingerprint == like.fingerprint:
        return store
    shape = Shape(store.n_rows, store.n_features, store.n_classes)
    agreed_shape(str(store.path), shape, store.is_dense, like, grows=grows)
    names, names_of_like = store.class_names, like.class_names
    if store.meta["text_features"] != (like.text_features and like.text_features.fingerprint()):
        raise DataError(f"store {store.path} has other text features than {like.path}: prepare its source with `like`")
    if grows:
        if names is None and names_of_like is not None and store.n_classes > like.n_classes:
            raise DataError(
                f"store {store.path} has K = {store.n_classes} classes without names, {like.path} names its "
                f"{like.n_classes}: prepare its source with `classes`"
            )
    elif names is not None and names_of_like is not None and list(names) != list(names_of_like):
        raise DataError(f"store {store.path} has other class names than {like.path}: prepare its source with `like`")
    return store


def _features(is_dense: bool, n_features: int | None) -> str:
    kind = "dense" if is_dense else "sparse"
    return f"{kind} features" if n_features is None else f"D = {n_features} {kind} features"
