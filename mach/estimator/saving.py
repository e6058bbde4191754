"""A classifier on disk: its run with one more file, which holds its parameters, classes and form of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mach.errors import StorageError
from mach.estimator.engine import Engine
from mach.estimator.parameters import spelled
from mach.estimator.vocabulary import Layout, Vocabulary
from mach.networks.permission import Trunk, name_of
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
        "classes": Vocabulary(classifier.classes_).to_json(),
        "form": {"form": layout.form, "dtype": layout.dtype.str, "is_sparse": layout.is_sparse},
        "temperature": engine.temperature,
        "rate": engine.rate,
        "n_features_in": getattr(classifier, "n_features_in_", None),
        "feature_names_in": getattr(classifier, "feature_names_in_", np.array([])).tolist(),
    }
    try:
        content = json.dumps(description, indent=1, default=spelled).encode()
    except TypeError as error:
        raise StorageError(f"a parameter cannot be saved: {error}") from error
    engine.copy_to(path, {FILE: content}, [str(value) for value in classifier.classes_.tolist()])


def restore(kind: type, path: Path, trunk: Trunk | None) -> Any:
    """A classifier of this kind as `save` wrote it."""
    try:
        description = json.loads((path / FILE).read_bytes())
        if description["format"] != FORMAT:
            raise StorageError(f"{path} has format {description['format']!r}, this version reads {FORMAT}")
        classifier = kind(**description["parameters"] | {"trunk": trunk})  # never what the file says
        classifier.classes_ = Vocabulary.from_json(description["classes"]).array
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
    classifier._engine = Engine(path, len(classifier.classes_), temperature, rate=rate, trunk=trunk)
    return classifier
