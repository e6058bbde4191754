"""The engine of a classifier: a run in a temporary folder of its own, and what it says of all classes."""

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
from scipy.sparse import csr_array

from mach.data.batch import SparseBatch
from mach.estimator.rows import Features, Reservoir, n_rows_of
from mach.files.places import refuse_outside
from mach.model.loading import load
from mach.networks.trunk import Trunk
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
    """A finished run and what it says of the classes 0..K-1 of rows in memory; pickled, it holds the run's files.

    The run, a directory like all others, may keep more ids ready, which are never given back. Log-probabilities of
    exclusive classes are divided by the temperature before they are normalised. The folder is what a temporary run
    lives in, the reservoir holds rows that further training replays, the rate is that of the first training.

    Where probabilities are calibrated, those of a row without a known feature are the classes' shares of the training
    rows, and order the classes. In dense rows a 0 is a value like others.
    """

    def __init__(
        self,
        path: Path,
        n_classes: int,
        *,
        temperature: float = 1.0,
        folder: Folder | None = None,
        reservoir: Reservoir | None = None,
        rate: float = 0.0,
        trunk: Trunk | None = None,
    ) -> None:
        self.path, self.n_classes, self.temperature, self.reservoir = path, n_classes, temperature, reservoir
        self.rate, self.trunk, self._folder = rate, trunk, folder

    def __getstate__(self) -> dict[str, Any]:
        files = {}
        for file in self.path.rglob("*"):
            if file.is_file():
                refuse_outside(self.path, file)
                files[str(file.relative_to(self.path))] = file.read_bytes()
        state = {name: getattr(self, name) for name in ("n_classes", "temperature", "reservoir", "rate", "trunk")}
        return state | {"files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder = Folder()
        for name, content in state.pop("files").items():
            file = folder.path / RUN / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        self.__init__(folder.path / RUN, folder=folder, **state)  # type: ignore[misc]

    @cached_property
    def model(self) -> MachModel:
        """The run as a model; its ids beyond K are spare."""
        return load(self.path, trunk=self.trunk)

    @property
    def is_exclusive(self) -> bool:
        """Whether a row has exactly one class."""
        return self.model.run.manifest.loss == "softmax"

    def logits(self, features: Features) -> Iterator[NDArray[np.float32]]:
        """Blocks of shape (n, K), ordered as `topk` orders classes.

        They are log-probabilities over the temperature, not normalised; log-odds where classes are not exclusive.
        """
        model, ids_K = self.model, np.arange(self.n_classes)
        for block, n in self._blocks(features):
            rows, is_known_N = self._read(block)
            scores_NK = model.score(rows, ids_K)[:n]
            if model.reranker is not None and model.reranker.candidates < self.n_classes:
                best = model.search(rows, model.reranker.candidates, allowed=self._allowed_K)
                # classes that are no candidates come behind all that are, as in MachModel.topk
                np.minimum(scores_NK, best.scores_Nk[:n].min(axis=1, keepdims=True), out=scores_NK)
                np.put_along_axis(scores_NK, best.ids_Nk[:n], best.scores_Nk[:n], axis=1)
            logits_NK = self._logits(scores_NK)
            logits_NK[~is_known_N[:n]] = self._logits_of_shares_K
            yield logits_NK

    def probabilities(self, features: Features) -> Iterator[NDArray[np.float32]]:
        """Blocks of shape (n, K); rows of exclusive classes sum to one."""
        return map(self._probabilities, self.logits(features))

    def topk(self, features: Features, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and probabilities of the k best classes, of shape (N, k), best first; k is at most K."""
        if not self._scores_all and n_rows_of(features):
            found = self.model.search(features, k, allowed=self._allowed_K)
            ids_Nk, probs_Nk = found.ids_Nk, self._of_scores(found.scores_Nk)
            if self._takes_shares:
                ids_Nk[~found.known_N] = best_k = np.argsort(-self._shares_K, kind="stable")[:k]
                probs_Nk[~found.known_N] = self._shares_K[best_k]
            return ids_Nk, probs_Nk
        ids, values = [np.empty((0, k), np.int64)], [np.empty((0, k), np.float32)]
        for logits_NK in self.logits(features):
            ids.append(np.argsort(-logits_NK, axis=1, kind="stable")[:, :k])
            values.append(np.take_along_axis(self._probabilities(logits_NK), ids[-1], axis=1))
        return np.concatenate(ids), np.concatenate(values)

    def likely(self, features: Features) -> csr_array:
        """Classes of probability 0.5 or more of every row, as the columns of an int8 array of shape (N, K).

        Only rows whose 16 best are all likely are asked for more: memory follows the answer.
        """
        k, n_rows, given = min(16, self.n_classes), n_rows_of(features), features
        open_n, rows, ids = np.arange(n_rows), [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while len(open_n):
            ids_nk, probs_nk = self.topk(given, k)
            is_likely_nk = probs_nk >= LEAST_PROBABILITY
            is_done_n = ~is_likely_nk[:, -1] | (k == self.n_classes)
            at, columns = np.nonzero(is_likely_nk & is_done_n[:, None])
            rows.append(open_n[at])
            ids.append(ids_nk[at, columns])
            open_n, k = open_n[~is_done_n], min(4 * k, self.n_classes)
            given = [features[n] for n in open_n] if isinstance(features, list) else features[open_n]
        positions = (np.concatenate(rows), np.concatenate(ids))
        return csr_array((np.ones(len(positions[0]), np.int8), positions), shape=(n_rows, self.n_classes))

    @property
    def _allowed_K(self) -> NDArray[np.bool_] | None:
        n_ids = self.model.n_classes
        return None if n_ids == self.n_classes else np.arange(n_ids) < self.n_classes

    @property
    def _scores_all(self) -> bool:
        """Whether every class is scored to find the best: there are few, and none shares a bucket."""
        return self.n_classes <= FEW_CLASSES and self.model.n_buckets >= self.n_classes

    @cached_property
    def _is_small(self) -> bool:
        return self._scores_all and int(self.model.info()["n_parameters"]) <= FEW_PARAMETERS

    @property
    def _takes_shares(self) -> bool:
        """Whether rows without a known feature get the classes' shares; older calibrations were of all rows."""
        made = self.model.calibration
        return made is not None and made.format > 1 and not self.model.ensemble.reader.dense_input

    @property
    def _shares_K(self) -> NDArray[np.float32]:
        return self.model.answerer.shares_K[: self.n_classes]

    @property
    def _logits_of_shares_K(self) -> NDArray[np.float32]:
        shares_K = self._shares_K.astype(np.float64)
        return np.log(np.maximum(shares_K, 1e-30)).astype(np.float32) if self.is_exclusive else log_odds(shares_K)

    def _read(self, block: Any) -> tuple[Any, NDArray[np.bool_]]:
        """Rows as features, and which of them are answered by their scores."""
        if not self._takes_shares:
            return block, np.ones(n_rows_of(block), np.bool_)
        reader = self.model.ensemble.reader
        [batch] = reader.batches(block, n_rows_of(block))
        assert isinstance(batch, SparseBatch)
        return batch.matrix(reader.n_features), reader.known(batch)

    def _blocks(self, features: Any) -> Iterator[tuple[Any, int]]:
        """Some rows at a time, and how many of them count.

        Small networks get blocks of one size, the last filled up with empty rows: matrix products of another shape
        round otherwise, and so a row's answer does not depend on the rows beside it.
        """
        n_rows = n_rows_of(features)
        step = BLOCK_ROWS if self._is_small else max(1, BLOCK_SCORES // self.n_classes)
        for begin in range(0, n_rows, step):
            block, n = features[begin : begin + step], min(step, n_rows - begin)
            if n < step and self._is_small:
                if isinstance(block, list):
                    block = [*block, *[""] * (step - n)]
                elif isinstance(block, np.ndarray):
                    block = np.pad(block, ((0, step - n), (0, 0)))
                else:
                    block.resize((step, block.shape[1]))
            yield block, n

    def _logits(self, scores_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        values = scores_NK.astype(np.float64)
        if self.is_exclusive:
            if self.model.aggregate != "log-mean":
                values = np.log(np.maximum(naive(values, self.model.aggregate), 1e-30))
            return (values / self.temperature).astype(np.float32)
        return log_odds(self._of_scores(scores_NK).astype(np.float64))

    def _probabilities(self, logits_NK: NDArray[np.float32]) -> NDArray[np.float32]:
        values = logits_NK.astype(np.float64)
        if not self.is_exclusive:
            return (0.5 * (1 + np.tanh(values / 2))).astype(np.float32)
        values = np.exp(values - values.max(axis=1, keepdims=True))
        return (values / values.sum(axis=1, keepdims=True)).astype(np.float32)

    def _of_scores(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities that classes are right, each by its own score; calibrated where rows were held out for it."""
        if self.model.calibration is not None:
            return self.model.curve()(scores)
        return naive(scores, self.model.aggregate).astype(np.float32)


def log_odds(probs: NDArray[np.float64]) -> NDArray[np.float32]:
    """Finite log-odds of probabilities."""
    probs = np.clip(probs, 1e-30, 1 - 1e-7)
    return (np.log(probs) - np.log1p(-probs)).astype(np.float32)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # a fork has the object too, but not the folder
        shutil.rmtree(path, ignore_errors=True)
