"""Folders of this machine for what can be made or fetched again: prepared data, fetched weights, compiled kernels."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from pathlib import Path

from mach.errors import ConfigError

USUAL = "~/.cache/mach"


def cache_folder(configured: str | None = None) -> Path:
    """The cache that the configuration names, else ``MACH_CACHE`` of the environment, else ``~/.cache/mach``.

    Where the last one cannot be written, as in a read-only container, a temporary folder serves.
    """
    named = configured or os.environ.get("MACH_CACHE")
    if not named:
        return Path(USUAL).expanduser() if _is_writable(USUAL) else _temporary()
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"no home folder is known for the cache {named}: give a whole path") from error


def keep_compiled() -> None:
    """Say where numba keeps compiled kernels, before the first of them is defined.

    ``MACH_CACHE`` moves them with all else, unless ``NUMBA_CACHE_DIR`` is set. Without either, numba keeps them beside
    the source or in its own folder of the user. It refuses to define them where neither can be written. Kernels in a
    folder that cannot be written, such as those of an image, are used as well.
    """
    named, moved = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("MACH_CACHE")
    if not named and not moved and (os.access(Path(__file__).parents[1], os.W_OK) or _is_writable("~/.cache/numba")):
        return
    folders = [named, moved and os.path.join(moved, "compiled"), os.path.join(USUAL, "compiled")]
    folder = next((folder for folder in folders if folder and _is_writable(folder)), None)
    path = os.path.expanduser(folder) if folder else _linked([named, moved and os.path.join(moved, "compiled")])
    os.environ["NUMBA_CACHE_DIR"] = path or str(_temporary() / "compiled")
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


def _is_writable(folder: str) -> bool:
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return os.access(path, os.W_OK)


def _linked(folders: list[str | None]) -> str | None:
    """A folder for as long as this process lives, of links to the kernels of the first one that has some."""
    for folder in filter(None, folders):
        if kernels := list(Path(folder).glob("*/*.nb?")):
            own = _own("mach-kernels-")
            for kernel in kernels:
                (own / kernel.parent.name).mkdir(exist_ok=True)
                (own / kernel.parent.name / kernel.name).symlink_to(kernel.absolute())
            return str(own)
    return None


def _temporary() -> Path:
    """A cache for as long as this process lives; it is said once, and processes that it starts share it."""
    folder = _own("mach-cache-")
    os.environ["MACH_CACHE"] = str(folder)
    print(f"mach: no cache can be written: {folder} serves for now; MACH_CACHE names a lasting one", file=sys.stderr)
    return folder


def _own(prefix: str) -> Path:
    folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return Path(folder.name)
