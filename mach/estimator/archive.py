"""A classifier on disk: its run with one more file, which holds its parameters, classes and form of answers."""

from __future__ import annotations

import json
import shutil
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from mach.data.store import ClassNames
from mach.errors import StorageError
from mach.estimator.engine import Engine
from mach.estimator.targets import Layout, from_json, to_json
from mach.files.places import atomic_file, flush_to_disk, temporary_name, upload_folder
from mach.files.tensors import write_tensors
from mach.networks.trunk import Trunk, name_of
from mach.runs.run import Run

FILE = "classifier.json"
FORMAT = 1


def save(classifier: Any, path: Path) -> None:
    """Write a fitted `MACHClassifier` into a new folder, whole or not at all."""
    parameters, layout, engine = classifier.get_params(deep=False), classifier._layout, classifier._engine
    if isinstance(parameters["random_state"], np.random.RandomState):
        parameters["random_state"] = None
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
        description = json.loads((path / FILE).read_bytes())
        if description["format"] != FORMAT:
            raise StorageError(f"{path} has format {description['format']!r}, this version reads {FORMAT}")
        classifier = kind(**description["parameters"] | {"trunk": trunk})  # never what the file says
        classifier.classes_ = from_json(description["classes"])
        form = description["form"]
        classifier._layout = Layout(form["form"], np.dtype(form["dtype"]), form["is_sparse"])
        temperature, rate = float(description["temperature"]), float(description["rate"])
        if description["n_features_in"] is not None:
            classifier.n_features_in_ = int(description["n_features_in"])
        if description["feature_names_in"]:
            classifier.feature_names_in_ = np.array(description["feature_names_in"], object)
    except OSError as error:
        raise StorageError(
            f"{path} is no saved classifier ({FILE}: {error.strerror}): give one made by `save`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: {FILE} is damaged ({error}): save the classifier anew") from error
    Run.open(path, trunk).agreed_trunk()
    classifier._engine = Engine(path, len(classifier.classes_), temperature=temperature, rate=rate, trunk=trunk)
    return classifier
