"""The store: rows of features and classes as raw little-endian arrays, mapped read-only by every worker.

A store is a directory. ``meta.json`` says what the other files hold: ``feature_indptr`` (int64),
``feature_indices`` (int32), ``feature_values`` (float32) or, for dense rows, ``features`` (float32, N x D);
``class_indptr`` (int64) and ``class_ids`` (int32, ascending and unique within a row); for named classes
``class_name_bytes`` (UTF-8) and ``class_name_offsets`` (int64, K + 1), and ``class_texts.safetensors`` where they say
more of themselves (`mach.data.class_texts`); for rows made of text the folder
``text_features``. Nothing is pickled, and processes that open the same store share its pages.
"""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mach.data.class_names import ClassNames
from mach.data.class_texts import FILE, ClassTexts
from mach.data.meta import DTYPES, FORMAT, Meta, OldPart
from mach.errors import StorageError
from mach.files.places import Place
from mach.files.records import first_of, parse_json, shortened
from mach.files.regular import read_regular

if TYPE_CHECKING:
    from mach.data.text import Csr, TextFeatures

META_BYTES = 2**20


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows: classes in CSR form, features in CSR form (a triple) or dense, of shape (n, D).

    Both indptr arrays begin with 0; class ids and feature indices are ascending and unique within a row.
    """

    class_indptr: NDArray[np.int64]
    class_ids: NDArray[np.int32]
    features: Csr | NDArray[np.float32]
    fraction: float = 0.0  # of the source that has been read with this chunk


def _mapped(name: str) -> cached_property[Any]:
    return cached_property(lambda store: store._map(name))


class Store:
    """A prepared set of rows, opened for reading; build one with `mach.data.prepare` or `mach.data.writer`.

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
        self.row_features: int = meta.get("row_features", 0)  # most that were kept of a row; 0: all
        self.old_parts = [OldPart(**part) for part in meta.get("old_parts", [])]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store after a look at its format number and file sizes; cost O(1), no array is read.

        Raises StorageError when the directory is no store, of another version, or a file is missing or cut short.
        """
        path = Path(path)
        try:
            meta = parse_json(read_regular(path / "meta.json", META_BYTES), f"store {path}: meta.json")
            if isinstance(meta, dict) and meta.get("format") != FORMAT:
                has = shortened(meta.get("format"))
                raise StorageError(f"store {path} has format {has}, this version reads {FORMAT}: rebuild it")
            store = cls(path, Meta.model_validate(meta).model_dump(exclude_unset=True))
            for name, size in store.meta["bytes"].items():
                status = (path / name).stat()
                if not stat.S_ISREG(status.st_mode):
                    raise StorageError(f"store {path}: {name} is no regular file: rebuild it")
                if status.st_size != size:
                    raise StorageError(f"store {path}: {name} has {status.st_size} bytes instead of {size}: rebuild it")
            return store
        except FileNotFoundError as error:
            raise StorageError(f"{path} is not a complete store: {Path(error.filename).name} is missing") from error
        except OSError as error:
            name = Path(error.filename or path).name
            raise StorageError(f"cannot open store {path} ({name}): {error.strerror}") from error
        except ValidationError as error:
            raise StorageError(f"store {path}: meta.json is damaged ({first_of(error)}): rebuild the store") from error

    def describe(self) -> dict[str, Any]:
        """What the store holds, for printing."""
        counts = ("n_rows", "n_features", "n_classes", "n_rows_without_features", "n_rows_without_classes")
        keys = ("kind", *counts, "n_unknown_classes", "fingerprint")
        return {"path": str(self.path)} | {key: self.meta[key] for key in keys}

    @property
    def n_nonzeros(self) -> int:
        """Stored feature values: N * D for dense rows."""
        return self.n_rows * self.n_features if self.is_dense else len(self.feature_indices)

    feature_indptr: cached_property[NDArray[np.int64]] = _mapped("feature_indptr")
    feature_indices: cached_property[NDArray[np.int32]] = _mapped("feature_indices")
    feature_values: cached_property[NDArray[np.float32]] = _mapped("feature_values")
    class_indptr: cached_property[NDArray[np.int64]] = _mapped("class_indptr")
    class_ids: cached_property[NDArray[np.int32]] = _mapped("class_ids")

    @cached_property
    def dense_ND(self) -> NDArray[np.float32]:
        return self._map("features").reshape(self.n_rows, self.n_features)

    @cached_property
    def class_names(self) -> ClassNames | None:
        """Names of the K classes; None where they have none."""
        if "class_name_offsets" not in self.meta["bytes"]:
            return None
        return ClassNames.of_file(self._map("class_name_offsets"), self._map("class_name_bytes"), f"store {self.path}")

    @cached_property
    def class_texts(self) -> ClassTexts | None:
        """What classes say of themselves: names alone where there is no more, None where they have none."""
        if FILE in self.meta["bytes"]:
            return ClassTexts.read(self.path / FILE, self.n_classes)
        return None if self.class_names is None else ClassTexts.of(self.class_names)

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
        for begin in range(0, len(self.class_ids), 2**22):  # bincount copies what it reads
            counts_K += np.bincount(self.class_ids[begin : begin + 2**22], minlength=self.n_classes)
        return counts_K

    @property
    def n_old_rows(self) -> int:
        """Rows that an earlier run has learned from, or held out: they come first."""
        return sum(part.n_rows for part in self.old_parts)

    def split(self, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Training and validation rows (`split_rows`), those before `n_old_rows` as the earlier runs drew them."""
        training, validation, begin = [], [], 0
        for part in [*self.old_parts, OldPart(n_rows=self.n_rows - self.n_old_rows, fraction=fraction, seed=seed)]:
            rows = split_rows(part.n_rows, part.fraction, part.seed)
            training.append(begin + rows[0])
            validation.append(begin + rows[1])
            begin += part.n_rows
        return np.concatenate(training), np.concatenate(validation)

    def compute_fingerprint(self) -> str:
        """The fingerprint of what is on disk, which is `fingerprint` unless it is damaged; reads all arrays."""
        digest = hashlib.blake2b(repr((self.n_rows, self.n_features, self.n_classes)).encode(), digest_size=16)
        for name in self.meta["bytes"]:
            found = hashlib.blake2b(self._map(name).data, digest_size=16).hexdigest()
            digest.update(f"{name} {found}".encode())
        if self.text_features is not None:
            digest.update(self.text_features.fingerprint().encode())
        return digest.hexdigest()

    def features(self, begin: int, end: int) -> Any:
        """Features of rows ``begin..end-1``: a CSR array of shape (n, D), or a view of the dense rows."""
        if self.is_dense:
            return self.dense_ND[begin:end]
        from scipy.sparse import csr_array

        indptr = self.feature_indptr[begin : end + 1]
        span = slice(indptr[0], indptr[-1])
        shape = (len(indptr) - 1, self.n_features)
        return csr_array((self.feature_values[span], self.feature_indices[span], indptr - indptr[0]), shape=shape)

    def _map(self, name: str) -> NDArray[Any]:
        if name not in self.meta["bytes"]:
            raise StorageError(f"store {self.path} holds {self.meta['kind']} features: it has no array {name}")
        if self.meta["bytes"][name] == 0:
            return np.empty(0, dtype=DTYPES[name])
        return np.asarray(np.memmap(self.path / name, DTYPES[name], "r"))


@dataclass(frozen=True)
class Reference:
    """What a run remembers of its training store, in place of which it serves; the attributes are those of `Store`."""

    path: Place
    fingerprint: str
    n_features: int
    n_classes: int
    is_dense: bool
    class_names: ClassNames | None
    text_features: TextFeatures | None
    row_features: int = 0
    class_texts: ClassTexts | None = None


def split_rows(n_rows: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation rows, drawn by the seed; both ascending.

    Of at least two rows, a fraction above 0 leaves at least one on either side.

    Examples
    --------
    >>> training, validation = split_rows(5, 0.4, seed=0)
    >>> sorted([*training.tolist(), *validation.tolist()]), len(validation)
    ([0, 1, 2, 3, 4], 2)
    """
    n_validation = round(n_rows * fraction)
    if fraction > 0:
        n_validation = min(max(n_validation, 1), max(n_rows - 1, 0))
    is_validation_N = np.zeros(n_rows, dtype=bool)
    is_validation_N[np.random.default_rng(seed).permutation(n_rows)[:n_validation]] = True
    return np.flatnonzero(~is_validation_N), np.flatnonzero(is_validation_N)
