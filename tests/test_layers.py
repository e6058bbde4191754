"""The house rule of `pyproject.toml`: imports point downwards only."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import lint_imports


def test_imports_point_downwards_only():
    assert lint_imports(str(Path(__file__).parents[1] / "pyproject.toml"), no_cache=True, no_logo=True) == 0
