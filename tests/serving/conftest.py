"""A served run: the fixture of every edit, which has calibrated probabilities, added classes and a stored subset."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from mach.config import parse_config
from mach.data.prepare import prepare
from mach.model.loading import load
from mach.model.model import MachModel
from mach.serving.connection import Connection
from mach.serving.server import Settings
from tests.fixtures import numbers

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
        clients.append(TestClient(Settings(runs or (str(run),), **options).app()))
        return clients[-1].__enter__()

    yield started
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(start: Started) -> TestClient:
    return start()


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """A run over numbers that has probabilities."""
    shutil.copytree(FIXTURE.with_name("run-format-1-table"), tmp_path / "numbers")
    model = load(tmp_path / "numbers")
    data = parse_config({"data": numbers(tmp_path) | {"cache": str(tmp_path / "cache")}}, "fixture").data
    model.calibrate(prepare(data, model.run.config.text, str(data.train), like=model.reference()))
    return tmp_path / "numbers"


@contextmanager
def serving(settings: Settings, port: int = 0) -> Iterator[str]:
    """A server at a port of this machine, by default a free one, in a thread."""
    config = uvicorn.Config(settings.app(), port=port, http=Connection, ws="none", lifespan="on", log_level="critical")
    socket, server = config.bind_socket(), uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)


@pytest.fixture
def live(run: Path) -> Iterator[Callable[..., str]]:
    """Starts a server of the run; keywords are those of `Settings`."""
    with ExitStack() as servers:
        yield lambda **options: servers.enter_context(serving(Settings((str(run),), **options)))
