"""Writing a store: chunk by chunk, and digested on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch
from mach.data.class_names import ClassNames
from mach.data.class_texts import FILE, ClassTexts
from mach.data.meta import DTYPES, FORMAT, OldPart
from mach.data.rows import RowView
from mach.data.store import Chunk
from mach.errors import DataError, StorageError
from mach.files.places import flush_to_disk

if TYPE_CHECKING:
    from mach.data.text import TextFeatures


class StoreWriter:
    """Builds a store from chunks, by which its memory is bounded.

    At the normal end of the ``with`` block the store is complete and flushed; after an exception nothing of it remains.
    ``meta.json`` is written last: without it, after a kill, a directory is no store.

    Parameters
    ----------
    path : str or Path
        Directory to make; it must not exist.
    source, key : str
        Where the rows come from and what the store was made of, for the record.
    dense : bool
        Whether chunks hold dense features.
    n_features, n_classes : int, optional
        D and K; by default one more than the largest index and id (or the width of dense rows).
    row_features : int
        Most features of a sparse row to keep (`mach.data.rows.RowView`); 0: all.
    old_parts : sequence of OldPart
        Rows at the beginning that earlier runs have seen.

    Attributes
    ----------
    class_names : iterable of str, optional
        One for each of the K classes; like ``text_features`` and ``class_texts`` it may be set until the block is left.
    n_rows : int
        Rows written so far.
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
    >>> from mach.data.store import Store
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
        row_features: int = 0,
        key: str = "",
        old_parts: Sequence[OldPart] = (),
    ) -> None:
        self.path = Path(path)
        self.class_names: Iterable[str] | None = None
        self.class_texts: ClassTexts | None = None
        self.text_features: TextFeatures | None = None
        self.n_rows = self.n_unknown_classes = 0
        self.notes: dict[str, Any] = {}  # more for the record
        kind = "dense" if dense else "sparse"
        self._meta: dict[str, Any] = {"format": FORMAT, "kind": kind, "source": source, "key": key}
        if row_features and not dense:
            self._meta["row_features"] = row_features
        if old_parts:
            self._meta["old_parts"] = [part.model_dump() for part in old_parts]
        self._view, self._dense = RowView(most=row_features), dense
        self._n_features, self._n_classes = n_features, n_classes
        self._n_empty = self._n_unlabelled = 0
        self._largest_feature = self._largest_class = -1
        self._arrays: dict[str, _ArrayFile] = {}

    @property
    def n_features(self) -> int:
        return self._largest_feature + 1 if self._n_features is None else self._n_features

    @property
    def n_classes(self) -> int:
        return self._largest_class + 1 if self._n_classes is None else self._n_classes

    def __enter__(self) -> Self:
        with storage_errors(self.path):
            if self.path.exists():
                raise StorageError(f"{self.path} exists already: remove it or choose another destination")
            self.path.mkdir(parents=True)
            names = ["features"] if self._dense else ["feature_indptr", "feature_indices", "feature_values"]
            for name in [*names, "class_indptr", "class_ids"]:
                array = self._open(name)
                if name.endswith("indptr"):
                    array.append(np.zeros(1))
        return self

    def append(self, chunk: Chunk) -> None:
        """Write some rows; the chunk's arrays may be used again afterwards."""
        n_rows, features = len(chunk.class_indptr) - 1, chunk.features
        if isinstance(features, tuple):
            indptr, indices, values = features
            self._largest_feature = max(self._largest_feature, int(indices.max(initial=-1)))
            arrays: Any = zip((indptr, indices, values), (np.int64, np.int32, np.float32), strict=True)
            seen = self._view.sparse(SparseBatch(*(array.astype(dtype, copy=False) for array, dtype in arrays)))
            self._arrays["feature_indptr"].append(seen.indptr[1:] + self._arrays["feature_indices"].n_entries)
            self._arrays["feature_indices"].append(seen.indices)
            self._arrays["feature_values"].append(seen.values)
            self._n_empty += int(np.count_nonzero(np.diff(seen.indptr) == 0))
        else:
            self._arrays["features"].append(features)
            self._largest_feature = max(self._largest_feature, features.shape[1] - 1)
        self._arrays["class_indptr"].append(chunk.class_indptr[1:] + self._arrays["class_ids"].n_entries)
        self._arrays["class_ids"].append(chunk.class_ids)
        self.serve(int(chunk.class_ids.max(initial=-1)) + 1)
        self._n_unlabelled += int(np.count_nonzero(np.diff(chunk.class_indptr) == 0))
        self.n_rows += n_rows

    def serve(self, n_classes: int) -> None:
        """Let K be at least so many, though no row may have the last of them."""
        self._largest_class = max(self._largest_class, n_classes - 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_complete = False
        try:
            with storage_errors(self.path):
                if isinstance(error, OSError):
                    raise error
                if error is None:
                    self._finish()
                    is_complete = True
        finally:
            for array in self._arrays.values():
                with suppress(OSError):  # the disk may still be full
                    array.file.close()
            if not is_complete:
                shutil.rmtree(self.path, ignore_errors=True)

    def _open(self, name: str) -> _ArrayFile:
        self._arrays[name] = _ArrayFile(self.path / name, np.dtype(DTYPES[name]))
        return self._arrays[name]

    def _finish(self) -> None:
        for what, largest, n in (
            ("feature index", self._largest_feature, self.n_features),
            ("class", self._largest_class, self.n_classes),
        ):
            if largest >= n:
                raise DataError(f"{what} {largest} is outside 0..{n - 1}: raise the limit or correct the row")
        if self.class_names is not None:
            self._write_class_names(self.class_names)
        if self.class_texts is not None:
            if len(self.class_texts) != self.n_classes:
                raise DataError(f"{len(self.class_texts)} class texts for {self.n_classes} classes: give one a class")
            content = BytesIO()
            self.class_texts.write(content)
            self._open(FILE).append(np.frombuffer(content.getbuffer(), np.uint8))
        sizes = {"n_rows": self.n_rows, "n_features": self.n_features, "n_classes": self.n_classes}
        fingerprint = hashlib.blake2b(repr(tuple(sizes.values())).encode(), digest_size=16)
        for name, array in self._arrays.items():
            array.file.close()
            flush_to_disk(self.path / name)
            fingerprint.update(f"{name} {array.digest.hexdigest()}".encode())
        if self.text_features is not None:
            folder = self.path / "text_features"
            folder.mkdir()
            self.text_features.save(folder)
            for path in [*folder.iterdir(), folder]:
                flush_to_disk(path)
            fingerprint.update(self.text_features.fingerprint().encode())
        meta = self._meta | self.notes | sizes
        meta |= {
            "n_rows_without_features": self._n_empty,
            "n_rows_without_classes": self._n_unlabelled,
            "n_unknown_classes": self.n_unknown_classes,
            "text_features": self.text_features and self.text_features.fingerprint(),
            "fingerprint": fingerprint.hexdigest(),
            "bytes": {name: array.n_entries * array.dtype.itemsize for name, array in self._arrays.items()},
        }
        (self.path / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        flush_to_disk(self.path / "meta.json")
        flush_to_disk(self.path)

    def _write_class_names(self, names: Iterable[str]) -> None:
        utf8, offsets = self._open("class_name_bytes"), self._open("class_name_offsets")
        offsets.append(np.zeros(1))
        left = iter(names)
        while block := list(islice(left, 2**16)):
            part = ClassNames.of(block)
            offsets.append(utf8.n_entries + part.offsets[1:])
            utf8.append(part.utf8)
        if offsets.n_entries - 1 != self.n_classes:
            raise DataError(f"{offsets.n_entries - 1} class names for {self.n_classes} classes: give one a class")


class _ArrayFile:
    """One array on its way to disk: appended, counted and digested."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.dtype, self.n_entries = dtype, 0
        self.digest = hashlib.blake2b(digest_size=16)
        self.file = path.open("wb")

    def append(self, array: NDArray[Any]) -> None:
        data = np.ascontiguousarray(array, dtype=self.dtype).reshape(-1)
        self.file.write(data.data)
        self.digest.update(data.data)
        self.n_entries += len(data)


@contextmanager
def storage_errors(store: object) -> Iterator[None]:
    """Turn an `OSError` on the way to a store into a `StorageError` of one line."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write store {store}: {error.strerror or error}") from error
