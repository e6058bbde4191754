"""Parameters of a classifier in Python as sections of a configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
from joblib import effective_n_jobs

from mach.errors import ConfigError
from mach.networks.trunk import name_of

Tree = dict[str, dict[str, Any]]  # sections of a configuration
PARAMETERS = {  # constructor arguments that stand for keys of their name, by section
    "hashing": ("repetitions", "buckets", "heads"),
    "network": ("hidden", "dropout", "trunk"),
    "training": ("effort", "epochs", "batch", "rate"),
    "reranking": ("candidates",),
    "launch": ("address",),
}


def sections_of(parameters: dict[str, Any]) -> Tree:
    """The sections that parameters and their ``config`` state, in the types of TOML.

    Raises a ConfigError when a key is none of a section, names a file of rows, or is stated twice.

    Examples
    --------
    >>> sections_of({"hidden": 64, "launcher": "local", "n_jobs": 2, "config": {"text.words": (1, 2)}})
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
    for name, key in ((name, f"{section}.{name}") for section, names in PARAMETERS.items() for name in names):
        value = parameters.get(name)
        if value is None:
            continue
        if key in flat:
            raise ConfigError(f"{name} = {value!r} and config[{key!r}] = {flat[key]!r} say the same: give {name} alone")
        if name == "trunk":
            value = name_of(value)
        flat[key] = _toml_value([value] if name == "hidden" and np.ndim(value) == 0 else value)
    launcher, n_jobs = parameters["launcher"], parameters["n_jobs"]
    if n_jobs == 0:
        raise ConfigError("n_jobs = 0: give 1 or more, or -1 for all cores")
    # a Ray cluster has as many workers as find a place unless they are stated
    n_workers = None if n_jobs is None and launcher == "ray" else effective_n_jobs(n_jobs)
    is_here = launcher == "local" and n_workers == 1
    flat |= {"launch.launcher": "here" if is_here else launcher, "launch.workers": n_workers}
    tree: Tree = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return tree


def _toml_value(value: Any) -> Any:
    """No tuples, no numbers of numpy."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_toml_value(part) for part in value] if isinstance(value, list | tuple) else value
