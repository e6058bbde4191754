"""The re-ranker of a run: sparse linear classifiers of all classes, mapped, that put candidates in a better order.

``reranker.safetensors`` holds a set of classifiers (`mach.classifiers.ARRAYS`), and ``priors`` (float32, K): 20 bytes a
class and 3 a weight. Where the blend asks for it, or an order was learned, ``repeats`` (uint32) counts training rows by
their features and class (`mach.kernels.repeats`). A learned order (`mach.stacker`) brings its own arrays, named
``stacker.*``, those of further sets of classifiers, ``presence.*`` and so on, rules ``rules.*``
(`mach.kernels.associations`) and ``log_rows`` (float32, K). The metadata hold the fingerprint, C, the blend, the loss,
how many features of a row give pairs, the power of its values and their mean number: the file is whole by itself. Files
without priors, of the first version, have 0 for all of them, those without a loss the squared hinge, without pairs
none, a power of 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mach.classifiers import ARRAYS, DTYPES, Classifiers, further_view, own_view
from mach.config import RerankingConfig, RerankingLoss, Section, ViewName
from mach.errors import StorageError
from mach.ordering import reorder, repeat_terms
from mach.places import cache_folder, fetch, is_there, kept
from mach.repetition import read_json
from mach.sketch.answers import TopK
from mach.stacker import BUCKET_INPUTS, COUNT_INPUTS, NAMES, ROW_INPUTS, RULE_INPUTS, Stacker, inputs_of
from mach.tensors import digest_of, map_tensors

if TYPE_CHECKING:
    from mach.data.batch import SparseBatch
    from mach.storage import Run

FORMAT: Literal[1] = 1
FORMULAS: dict[RerankingLoss, str] = {"hinge": "max(0, 1 - margin)^2", "logistic": "log(1 + exp(-margin))"}
LOWEST_MARGIN = np.float32(-1e6)  # keeps every score finite
RULES = ("offsets", "classes", "confidences", "supports")
_DTYPES: dict[str, Any] = {**DTYPES, "priors": np.float32, "repeats": np.uint32, "log_rows": np.float32}
_DTYPES |= {f"rules.{name}": dtype for name, dtype in zip(RULES, (np.int64, np.int32, np.uint8, np.int32), strict=True)}
_DTYPES |= {f"stacker.{name}": np.float32 for name in NAMES}


class Blend(Section):
    """How aggregate, margin and counts of a class become one score, see `combine` and `mach.ordering`."""

    weight: float
    prior: float
    repeats: float = 0.0


class Reranked(Section):
    """What a finished re-ranker tells about itself: the content of RERANKED.

    ``fingerprint`` is that of what it was trained from and with, ``least`` the smallest magnitude that was kept,
    ``n_pairs`` the pairs of row and class that it was fitted to, ``validated`` whether held-out rows chose the
    blend, and ``learned`` whether the order is a learned one, which leaves the blend without effect;
    ``cpu_seconds`` are without those of pilots.
    """

    format: Literal[1] = FORMAT
    fingerprint: str
    repetitions: list[int]
    settings: RerankingConfig
    weight: float
    prior: float = 0.0
    repeats: float = 0.0
    validated: bool
    learned: bool = False
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
    for name, default in (("repeats", None), ("power", 1.0), ("pilots", 0), ("views", []), ("inputs", False)):
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
    """What a run knows of its candidates beside their aggregates; safe to share between threads.

    Parameters
    ----------
    arrays : mapping
        As in the file.
    n_features : int
    settings : RerankingConfig
        Of them count C, and what tells the view of the classifiers and names further sets.
    blend : Blend
        Its prior is that of the file's ``priors``.
    row_features : float
        Mean number of features of a training row.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[Any]],
        *,
        n_features: int,
        settings: RerankingConfig,
        blend: Blend,
        row_features: float = 1.0,
    ) -> None:
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}  # not memmap: calls cost less
        self.n_features, self.candidates, self.blend = n_features, settings.candidates, blend
        self.classifiers = Classifiers(self.arrays, own_view(settings), n_features)
        self.further = [
            Classifiers(_within(self.arrays, view), further_view(view, row_features), n_features)
            for view in settings.views
        ]
        self.stacker = Stacker(_within(self.arrays, "stacker")) if f"stacker.{NAMES[0]}" in self.arrays else None

    @classmethod
    def load(cls, run: Run) -> Self | None:
        """The re-ranker of a run, mapped; None where it has none, or its configuration says that it wants none.

        Raises
        ------
        StorageError
            When the file is damaged or of another run.
        """
        if run.config.reranking.candidates == 0 or not is_there(run.reranked):
            return None
        arrays, metadata = map_tensors(_file(run))
        try:
            loss, views = metadata.get("loss", "hinge"), metadata.get("views", "")
            if loss not in get_args(RerankingLoss):
                raise ValueError(f"loss {loss}")
            settings = RerankingConfig(
                candidates=int(metadata["candidates"]),
                loss=cast(RerankingLoss, loss),
                pairs=int(metadata.get("pairs", 0)),
                power=float(metadata.get("power", 1)),
                inputs=True,
                views=[view for view in get_args(ViewName) if view in views.split(",")],
            )
            blend = Blend(
                weight=float(metadata["weight"]),
                prior=float(metadata.get("prior", 0)),
                repeats=float(metadata.get("repeats", 0)),
            )
            row_features = float(metadata.get("row_features", 1))
            if blend.repeats and "repeats" not in arrays:
                raise ValueError(f"repeats {blend.repeats:g} without a table")
        except (KeyError, ValueError) as error:
            raise StorageError(f"{run.reranker_file}: its metadata are damaged ({error}): train it again") from error
        _check(run, arrays, settings)
        return cls(
            arrays, n_features=run.manifest.n_features, settings=settings, blend=blend, row_features=row_features
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays, on disk and in memory once every page was touched."""
        return sum(array.nbytes for array in self.arrays.values())

    def margins(self, batch: SparseBatch, ids_NC: NDArray[np.int64]) -> NDArray[np.float32]:
        """``w_k x_n + b_k`` of given classes, shape (N, C)."""
        return self.classifiers.margins(batch, ids_NC)

    def repeats(self, batch: SparseBatch, ids_NC: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Training rows with a query's features: those that have a given class, shape (N, C), and all; at most 255."""
        from mach.kernels.repeats import counts_of

        counts_NC, totals_N = np.zeros(ids_NC.shape, np.uint8), np.zeros(len(ids_NC), np.uint8)
        table = self.arrays.get("repeats")
        if table is not None and len(table):
            counts_of(table, (batch.indptr, batch.indices, batch.values), ids_NC, counts_NC, totals_N)
        return counts_NC, totals_N

    def rules(self, batch: SparseBatch, ids_NC: NDArray[np.int64]) -> NDArray[np.float32]:
        """What rules of features say of given classes, shape (N, C, 5): `mach.kernels.associations.rules_for`."""
        from mach.kernels.associations import rules_for

        found_NC5 = np.zeros((*ids_NC.shape, 5), np.float32)
        offsets, classes, confidences, supports = (self.arrays[f"rules.{name}"] for name in RULES)
        rows = (batch.indptr, batch.indices, batch.values)
        rules_for(offsets, classes, confidences, supports, rows, ids_NC, found_NC5)
        return found_NC5

    def inputs(
        self,
        batch: SparseBatch,
        ids_NC: NDArray[np.int64],
        scores_NC: NDArray[np.float32],
        probs_NRB: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """What a learned order weighs, shape (N, C, I), see `mach.stacker.inputs_of`."""
        return inputs_of(
            scores_NC,
            self.arrays["log_rows"][np.maximum(ids_NC, 0)],
            np.diff(batch.indptr),
            probs_NRB,
            [classifiers.margins(batch, ids_NC) for classifiers in (self.classifiers, *self.further)],
            self.rules(batch, ids_NC),
            *self.repeats(batch, ids_NC),
        )

    def rescore(
        self,
        batch: SparseBatch,
        ids_NC: NDArray[np.int64],
        scores_NC: NDArray[np.float32],
        probs_NRB: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Scores of given classes by the learned order, else the blend, shape (N, C).

        Parameters
        ----------
        batch : SparseBatch
        ids_NC, scores_NC : int64 and float32 arrays
            Classes and their aggregates.
        probs_NRB : float32 array
            Bucket probabilities that these come from.
        """
        if self.stacker is not None:
            return self.stacker.scores(scores_NC, self.inputs(batch, ids_NC, scores_NC, probs_NRB))
        return self.blended(batch, ids_NC, scores_NC)

    def blended(
        self, batch: SparseBatch, ids_NC: NDArray[np.int64], scores_NC: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Scores with the classifiers' part and the prior terms, shape (N, C)."""
        margins_NC, blend = self.margins(batch, ids_NC), self.blend
        priors_K = self.arrays.get("priors")
        terms_NC = np.zeros_like(margins_NC) if priors_K is None else priors_K[np.maximum(ids_NC, 0)]
        if blend.repeats:
            terms_NC = terms_NC + repeat_terms(*self.repeats(batch, ids_NC), blend.repeats)
        return combine(scores_NC, margins_NC, terms_NC, blend.weight, self.classifiers.view.loss)

    def rerank(
        self,
        batch: SparseBatch,
        top: TopK,
        k: int,
        probs_NRB: NDArray[np.float32],
        terms_K: NDArray[np.float32] | None = None,
    ) -> TopK:
        """The best k of the candidates by both, and by further terms of their classes, see `mach.ordering.reorder`."""
        scores_NC = self.rescore(batch, top.ids_Nk, top.scores_Nk, probs_NRB)
        return reorder(top, scores_NC if terms_K is None else scores_NC + terms_K[top.ids_Nk], k)


def _within(arrays: Mapping[str, NDArray[Any]], section: str) -> dict[str, NDArray[Any]]:
    """Arrays of a section of the file, by their names in it."""
    return {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{section}.")}


def _check(run: Run, arrays: Mapping[str, NDArray[Any]], settings: RerankingConfig) -> None:
    """Refuse a file whose arrays do not fit each other."""
    K, D = run.manifest.n_classes, run.manifest.n_features
    shapes: dict[str, tuple[int, ...]] = {}
    for section in ("", *(f"{view}." for view in settings.views)):
        n = len(arrays.get(f"{section}codes", ()))
        found = {"offsets": (K + 1,), "gaps": (n,), "codes": (n,), "scales": (K,), "biases": (K,)}
        shapes |= {section + name: found[name] for name in ARRAYS}
    if "priors" in arrays:
        shapes["priors"] = (K,)
    is_learned = any(name.startswith("stacker.") for name in arrays)
    if "repeats" in arrays or is_learned:
        shapes["repeats"] = (max(1, arrays["repeats"].size if "repeats" in arrays else 1),)
    if is_learned:
        n = len(arrays.get("rules.classes", ()))
        shapes |= {"log_rows": (K,), "rules.offsets": (D + 1,), "rules.supports": (D,)}
        shapes |= {"rules.classes": (n,), "rules.confidences": (n,)}
        shapes |= {name: arrays[name].shape if name in arrays else (0,) for name in (f"stacker.{n}" for n in NAMES)}
    for name, shape in shapes.items():
        dtype = _DTYPES[name if name in _DTYPES else name.partition(".")[2]]
        if name not in arrays or arrays[name].shape != shape or arrays[name].dtype != dtype:
            raise StorageError(f"{run.reranker_file}: {name} is missing or not of shape {shape}: train it again")
    if is_learned:
        stacker = Stacker(_within(arrays, "stacker"))
        n_inputs = sum(map(len, (ROW_INPUTS, BUCKET_INPUTS, ("own", *settings.views), RULE_INPUTS, COUNT_INPUTS)))
        if not stacker.is_whole() or stacker.n_inputs != n_inputs:
            raise StorageError(
                f"{run.reranker_file}: its learned order is no network of {n_inputs} inputs: train it again"
            )


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
