"""The store: rows of features and classes as raw little-endian arrays, mapped read-only by every worker.

A store is a directory. ``meta.json`` says what the other files hold: ``feature_indptr`` (int64),
``feature_indices`` (int32), ``feature_values`` (float32) or, for dense rows, ``features`` (float32, N x D);
``class_indptr`` (int64) and ``class_ids`` (int32, ascending and unique within a row); for named classes
``class_name_bytes`` (UTF-8) and ``class_name_offsets`` (int64, K + 1); for rows made of text the folder
``text_features``. Nothing is pickled, and processes that open the same store share its pages.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from mach.errors import DataError, StorageError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from mach.data.text import TextFeatures

FORMAT = 1
_DTYPES = {
    "feature_indptr": "<i8",
    "feature_indices": "<i4",
    "feature_values": "<f4",
    "features": "<f4",
    "class_indptr": "<i8",
    "class_ids": "<i4",
    "class_name_bytes": "|u1",
    "class_name_offsets": "<i8",
}
_BLOCK = 2**22  # entries handled at once where a whole array must be read


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows: classes in CSR form, features in CSR form or dense.

    Attributes
    ----------
    class_indptr : int64 array of shape (n + 1,), from 0
    class_ids : int32 array, ascending and unique within a row
    features : tuple of arrays (indptr int64, indices int32, values float32), or one float32 array of shape (n, D)
        Indices are ascending and unique within a row.
    fraction : float
        Share of the source that has been read with this chunk.
    """

    class_indptr: NDArray[np.int64]
    class_ids: NDArray[np.int32]
    features: tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]] | NDArray[np.float32]
    fraction: float = 0.0


class ClassNames(Sequence[str]):
    """Names of all classes, decoded when they are asked for; K + 1 offsets and the bytes stay on disk."""

    def __init__(self, offsets: NDArray[np.int64], utf8: NDArray[np.uint8]) -> None:
        self._offsets, self._utf8 = offsets, utf8

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, k: int) -> str: ...
    @overload
    def __getitem__(self, k: slice) -> list[str]: ...
    def __getitem__(self, k: int | slice) -> str | list[str]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        if not -len(self) <= k < len(self):
            raise IndexError(f"class {k} of {len(self)} named classes")
        k %= len(self)
        return self._utf8[self._offsets[k] : self._offsets[k + 1]].tobytes().decode("utf-8", "surrogatepass")


class Store:
    """A prepared set of rows, opened for reading; build one with `mach.data.prepare` or `StoreWriter`.

    Parameters
    ----------
    path : Path
        The directory; use `open`, which checks it.
    meta : dict
        The contents of ``meta.json``.

    Attributes
    ----------
    feature_indptr, feature_indices, feature_values : int64, int32 and float32 arrays
        CSR features of a sparse store.
    dense_ND : float32 array of shape (N, D)
        Features of a dense store.
    class_indptr, class_ids : int64 and int32 arrays
        CSR classes.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self.n_rows: int = meta["n_rows"]
        self.n_features: int = meta["n_features"]
        self.n_classes: int = meta["n_classes"]
        self.fingerprint: str = meta["fingerprint"]
        self.is_dense: bool = meta["kind"] == "dense"

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store after a look at its format number and file sizes; cost O(1), nothing is read.

        Raises
        ------
        StorageError
            When the directory is no store, was made by another version, or a file is missing or cut short.
        """
        path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise StorageError(f"store {path} has format {meta['format']!r}, this version reads {FORMAT}: rebuild it")
            for name, size in meta["bytes"].items():
                if name not in _DTYPES:
                    raise StorageError(f"store {path} lists an unknown array {name!r}: rebuild it")
                actual = (path / name).stat().st_size
                if actual != size:
                    raise StorageError(f"store {path}: {name} has {actual} bytes instead of {size}: rebuild it")
            return cls(path, meta)
        except FileNotFoundError as error:
            raise StorageError(f"{path} is not a complete store: {Path(error.filename).name} is missing") from error
        except OSError as error:
            raise StorageError(f"cannot open store {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"store {path}: meta.json is damaged ({error}): rebuild the store") from error

    @property
    def n_nonzeros(self) -> int:
        """Stored feature values: N * D for dense rows."""
        return self.n_rows * self.n_features if self.is_dense else len(self.feature_indices)

    @cached_property
    def feature_indptr(self) -> NDArray[np.int64]:
        return self._map("feature_indptr")

    @cached_property
    def feature_indices(self) -> NDArray[np.int32]:
        return self._map("feature_indices")

    @cached_property
    def feature_values(self) -> NDArray[np.float32]:
        return self._map("feature_values")

    @cached_property
    def dense_ND(self) -> NDArray[np.float32]:
        return self._map("features").reshape(self.n_rows, self.n_features)

    @cached_property
    def class_indptr(self) -> NDArray[np.int64]:
        return self._map("class_indptr")

    @cached_property
    def class_ids(self) -> NDArray[np.int32]:
        return self._map("class_ids")

    @cached_property
    def class_names(self) -> ClassNames | None:
        """Names of the K classes; None where they have none."""
        if "class_name_offsets" not in self.meta["bytes"]:
            return None
        return ClassNames(self._map("class_name_offsets"), self._map("class_name_bytes"))

    @cached_property
    def text_features(self) -> TextFeatures | None:
        """What turned the texts into features; None where the source held numbers."""
        if not self.meta["text_features"]:
            return None
        from mach.data.text import TextFeatures

        return TextFeatures.load(self.path / "text_features")

    def class_counts(self) -> NDArray[np.int64]:
        """Rows of every class, shape (K,); reads the class ids once, in blocks."""
        counts_K = np.zeros(self.n_classes, dtype=np.int64)
        for begin in range(0, len(self.class_ids), _BLOCK):
            counts_K += np.bincount(self.class_ids[begin : begin + _BLOCK], minlength=self.n_classes)
        return counts_K

    def features(self, begin: int, end: int) -> csr_array | NDArray[np.float32]:
        """Features of rows ``begin..end-1``: a CSR array of shape (n, D), or a view of the dense rows."""
        if self.is_dense:
            return self.dense_ND[begin:end]
        from scipy.sparse import csr_array

        begin, end, _ = slice(begin, end).indices(self.n_rows)
        indptr = self.feature_indptr[begin : max(begin, end) + 1]
        span = slice(indptr[0], indptr[-1])
        shape = (len(indptr) - 1, self.n_features)
        return csr_array((self.feature_values[span], self.feature_indices[span], indptr - indptr[0]), shape=shape)

    def _map(self, name: str) -> NDArray[Any]:
        if name not in self.meta["bytes"]:
            raise StorageError(f"store {self.path} holds {self.meta['kind']} features: it has no array {name}")
        if self.meta["bytes"][name] == 0:
            return np.empty(0, dtype=_DTYPES[name])
        with (self.path / name).open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=_DTYPES[name])


class StoreWriter:
    """Builds a store from chunks in a temporary sibling directory, renamed into place when all is on disk.

    Leave the ``with`` block normally and the store is there, complete and flushed; leave it by an exception
    and nothing remains. Memory is bounded by the chunks given to `append`.

    Parameters
    ----------
    path : str or Path
        Directory to make; it must not exist.
    source : str
        Where the rows come from, for the record.
    dense : bool
        Whether chunks hold dense features.
    n_features, n_classes : int, optional
        D and K; taken from the largest index and id (or the width of dense rows) where they are not given.
    key : str
        What the store was made of (`mach.data.prepare` recognises its own by it).

    Attributes
    ----------
    class_names : iterable of str, optional
        May be set until the block is left; must then number K.
    text_features : TextFeatures, optional
        Saved with the store.
    n_unknown_classes : int
        Classes dropped because their name was unknown, for the record.

    Raises
    ------
    StorageError
        When the path exists, or writing fails (a full disk, no permission).
    DataError
        When an index or id reaches ``n_features`` or ``n_classes``, or the names do not number K.

    Examples
    --------
    >>> import tempfile
    >>> features = np.array([0, 2]), np.array([4, 7]), np.array([1.0, 0.5])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with StoreWriter(Path(folder) / "store", source="example", n_classes=10) as writer:
    ...         writer.append(Chunk(np.array([0, 1]), np.array([9]), features))
    ...     store = Store.open(Path(folder) / "store")
    ...     store.n_rows, store.n_features, store.n_classes
    (1, 8, 10)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        source: str,
        dense: bool = False,
        n_features: int | None = None,
        n_classes: int | None = None,
        key: str = "",
    ) -> None:
        self.path = Path(path)
        self.class_names: Iterable[str] | None = None
        self.text_features: TextFeatures | None = None
        self.n_unknown_classes = 0
        self._meta = {"format": FORMAT, "kind": "dense" if dense else "sparse", "source": source, "key": key}
        self._n_features, self._n_classes, self._dense = n_features, n_classes, dense
        self._n_rows = self._n_empty = self._n_unlabelled = 0
        self._largest_feature = self._largest_class = -1
        self._arrays: dict[str, _ArrayFile] = {}
        # beside the store, hence on its file system, and under a name that no other writer has
        self._folder = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")

    def __enter__(self) -> Self:
        if self.path.exists():
            raise StorageError(f"{self.path} exists already: remove it or choose another destination")
        with _storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir()
        names = ["features"] if self._dense else ["feature_indptr", "feature_indices", "feature_values"]
        try:
            for name in [*names, "class_indptr", "class_ids"]:
                self._open(name)
            for name in ("feature_indptr", "class_indptr"):
                if name in self._arrays:
                    self._arrays[name].append(np.zeros(1))
        except BaseException:
            self._discard()
            raise
        return self

    def append(self, chunk: Chunk) -> None:
        """Write some rows; the chunk's arrays may be used again afterwards."""
        n_rows = len(chunk.class_indptr) - 1
        if isinstance(chunk.features, tuple):
            indptr, indices, values = chunk.features
            self._append_indptr("feature_indptr", indptr, "feature_indices")
            self._arrays["feature_indices"].append(indices)
            self._arrays["feature_values"].append(values)
            self._largest_feature = max(self._largest_feature, int(indices.max(initial=-1)))
            self._n_empty += int(np.count_nonzero(np.diff(indptr) == 0))
        else:
            self._arrays["features"].append(chunk.features)
            self._largest_feature = max(self._largest_feature, chunk.features.shape[1] - 1)
        self._append_indptr("class_indptr", chunk.class_indptr, "class_ids")
        self._arrays["class_ids"].append(chunk.class_ids)
        self._largest_class = max(self._largest_class, int(chunk.class_ids.max(initial=-1)))
        self._n_unlabelled += int(np.count_nonzero(np.diff(chunk.class_indptr) == 0))
        self._n_rows += n_rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()  # after a success the folder has moved away

    def _append_indptr(self, name: str, indptr: NDArray[np.int64], entries: str) -> None:
        self._arrays[name].append(indptr[1:] + self._arrays[entries].n_entries)

    def _open(self, name: str) -> _ArrayFile:
        self._arrays[name] = _ArrayFile(self._folder / name, np.dtype(_DTYPES[name]), self.path)
        return self._arrays[name]

    def _finish(self) -> None:
        n_features = _count("feature index", self._largest_feature, self._n_features)
        n_classes = _count("class", self._largest_class, self._n_classes)
        if self.class_names is not None:
            self._write_class_names(self.class_names, n_classes)
        fingerprint = hashlib.blake2b(repr((self._n_rows, n_features, n_classes)).encode(), digest_size=16)
        for name, array in self._arrays.items():
            array.close()
            fingerprint.update(f"{name} {array.digest.hexdigest()}".encode())
        with _storage_errors(self.path):
            if self.text_features is not None:
                self.text_features.save(self._folder / "text_features")
                fingerprint.update(self.text_features.fingerprint().encode())
            meta = self._meta | {
                "n_rows": self._n_rows,
                "n_features": n_features,
                "n_classes": n_classes,
                "rows_without_features": self._n_empty,
                "rows_without_classes": self._n_unlabelled,
                "unknown_classes_dropped": self.n_unknown_classes,
                "text_features": self.text_features is not None,
                "fingerprint": fingerprint.hexdigest(),
                "bytes": {name: array.n_entries * array.dtype.itemsize for name, array in self._arrays.items()},
            }
            (self._folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            _flush(self._folder / "meta.json")
            _flush(self._folder)
            self._folder.rename(self.path)
            _flush(self.path.parent)

    def _write_class_names(self, names: Iterable[str], n_classes: int) -> None:
        utf8, offsets = self._open("class_name_bytes"), self._open("class_name_offsets")
        for block in _blocks_of(names):
            encoded = [name.encode("utf-8", "surrogatepass") for name in block]
            ends = utf8.n_entries + np.cumsum([0, *map(len, encoded)])
            offsets.append(ends if offsets.n_entries == 0 else ends[1:])
            utf8.append(np.frombuffer(b"".join(encoded), dtype=np.uint8))
        if offsets.n_entries - 1 != n_classes:
            raise DataError(f"{max(offsets.n_entries - 1, 0)} class names for {n_classes} classes: give one a class")

    def _discard(self) -> None:
        for array in self._arrays.values():
            array.file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
