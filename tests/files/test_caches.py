"""Where caches lie: the variable that moves them all, and what serves where nothing can be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mach.errors import ConfigError
from mach.files.caches import cache_folder

ROOT = Path(__file__).parents[2]


def folder_of_kernels(*fixed: Path, also: str = "path", **environment: str) -> tuple[str, str]:
    """Where a fresh interpreter keeps compiled kernels, and what it says; its own folders cannot be written.

    Nor can the ``fixed`` ones. ``also`` is what it tells in place of the folder, which is ``path``.
    """
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "really = os.access\n"
        f"fixed = {tuple(map(str, (ROOT, *fixed)))!r}\n"
        "os.access = lambda path, mode: really(path, mode) and not str(path).startswith(fixed)\n"
        "from mach.sketch.kernels.search import search\n"
        "path = Path(search._cache.cache_path)\n"
        f"print({also})\n"
    )
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True
    )
    return ran.stdout.strip(), ran.stderr.strip()


def test_one_variable_moves_all_caches(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "all"))
    assert cache_folder() == tmp_path / "all"
    assert cache_folder(str(tmp_path / "given")) == tmp_path / "given"
    kernels, told = folder_of_kernels(MACH_CACHE=str(tmp_path / "all"), HOME=str(tmp_path))
    assert Path(kernels).is_relative_to(tmp_path / "all" / "compiled")
    assert told == ""


def test_numbas_own_variable_is_heard(tmp_path: Path):
    kernels, _ = folder_of_kernels(NUMBA_CACHE_DIR=str(tmp_path / "own"), MACH_CACHE=str(tmp_path), HOME=str(tmp_path))
    assert Path(kernels).is_relative_to(tmp_path / "own")


def test_a_good_cache_stays_where_numbas_cannot_be_written(tmp_path: Path):
    kernels, told = folder_of_kernels(NUMBA_CACHE_DIR="/proc/none", MACH_CACHE=str(tmp_path / "all"), HOME="/proc/none")
    assert Path(kernels).is_relative_to(tmp_path / "all" / "compiled")
    assert told == ""


def test_a_home_that_can_be_written_needs_no_other(tmp_path: Path):
    _, told = folder_of_kernels(HOME=str(tmp_path))
    assert told == ""


def test_kernels_of_an_image_are_used_where_they_cannot_be_written(tmp_path: Path):
    image = tmp_path / "image"
    kernels, _ = folder_of_kernels(MACH_CACHE=str(image), HOME="/proc/none")
    kept = Path(kernels, "search-1.py311.nbi")
    kept.write_bytes(b"kept")
    also = f"path, (path / {kept.name!r}).read_bytes(), (path / 'another').write_bytes(b'')"
    told, said = folder_of_kernels(image, also=also, MACH_CACHE=str(image), HOME="/proc/none")
    path, read, _ = told.split()
    assert (read, said) == ("b'kept'", "")
    assert not Path(path).is_relative_to(image)
    assert not Path(path).exists()  # it went with the process
    assert os.listdir(kernels) == [kept.name]


@pytest.mark.parametrize("where", ["HOME", "MACH_CACHE", "NUMBA_CACHE_DIR"])
def test_where_nothing_can_be_written_a_temporary_cache_serves_and_is_said_once(where: str):
    kernels, told = folder_of_kernels(**({"HOME": "/proc/none"} | {where: "/proc/none"}))
    [line] = told.splitlines()
    assert line.startswith("mach: no cache can be written: ")
    temporary = Path(line.split()[6])
    assert Path(kernels).is_relative_to(temporary)
    assert not temporary.exists()  # it went with the process


def test_processes_share_the_temporary_cache(monkeypatch, capsys):
    monkeypatch.delenv("MACH_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/proc/none")
    folder = cache_folder()
    assert (folder, os.environ["MACH_CACHE"]) == (cache_folder(), str(folder))
    np.save(folder / "x.npy", np.zeros(1))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_named_cache_without_a_home_is_refused(monkeypatch):
    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(ConfigError, match=r"no home folder is known for the cache ~/mine: give a whole path"):
        cache_folder("~/mine")
