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
    """The shape that a store shall have: that of the training store, or with as many classes as there are names.

    Parameters
    ----------
    source : str
        As messages call it.
    shape : Shape
        What it states.
    is_dense, like, grows
        Whether its rows are dense; the training store, and whether classes may come to its own.
    names : sequence of str, optional
        Of classes, from 0.

    Raises
    ------
    DataError
        When they do not agree.
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
        if not grows:
            n_classes = like.n_classes
        elif n_classes is not None:
            n_classes = max(n_classes, like.n_classes)
    if names is not None:
        if grows and n_classes is not None and n_classes > len(names):
            raise DataError(
                f"{source} has K = {n_classes} classes, {len(names)} have names: set data.class_names to a file that "
                "names all"
            )
        if not grows and n_classes is not None and n_classes != len(names):
            raise DataError(f"class_names has {len(names)} names, {source} has K = {n_classes} classes: name each once")
        n_classes = len(names)
    return Shape(shape.n_rows, n_features, n_classes)


def agreed_store(store: Store, like: Store | Reference | None, grows: bool = False) -> Store:
    """A store given as the source; DataError where its features and classes do not mean what those of ``like`` do."""
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
                f"{like.n_classes}: prepare its source with class_names"
            )
    elif names is not None and names_of_like is not None and list(names) != list(names_of_like):
        raise DataError(f"store {store.path} has other class names than {like.path}: prepare its source with `like`")
    return store


def _features(is_dense: bool, n_features: int | None) -> str:
    kind = "dense" if is_dense else "sparse"
    return f"{kind} features" if n_features is None else f"D = {n_features} {kind} features"
