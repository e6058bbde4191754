"""A served run: the fixture of every edit, which has calibrated probabilities, added classes and a stored subset."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mach.data.prepare import prepare
from mach.model.loading import load
from mach.model.model import MachModel
from mach.serving.server import Service, Settings

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-format-1-edited"
TEXTS = ["red cup ala", "a blue hat beside a green car", "brown ene", "nothing known", ""]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURE, tmp_path / "things")
    return tmp_path / "things"


@pytest.fixture(scope="session")
def offline() -> MachModel:
    return load(FIXTURE)


Started = Callable[..., TestClient]


@pytest.fixture
def start(run: Path) -> Iterator[Started]:
    """Starts a server of the run in this process; keywords are those of `Settings`."""
    clients: list[TestClient] = []

    def started(*runs: str, **options) -> TestClient:
        settings = Settings(runs or (str(run),), **options)
        service = Service(settings, settings.projects(lambda line: None))
        clients.append(TestClient(service.app()))
        return clients[-1].__enter__()

    yield started
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(start: Started) -> TestClient:
    return start()


@pytest.fixture
def calibrated(trained: Path, planted: Path, tmp_path: Path) -> Path:
    """A run over numbers that has probabilities."""
    shutil.copytree(trained, tmp_path / "numbers")
    model = load(tmp_path / "numbers")
    model.calibrate(
        prepare(model.run.reading, model.run.config.text, str(planted / "test.txt"), like=model.reference())
    )
    return tmp_path / "numbers"
