"""A trained run as a model: exact top-k classes of queries, from any subset of its repetitions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mach.data.queries import is_single
from mach.data.store import Reference, Store
from mach.errors import ConfigError, DataError, counted
from mach.files.records import find_json, read_json
from mach.model.ask import Allowed, Answer, Ask, by_chance
from mach.model.calibration import LEAST_ROWS, Calibration, calibrate, fingerprint, prior_of
from mach.model.classes.answerer import Answerer
from mach.model.classes.editor import ClassEditor
from mach.model.classes.edits import Edits
from mach.model.classes.versions import Versions
from mach.model.curves import Curve
from mach.model.hub import push
from mach.reranking.model import Reranker
from mach.reranking.record import Record, verify
from mach.runs.ensemble import Ensemble
from mach.runs.manifest import AccuracyCurve
from mach.runs.run import Run
from mach.runs.scorer import Scorer

if TYPE_CHECKING:
    from mach.data.queries import Queries


class MachModel(AbstractContextManager["MachModel"]):
    """Exact top-k classes by R independent networks over hashed buckets; a context manager that closes it.

    Build it with `mach.load`.

    Attributes
    ----------
    ensemble : Ensemble
        The repetitions: queries to bucket scores, and these to the best trained classes.
    reranker : Reranker or None
        Linear classifiers that order the best classes anew, where the run has them.
    calibration : Calibration or None
        What turns scores into probabilities, where the run has it.
    classes : ClassEditor
        Adds, removes, renames and teaches classes, and knows their names.
    n_features, n_buckets, n_repetitions, n_heads : int
        D, B, R as far as used, and J: the hash functions of a repetition.
    """

    def __init__(
        self, run: Run, repetitions: list[int], scorer: Scorer | None = None, edits: Edits | None = None
    ) -> None:
        self.run, self.repetitions = run, repetitions
        self.ensemble = ensemble = Ensemble(run, repetitions, scorer)
        self.n_features, self.n_heads = run.manifest.n_features, ensemble.n_heads
        self.assignment, self.n_buckets = ensemble.assignment, ensemble.n_buckets
        self.n_repetitions, self.aggregate = ensemble.n_repetitions, ensemble.aggregate
        self.reranker = Reranker.load(run)
        self.calibration = Calibration.load(run)
        edits = Edits(run.manifest.n_classes) if edits is None else edits
        self.classes = ClassEditor(Answerer(ensemble, self.reranker, prior_of(run, self.calibration), edits))

    def __repr__(self) -> str:
        of, also = self.run.config.hashing.repetitions, [f"version {v}" for v in [self.classes.edits.version] if v]
        also += ["re-ranked"] * bool(self.reranker) + ["calibrated"] * bool(self.calibration)
        told = f"{counted(self.n_classes, 'class')}, {self.n_repetitions} of {counted(of, 'repetition')}"
        return f"<MachModel {self.run.path}: {', '.join([told, *also])}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """A model travels as its path, repetitions and version of the classes, and is opened from them again."""
        from mach.model.loading import load

        path = self.run.path.absolute() if isinstance(self.run.path, Path) else self.run.path
        version, trunk = self.classes.edits.version, self.run.trunk
        return partial(load, path, repetitions=self.repetitions, version=version, trunk=trunk), ()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors that keep the weights; nothing to do for a model of this process."""
        self.ensemble.close()

    def with_edits(self, edits: Edits) -> MachModel:
        """Another model by another version of the classes. It shares the weights; what is taught to one, one knows."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.classes = ClassEditor(self.answerer.with_edits(edits))
        return other

    @property
    def answerer(self) -> Answerer:
        """What answers by the version of the classes that holds now; whoever keeps it keeps that version."""
        return self.classes.answerer

    @property
    def n_classes(self) -> int:
        """K: all ids ever given, those of removed classes among them."""
        return self.classes.edits.n_classes

    @property
    def prior(self) -> float:
        """Strength of ``log(1 + training rows)`` of a class in scores without re-ranking."""
        return self.answerer.prior

    def topk(
        self,
        queries: Queries,
        k: int | None = None,
        *,
        allowed: Allowed = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        probabilities: bool = False,
        repetitions: int | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k best classes of every query, best first; equal scores break to the smaller id.

        Parameters
        ----------
        queries : text, sequence of texts, CSR matrix or array of shape (N, D), table or column
            Texts only where the model was trained on text. A text or a 1-D array is a single query. Of a table of
            pandas, Polars, DuckDB or whatever has ``__arrow_c_stream__``, the columns of text of training count.
        k : int, optional
            10 by default; where there are fewer classes, that many columns come back. Ids beyond the number of allowed
            classes are -1 with score -inf.
        allowed, budget, rerank, tail, repetitions
            As of `mach.model.ask.Ask`.
        probabilities : bool
            Return calibrated probabilities that each class is right in place of scores, see `probabilities`.

        Returns
        -------
        ids, scores : int64 and float32 arrays of shape (N, k), or (k,) for a single query

        Raises
        ------
        ConfigError, DataError
            When probabilities are wanted and the run has no calibration for them, or they are not of all repetitions;
            when k or another argument is of a wrong type or out of range; when queries do not fit the model.
        """
        ask = Ask(allowed, budget, rerank, tail, repetitions)
        if probabilities:
            self.curve(rerank=rerank)  # missing, it is missed before the work
            if repetitions not in (None, self.n_repetitions):
                raise ConfigError(
                    f"the calibration is for all {self.n_repetitions} repetitions, not the first {repetitions}: leave "
                    "repetitions out, or ask for scores"
                )
        answer = self._answer(queries, k, ask)
        ids_Nk, values_Nk = answer.ids_Nk, answer.scores_Nk
        if probabilities:
            values_Nk = self.probabilities(ids_Nk, values_Nk, rerank=rerank, tail=tail, known=answer.known_N)
            ids_Nk, values_Nk = by_chance(ids_Nk, values_Nk, answer.known_N | bool(tail))
        return (ids_Nk[0], values_Nk[0]) if is_single(queries) else (ids_Nk, values_Nk)

    def search(
        self,
        queries: Queries,
        k: int | None = None,
        *,
        allowed: Allowed = None,
        budget: int | None = None,
        rerank: bool = True,
        tail: float = 0.0,
        repetitions: int | None = None,
    ) -> Answer:
        """As `topk`, with the certificate: whether each answer is exact, and the bound on everything left out.

        With a prior or tail, ``exact_N`` says that no class is better by aggregate and these together. Re-ranked, it
        says that the candidates are the C (at least k) best classes of the repetitions, and the k returned are the best
        *of these*. They are certainly the best of all classes where ``scores_Nk[:, -1] >= bound_N``.
        """
        return self._answer(queries, k, Ask(allowed, budget, rerank, tail, repetitions))

    def score(self, queries: Queries, ids: ArrayLike, *, rerank: bool = True, tail: float = 0.0) -> NDArray[np.float32]:
        """Scores of given classes: ids of shape (C,) for all queries or (N, C); returns (N, C), or (C,) for one.

        They are those that `topk` would give them, -inf for removed classes; ``rerank`` and ``tail`` as there.
        DataError when an id is not a class.
        """
        given, answerer, K = np.asarray(ids), self.answerer, self.n_classes
        if not given.size:
            given = given.astype(np.int64)
        if given.dtype.kind not in "iu":
            raise DataError(f"ids are {given.dtype}: need integers below {K}; `classes.ids_of` knows names")
        outside = given[(given < -1) | (given >= K)]
        if len(outside):
            raise DataError(f"id {outside[0]} is no class: need 0..{K - 1}, or -1 for none")
        ask, parts, begin = Ask(rerank=rerank, tail=tail), [], 0
        for scores in self.ensemble.answered(queries):
            n = len(scores.batch)
            ids_NC = given[begin : begin + n] if given.ndim == 2 else np.tile(given, (n, 1))
            parts.append(answerer.score(scores, ids_NC, ask))
            begin += n
        if given.ndim == 2 and len(given) != begin:
            raise DataError(f"ids of shape {given.shape} for {begin} queries: give a row a query, or one for all")
        if not parts:
            raise DataError("there are no queries: give at least one")
        scores_NC = np.concatenate(parts)
        return scores_NC[0] if is_single(queries) and given.ndim == 1 else scores_NC

    def bucket_scores(self, queries: Queries) -> NDArray[np.float32]:
        """Bucket probabilities of shape (N, R J, B), float32: what the aggregate turns into class scores.

        Those of repetitions that do not answer are NaN.
        """
        parts = [np.empty((0, self.assignment.n_repetitions, self.n_buckets), np.float32)]
        for _, probs_NRB, columns in self.ensemble.answered(queries):
            parts.append(np.full((len(probs_NRB), *parts[0].shape[1:]), np.nan, np.float32))
            parts[-1][:, self.run.functions(columns)] = probs_NRB
        return np.concatenate(parts)

    def explain(self, query: Any, classes: Any, *, rerank: bool = True, tail: float = 0.0) -> Any:
        """Why a query has a class: the words that it rests on, and what each signal adds to its score.

        Parameters
        ----------
        query : text, or row of numbers
            A single one.
        classes : int, str, or sequence of these
            Ids or names.
        rerank, tail
            As of `topk`.

        Returns
        -------
        mach.model.explanation.Explanation, or a list of them where ``classes`` are several
            Printed, it is in plain words; ``to_dict()`` is for machines.

        Raises
        ------
        DataError
            When there is not one query, it does not fit the model, or a class is not there.

        Notes
        -----
        Cost: about a query for every word, as each is left out once.

        Examples
        --------
        >>> print(model.explain("black chess queen", "BLACK CHESS QUEEN"))  # doctest: +SKIP
        """
        from mach.model.explainer import Explainer

        is_single = isinstance(classes, str) or np.ndim(classes) == 0
        found = Explainer(self, query, rerank=rerank, tail=tail).explain(self.classes.ids_of(classes).tolist())
        return found[0] if is_single else found

    def probabilities(
        self,
        ids: NDArray[np.int64],
        scores: NDArray[np.float32],
        *,
        rerank: bool = True,
        tail: float = 0.0,
        known: ArrayLike = True,
    ) -> NDArray[np.float32]:
        """Calibrated probabilities that classes are right, by their scores from `topk`, `search` or `score`.

        They never order classes otherwise than scores without a tail do, and hold for the best 10 of all classes. Where
        queries are not ``known`` (``known_N`` of an answer, one bool a row of ids) they are the classes' shares of the
        training rows instead, whatever the scores, and `topk` without a tail orders by them (not by calibrations of
        earlier versions). ConfigError when the run has no calibration, or one for other weights or settings.
        """
        by_scores = self.curve(rerank=rerank)(self.answerer.without_tail(ids, scores, tail))
        is_known = np.asarray(known, np.bool_)
        if is_known.all() or (self.calibration is not None and self.calibration.format == 1):
            return by_scores
        shares = np.where(np.isneginf(scores), np.float32(0), self.answerer.shares_K[ids])
        return np.where(is_known[..., None] if is_known.ndim else is_known, by_scores, shares)

    def curve(self, *, rerank: bool = True) -> Curve:
        """The curve of probabilities, of re-ranked scores where the model has them; errors as `probabilities`."""
        path, made = self.run.path, self.calibration
        repair = f"make one by `mach calibrate {path} DATA`, rows that the run was not trained on"
        if made is None:
            also = f", or train another that holds out {LEAST_ROWS} or more (--set data.validation_fraction=0.1)"
            raise ConfigError(f"{path} has no calibration, which probabilities need: {repair}{also}")
        curve = made.reranked if rerank and self.reranker else made.plain
        if curve is None or made.fingerprint != self._fingerprint:
            raise ConfigError(f"the calibration of {path} is for other repetitions, weights or settings: {repair}")
        return curve

    def calibrate(self, store: Store, rows: NDArray[np.int64] | None = None) -> Calibration:
        """Fit probabilities to rows that the run has not learned from, see `mach.model.calibration.calibrate`."""
        self.calibration = calibrate(self.answerer, store, rows)
        return self.calibration

    @property
    def accuracy_curve(self) -> list[dict[str, Any]] | None:
        """Accuracy for the first 1, 2, ... repetitions, as ``mach evaluate`` last measured it; None if it never did."""
        curve = find_json(self.run.curve_file, AccuracyCurve)
        return curve.rows if curve else None

    def names(self, ids: ArrayLike) -> list[Any]:
        """Names of classes, in the shape of ``ids``; as ``model.classes.names``."""
        return self.classes.names(ids)

    def name_function(self) -> Callable[[ArrayLike], list[Any]] | None:
        """`names`, or None where the model has none."""
        return self.names if self.answerer.catalogue.has_names else None

    def uri_function(self) -> Callable[[ArrayLike], list[str]] | None:
        """What gives addresses of classes, "" of one without; None where no class has one."""
        catalogue = self.answerer.catalogue
        return catalogue.uris if catalogue.has_uris else None

    def reference(self) -> Reference:
        """What other rows must agree with to be this model's queries, with added and renamed classes."""
        return Versions(self.run).reference(self.classes.edits)

    def info(self) -> dict[str, Any]:
        """What the model is: counts, aggregate, bytes on disk, and what its training reported."""
        manifest, edits = self.run.manifest, self.classes.edits
        done = [self.run.repetition(r).summary() for r in self.repetitions]
        told: dict[str, Any] = {"reranker_bytes": self.reranker.n_bytes if self.reranker else 0}
        if self.reranker:
            record = read_json(self.run.reranked, Record)
            told |= {
                "reranker_weights": record.n_weights,
                "reranker_candidates": self.reranker.candidates,
                **{f"reranker_{name}": value for name, value in self.reranker.blend.strengths.items()},
                "reranker_learned": self.reranker.order is not None,
                "reranker_cpu_seconds": record.cpu_seconds,
                "reranker_repetitions": record.repetitions,
            }
        return {
            "path": str(self.run.path),
            "n_classes": self.n_classes,
            "n_added": edits.n_added,
            "n_removed": len(edits.removed),
            "classes_version": edits.version,
            "n_features": self.n_features,
            "n_buckets": self.n_buckets,
            "effort": self.run.config.training.effort,
            "n_repetitions": self.n_repetitions,
            "n_heads": self.n_heads,
            "assignment": self.run.assignment_kind,
            "repetitions": self.repetitions,
            "n_rows": manifest.n_rows,
            "loss": manifest.loss,
            "precision": manifest.precision,
            "aggregate": self.aggregate,
            "prior": self.prior,
            "calibrated_rows": self.calibration.n_rows if self.calibration else 0,
            "has_class_names": self.run.class_names is not None,
            "takes_text": self.run.text_features is not None,
            **self.ensemble.scorer.sizes(),
            "worker_seconds": round(sum(summary.worker_seconds for summary in done), 1),
            "peak_worker_bytes": max(summary.peak_memory_bytes for summary in done),
            "peer_bytes": sum(summary.peer_bytes for summary in done),
            "peer_sockets": sum(summary.peer_sockets for summary in done),
            **told,
            "mach_version": manifest.mach_version,
        }

    def verify(self) -> None:
        """Read all weights and compare them with the digests that training recorded: StorageError if one differs."""
        self.ensemble.scorer.verify()
        verify(self.run)

    def push_to_hub(self, repository: str, *, licence: str | None = None, private: bool = False) -> str:
        """Upload the run to ``user/model`` of the Hugging Face hub, with a card; returns its name for `mach.load`."""
        return push(self, repository, licence=licence, private=private)

    def parse(self, line: str) -> Any:
        """A query as typed in a shell: a text, or numbers where the model takes them."""
        return self.ensemble.reader.parse(line)

    def _answer(self, queries: Queries, k: int | None, ask: Ask) -> Answer:
        parts = list(self.answerer.answers(queries, k, ask))
        if not parts:
            raise DataError("there are no queries: give at least one")
        return parts[0] if len(parts) == 1 else Answer.concatenate(parts)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.run, self.repetitions)
