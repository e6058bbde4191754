"""A classifier on disk: its run with one more file, which holds its parameters, classes and form of answers."""

from __future__ import annotations

import json
import shutil
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from mach.config import Section
from mach.data.class_names import ClassNames
from mach.errors import StorageError
from mach.estimator.engine import Engine
from mach.estimator.targets import Form, Layout, from_json, to_json
from mach.files.places import atomic_file, flush_to_disk, read_bytes, temporary_name, upload_folder
from mach.files.records import first_of, parse_json
from mach.files.tensors import write_tensors
from mach.networks.trunk import Trunk, name_of
from mach.runs.run import Run

FILE = "classifier.json"
FORMAT: Literal[1] = 1


class _Form(Section):
    form: Form
    dtype: str = Field(max_length=16, pattern=r"^[<>|=]?([biufUO?][0-9]{0,6}|[mM]8\[[0-9]{0,6}[A-Za-z]{1,2}\])$")
    is_sparse: bool


class _Saved(Section):
    """The content of classifier.json."""

    format: Literal[1] = FORMAT
    parameters: dict[str, Any]
    classes: dict[str, Any]
    form: _Form
    temperature: float = Field(gt=0, le=1e9)
    rate: float = Field(ge=0, le=1e9)
    n_features_in: int | None = Field(ge=1)
    feature_names_in: list[Any]


def save(classifier: Any, path: Path) -> None:
    """Write a fitted `MACHClassifier` into a new folder, whole or not at all."""
    parameters, layout, engine = classifier.get_params(deep=False), classifier._layout, classifier._engine
    if isinstance(parameters["random_state"], np.random.RandomState):
        parameters["random_state"] = None
    parameters["class_texts"] = None  # the run has them
    if isinstance(parameters["class_weight"], dict):  # its keys are classes, which JSON would make strings
        parameters["class_weight"] = None
    if classifier.trunk is not None:
        parameters["trunk"] = name_of(classifier.trunk)
    description = {
        "format": FORMAT,
        "parameters": parameters,
        "classes": to_json(classifier.classes_),
        "form": {"form": layout.form, "dtype": layout.dtype.str, "is_sparse": layout.is_sparse},
        "temperature": engine.temperature,
        "rate": engine.rate,
        "n_features_in": getattr(classifier, "n_features_in_", None),
        "feature_names_in": getattr(classifier, "feature_names_in_", np.array([])).tolist(),
    }
    try:
        content = json.dumps(description, indent=1, default=methodcaller("tolist")).encode()
    except (TypeError, AttributeError) as error:
        raise StorageError(f"a parameter cannot be saved: {error}") from error
    if path.exists():
        raise StorageError(f"{path} exists already: remove it, or choose another name")
    run, names = engine.model.run, [str(value) for value in classifier.classes_.tolist()]
    stored = ClassNames.of(names + [""] * (run.manifest.n_classes - len(names)))
    partial = temporary_name(path)
    try:
        upload_folder(engine.path, partial)
        with atomic_file(partial / FILE) as file:
            file.write(content)
        with atomic_file(partial / run.class_names_file.name) as file:
            write_tensors(file, {"offsets": stored.offsets, "utf8": stored.utf8}, {})
        partial.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def restore(kind: type, path: Path, trunk: Trunk | None) -> Any:
    """A classifier of this kind as `save` wrote it."""
    try:
        told = _Saved.model_validate(parse_json(read_bytes(path / FILE), path / FILE))
        classifier = kind(**told.parameters | {"trunk": trunk, "address": None})  # never what the file says
        classifier.classes_ = from_json(told.classes)
        classifier._layout = Layout(told.form.form, np.dtype(told.form.dtype), told.form.is_sparse)
    except OSError as error:
        raise StorageError(
            f"{path} is no saved classifier ({FILE}: {error.strerror}): give one made by `save`"
        ) from error
    except ValidationError as error:
        raise StorageError(f"{path}: {FILE} is damaged ({first_of(error)}): save the classifier anew") from error
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise StorageError(f"{path}: {FILE} is damaged ({error!s:.100}): save the classifier anew") from error
    if told.n_features_in is not None:
        classifier.n_features_in_ = told.n_features_in
    if told.feature_names_in:
        classifier.feature_names_in_ = np.array(told.feature_names_in, object)
    run = Run.open(path, trunk)
    run.agreed_trunk()
    n_classes, n_features = len(classifier.classes_), told.n_features_in
    if not 1 <= n_classes <= run.manifest.n_classes or n_features not in (None, run.manifest.n_features):
        raise StorageError(
            f"{path}: {FILE} has {n_classes} classes and {n_features} features, the run {run.manifest.n_classes} and "
            f"{run.manifest.n_features}: save the classifier anew"
        )
    classifier._engine = Engine(path, n_classes, temperature=told.temperature, rate=told.rate, trunk=trunk)
    return classifier
