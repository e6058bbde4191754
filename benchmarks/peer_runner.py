"""One entrant of benchmarks/peers.py in a process of its own: train and save, or load and answer.

    benchmarks/.peers/bin/python benchmarks/peer_runner.py train omikuji-parabel --work FOLDER --threads 2

peers.py starts it, with the interpreter of the peers' own environment (ours: that of mach). What a peer prints goes
where it likes, figures go to FOLDER/ENTRANT.STAGE.json and the answers to FOLDER/ENTRANT.npy. FOLDER holds the data as
peers.py laid it out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import pickle
import random
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

TOP = 5
STAGES = ("train", "batch", "single")
SINGLE_QUERIES, SINGLE_SECONDS, SINGLE_AT_LEAST = 300, 60, 20
Ids = NDArray[np.int64]
LABEL = "__label__"


class RefusedError(Exception):
    """The entrant cannot do this data set within the memory it may have."""


class Entrant:
    """What is done with every entrant; only `fit` is timed as training, `answer` as answering."""

    packages: ClassVar[tuple[str, ...]]
    modules: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[str]
    slow: ClassVar[bool] = False

    def __init__(self, work: Path, name: str, threads: int, memory: int) -> None:
        self.work, self.model, self.threads, self.memory = work, work / f"{name}.model", threads, memory

    def read(self) -> None:
        """The training rows, as the peer takes them, and the library, whose import is no part of the fit."""
        for module in self.modules:
            importlib.import_module(module)
        self.x = sp.load_npz(self.work / "train.x.npz")
        self.y = sp.load_npz(self.work / "train.y.npz")

    def fit(self) -> None:
        raise NotImplementedError

    def save(self) -> None:
        raise NotImplementedError

    def load(self) -> None:
        raise NotImplementedError

    def queries(self) -> Any:
        """The test rows, as the peer takes them: sliced by rows, one row is a batch of one."""
        return sp.load_npz(self.work / "test.x.npz")

    def answer(self, queries: Any) -> Ids:
        """The best classes, best first, -1 where there are fewer; shape (N, 5)."""
        raise NotImplementedError


class Omikuji(Entrant):
    """Its own defaults are those of Parabel. It has no call for a batch and reads its training file itself."""

    packages = ("omikuji",)
    settings = "defaults (Parabel: 3 trees, balanced 2-means); training includes reading the text; asked row by row"
    parameters: ClassVar[dict[str, Any]] = {}

    def read(self) -> None:
        pass

    def fit(self) -> None:
        import omikuji

        parameters = omikuji.Model.default_hyper_param()
        for name, value in self.parameters.items():
            setattr(parameters, name, value)
        self.fitted = omikuji.Model.train_on_data(str(self.work / "train.txt"), parameters, self.threads)

    def save(self) -> None:
        self.fitted.save(str(self.model))

    def load(self) -> None:
        import omikuji

        self.fitted = omikuji.Model.load(str(self.model))
        self.fitted.init_prediction_thread_pool(self.threads)

    def queries(self) -> list[list[tuple[int, float]]]:
        x = sp.load_npz(self.work / "test.x.npz")
        ends = zip(x.indptr[:-1], x.indptr[1:], strict=True)
        return [list(zip(x.indices[i:j].tolist(), x.data[i:j].tolist(), strict=True)) for i, j in ends]

    def answer(self, queries: Any) -> Ids:
        return padded([[k for k, _ in self.fitted.predict(pairs, top_k=TOP)] for pairs in queries])


class OmikujiBonsai(Omikuji):
    settings = (
        "Bonsai as documented: cluster_balanced = False, cluster_k = 100, max_depth = 3; "
        "training includes reading the text; asked row by row"
    )
    parameters: ClassVar[dict[str, Any]] = {"cluster_balanced": False, "cluster_k": 100, "max_depth": 3}


class OmikujiOneTree(Omikuji):
    settings = Omikuji.settings.replace("3 trees", "1 tree instead of 3")
    parameters: ClassVar[dict[str, Any]] = {"n_trees": 1}


class Pecos(Entrant):
    packages = ("libpecos",)
    modules = ("pecos.xmc.xlinear.model",)
    settings = "XR-Linear with defaults: PIFA, hierarchical k-means, beam 10"
    beam: ClassVar[int] = 10

    def fit(self) -> None:
        from pecos.xmc import Indexer, LabelEmbeddingFactory
        from pecos.xmc.xlinear.model import XLinearModel

        y = self.y.tocsc().astype(np.float32)
        chain = Indexer.gen(LabelEmbeddingFactory.create(y, self.x, method="pifa"), threads=self.threads)
        self.fitted = XLinearModel.train(self.x, y, C=chain, threads=self.threads)

    def save(self) -> None:
        self.fitted.save(str(self.model))

    def load(self) -> None:
        from pecos.xmc.xlinear.model import XLinearModel

        self.fitted = XLinearModel.load(str(self.model), is_predict_only=True)

    def answer(self, queries: Any) -> Ids:
        return top_of_rows(self.fitted.predict(queries, only_topk=TOP, beam_size=self.beam, threads=self.threads))


class PecosWide(Pecos):
    settings = Pecos.settings.replace("beam 10", "beam 50")
    beam = 50


class PecosTrees(Pecos):
    """Three trees of other seeds; what their best 20 classes have is added up."""

    settings = Pecos.settings.replace("beam 10", "beam 10; 3 trees of other seeds, their scores added up")
    seeds = (0, 1, 2)

    def fit(self) -> None:
        from pecos.xmc import Indexer, LabelEmbeddingFactory
        from pecos.xmc.xlinear.model import XLinearModel

        y = self.y.tocsc().astype(np.float32)
        classes = LabelEmbeddingFactory.create(y, self.x, method="pifa")
        self.trees = []
        for seed in self.seeds:
            chain = Indexer.gen(classes, seed=seed, threads=self.threads)
            self.trees.append(XLinearModel.train(self.x, y, C=chain, threads=self.threads))

    def save(self) -> None:
        for seed, tree in zip(self.seeds, self.trees, strict=True):
            tree.save(str(self.model / str(seed)))

    def load(self) -> None:
        from pecos.xmc.xlinear.model import XLinearModel

        self.trees = [XLinearModel.load(str(self.model / str(seed)), is_predict_only=True) for seed in self.seeds]

    def answer(self, queries: Any) -> Ids:
        scores = (tree.predict(queries, only_topk=20, threads=self.threads) for tree in self.trees)
        return top_of_rows(sum(scores).tocsr())


class PecosOneVersusRest(Pecos):
    settings = "XR-Linear without a tree: one-vs-rest, defaults"
    slow = True

    def fit(self) -> None:
        from pecos.xmc.xlinear.model import XLinearModel

        self.fitted = XLinearModel.train(self.x, self.y.tocsc().astype(np.float32), threads=self.threads)


class NapkinXC(Entrant):
    """It writes its model while it fits."""

    packages = ("napkinxc",)
    settings = "PLT with defaults, seed 1; training includes writing the model"

    def fit(self) -> None:
        from napkinxc.models import PLT

        PLT(str(self.model), threads=self.threads, seed=1).fit(self.x, self.y)

    def save(self) -> None:
        pass

    def load(self) -> None:
        from napkinxc.models import PLT

        self.fitted = PLT(str(self.model), threads=self.threads)
        self.fitted.load()

    def answer(self, queries: Any) -> Ids:
        return padded(self.fitted.predict(queries, top_k=TOP))


class LibMultiLabelTree(Entrant):
    """Its own reader knows only classes that occur in training, so that others are left out here as well."""

    packages = ("libmultilabel", "sparsekmeans", "liblinear-multicore")
    settings = "train_tree with defaults (one tree, K = 100); answers with one thread, 256 rows at a time"

    def read(self) -> None:
        super().read()
        self.linear = self.library()
        self.classes = np.flatnonzero(np.bincount(self.y.indices, minlength=self.y.shape[1]))
        self.y = self.y[:, self.classes]
        self.x = self.x.astype(np.float64)

    def fit(self) -> None:
        self.fitted = self.linear.train_tree(self.y, self.x, verbose=False)

    def library(self) -> Any:
        # it asks how many processors there are instead of taking a number of threads, and k-means takes half of them
        patch("psutil.cpu_count", return_value=self.threads).start()
        with patch("os.cpu_count", return_value=2 * self.threads):
            import libmultilabel.linear
        return libmultilabel.linear

    def save(self) -> None:
        from libmultilabel.linear.utils import save_pipeline

        save_pipeline(str(self.model), None, self.fitted)
        np.save(self.work / "classes.npy", self.classes)

    def load(self) -> None:
        from libmultilabel.linear.utils import load_pipeline

        self.fitted = load_pipeline(str(self.model / "linear_pipeline.pickle"))[1]
        self.classes = np.load(self.work / "classes.npy")

    def queries(self) -> Any:
        return super().queries().astype(np.float64)

    def answer(self, queries: Any) -> Ids:
        parts = (self.fitted.predict_values(rows) for rows in blocks(queries, 256))
        return np.concatenate([self.classes[top_of_dense(part)] for part in parts])


class LibMultiLabelOneVersusRest(LibMultiLabelTree):
    settings = "train_1vsrest with defaults; answers with one thread, 256 rows at a time"
    slow = True

    def fit(self) -> None:
        refuse_dense(self.x.shape[1], self.y.shape[1], self.memory)
        self.fitted = self.linear.train_1vsrest(self.y, self.x, verbose=False)


class ScikitLearn(Entrant):
    """A class without rows would get the constant 0, above most others, so that only classes with rows take part."""

    packages = ("scikit-learn",)
    modules = ("joblib", "sklearn.multiclass", "sklearn.svm")
    settings = "OneVsRestClassifier(LinearSVC()) with defaults, in threads; 256 rows at a time"
    slow = True

    def fit(self) -> None:
        import joblib
        from sklearn.multiclass import OneVsRestClassifier
        from sklearn.svm import LinearSVC

        self.classes = np.flatnonzero(np.bincount(self.y.indices, minlength=self.y.shape[1]))
        refuse_dense(self.x.shape[1], len(self.classes), self.memory)
        with joblib.parallel_backend("threading"):
            self.fitted = OneVsRestClassifier(LinearSVC(), n_jobs=self.threads).fit(self.x, self.y[:, self.classes])

    def save(self) -> None:
        self.model.write_bytes(pickle.dumps((self.classes, self.fitted), protocol=pickle.HIGHEST_PROTOCOL))

    def load(self) -> None:
        self.classes, self.fitted = pickle.loads(self.model.read_bytes())

    def answer(self, queries: Any) -> Ids:
        parts = (self.fitted.decision_function(rows) for rows in blocks(queries, 256))
        return np.concatenate([self.classes[top_of_dense(part)] for part in parts])


class FastTextSoftmaxTree(Entrant):
    """It takes texts, not features; lower case and words alone, as its own tutorial prepares them.

    It takes the rows in the order of the file, every epoch anew, and learns little where that is an order by class.
    """

    packages = ("fasttext-wheel",)
    loss: ClassVar[str] = "hs"
    settings = (
        "from the raw texts, loss hs (one random class of a row a step), lr 0.5, 25 epochs, 100 dimensions, "
        "single words, rows shuffled once; training includes reading the text; answers with one thread"
    )

    def read(self) -> None:
        rows = zip(self.class_ids(), self.words("train"), strict=True)
        lines = [" ".join([*(f"{LABEL}{k}" for k in ids), words]) + "\n" for ids, words in rows]
        random.Random(1).shuffle(lines)
        with (self.work / "train.fasttext.txt").open("w", encoding="utf-8") as file:
            file.writelines(lines)

    def class_ids(self) -> Iterator[list[int]]:
        y = sp.load_npz(self.work / "train.y.npz")
        return (y.indices[i:j].tolist() for i, j in zip(y.indptr[:-1], y.indptr[1:], strict=True))

    def words(self, part: str) -> Iterator[str]:
        path = self.work / f"{part}_texts.txt"
        if not path.exists():
            raise RefusedError(f"needs {path.name}.xz: the data set has no raw texts")
        with path.open(encoding="utf-8", newline="\n") as lines:
            yield from (" ".join(re.findall(r"\w+", line.lower())) for line in lines)

    def fit(self) -> None:
        import fasttext

        self.fitted = fasttext.train_supervised(
            str(self.work / "train.fasttext.txt"), loss=self.loss, lr=0.5, epoch=25, dim=100, thread=self.threads
        )

    def save(self) -> None:
        self.fitted.save_model(str(self.model))

    def load(self) -> None:
        import fasttext

        self.fitted = fasttext.load_model(str(self.model))

    def queries(self) -> list[str]:
        return list(self.words("test"))[: sp.load_npz(self.work / "test.y.npz").shape[0]]

    def answer(self, queries: Any) -> Ids:
        return padded([[int(name[len(LABEL) :]) for name in names] for names in self.fitted.predict(queries, k=TOP)[0]])


class FastTextOneVersusRest(FastTextSoftmaxTree):
    loss: ClassVar[str] = "ova"
    settings = FastTextSoftmaxTree.settings.replace("loss hs (one random class of a row a step)", "loss ova")
    slow = True


class Neighbours(Entrant):
    """The classes of the nearest training rows, weighted by cosine; the model is the training rows."""

    packages = ("scipy",)
    settings = "10 nearest training rows by exact cosine (scipy), classes weighted by it; nothing is trained"
    n_neighbours = 10

    def fit(self) -> None:
        self.columns = self.x.T.tocsr()

    def save(self) -> None:
        self.model.mkdir()
        sp.save_npz(self.model / "x.npz", self.columns, compressed=False)
        sp.save_npz(self.model / "y.npz", self.y, compressed=False)

    def load(self) -> None:
        self.columns, self.y = (sp.load_npz(self.model / name) for name in ("x.npz", "y.npz"))

    def answer(self, queries: Any) -> Ids:
        if queries.shape[0] == 1:
            return self.answer_block(queries)
        with ThreadPoolExecutor(self.threads) as pool:  # scipy multiplies without the interpreter's lock
            return np.concatenate(list(pool.map(self.answer_block, blocks(queries, 128))))

    def answer_block(self, queries: Any) -> Ids:
        likeness = (queries @ self.columns).tocsr()
        nearest = top_of_rows(likeness, self.n_neighbours)
        rows, ranks = np.nonzero(nearest >= 0)
        columns = nearest[rows, ranks]
        weights = np.asarray(likeness[rows, columns]).ravel()
        chosen = sp.csr_matrix((weights, (rows, columns)), shape=likeness.shape)
        return top_of_rows((chosen @ self.y).tocsr())


class Mach(Entrant):
    """Ours: trained through the command line by peers.py, asked here; its rows come from its own store."""

    packages = ("mach-classifier",)
    settings = "through `mach train`: everything from the start of the command, reading and process starts included"

    def load(self) -> None:
        import mach

        self.fitted = mach.load(str(self.model))

    def queries(self) -> Any:
        from mach.data.prepare import prepare

        config = self.fitted.run.config
        if config.data.test is None:
            raise RefusedError("its configuration names no test rows")
        store = prepare(config.data, config.text, config.data.test, like=self.fitted.run.reference())
        truth = sp.load_npz(self.work / "test.y.npz")
        n_rows = truth.shape[0]
        indptr = np.asarray(store.class_indptr[: n_rows + 1])
        if store.n_classes != truth.shape[1] or not np.array_equal(indptr, truth.indptr):
            raise RefusedError("its configuration has other test rows or classes than the data set")
        ours = sp.csr_matrix((np.ones(indptr[-1]), store.class_ids[: indptr[-1]], indptr), shape=truth.shape)
        if (ours != truth).nnz:
            raise RefusedError("its configuration numbers the classes or rows otherwise than the data set")
        return store.features(0, n_rows)

    def answer(self, queries: Any) -> Ids:
        return np.asarray(self.fitted.topk(queries, TOP)[0])


ENTRANTS: dict[str, type[Entrant]] = {
    "omikuji-parabel": Omikuji,
    "omikuji-parabel-1": OmikujiOneTree,
    "omikuji-bonsai": OmikujiBonsai,
    "pecos-xrlinear": Pecos,
    "pecos-xrlinear-beam-50": PecosWide,
    "pecos-xrlinear-3-trees": PecosTrees,
    "napkinxc-plt": NapkinXC,
    "libmultilabel-tree": LibMultiLabelTree,
    "fasttext-hs": FastTextSoftmaxTree,
    "neighbours": Neighbours,
    "pecos-ovr": PecosOneVersusRest,
    "libmultilabel-ovr": LibMultiLabelOneVersusRest,
    "sklearn-ovr": ScikitLearn,
    "fasttext-ova": FastTextOneVersusRest,
}


def padded(rows: Iterable[Sequence[int]]) -> Ids:
    return np.array([[*row[:TOP], *[-1] * (TOP - len(row))] for row in rows], dtype=np.int64).reshape(-1, TOP)


def blocks(queries: Any, n: int) -> Iterator[Any]:
    return (queries[begin : begin + n] for begin in range(0, queries.shape[0], n))


def top_of_rows(scores: sp.csr_matrix, n: int = TOP) -> Ids:
    """The columns of the n largest values stored in each row."""
    ids = np.full((scores.shape[0], n), -1, dtype=np.int64)
    for row, (i, j) in enumerate(zip(scores.indptr[:-1], scores.indptr[1:], strict=True)):
        values, columns = scores.data[i:j], scores.indices[i:j]
        if len(values) > n:
            kept = np.argpartition(-values, n)[:n]
            values, columns = values[kept], columns[kept]
        ids[row, : len(values)] = columns[np.argsort(-values, kind="stable")]
    return ids


def top_of_dense(scores: NDArray[np.floating[Any]]) -> Ids:
    best = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1)


def refuse_dense(n_features: int, n_classes: int, memory: int) -> None:
    needed = 8 * n_features * n_classes
    if needed > memory:
        raise RefusedError(f"keeps dense weights, {needed / 1e9:.0f} GB here; the limit is {memory / 1e9:.3g} GB")


def peak_bytes() -> int:
    """Of this process. Not ru_maxrss: that starts at what the parent held when it started us."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def bytes_on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def train(entrant: Entrant) -> dict[str, float]:
    shutil.rmtree(entrant.model, ignore_errors=True)
    entrant.model.unlink(missing_ok=True)
    entrant.read()
    cpu, started = cpu_seconds(), time.perf_counter()
    entrant.fit()
    figures = {"train_seconds": time.perf_counter() - started, "train_cpu_seconds": cpu_seconds() - cpu}
    figures["train_peak_bytes"] = peak_bytes()
    entrant.save()
    return figures | {"model_bytes": bytes_on_disk(entrant.model)}


def batch(entrant: Entrant) -> dict[str, float]:
    entrant.load()
    queries = entrant.queries()
    entrant.answer(queries[:16])  # compiled, mapped, converted
    cpu, started = cpu_seconds(), time.perf_counter()
    ids = entrant.answer(queries)
    figures = {"batch_ms": time.perf_counter() - started, "batch_cpu_ms": cpu_seconds() - cpu}
    np.save(entrant.model.with_suffix(".npy"), ids)
    return {name: 1e3 * value / len(ids) for name, value in figures.items()} | {"batch_peak_bytes": peak_bytes()}


def single(entrant: Entrant) -> dict[str, float]:
    """The median of up to 300 queries one by one, fewer where a minute is not enough."""
    entrant.load()
    queries = entrant.queries()
    n_rows = len(queries) if isinstance(queries, list) else queries.shape[0]
    seconds: list[float] = []
    begun = time.perf_counter()
    entrant.answer(queries[:1])
    for n in np.linspace(0, n_rows - 1, min(n_rows, SINGLE_QUERIES)).astype(int):
        row, started = queries[n : n + 1], time.perf_counter()
        entrant.answer(row)
        seconds.append(time.perf_counter() - started)
        if len(seconds) >= SINGLE_AT_LEAST and started - begun > SINGLE_SECONDS:
            break
    return {"single_ms": 1e3 * float(np.median(seconds)), "single_queries": len(seconds)}


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise RefusedError(f"{package} is not installed") from error
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("entrant", help=f"{', '.join(ENTRANTS)}; any other name: ours")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, default=10 * 10**9)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    entrant = ENTRANTS.get(options.entrant, Mach)(options.work, options.entrant, options.threads, options.memory)
    stages: dict[str, Callable[[Entrant], dict[str, float]]] = {"train": train, "batch": batch, "single": single}
    try:
        found = versions(entrant.packages)
        result: dict[str, Any] = stages[options.stage](entrant) | {"versions": found}
    except RefusedError as error:
        result = {"refused": str(error)}
    (options.work / f"{options.entrant}.{options.stage}.json").write_text(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
