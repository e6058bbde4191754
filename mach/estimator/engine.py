"""The engine of a classifier: a run in a folder of its own, and what it says of all classes.

The folder is an ordinary run directory (`mach.runs.run`), so whatever reads runs reads it too. It is temporary, goes
when its owner goes, and travels as the bytes of its files where the owner is pickled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.data.store import ClassNames
from mach.errors import StorageError
from mach.estimator.rows import Features, Reservoir, n_rows_of
from mach.files.places import flush_to_disk, temporary_name
from mach.files.tensors import write_tensors
from mach.model.ask import Ask
from mach.model.loading import load
from mach.networks.permission import Trunk
from mach.sketch.aggregates import naive

if TYPE_CHECKING:
    from mach.model.model import MachModel


FEW_CLASSES = 1024  # up to here every class has a bucket of its own, and all are scored
FEW_PARAMETERS = 2**22  # up to here float32 costs nothing worth saving, and rows are answered in blocks of one size
BLOCK_ROWS = 64
BLOCK_SCORES = 2**22  # class scores held at once: 16 MB
LEAST_PROBABILITY = 0.5  # of the classes that a row is said to have, where it may have any number
RUN = "run"


class Folder:
    """A temporary folder that goes with this object, in the process that made it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mach-classifier-"))
        weakref.finalize(self, _remove, self.path, os.getpid())


class Engine:
    """A finished run and what it says of the classes 0..K-1 of rows in memory.

    Parameters
    ----------
    path : Path
        The run; with a folder it lies in that.
    n_classes : int
        K; the run may keep more ids ready, which are never given back.
    temperature : float
        What log-probabilities of exclusive classes are divided by before they are normalised.
    folder : Folder, optional
        What the run lives in.
    reservoir : Reservoir, optional
        Rows that further training replays.
    rate : float
        Learning rate of its first training.
    trunk : class or str, optional
        As of `mach.load`.
    """

    def __init__(
        self,
        path: Path,
        n_classes: int,
        temperature: float = 1.0,
        folder: Folder | None = None,
        reservoir: Reservoir | None = None,
        rate: float = 0.0,
        trunk: Trunk | None = None,
    ) -> None:
        self.path, self.n_classes, self.temperature, self.reservoir = path, n_classes, temperature, reservoir
        self.rate, self.trunk = rate, trunk
        self._folder = folder

    def __getstate__(self) -> dict[str, Any]:
        files = {str(file.relative_to(self.path)): file.read_bytes() for file in _files(self.path)}
        state = {name: getattr(self, name) for name in ("n_classes", "temperature", "reservoir", "rate", "trunk")}
        return state | {"files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder = Folder()
        for name, content in state["files"].items():
            file = folder.path / RUN / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        rest = {name: value for name, value in state.items() if name != "files"}
        self.__init__(folder.path / RUN, folder=folder, **rest)  # type: ignore[misc]

    @cached_property
    def model(self) -> MachModel:
        """The run as a model; its ids beyond K are spare."""
        return load(self.path, trunk=self.trunk)

    @property
    def is_exclusive(self) -> bool:
        """Whether a row has exactly one class."""
        return self.model.run.manifest.loss == "softmax"

    @property
    def scores_all(self) -> bool:
        """Whether every class is scored to find the best: there are few, and none shares a bucket."""
        return self.n_classes <= FEW_CLASSES and self.model.n_buckets >= self.n_classes

    def logits(self, features: Features) -> Iterator[NDArray[np.float32]]:
        """Blocks of shape (n, K): log-probabilities over the temperature, or log-odds of classes not exclusive.

        Exclusive ones are not normalised. They are ordered as `topk` orders classes.
        """
        model, ids_K = self.model, np.arange(self.n_classes)
        for block, n in self._blocks(features):
            scores_NK = model.score(block, ids_K)[:n]
            if model.reranker is not None and model.reranker.candidates < self.n_classes:
                found = model.search(block, model.reranker.candidates, allowed=self._allowed_K)
                self._lower_others(scores_NK, found.ids_Nk[:n], found.scores_Nk[:n])
            yield self._logits(scores_NK)

    def probabilities(self, features: Features) -> Iterator[NDArray[np.float32]]:
        """Blocks of shape (n, K); rows of exclusive classes sum to one."""
        for logits_NK in self.logits(features):
            yield self._probabilities(logits_NK)

    def topk(self, features: Features, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and probabilities of the k best classes, of shape (N, k), best first; k is at most K."""
        ids: list[NDArray[np.int64]] = [np.empty((0, k), np.int64)]
        values: list[NDArray[np.float32]] = [np.empty((0, k), np.float32)]
        if self.scores_all:
            for logits_NK in self.logits(features):
                ids.append(np.argsort(-logits_NK, axis=1, kind="stable")[:, :k])
                values.append(np.take_along_axis(self._probabilities(logits_NK), ids[-1], axis=1))
        else:
            for found in self.model.search_in_parts(features, k, Ask(self._allowed_K)):
                ids.append(found.ids_Nk)
                values.append(self._of_scores(found.scores_Nk))
        return np.concatenate(ids), np.concatenate(values)

    def likely(self, features: Features) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Classes of probability 0.5 or more of every row, ascending, as a CSR pair; any number of them.

        Only rows whose 16 best are all likely are asked for more: memory follows the answer.
        """
        k, n_rows = min(16, self.n_classes), n_rows_of(features)
        open_n, rows, ids = np.arange(n_rows), [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while len(open_n):
            ids_nk, probs_nk = self.topk(features if len(open_n) == n_rows else _some(features, open_n), k)
            is_likely_nk = probs_nk >= LEAST_PROBABILITY
            is_done_n = ~is_likely_nk[:, -1] | (k == self.n_classes)
            at, columns = np.nonzero(is_likely_nk & is_done_n[:, None])
            rows.append(open_n[at])
            ids.append(ids_nk[at, columns])
            open_n, k = open_n[~is_done_n], min(4 * k, self.n_classes)
        all_rows, all_ids = np.concatenate(rows), np.concatenate(ids)
        counts_N = np.bincount(all_rows, minlength=n_rows)
        return np.concatenate([[0], np.cumsum(counts_N)]), all_ids[np.lexsort((all_ids, all_rows))]

    def copy_to(self, path: Path, extra: dict[str, bytes], names: list[str]) -> None:
        """Copy the run, with further files and names of its classes, to a new place; it is there whole or not at all.

        Raises
        ------
        StorageError
            When something is there, or writing fails.
        """
        if path.exists():
            raise StorageError(f"{path} exists already: remove it, or choose another name")
        partial = temporary_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.path, partial)
            for name, content in extra.items():
                (partial / name).write_bytes(content)
            with (partial / "class_names.safetensors").open("wb") as names_file:
                stored = ClassNames.of(names + [""] * (self.model.n_classes - len(names)))
                write_tensors(names_file, {"offsets": stored.offsets, "utf8": stored.utf8}, {})
            for file in [*_files(partial), partial]:
                flush_to_disk(file)
            partial.replace(path)
            flush_to_disk(path.parent)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @property
    def _allowed_K(self) -> NDArray[np.bool_] | None:
        n_ids = self.model.n_classes
        return None if n_ids == self.n_classes else np.arange(n_ids) < self.n_classes

    def _blocks(self, features: Features) -> Iterator[tuple[Any, int]]:
        """Some rows at a time, and how many of them count.

        Small networks get blocks of one size, the last filled up: matrix products of another shape round otherwise,
        and so a row's answer does not depend on the rows beside it.
        """
        n_rows = n_rows_of(features)
        if not self._is_small:
            step = max(1, BLOCK_SCORES // self.n_classes)
            for begin in range(0, n_rows, step):
                yield features[begin : begin + step], min(step, n_rows - begin)
            return
        for begin in range(0, n_rows, BLOCK_ROWS):
            block = features[begin : begin + BLOCK_ROWS]
            n = min(BLOCK_ROWS, n_rows - begin)
            yield _filled_up(block, n), n

    @cached_property
    def _is_small(self) -> bool:
        return self.scores_all and int(self.model.info()["n_parameters"]) <= FEW_PARAMETERS

    def _lower_others(
        self, scores_NK: NDArray[np.float32], ids_NC: NDArray[np.int64], best_NC: NDArray[np.float32]
    ) -> None:
        """Put classes that are no candidates of the re-ranker behind all that are, as `MachModel.topk` does."""
        np.minimum(scores_NK, best_NC.min(axis=1, keepdims=True), out=scores_NK)
        np.put_along_axis(scores_NK, ids_NC, best_NC, axis=1)

    def _logits(self, scores_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        values = scores_NK.astype(np.float64)
        if self.is_exclusive:
            if self.model.aggregate != "log-mean":
                values = np.log(np.maximum(naive(values, self.model.aggregate), 1e-30))
            return (values / self.temperature).astype(np.float32)
        probs_NK = np.clip(self._of_scores(scores_NK).astype(np.float64), 1e-30, 1 - 1e-7)
        logits_NK: NDArray[np.float32] = (np.log(probs_NK) - np.log1p(-probs_NK)).astype(np.float32)
        return logits_NK

    def _probabilities(self, logits_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        values = logits_NK.astype(np.float64)
        if not self.is_exclusive:
            return (0.5 * (1 + np.tanh(values / 2))).astype(np.float32)
        values = np.exp(values - values.max(axis=1, keepdims=True))
        return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)

    def _of_scores(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities that classes are right, each by its own score; calibrated where rows were held out for it."""
        model = self.model
        if model.calibration is not None:
            return model.curve()(scores)
        return naive(scores, model.aggregate).astype(np.float32)


def _some(features: Any, rows: NDArray[np.int64]) -> Any:
    return [features[n] for n in rows] if isinstance(features, list) else features[rows]


def _filled_up(block: Any, n: int) -> Any:
    """The rows of a block and empty ones, `BLOCK_ROWS` together."""
    missing = BLOCK_ROWS - n
    if not missing:
        return block
    if isinstance(block, list):
        return [*block, *[""] * missing]
    if isinstance(block, np.ndarray):
        return np.concatenate([block, np.zeros((missing, block.shape[1]), block.dtype)])
    from scipy.sparse import csr_array

    indptr = np.concatenate([block.indptr, np.repeat(block.indptr[-1:], missing)])
    return csr_array((block.data, block.indices, indptr), shape=(BLOCK_ROWS, block.shape[1]))


def _files(folder: Path) -> list[Path]:
    """All files that a model reads, of a folder and those below."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # a fork has the object too, but not the folder
        shutil.rmtree(path, ignore_errors=True)
