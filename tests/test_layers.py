"""The house rule of `pyproject.toml`: imports point downwards only."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import lint_imports


def test_imports_point_downwards_only():
    assert lint_imports(str(Path(__file__).parents[1] / "pyproject.toml"), no_cache=True, no_logo=True) == 0


def test_kernels_are_compiled_in_one_way():
    """`mach.files.compiled.kernel` compiles each once a machine, and says so; numba itself would do neither."""
    room = Path(__file__).parents[1] / "mach"
    named = [path.relative_to(room).as_posix() for path in room.rglob("*.py") if "import njit" in path.read_text()]
    assert named == ["files/compiled.py"]
