"""What a file of weights must hold, exactly: looked at once, so that kernels trust types, shapes and offsets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.errors import StorageError
from mach.files.arrays import ascends

Arrays = Mapping[str, NDArray[Any]]
TABLE = "assignment"  # among the weights of runs made until 2026: buckets that a repetition learned by itself, (J, K)
SCALED = ("input", "output")  # layers that are stored as integers
MOMENTS = ("mean.output.weight", "square.output.weight", "mean.output.bias", "square.output.bias")  # of a checkpoint
SMALL = 2**16  # entries: as many are looked at when a file is opened; larger matrices once an answer is not finite
BLOCK = 2**22


def check_stored(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]], where: object, *, has_trunk: bool) -> None:
    """Compare the arrays of a file with the network that they are of.

    Names, types and shapes must be exactly what `mach.networks.inference.stored_weights` writes for it, or earlier
    versions did; offsets ascend from 0 to the end; scales and biases are finite. Of a trunk of the user's own
    (``has_trunk``) any names that begin with "trunk." may be there: torch compares them with its class.

    Parameters
    ----------
    arrays : mapping
    shapes : mapping
        Names of matrices and vectors (``.weight``, ``.bias``, `TABLE`), and their shapes.
    where : object
        The file, for messages.

    Raises
    ------
    StorageError
        Where they differ; cost O(D) of offsets and scales.
    """
    check = _Check(arrays, where)
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) == 2:
            check.matrix(name, *shape)
        elif name == TABLE:
            check.take(name, shape, "B", "H", "I")
        elif name.startswith("trunk.") and has_trunk:
            check.take(name, shape, arrays[name].dtype.char if name in arrays else "f")
        else:
            check.finite(name, shape)
    if has_trunk and "output.weight" in arrays:  # its width is the trunk's
        check.matrix(
            "output.weight", shapes["output.bias"][0], arrays["output.weight"].size // shapes["output.bias"][0]
        )
    for name in sorted(arrays.keys() - check.known):
        if not (has_trunk and name.startswith("trunk.")):
            raise StorageError(f"{where}: {name!r:.80} is no array of this network: the file is of another run")


def wild_matrix(arrays: Arrays) -> str:
    """The name of a matrix with NaN or infinity, empty where there is none; cost of reading all weights.

    Weights of integers cannot be wild, and their scales are looked at before.
    """
    return next((name for name, array in arrays.items() if any(_wild_blocks(array))), "")


class _Check:
    def __init__(self, arrays: Arrays, where: object) -> None:
        self.arrays, self.where, self.known = arrays, where, set[str]()

    def take(self, name: str, shape: tuple[int, ...], *types: str) -> NDArray[Any]:
        """An array of this shape and of one of these types (numpy's letters)."""
        self.known.add(name)
        array = self.arrays.get(name)
        wanted = f"{' or '.join(np.dtype(one).name for one in types)} of shape {shape}"
        if array is None:
            raise StorageError(f"{self.where}: {name} is missing: the run needs {wanted}: the file is of another run")
        if array.shape != shape or array.dtype.char not in types:
            found = f"{array.dtype} of shape {array.shape}"
            raise StorageError(f"{self.where}: {name} is {found}, the run needs {wanted}: the file is of another run")
        return array

    def finite(self, name: str, shape: tuple[int, ...]) -> None:
        if any(_wild_blocks(self.take(name, shape, "f"))):
            raise StorageError(f"{self.where}: {name} holds NaN or infinity: copy the file anew")

    def matrix(self, name: str, height: int, width: int) -> None:
        layer, array = name.removesuffix(".weight"), self.arrays.get(name)
        kind = "f" if array is None else array.dtype.char
        if layer in SCALED and kind == "b":
            self.take(name, (height, width), "b")
        elif layer == "input" and array is not None and kind == "B":
            self.bytes_of(array, height, width)
        else:
            stored = self.take(name, (height, width), "f", "H", *("b" if layer in SCALED else ""))
            if stored.size <= SMALL and any(_wild_blocks(stored)):
                raise StorageError(f"{self.where}: {name} holds NaN or infinity: copy the file anew")
            return
        self.finite(f"{layer}.scale", (height,))

    def bytes_of(self, array: NDArray[Any], height: int, width: int) -> None:
        """Two weights a byte, or, where there are offsets, those that `mach.networks.kernels.memory.to_kept` keeps."""
        if "input.offsets" not in self.arrays:
            self.take("input.weight", (height, -(-width // 2)), "B")
            return
        self.take("input.weight", (array.size,), "B")
        offsets = self.take("input.offsets", (height + 1,), "l")
        if not ascends(offsets, len(array)):
            raise StorageError(f"{self.where}: input.offsets do not ascend from 0 to {len(array)}: copy the file anew")


def _wild_blocks(array: NDArray[Any]) -> Iterator[bool]:
    """Whether parts of an array of float32, or of bfloat16 as bits, hold NaN or infinity."""
    flat = array.reshape(-1)
    for begin in range(0, len(flat), BLOCK) if array.dtype in (np.float32, np.uint16) else ():
        part = flat[begin : begin + BLOCK]
        if part.dtype == np.uint16:
            yield bool(((part & np.uint16(0x7F80)) == 0x7F80).any())
        else:
            yield not np.isfinite(part).all()
