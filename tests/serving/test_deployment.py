"""What `scripts/serving` starts is a command that `mach serve` takes, and what it asks and mounts is there."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from mach.cli import main
from mach.serving.server import STOP_SECONDS
from tests.serving.conftest import Started

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts/serving"


def options_of(command: list[str]) -> dict[str, Any]:
    """What a command line says; a UsageError where the verb takes it otherwise."""
    assert [Path(command[0]).name, command[1]] == ["mach", "serve"]
    verb = main.get_command(click.Context(main), "serve")
    assert verb is not None
    return verb.make_context("serve", command[2:]).params


def instructions() -> list[tuple[str, str]]:
    """Of the Containerfile, without comments and with its lines joined."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Containerfile").read_text(), flags=re.M).replace("\\\n", "")
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in text.splitlines()]


@pytest.fixture(scope="module")
def deployment() -> tuple[dict[str, Any], dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    first, second = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    return first, second


def test_the_container_starts_a_server(start: Started):
    said = dict(instructions())
    options = options_of(json.loads(said["ENTRYPOINT"]) + json.loads(said["CMD"]))
    assert (options["host"], options["runs"]) == ("0.0.0.0", ("/run/mach/books",))
    assert str(options["token_file"]) == "/run/mach/tokens"
    assert int(said["EXPOSE"]) == options["port"]
    checked = re.search(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", said["HEALTHCHECK"])
    assert checked is not None
    assert int(checked[1]) == options["port"]
    assert start().get(checked[2]).status_code == 200


def test_the_container_is_built_of_what_is_there():
    copied = [word for kind, words in instructions() if kind == "COPY" for word in words.split()[:-1]]
    assert "pyproject.toml" in copied
    assert all((ROOT / name).exists() for name in copied)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [extra] = re.findall(r"/source\[(\w+)\]", (FOLDER / "Containerfile").read_text())
    assert extra in extras


def test_the_unit_starts_a_server():
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(FOLDER / "mach-serve.service")
    service = unit["Service"]
    options = options_of(shlex.split(service["ExecStart"]))
    assert str(options["token_file"]) == f"%d/{service['LoadCredential'].partition(':')[0]}"
    assert int(service["TimeoutStopSec"]) > STOP_SECONDS
    assert service["Environment"] == f"MACH_CACHE=/var/cache/{service['CacheDirectory']}"


def test_the_pods_start_a_server_and_are_asked_where_it_answers(
    deployment: tuple[dict[str, Any], dict[str, Any]], start: Started, tmp_path: Path
):
    pods, service = deployment
    spec = pods["spec"]["template"]["spec"]
    [container] = spec["containers"]
    options = options_of(json.loads(dict(instructions())["ENTRYPOINT"]) + container["args"])
    [port] = container["ports"]
    assert port["containerPort"] == options["port"]
    assert pods["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(options["port"])
    (tmp_path / "tokens").write_text("read " + "r" * 16)
    client = start(token_file=tmp_path / "tokens")
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[kind]["httpGet"]
        assert asked["port"] == port["name"]
        assert client.get(asked["path"]).status_code == 200  # without a token
    assert spec["terminationGracePeriodSeconds"] >= STOP_SECONDS + float(
        container["lifecycle"]["preStop"]["exec"]["command"][1]
    )
    assert f"--uid {spec['securityContext']['runAsUser']} " in (FOLDER / "Containerfile").read_text()
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounts.keys() == {one["name"] for one in spec["volumes"]}
    assert options["token_file"].parent == Path(mounts["tokens"])
    assert all(Path(run).is_relative_to(mounts["runs"]) for run in options["runs"])
    assert mounts["tmp"] == "/tmp"  # counts are kept there, and all else is read only
    assert service["spec"]["selector"].items() <= pods["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
