"""Named arrays on disk in the safetensors format, written without a copy in memory and read by mapping.

The library's own numpy functions copy every array, and training states are too large for that. The format
(https://github.com/huggingface/safetensors) is the length of the header in 8 little-endian bytes, a JSON header, and
the raw arrays. bfloat16 arrays are held as uint16 bits (`mach.networks.kernels.memory`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mach.errors import StorageError
from mach.files.caches import cache_folder
from mach.files.names import digest as checked_digest
from mach.files.names import named
from mach.files.places import Place, fetch, kept
from mach.files.records import is_text, parse_json, shortened
from mach.files.regular import open_regular

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "U32": np.uint32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAME_OF = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 2**24  # the format's own limit is 100 MB, of which parsing makes gigabytes
MAX_SIDES = 8


def write_tensors(file: BinaryIO, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    """Write arrays and string metadata to an open file; return a digest of the array bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        header[name] = {"dtype": _NAME_OF[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays start aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        file.write(_bytes(array))
    return digest_of(arrays)


def digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Digest of the arrays' bytes in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays.values():
        digest.update(_bytes(array))
    return digest.hexdigest()


def map_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays, as views of one read-only memory map, and metadata of a file; nothing is read until it is used.

    Raises StorageError when the file is missing, cut short, or its header does not describe it.
    """
    try:
        with open_regular(path) as file:  # one open file throughout: the path may be replaced by a writer meanwhile
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
                raise StorageError(f"{path}: header of {header_bytes} bytes in a file of {size}: the file is damaged")
            header = parse_json(file.read(header_bytes), f"{path}: header", may_be_wild=True)  # `_view` looks at all
            data_bytes = size - 8 - header_bytes
            mapped = np.empty(0, np.uint8)
            if data_bytes:  # as an array: every view of a memmap costs more
                mapped = np.asarray(np.memmap(file, np.uint8, "r", offset=8 + header_bytes))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(header, dict):
        raise StorageError(f"{path}: the header is not a JSON object: the file is damaged")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StorageError(f"{path}: the metadata are {shortened(metadata)}, no object of texts: the file is damaged")
    return {name: _view(path, mapped, name, entry) for name, entry in header.items()}, metadata


def local_tensors(where: Place, digest: str) -> Path:
    """A file of tensors on this machine; a remote one is fetched once a machine, and compared with its digest.

    Raises
    ------
    StorageError
        When it cannot be fetched, or its digest differs.
    """
    if isinstance(where, Path):
        return where

    def check(file: Path) -> None:
        expect_digest(where, map_tensors(file)[0], digest)

    path = named(cache_folder() / "weights", checked_digest(digest), ".safetensors")
    return kept(path, lambda file: fetch(where, file, check))


def expect_digest(where: Place, arrays: Mapping[str, NDArray[Any]], digest: str) -> None:
    """Compare arrays with the digest of what was written; a StorageError where it differs."""
    found = digest_of(arrays)
    if found != digest:
        raise StorageError(f"{where} has digest {found}, its writer recorded {digest}: copy it anew, or make it again")


def _bytes(array: NDArray[Any]) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _view(path: Path, mapped: NDArray[np.uint8], name: str, entry: Any) -> NDArray[Any]:
    is_entry = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
    if not is_entry or not (name.isascii() or is_text(name)):
        raise StorageError(f"{path}: tensor {name!a:.80} has the header {shortened(entry)}: the file is damaged")
    dtype, shape, span = DTYPES.get(entry["dtype"]), entry.get("shape", ""), entry.get("data_offsets", "")
    if dtype is None or not _are_counts(shape) or not _are_counts(span) or len(shape) > MAX_SIDES or len(span) != 2:
        raise StorageError(f"{path}: tensor {name!r:.80} has the header {entry!s:.120}: the file is damaged")
    begin, end = span
    if not begin <= end <= len(mapped):
        raise StorageError(f"{path}: tensor {name!r:.80} claims bytes {begin}..{end} of {len(mapped)}: it is truncated")
    if math.prod(shape) * np.dtype(dtype).itemsize != end - begin or math.prod(max(side, 1) for side in shape) > 2**48:
        raise StorageError(f"{path}: tensor {name!r:.80} of shape {shape} does not fill its {end - begin} bytes")
    return mapped[begin:end].view(dtype).reshape(shape)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
