"""Fixtures by cost: a planted data set (free), a configuration, a run trained in this process (seconds)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.compiled import compiled_kernels

os.environ.setdefault("SCIPY_ARRAY_API", "1")  # else scikit-learn skips one of its checks; read when scipy is imported
os.environ["NUMBA_CACHE_DIR"] = compiled_kernels()

import numpy as np
import pytest
from hypothesis import settings

from mach.config import Config, parse_config
from mach.model.loading import load
from mach.model.model import MachModel
from mach.training.conductor import train

settings.register_profile("mach", deadline=None)  # no test depends on how busy the machine is
settings.load_profile("mach")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else children of a suite under nohup ignore it, as they should
N_CLASSES, N_FEATURES = 120, 400
LONG = [  # files in the order in which they are begun, before all others: none of them is to be what is left in the end
    "training/test_cluster.py",
    "training/test_local.py",
    "test_pages.py",
    "estimator/test_estimator.py",
    "runs/test_actors.py",
    "runs/test_storage.py",
    "attacks/test_trunk.py",
    "training/test_conductor.py",
    "cli/test_cli.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, file in enumerate(LONG) if item.path.match(file)), len(LONG)))


def planted_rows(n_rows: int, seed: int) -> list[str]:
    """Repository text lines whose classes are known from the features.

    Class k owns features 3k, 3k + 1 and 3k + 2; a row of one or two classes shows two features of each, and
    some noise from the 40 features that no class owns.
    """
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(n_rows):
        classes = np.sort(generator.choice(N_CLASSES, generator.integers(1, 3), replace=False))
        owned = np.concatenate([3 * k + generator.choice(3, 2, replace=False) for k in classes])
        noise = 360 + generator.choice(40, 2, replace=False)
        features = np.sort(np.concatenate([owned, noise]))
        line = ",".join(map(str, classes))
        lines.append(line + "".join(f" {j}:{generator.uniform(0.3, 0.7):.4f}" for j in features))
    return lines


def write_repository(path: Path, lines: list[str]) -> Path:
    path.write_text(f"{len(lines)} {N_FEATURES} {N_CLASSES}\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.txt (3,000 rows), test.txt (400) and names.txt."""
    folder = tmp_path_factory.mktemp("planted")
    write_repository(folder / "train.txt", planted_rows(3000, seed=1))
    write_repository(folder / "test.txt", planted_rows(400, seed=2))
    unlabelled = [line[line.index(" ") :] for line in planted_rows(60, seed=3)]
    write_repository(folder / "unlabelled.txt", unlabelled)
    (folder / "names.txt").write_text("".join(f"class number {k}\n" for k in range(N_CLASSES)))
    return folder


@pytest.fixture(scope="session")
def config(planted: Path) -> Config:
    """Three small repetitions that fit the planted set in about a second each."""
    return parse_config(
        {
            "data": {
                "train": str(planted / "train.txt"),
                "test": str(planted / "test.txt"),
                "classes": str(planted / "names.txt"),
                "cache": str(planted / "cache"),
                "row_features": 0,
                "validation_fraction": 0.0,
            },
            "hashing": {"repetitions": 3, "buckets": 32, "heads": 1},
            "network": {"hidden": [32], "dropout": 0.1, "weights": "bfloat16", "power": 1.0},
            "reranking": {"candidates": 0},
            "training": {"epochs": 8, "batch": 64, "rate": 0.02, "precision": "float32"},
        },
        "fixture",
    )


@pytest.fixture(scope="session")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, trained in this process without interruption: the reference for every other way."""
    path = tmp_path_factory.mktemp("runs") / "trained"
    train(config, path, launcher="here")
    return path


@pytest.fixture(scope="session")
def model(trained: Path) -> MachModel:
    return load(trained)
