"""The re-ranker of a run: one sparse linear classifier a class, mapped, that puts candidates in a better order.

``reranker.safetensors`` holds, for K classes, ``offsets`` (int64, K + 1), ``scales``, ``biases`` and ``priors``
(float32, K), and for every stored weight its feature as a step from the class's feature before (``gaps``, int16; the
first from 0) and its value (``codes``, int8, times the class's scale): 3 bytes a weight and 20 a class. Steps above
32,767 are cut by codes of 0. Where the blend asks for it, ``repeats`` (uint32) counts training rows by their features
and class (`mach.kernels.repeats`). The metadata hold the fingerprint, C, the blend, the loss, how many features of a
row give pairs and the power of its values (`mach.kernels.pairs`): the file is whole by itself. Files without priors, of
the first version, have 0 for all of them, those without a loss the squared hinge, without pairs none, a power of 1.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mach.config import RerankingConfig, RerankingLoss, Section
from mach.decoding import TopK
from mach.errors import StorageError
from mach.ordering import reorder, repeat_terms
from mach.places import cache_folder, fetch, is_there, kept
from mach.repetition import read_json
from mach.tensors import digest_of, map_tensors

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from mach.networks.batch import SparseBatch
    from mach.storage import Run

FORMAT: Literal[1] = 1
FORMULAS: dict[RerankingLoss, str] = {"hinge": "max(0, 1 - margin)^2", "logistic": "log(1 + exp(-margin))"}
LOWEST_MARGIN = np.float32(-1e6)  # keeps every score finite
CLASSIFIERS = ("offsets", "gaps", "codes", "scales", "biases")  # the arrays that margins come from
_DTYPES = dict(zip(CLASSIFIERS, (np.int64, np.int16, np.int8, np.float32, np.float32), strict=True)) | {
    "priors": np.float32,
    "repeats": np.uint32,
}


class Blend(Section):
    """How aggregate, margin and counts of a class become one score, see `combine` and `mach.ordering`."""

    weight: float
    prior: float
    repeats: float = 0.0


class Reranked(Section):
    """What a finished re-ranker tells about itself: the content of RERANKED.

    ``fingerprint`` is that of what it was trained from and with, ``least`` the smallest magnitude that was kept,
    ``n_pairs`` the pairs of row and class that it was fitted to, ``validated`` whether held-out rows chose the blend.
    """

    format: Literal[1] = FORMAT
    fingerprint: str
    repetitions: list[int]
    settings: RerankingConfig
    weight: float
    prior: float = 0.0
    repeats: float = 0.0
    validated: bool
    least: float
    n_weights: int
    n_bytes: int
    n_pairs: int
    cpu_seconds: float
    digest: str


def fingerprint(run: Run) -> str:
    """Digest of all that decides the classifiers: settings, data, and the weights of all repetitions."""
    config = run.config
    digests = [run.repetition(r).summary().weights_digest for r in range(config.hashing.repetitions)]
    settings = config.reranking.model_dump()
    for name in ("pairs", "class_weights"):  # keys that older classifiers do not know, and do not need
        if not settings[name]:
            del settings[name]
    for name, default in (("repeats", None), ("power", 1.0)):
        if settings[name] == default:
            del settings[name]
    parts = (FORMAT, settings, config.decoding.aggregate, run.manifest.data_fingerprint, digests)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def is_due(run: Run) -> bool:
    """Whether a re-ranker is wanted, all repetitions are finished, and none is there of these settings and weights."""
    if run.config.reranking.candidates == 0 or len(run.finished()) < run.config.hashing.repetitions:
        return False
    return not is_there(run.reranked) or read_json(run.reranked, Reranked).fingerprint != fingerprint(run)


def combine(
    scores_NC: NDArray[np.float32],
    margins_NC: NDArray[np.float32],
    terms_NC: NDArray[np.float32],
    weight: float,
    loss: RerankingLoss = "hinge",
) -> NDArray[np.float32]:
    """Aggregate minus weight times the classifier's own loss as a positive, plus what is counted of a class; float32.

    The loss is ``max(0, 1 - margin)^2``, or ``log(1 + exp(-margin))`` if logistic: a class that is certain keeps its
    aggregate, all others lose. Terms (`mach.ordering`) are at most 0, so no score exceeds its aggregate.

    Examples
    --------
    >>> combine(np.float32([[-1, -1]]), np.float32([[2, 0]]), np.float32([[-0.5, 0]]), weight=3.0).tolist()
    [[-1.5, -4.0]]
    """
    margins_NC = np.fmax(margins_NC, LOWEST_MARGIN)
    if loss == "hinge":
        losses_NC = np.square(1 - np.fmin(margins_NC, np.float32(1)))
    else:
        losses_NC = np.logaddexp(np.float32(0), -margins_NC)
    return scores_NC - np.float32(weight) * losses_NC + terms_NC


class Reranker:
    """Linear classifiers of K classes over D features; safe to share between threads.

    Parameters
    ----------
    arrays : mapping
        As in the file.
    n_features : int
    candidates : int
        C, the classes of a query that are ordered anew.
    blend : Blend
        Its prior is that of the file's ``priors``.
    loss : {"hinge", "logistic"}
        That the classifiers were fitted with.
    pairs : int
        Largest features of a row whose products are features as well; 0: none.
    power : float
        That values of a row are raised to before.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]],
        *,
        n_features: int,
        candidates: int,
        blend: Blend,
        loss: RerankingLoss = "hinge",
        pairs: int = 0,
        power: float = 1.0,
    ) -> None:
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}  # not memmap: calls cost less
        self.n_features, self.pairs, self.power = n_features, pairs, power
        self.candidates, self.blend, self.loss = candidates, blend, loss
        self._scratch = threading.local()

    @classmethod
    def load(cls, run: Run) -> Reranker | None:
        """The re-ranker of a run, mapped; None where it has none, or its configuration says that it wants none.

        Raises
        ------
        StorageError
            When the file is damaged or of another run.
        """
        if run.config.reranking.candidates == 0 or not is_there(run.reranked):
            return None
        path, K = _file(run), run.manifest.n_classes
        arrays, metadata = map_tensors(path)
        n = len(arrays.get("codes", ()))
        shapes = {"offsets": (K + 1,), "gaps": (n,), "codes": (n,), "scales": (K,), "biases": (K,)}
        if "priors" in arrays:
            shapes |= {"priors": (K,)}
        if "repeats" in arrays:
            shapes |= {"repeats": (max(1, arrays["repeats"].size),)}
        for name, shape in shapes.items():
            if name not in arrays or arrays[name].shape != shape or arrays[name].dtype != _DTYPES[name]:
                raise StorageError(f"{run.reranker_file}: {name} is missing or not of shape {shape}: train it again")
        try:
            candidates = int(metadata["candidates"])
            blend = Blend(
                weight=float(metadata["weight"]),
                prior=float(metadata.get("prior", 0)),
                repeats=float(metadata.get("repeats", 0)),
            )
            if blend.repeats and "repeats" not in arrays:
                raise ValueError(f"repeats {blend.repeats:g} without a table")
            loss = metadata.get("loss", "hinge")
            if loss not in get_args(RerankingLoss):
                raise ValueError(f"loss {loss}")
            pairs = int(metadata.get("pairs", 0))
            power = float(metadata.get("power", 1))
        except (KeyError, ValueError) as error:
            raise StorageError(f"{run.reranker_file}: its metadata are damaged ({error}): train it again") from error
        options: dict[str, Any] = {"candidates": candidates, "blend": blend, "loss": loss}
        options |= {"pairs": pairs, "power": power}
        return cls(arrays, n_features=run.manifest.n_features, **options)

    @property
    def n_columns(self) -> int:
        """Features of the classifiers: D, and those of pairs."""
        from mach.kernels.pairs import N_HASHED

        return self.n_features + (N_HASHED if self.pairs > 1 else 0)

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays, on disk and in memory once every page was touched."""
        return sum(array.nbytes for array in self.arrays.values())

    def margins(self, batch: SparseBatch, ids_NC: NDArray[np.int64]) -> NDArray[np.float32]:
        """``w_k x_n + b_k`` of given classes, shape (N, C); reads 3 bytes for each of their weights."""
        from mach.kernels.pairs import with_pairs
        from mach.kernels.rerank import margins

        margins_NC = np.empty(ids_NC.shape, np.float32)
        x_D = getattr(self._scratch, "x_D", None)
        if x_D is None:
            x_D = self._scratch.x_D = np.zeros(self.n_columns + 1, np.float32)
        offsets, gaps, codes, scales, biases = (self.arrays[name] for name in CLASSIFIERS)
        rows = (batch.indptr, batch.indices, batch.values)
        if self.pairs > 1 or self.power != 1:
            rows = with_pairs(*rows, np.arange(len(batch)), self.pairs, self.n_features, self.power)
        margins(rows, ids_NC, offsets, gaps, codes, scales, biases, x_D, margins_NC)
        return margins_NC

    def repeats(self, batch: SparseBatch, ids_NC: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Training rows with a query's features: those that have a given class, shape (N, C), and all; at most 255."""
        from mach.kernels.repeats import counts_of

        counts_NC, totals_N = np.zeros(ids_NC.shape, np.uint8), np.zeros(len(ids_NC), np.uint8)
        table = self.arrays.get("repeats")
        if table is not None and len(table):
            counts_of(table, (batch.indptr, batch.indices, batch.values), ids_NC, counts_NC, totals_N)
        return counts_NC, totals_N

    def rescore(
        self, batch: SparseBatch, ids_NC: NDArray[np.int64], scores_NC: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores of given classes with the classifiers' part and the prior terms, shape (N, C)."""
        margins_NC, blend = self.margins(batch, ids_NC), self.blend
        priors_K = self.arrays.get("priors")
        terms_NC = np.zeros_like(margins_NC) if priors_K is None else priors_K[np.maximum(ids_NC, 0)]
        if blend.repeats:
            terms_NC = terms_NC + repeat_terms(*self.repeats(batch, ids_NC), blend.repeats)
        return combine(scores_NC, margins_NC, terms_NC, blend.weight, self.loss)

    def rerank(self, batch: SparseBatch, top: TopK, k: int, terms_K: NDArray[np.float32] | None = None) -> TopK:
        """The best k of the candidates by both, and by further terms of their classes, see `mach.ordering.reorder`."""
        scores_NC = self.rescore(batch, top.ids_Nk, top.scores_Nk)
        return reorder(top, scores_NC if terms_K is None else scores_NC + terms_K[top.ids_Nk], k)

    def matrix(self) -> csr_array:
        """All weights but the biases, (K, `n_columns`), in plain numpy: the oracle of the compiled margins."""
        from scipy.sparse import csr_array

        offsets, gaps, codes, scales = (
            np.asarray(self.arrays[name]) for name in ("offsets", "gaps", "codes", "scales")
        )
        totals = np.concatenate([[0], np.cumsum(gaps, dtype=np.int64)])
        counts_K = np.diff(offsets)
        features = totals[1:] - np.repeat(totals[offsets[:-1]], counts_K)
        weights = codes * np.repeat(scales, counts_K)
        return csr_array((weights, features, offsets), shape=(len(counts_K), self.n_columns))


def _file(run: Run) -> Path:
    """The file on this machine; a remote one is fetched once a machine and compared with what RERANKED says."""
    where = run.reranker_file
    if isinstance(where, Path):
        return where
    digest = read_json(run.reranked, Reranked).digest

    def check(file: Path) -> None:
        found = digest_of(map_tensors(file)[0])
        if found != digest:
            raise StorageError(f"{where} has digest {found}, RERANKED says {digest}: run the same `mach train` again")

    return kept(cache_folder() / "weights" / f"{digest}.safetensors", lambda file: fetch(where, file, check))


def verify(run: Run) -> None:
    """Compare the classifiers, if there are any, with the digest of their training; a StorageError if they differ."""
    if is_there(run.reranked):
        found, recorded = digest_of(map_tensors(_file(run))[0]), read_json(run.reranked, Reranked).digest
        if found != recorded:
            raise StorageError(f"{run.reranker_file} has digest {found}, training recorded {recorded}: train it again")
