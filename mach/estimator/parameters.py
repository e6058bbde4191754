"""Parameters of a classifier in Python to sections of a configuration, and to JSON and back."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from mach.errors import ConfigError
from mach.networks.permission import name_of

PARAMETERS = {  # constructor arguments and the configuration keys that they stand for
    "repetitions": "hashing.repetitions",
    "buckets": "hashing.buckets",
    "heads": "hashing.heads",
    "hidden": "network.hidden",
    "dropout": "network.dropout",
    "epochs": "training.epochs",
    "batch": "training.batch",
    "rate": "training.rate",
    "candidates": "reranking.candidates",
    "address": "launch.address",
}


def given_by(parameters: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections that parameters and their ``config`` state, in the types of TOML.

    Raises
    ------
    ConfigError
        When a key is none of a section, names a file of rows, or is stated twice.

    Examples
    --------
    >>> given_by({"hidden": 64, "launcher": "local", "n_jobs": 2, "config": {"text.words": (1, 2)}})
    {'text': {'words': [1, 2]}, 'network': {'hidden': [64]}, 'launch': {'launcher': 'local', 'workers': 2}}
    """
    flat: dict[str, Any] = {}
    for key, value in (parameters.get("config") or {}).items():
        section, dot, name = key.partition(".")
        if not dot:
            raise ConfigError(f"config key {key!r}: write section.key, such as 'training.epochs'")
        if section == "data" and name not in ("row_features", "validation_fraction"):
            raise ConfigError(f"config key {key!r}: rows come from X and y, not from a file")
        flat[key] = _toml_value(value)
    for name, key in PARAMETERS.items():
        value = parameters.get(name)
        if value is not None and key in flat:
            raise ConfigError(f"{name} = {value!r} and config[{key!r}] = {flat[key]!r} say the same: give one of them")
        if value is not None:
            flat[key] = _toml_value([value] if name == "hidden" and np.ndim(value) == 0 else value)
    if parameters.get("trunk") is not None:
        if "network.trunk" in flat:
            raise ConfigError("trunk and config['network.trunk'] say the same: give trunk alone")
        flat["network.trunk"] = name_of(parameters["trunk"])
    launcher, n_workers = parameters["launcher"], _n_workers(parameters["n_jobs"], parameters["launcher"])
    is_here = launcher == "local" and n_workers == 1
    flat |= {"launch.launcher": "here" if is_here else launcher, "launch.workers": n_workers}
    tree: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def refuse_large(n_rows: int, n_classes: int, most_bytes: int, what: str) -> None:
    """Refuse a float32 matrix of all classes that is larger than stated, with a ConfigError."""
    n_bytes = 4 * n_rows * n_classes
    if n_bytes > most_bytes:
        raise ConfigError(
            f"{what} of {n_rows} rows and {n_classes} classes takes {n_bytes} bytes, max_proba_bytes is {most_bytes}: "
            "ask predict_topk for the best classes, give fewer rows, or raise it"
        )


def spelled(value: Any) -> Any:
    """What JSON itself does not know, for ``json.dumps``."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r:.60} is a {type(value).__name__}")


def _n_workers(n_jobs: int | None, launcher: str) -> int | None:
    """Workers by joblib's convention; a Ray cluster has as many as find a place unless they are stated."""
    if n_jobs is None:
        return None if launcher == "ray" else 1
    if n_jobs == 0:
        raise ConfigError("n_jobs = 0: give 1 or more, or -1 for all cores")
    return int(n_jobs) if n_jobs > 0 else max(1, len(os.sched_getaffinity(0)) + 1 + int(n_jobs))


def _toml_value(value: Any) -> Any:
    """No tuples, no numbers of numpy."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_toml_value(part) for part in value] if isinstance(value, list | tuple) else value
