"""Setting up a run beside others that do the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from mach.config import Config
from mach.data.prepare import prepare as prepare_data
from mach.launch import start
from mach.launch.setup import set_up


def test_a_run_that_appears_while_the_data_are_read_is_joined(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prepare = prepare_data

    def prepare_while_another_is_faster(*arguments, **options):
        monkeypatch.setattr(start, "prepare", prepare)
        set_up(config, tmp_path / "run")
        return prepare(*arguments, **options)

    monkeypatch.setattr(start, "prepare", prepare_while_another_is_faster)
    run, store = set_up(config, tmp_path / "run")
    assert run.manifest.data_fingerprint == store.fingerprint
    assert (tmp_path / "run/manifest.json").exists()
