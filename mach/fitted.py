"""A classifier trained in this process on rows in memory: a run in a folder of its own, and what it says of all classes.

The folder is an ordinary run directory (`mach.storage`), so whatever reads runs reads it too. It is temporary, goes when
its owner goes, and travels as the bytes of its files where the owner is pickled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mach import recipe
from mach.calibrating import LEAST_ROWS, calibrate_when_due, held_out
from mach.calibration import naive
from mach.config import Config, LaunchConfig, TextConfig, parse_config
from mach.data.store import Chunk, Store
from mach.data.writer import StoreWriter
from mach.errors import ConfigError, StorageError
from mach.launch.launchers import train as launch_training
from mach.launch.reranker import train_reranker
from mach.launch.setup import set_up
from mach.loading import load
from mach.networks.batch import SparseBatch, read_batch, read_classes
from mach.places import flush_to_disk, short_lived, temporary_name
from mach.reranker import is_due
from mach.storage import Run

if TYPE_CHECKING:
    from rich.console import Console
    from scipy.sparse import csr_array

    from mach.data.text import TextFeatures
    from mach.model import MachModel

Features: TypeAlias = "list[str] | csr_array | NDArray[np.float32]"
Tree: TypeAlias = dict[str, dict[str, Any]]  # sections of a configuration

FEW_CLASSES = 1024  # up to here every class has a bucket of its own, and all are scored
FEW_PARAMETERS = 2**22  # up to here float32 costs nothing worth saving, and rows are answered in blocks of one size
BLOCK_ROWS = 64
BLOCK_SCORES = 2**22  # class scores held at once: 16 MB
LEAST_STEPS, MOST_EPOCHS = 300, 60
LEAST_PROBABILITY = 0.5  # of the classes that a row is said to have, where it may have any number
TEMPERATURES = (0.1, 10.0)
STORE, RUN = "store", "run"
WHERE = "MACHClassifier"  # what messages about its configuration begin with


@dataclass(frozen=True, eq=False)
class Rows:
    """Training rows in memory: features, and class ids as a CSR pair."""

    features: Features
    class_indptr: NDArray[np.int64]
    class_ids: NDArray[np.int32]
    n_classes: int

    def __len__(self) -> int:
        return len(self.class_indptr) - 1


class Folder:
    """A temporary folder that goes with this object, in the process that made it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mach-classifier-"))
        weakref.finalize(self, _remove, self.path, os.getpid())


class Fitted:
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
    """

    def __init__(self, path: Path, n_classes: int, temperature: float = 1.0, folder: Folder | None = None) -> None:
        self.path, self.n_classes, self.temperature = path, n_classes, temperature
        self._folder = folder

    def __getstate__(self) -> dict[str, Any]:
        files = {str(file.relative_to(self.path)): file.read_bytes() for file in _files(self.path)}
        return {"n_classes": self.n_classes, "temperature": self.temperature, "files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        folder = Folder()
        for name, content in state["files"].items():
            file = folder.path / RUN / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        self.__init__(folder.path / RUN, state["n_classes"], state["temperature"], folder)  # type: ignore[misc]

    @cached_property
    def model(self) -> MachModel:
        """The run as a model; its ids beyond K are spare."""
        return load(self.path)

    @property
    def is_exclusive(self) -> bool:
        """Whether a row has exactly one class."""
        return self.model.run.manifest.loss == "softmax"

    @property
    def scores_all(self) -> bool:
        """Whether every class is scored to find the best: there are few, and none shares a bucket."""
        return self.n_classes <= FEW_CLASSES and self.model.n_buckets >= self.n_classes

    def logits(self, features: Features) -> Iterator[NDArray[np.float32]]:
        """Blocks of shape (n, K): log-probabilities over the temperature, or log-odds where classes do not exclude others.

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
            for found in self.model.search_in_parts(features, k, allowed=self._allowed_K):
                ids.append(found.ids_Nk)
                values.append(self._of_scores(found.scores_Nk))
        return np.concatenate(ids), np.concatenate(values)

    def likely(self, features: Features) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Classes of probability 0.5 or more of every row, ascending, as a CSR pair; any number of them."""
        k, K = min(16, self.n_classes), self.n_classes
        while True:
            ids_Nk, probs_Nk = self.topk(features, k)
            is_likely_Nk = probs_Nk >= LEAST_PROBABILITY
            if k == K or not is_likely_Nk[:, -1].any():
                break
            k = min(4 * k, K)
        counts = is_likely_Nk.sum(1)
        order_Nk = np.argsort(np.where(is_likely_Nk, ids_Nk, K), axis=1)
        ids_Nk = np.take_along_axis(ids_Nk, order_Nk, axis=1)
        return np.concatenate([[0], np.cumsum(counts)]), ids_Nk[np.arange(k) < counts[:, None]]

    def copy_to(self, path: Path, extra: dict[str, bytes]) -> None:
        """Copy the run, with further files, to a new place; it is there whole or not at all.

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
        n_rows = features.shape[0] if hasattr(features, "shape") else len(features)
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
            return model.probabilities(np.zeros(scores.shape, np.int64), scores)
        return naive(scores, model.aggregate).astype(np.float32)


def fit(
    rows: Rows,
    given: Tree,
    *,
    seed: int,
    is_exclusive: bool,
    names: list[str] | None = None,
    device: str = "cpu",
    console: Console,
) -> Fitted:
    """Train a new run on rows in memory.

    Parameters
    ----------
    rows : Rows
    given : dict
        Sections of a configuration; what they leave open is chosen by `small_choices` and `mach.recipe`.
    seed : int
        Of hash functions, weights, row order and dropout.
    is_exclusive : bool
        Whether every row has exactly one class, now and in future.
    names : list of str, optional
        Of the classes, for people.
    device : str
        "cpu" or "cuda:N".
    console : Console
        Where progress goes.

    Notes
    -----
    Cost: that of ``mach train``; the rows are on disk once more until it is done.
    """
    folder = Folder()
    with short_lived():
        store = write_store(rows, parse_config({"data": {"train": ""}} | given, WHERE), folder.path / STORE, names)
        shape = recipe.Shape(store.n_rows, store.n_features, store.n_classes, store.is_dense)
        tree = small_choices(shape, is_exclusive=is_exclusive, seed=seed)
        for section, values in given.items():
            tree[section] = tree.get(section, {}) | values
        tree["data"]["train"] = str(store.path)
        _own_buckets(tree["hashing"], shape.n_classes, folder.path / "table.npy")
        run = train(parse_config(tree, WHERE), folder.path / RUN, device=device, console=console)
        fitted = Fitted(folder.path / RUN, rows.n_classes, folder=folder)
        held = held_out(run, store)
        if is_exclusive and len(held) >= LEAST_ROWS:
            fitted.temperature = _best_temperature(fitted, store, held)
        shutil.rmtree(folder.path / STORE)
    return fitted


def _own_buckets(hashing: dict[str, Any], n_classes: int, table: Path) -> None:
    """Give every class a bucket of its own where there are few, and never ask for more buckets than classes."""
    n_buckets = hashing.get("buckets") or n_classes
    if n_classes <= FEW_CLASSES and n_buckets >= n_classes and not {"table", "assignment"} & hashing.keys():
        n_functions = hashing["repetitions"] * hashing["heads"]
        np.save(table, np.tile(np.arange(n_classes, dtype=np.int32), (n_functions, 1)))
        hashing |= {"table": str(table), "buckets": n_classes}
    elif "buckets" in hashing:
        hashing["buckets"] = min(n_buckets, n_classes)


def small_choices(shape: recipe.Shape, *, is_exclusive: bool, seed: int) -> Tree:
    """What a configuration leaves open where rows or classes are fewer than `mach.recipe` was made for.

    Shorter batches and more epochs, so that there are some hundred steps; below `FEW_CLASSES` a network of its own
    bucket for every class; held-out rows for probabilities wherever there are enough.
    """
    n_rows = max(shape.n_rows, 1)
    batch = min(max(2 ** int(np.log2(max(n_rows / 20, 1))), 16), 256 if shape.is_dense else 512)
    tree: Tree = {
        "data": {"validation_fraction": recipe.held_out_fraction(n_rows)},
        "training": {"loss": "softmax" if is_exclusive else "binary", "batch": batch, "seed": seed},
        "hashing": {"seed": seed},
    }
    epochs = min(-(-LEAST_STEPS // -(-n_rows // batch)), MOST_EPOCHS)
    if epochs > 12:
        tree["training"]["epochs"] = epochs
    if n_rows < 5000 and shape.is_dense:
        tree["training"]["rate"] = 6e-3
    if shape.n_classes <= FEW_CLASSES:
        width = 128 if n_rows < 1000 else 512
        tree["network"] = {"hidden": [width]}
        tree["hashing"] |= {"repetitions": 1, "heads": 1}
        tree["reranking"] = {"candidates": 0}
        if (shape.n_features + shape.n_classes) * width <= FEW_PARAMETERS:
            tree["network"]["weights"] = tree["training"]["precision"] = "float32"
    return tree


def write_store(rows: Rows, config: Config, path: Path, names: list[str] | None = None) -> Store:
    """Rows as a store; texts become features that are fitted on them. One class gets a spare one beside it."""
    text_features: TextFeatures | None = None
    features: Any = rows.features
    is_dense = isinstance(features, np.ndarray)
    if isinstance(features, list):
        text_features = _fitted_text(config.text, features)
        n_features, features = text_features.n_features, text_features.transform(features)
    else:
        n_features = int(features.shape[1])
        features = features if is_dense else (features.indptr, features.indices, features.data)
    row_features = recipe.before_reading(config).data.row_features
    if not is_dense and text_features is None and "row_features" not in config.data.model_fields_set:
        values = features[2]  # of values that are all equal none is the largest
        row_features = 0 if not len(values) or values.min() == values.max() else row_features
    n_ids = max(rows.n_classes, 2)
    with StoreWriter(
        path, source="memory", dense=is_dense, n_features=n_features, n_classes=n_ids, row_features=row_features
    ) as writer:
        writer.append(Chunk(rows.class_indptr, rows.class_ids, features))
        writer.text_features = text_features
        if names is not None and len(names) == n_ids:
            writer.class_names = names
    return Store.open(path)


def train(config: Config, path: Path, *, device: str = "cpu", console: Console) -> Run:
    """Train a run to its end: repetitions, re-ranker, calibration; one worker is this process itself."""
    run, store = set_up(config, path)
    launch = config.launch
    if launch.launcher == "local" and launch.workers == 1:
        _train_here(run, store, launch, device, console)
    else:
        if device != "cpu" and not launch.gpus:
            share = 1.0 if launch.launcher == "ray" else 1.0 / (launch.workers or 1)
            launch = launch.model_copy(update={"gpus": share})
        launch_training(run, store, launch, console=console)
        train_reranker(run, store, launch, console=console)
    calibrate_when_due(run, store)
    return run


def _train_here(run: Run, store: Store, launch: LaunchConfig, device: str, console: Console) -> None:
    from mach.launch.display import Display
    from mach.traffic import PeerTraffic
    from mach.training import ShardJob, train_shard

    repetitions = list(range(run.config.hashing.repetitions))
    display = Display(console, repetitions, [])
    traffic = PeerTraffic()
    # other threads of this process may open sockets, and that is no talk between repetitions
    with _torch_kept(), display, traffic.paused():
        for r in repetitions:
            job = ShardJob(str(run.path), str(store.path), (r,), threads=launch.threads, device=device)
            display.set(r, f"here, {device}")
            train_shard(job, report=display.progressed, traffic=traffic)
            display.set(r, "finished")
        if is_due(run):
            from mach.reranking import STAGES, RerankerTraining

            training = RerankerTraining(run, store)
            training.begin()
            for stage in STAGES:
                for part in training.parts(stage)[1]:
                    training.make(stage, part)
            training.finish()


@contextlib.contextmanager
def _torch_kept() -> Iterator[None]:
    """Give back what training changes in this process's torch: its threads and its random numbers."""
    import torch

    n_threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        torch.set_rng_state(state)


def _best_temperature(fitted: Fitted, store: Store, rows: NDArray[np.int64]) -> float:
    """The temperature under which held-out rows are most likely (Guo et al., "On calibration of modern neural networks")."""
    from scipy.optimize import minimize_scalar

    rows = rows[: max(LEAST_ROWS, 8 * BLOCK_SCORES // fitted.n_classes)]
    batch = read_batch(store, rows)
    features: Any = batch.matrix(store.n_features) if isinstance(batch, SparseBatch) else batch.values_ND
    logits_NK = np.concatenate(list(fitted.logits(features))).astype(np.float64)
    classes, _ = read_classes(store, rows)
    logits_NK -= logits_NK.max(axis=1, keepdims=True)
    right_N = logits_NK[np.arange(len(rows)), classes]

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.mean(np.log(np.exp(logits_NK / temperature).sum(1)) - right_N / temperature))

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def _fitted_text(config: TextConfig, texts: list[str]) -> TextFeatures:
    from mach.data.text import TextFeatures

    features = TextFeatures(config)
    return features.fit(texts) if config.tfidf or not config.hashing else features


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


def refuse_large(n_rows: int, n_classes: int, most_bytes: int, what: str) -> None:
    """Refuse a matrix of all classes that is larger than stated."""
    n_bytes = 4 * n_rows * n_classes
    if n_bytes > most_bytes:
        raise ConfigError(
            f"{what} of {n_rows} rows and {n_classes} classes takes {n_bytes} bytes, max_proba_bytes is {most_bytes}: "
            "ask predict_topk for the best classes, give fewer rows, or raise it"
        )
