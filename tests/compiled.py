"""Where tests keep compiled kernels: where `mach warm-up` left them."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from hashlib import sha1
from pathlib import Path


def compiled_kernels() -> str:
    """A folder for NUMBA_CACHE_DIR; the folders in it have numba's names for them, and lead to those beside the source.

    Tests move MACH_CACHE, also for processes that they start, and with it all would be compiled anew.
    """
    if "NUMBA_CACHE_DIR" in os.environ:  # as in the workers of pytest-xdist, which have it from their parent
        return os.environ["NUMBA_CACHE_DIR"]
    if "MACH_CACHE" in os.environ:
        return str(Path(os.environ["MACH_CACHE"]).expanduser() / "compiled")
    folder = Path(tempfile.mkdtemp(prefix="mach-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for kernels in (Path(__file__).parents[1] / "mach").glob("*/kernels"):
        (kernels / "__pycache__").mkdir(exist_ok=True)
        (folder / f"{kernels.name}_{sha1(bytes(kernels)).hexdigest()}").symlink_to(kernels / "__pycache__")
    return str(folder)
