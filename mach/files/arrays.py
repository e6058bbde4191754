"""Single arrays in numpy's own format, as runs keep some: plain numbers, as many as the file is long."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mach.errors import StorageError
from mach.files.regular import open_regular

_HEADERS: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
LONGEST_HEADER = 2**12


def ascends(offsets: NDArray[Any], end: int) -> bool:
    """Whether offsets begin with 0, never fall, and end where they must; not where there are none.

    >>> ascends(np.array([0, 2, 2, 5]), 5), ascends(np.array([0, 3, 2, 5]), 5)
    (True, False)
    """
    return bool(len(offsets) and offsets[0] == 0 and offsets[-1] == end and (offsets[1:] >= offsets[:-1]).all())


def array_form(file: IO[bytes], path: object) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type of an .npy file of plain numbers; nothing else is read.

    Raises
    ------
    StorageError
        When it is no such file, or its length is not what the header claims.
    """
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file, max_header_size=LONGEST_HEADER)  # type: ignore[no-untyped-call]
    except Exception as error:  # of a damaged header any kind, tokenize.TokenError and MemoryError among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StorageError(f"{path} is no array of numpy ({reason:.80}): copy it anew") from error
    n_bytes = os.fstat(file.fileno()).st_size - file.tell()
    if dtype.kind not in "biuf":
        raise StorageError(f"{path} holds {dtype!s:.40}: need numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != n_bytes:
        raise StorageError(f"{path} claims {dtype} of shape {shape!s:.80} and holds {n_bytes:,} bytes: copy it anew")
    return shape, is_fortran, dtype


def read_array(path: Path) -> NDArray[Any]:
    """An .npy file of plain numbers, read whole; errors as `array_form` and `open_regular`."""
    with open_regular(path) as file:
        shape, is_fortran, dtype = array_form(file, path)
        array = np.fromfile(file, dtype)
    return array.reshape(shape, order="F" if is_fortran else "C").astype(dtype.newbyteorder("="), copy=False)
