"""`openapi.json` says what the server does: schemathesis makes requests of every kind from it, right and wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from mach.serving import app
from mach.serving.server import Settings
from tests.serving.conftest import FIXTURE, serving

DOCUMENT = Path(app.__file__).with_name("openapi.json")


LABELS = [
    f"{method.upper()} {path}"
    for path, methods in json.loads(DOCUMENT.read_text())["paths"].items()
    for method in methods
]


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("runs") / "things"
    shutil.copytree(FIXTURE, folder)
    with serving(Settings((str(folder),), learn=True)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", LABELS)
def test_the_server_does_what_it_says(schema: Any, label: str, mode: GenerationMode):
    method, path = label.split(" ")

    @settings(max_examples=6, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def asked(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and "project_id" in (case.path_parameters or {}):
            case.path_parameters["project_id"] = "things"  # a name made up is never there
        case.call_and_validate(excluded_checks=[positive_data_acceptance])  # classes made up are not there

    try:
        asked()
    except Unsatisfiable:
        pytest.skip("there is no such request")


def test_every_address_is_described(start: Callable[..., TestClient]):
    client = start()
    described = json.loads(DOCUMENT.read_text())["paths"]
    assert client.get("/openapi.json").json()["paths"].keys() == described.keys()
    routes = {(route.path, method) for route in client.app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined]
    told = {(path, method.upper()) for path, methods in described.items() for method in methods}
    assert routes - {(path, "GET") for path in app.FILES} == told
