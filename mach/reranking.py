"""Train a run's re-ranker in parts: candidates of training rows first, classifiers of classes next, then one file.

Where an order is learned, pilots (`mach.launch.pilot`) leave their examples here first, and further sets of classifiers
are fitted beside the first one.
Hard negatives of a class are the rows in whose candidates it stands though it is not theirs; the candidates come from
the finished repetitions. A part is a file of the folder ``reranking``, whole or absent, so whoever makes it may die at
any moment and parts that are there are not made again. The parts of rows follow from their number, and every class is
fitted alone (`mach.kernels.rerank`): neither workers nor the cut of the classes change a bit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse import csr_array

from mach.blending import Judged, best_of, choose, given, is_open, precisions
from mach.classifiers import ARRAYS, View, further_view, own_view
from mach.config import RerankingConfig, Section
from mach.data.batch import SparseBatch, read_batch, read_classes, right_of
from mach.data.store import Store
from mach.errors import StorageError
from mach.kernels import rerank as kernels
from mach.kernels.associations import count_rules
from mach.kernels.repeats import LOAD, MAX_SLOTS, count_rows
from mach.kernels.views import N_HASHED
from mach.ordering import prior_terms
from mach.places import Place, atomic_file, cache_folder, fetch, is_there, kept, names_in, remove, remove_folder
from mach.repetition import RepetitionFiles, read_json, write_json
from mach.reranker import RULES, Blend, Reranked, Reranker, fingerprint
from mach.runs.ensemble import Ensemble
from mach.sketch.ledger import RERANKING_CLASS_BYTES, RERANKING_WEIGHT_BYTES
from mach.stacker import TAUGHT, Examples, Stacker
from mach.storage import Run
from mach.tensors import map_tensors, write_tensors

Lists = tuple[Any, Any, Any, Any]  # begins, ends, lists and rows, as `mach.kernels.rerank.invert` takes them
STAGES = CANDIDATES, CLASSIFIERS = "candidates", "classifiers"  # made in parts, one after the other
ROWS_A_PART, PAIRS_A_PART, MAX_PARTS = (
    2**16,
    2**18,
    128,
)  # some seconds each; every part of classes reads all candidates
MIN_ROW_PARTS = 8  # so that a few workers share a small set
CHUNK_ROWS = 4096
LEAST_FUNCTIONS = 4  # that tell candidates of training rows
LISTED, LISTED_A_CLASS = 50, 5  # for a learned order: candidates of a training row, or of each class that one has
MAX_VALIDATION_ROWS = 20_000
MAX_TEACHING_ROWS = 20_000  # of a pilot


class Plan(Section):
    """How the work is cut: bounds of the parts, among the training rows and among the classes (none at first)."""

    fingerprint: str
    rows: list[int]
    classes: list[int] = Field(default=[])


class RerankerTraining:
    """The making of a re-ranker for a run whose repetitions are finished.

    Parameters
    ----------
    run : Run
    store : Store
        The training data, sparse.
    """

    def __init__(self, run: Run, store: Store) -> None:
        self.run, self.store = run, store
        self.folder = run.reranking_folder
        self.settings: RerankingConfig = run.config.reranking
        self.fingerprint = fingerprint(run)
        self.rows, self.validation_rows = store.split(run.config.data.validation_fraction, run.config.training.seed)

    @property
    def files(self) -> RepetitionFiles:
        """Lock and log."""
        return RepetitionFiles(self.folder, -1)

    @cached_property
    def ensemble(self) -> Ensemble:
        return Ensemble(self.run, self.run.finished())

    @property
    def is_stacked(self) -> bool:
        """Whether all is kept that a learned order weighs."""
        return bool(self.settings.pilots or self.settings.inputs)

    def begin(self) -> None:
        """Cut the rows; what is there of other settings or weights is removed first."""
        if self._plan_there() is None:
            for name in names_in(self.folder):
                if name.endswith((".safetensors", ".json")):
                    remove(self.folder / name)
            n_rows = len(self.rows)
            n_parts = max(MIN_ROW_PARTS, -(-n_rows // ROWS_A_PART))
            bounds = np.unique(np.linspace(0, n_rows, n_parts + 1).astype(int))
            self._write_plan(Plan(fingerprint=self.fingerprint, rows=bounds.tolist()))
        self.files.sweep()

    def parts(self, stage: str) -> tuple[int, list[int]]:
        """How many parts a stage has, and which of them are missing; the classes are cut once it is their turn."""
        if stage != CANDIDATES and not self.plan.classes:
            self._cut_classes()
        n_parts = len(self._bounds(stage)) - 1
        there = set(names_in(self.folder))
        return n_parts, [part for part in range(n_parts) if self._name(stage, part) not in there]

    def number_of(self, stage: str, part: int) -> int:
        """Of a part among those of all stages, by which workers are told of it."""
        return part if stage == CANDIDATES else len(self.plan.rows) - 1 + part

    def part_of(self, number: int) -> tuple[str, int]:
        """The stage and part that `number_of` gives this number."""
        n_row_parts = self.number_of(CLASSIFIERS, 0)
        return (CANDIDATES, number) if number < n_row_parts else (CLASSIFIERS, number - n_row_parts)

    def make(self, stage: str, part: int, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Make one part; False if it was told to stop before it was whole."""
        started = time.process_time()
        begin, end = self._bounds(stage)[part : part + 2]
        if stage == CANDIDATES:
            made = self._candidates(begin, end, should_stop)
        else:
            made = self._classifiers(begin, end, should_stop)
        if made is None:
            return False
        arrays, notes = made
        notes |= {"fingerprint": self.fingerprint, "seconds": str(time.process_time() - started)}
        with atomic_file(self.folder / self._name(stage, part)) as file:
            write_tensors(file, arrays, notes)
        return True

    def missing_pilots(self) -> list[int]:
        """Pilots that have not taught yet."""
        there = set(names_in(self.folder))
        return [pilot for pilot in range(self.settings.pilots) if self._name_of_examples(pilot) not in there]

    def examine(self, pilot: int, run: Run, rows: NDArray[np.int64]) -> None:
        """Keep what a finished pilot knows of rows that it has not seen, and whether it is right."""
        started = time.process_time()
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_TEACHING_ROWS)).astype(int))]
        ensemble, reranker = Ensemble(run, run.finished()), Reranker.load(run)
        assert reranker is not None
        found = []
        for begin in range(0, len(rows), CHUNK_ROWS):
            part = rows[begin : begin + CHUNK_ROWS]
            done = 0
            for batch, probs_NJB, columns in ensemble.answered(self._features(part)):
                assert isinstance(batch, SparseBatch)
                top = ensemble.topk(probs_NJB, columns, self.settings.candidates)
                blended_NC = reranker.blended(batch, top.ids_Nk, top.scores_Nk)
                best_NT = np.argsort(-blended_NC, axis=1, kind="stable")[:, :TAUGHT]
                ids_NT = np.take_along_axis(top.ids_Nk, best_NT, axis=1)
                scores_NT = np.take_along_axis(top.scores_Nk, best_NT, axis=1)
                right_NT = right_of(self.store, part[done : done + len(batch)], ids_NT)
                found.append((reranker.inputs(batch, ids_NT, scores_NT, probs_NJB), scores_NT, right_NT))
                done += len(batch)
        arrays = dict(zip(("inputs", "scores", "right"), map(np.concatenate, zip(*found, strict=True)), strict=True))
        notes = {"fingerprint": self.fingerprint, "seconds": str(time.process_time() - started)}
        with atomic_file(self.folder / self._name_of_examples(pilot)) as file:
            write_tensors(file, arrays | {"right": arrays["right"].astype(np.uint8)}, notes)

    def finish(self) -> Reranked:
        """Drop the smallest weights until the file fits, choose or learn the order, write the file, tidy up."""
        started = time.process_time()
        notes = [self._map(stage, part)[1] for stage in STAGES for part in range(len(self._bounds(stage)) - 1)]
        settings = self.settings
        with tempfile.TemporaryDirectory(prefix="mach-", dir=self._scratch_folder) as scratch:
            table, tables = self._repeats(), self._tables()
            arrays, least = self._merged(Path(scratch))
            for view in settings.views:
                arrays |= self._merged(Path(scratch), f"{view}.")[0]
            stacker = self._learned()
            blend, is_learned = self._order(arrays | tables | {"repeats": table}, stacker)
            if is_learned:
                assert stacker is not None
                arrays |= tables | {f"stacker.{name}": array for name, array in stacker.arrays.items()}
            elif stacker is not None:  # nothing weighs these
                tables, arrays = {}, {name: array for name, array in arrays.items() if name in ARRAYS}
            else:
                arrays |= tables
            if (tables and len(table)) or blend.repeats:
                if settings.bytes is not None:
                    arrays, least = self._merged(Path(scratch), reserved=table.nbytes)
                arrays["repeats"] = table
            arrays["priors"] = prior_terms(self.run.class_counts_K(), blend.prior)
            metadata = {"fingerprint": self.fingerprint, "candidates": str(settings.candidates)}
            metadata |= {"loss": settings.loss, "pairs": str(settings.pairs), "power": repr(settings.power)}
            metadata |= {name: repr(value) for name, value in blend.model_dump().items()}
            if tables:
                metadata |= {"views": ",".join(settings.views), "row_features": repr(self._row_features)}
            with atomic_file(self.run.reranker_file) as file:
                digest = write_tensors(file, arrays, metadata)
        summary = Reranked(
            fingerprint=self.fingerprint,
            repetitions=self.run.finished(),
            settings=settings,
            **blend.model_dump(),
            validated=self._is_validated,
            learned=is_learned,
            least=least,
            n_weights=sum(len(array) for name, array in arrays.items() if name.endswith("codes")),
            n_bytes=sum(array.nbytes for array in arrays.values()),
            n_pairs=sum(int(note.get("n_pairs", 0)) for note in notes),
            cpu_seconds=round(sum(float(note["seconds"]) for note in notes) + time.process_time() - started, 2),
            digest=digest,
        )
        write_json(self.run.reranked, summary.model_dump())
        self._tidy()
        return summary

    @property
    def plan(self) -> Plan:
        plan = self._plan_there()
        if plan is None:
            raise StorageError(f"{self.folder} holds no plan for these settings: run the same `mach train` again")
        return plan

    def _plan_there(self) -> Plan | None:
        where = self.folder / "plan.json"
        plan = read_json(where, Plan) if is_there(where) else None
        return plan if plan and plan.fingerprint == self.fingerprint else None

    def _write_plan(self, plan: Plan) -> None:
        if isinstance(self.folder, Path):
            self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "plan.json", plan.model_dump())

    def _bounds(self, stage: str) -> list[int]:
        return self.plan.rows if stage == CANDIDATES else self.plan.classes

    def _candidates(self, begin: int, end: int, should_stop: Callable[[], bool]) -> Any:
        """Best classes of some training rows by some of the repetitions, whose hard negatives they are.

        Fewer than the C of a query do where an order is learned: what stands far down a list is not taken for one of
        the best there, and half of them is half of the fitting. So do those of `LEAST_FUNCTIONS` hash functions: on the
        rows they have learned from all agree about the best, and parts that ask different repetitions give a class more
        kinds of negatives.
        """
        finished, store = self.run.finished(), self.store
        n_listed = self.settings.candidates
        if self.is_stacked:
            wanted = max(LISTED, round(LISTED_A_CLASS * len(store.class_ids) / max(store.n_rows, 1)))
            n_listed = min(n_listed, wanted)
        n = min(len(finished), -(-LEAST_FUNCTIONS // self.run.config.hashing.heads))
        first = self.plan.rows.index(begin) * n
        asked = sorted(finished[(first + i) % len(finished)] for i in range(n))
        ensemble = Ensemble(self.run, asked)
        found = []
        for first in range(begin, end, CHUNK_ROWS):
            if should_stop():
                return None
            queries = self._features(self.rows[first : min(first + CHUNK_ROWS, end)])
            found += [part.ids_Nk.astype(np.int32) for part in ensemble.search(queries, n_listed)]
        return {"ids": np.concatenate(found)}, {}

    def _classifiers(self, begin: int, end: int, should_stop: Callable[[], bool]) -> Any:
        """All sets of some classes; names of a further set's arrays begin with its own."""
        settings, store = self.settings, self.store
        rows = (
            *self._rows_by_class(lambda: self._lists(of_classes=True), begin, end),
            *self._rows_by_class(lambda: self._lists(of_classes=False), begin, end),
        )
        arrays: dict[str, NDArray[Any]] = {}
        n_pairs = 0
        for prefix, view in self._views.items():
            if should_stop():
                return None
            offsets, features, weights, biases, n_fitted = kernels.fit_classes(
                store.feature_indptr,
                store.feature_indices,
                view.rows(store.n_features).present(store.feature_values),
                *rows,
                store.n_features,
                view.pairs,
                view.loss == "logistic",
                view.cost,
                settings.negatives,
                settings.iterations,
                settings.tolerance,
                view.threshold,
                view.class_weights or store.n_features + N_HASHED,
                begin,
                view.power,
            )
            fitted = {"offsets": offsets, "features": features, "weights": weights, "biases": biases}
            arrays |= {prefix + name: array for name, array in fitted.items()}
            n_pairs += n_fitted
        return arrays, {"n_pairs": str(n_pairs)}

    def _lists(self, *, of_classes: bool) -> Iterator[Lists]:
        """Of consecutive training rows: where each one's list begins and ends, the lists, and the rows' numbers."""
        bounds = self._bounds(CANDIDATES)
        for part, (begin, end) in enumerate(pairwise(bounds)):
            rows = self.rows[begin:end]
            if of_classes:
                indptr = self.store.class_indptr
                yield indptr[rows], indptr[rows + 1], self.store.class_ids, rows
            else:
                ids_NC = self._map(CANDIDATES, part)[0]["ids"]
                begins = np.arange(len(ids_NC)) * ids_NC.shape[1]
                yield begins, begins + ids_NC.shape[1], ids_NC.reshape(-1), rows

    @staticmethod
    def _rows_by_class(lists: Callable[[], Iterator[Lists]], begin: int, end: int) -> tuple[Any, Any]:
        """CSR of the rows in whose list each of the classes stands, ascending within a class."""
        indptr, rows = np.zeros(end - begin + 1, np.int64), np.empty(0, np.int32)
        for part in lists():
            kernels.invert(part, begin, indptr[1:], rows)
        np.cumsum(indptr, out=indptr)
        rows, places = np.empty(indptr[-1], np.int32), indptr[:-1].copy()
        for part in lists():
            kernels.invert(part, begin, places, rows)
        return indptr, rows

    def _cut_classes(self) -> None:
        """Cut the classes into parts of about as many pairs of row and class."""
        K = self.store.n_classes
        pairs_K = np.zeros(K, np.int64)
        for part in range(len(self._bounds(CANDIDATES)) - 1):
            pairs_K += np.bincount(self._map(CANDIDATES, part)[0]["ids"].ravel() + 1, minlength=K + 1)[1:]
        np.minimum(pairs_K, self.settings.negatives, out=pairs_K)
        totals_K = np.cumsum(pairs_K + self.run.class_counts_K() + 1)
        n_parts = min(max(1, -(-int(totals_K[-1]) // PAIRS_A_PART)), MAX_PARTS, K)
        cuts = np.searchsorted(totals_K, totals_K[-1] * np.arange(1, n_parts) / n_parts)
        self._write_plan(self.plan.model_copy(update={"classes": np.unique([0, *cuts.tolist(), K]).tolist()}))

    def _repeats(self) -> NDArray[np.uint32]:
        """Table of the rows that were learned from (`mach.kernels.repeats`); empty where it is not wanted."""
        store, settings = self.store, self.settings
        is_open = settings.repeats is None and not (self._is_validated or self.is_stacked)
        if settings.repeats == 0 or is_open:
            return np.empty(0, np.uint32)
        n_most = len(self.rows) + int((store.class_indptr[self.rows + 1] - store.class_indptr[self.rows]).sum())
        csr = (store.feature_indptr, store.feature_indices, store.feature_values)
        for _ in range(2):  # the second time as large as need be
            n_slots = min(int(n_most / LOAD) + 2, MAX_SLOTS)
            table, n_entries = count_rows(csr, store.class_indptr, store.class_ids, self.rows, n_slots)
            if n_entries > LOAD * n_most:
                break
            n_most = n_entries
        room = np.inf if settings.bytes is None else settings.bytes - RERANKING_CLASS_BYTES * store.n_classes
        if settings.repeats is None and 10 * table.nbytes > room:
            return np.empty(0, np.uint32)  # classifiers are worth more
        return table

    def _tables(self) -> dict[str, NDArray[Any]]:
        """What a learned order weighs beside classifiers and equal rows; nothing where there is none."""
        if not self.is_stacked:
            return {}
        rows, store = self.rows, self.store
        ids, counts = read_classes(store, rows)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        y_NK = csr_array((np.ones(len(ids), np.float32), ids, indptr), shape=(len(rows), store.n_classes))
        found = dict(zip(RULES, count_rules(self._features(rows), y_NK), strict=True))
        log_rows_K = np.log1p(np.bincount(ids, minlength=store.n_classes), dtype=np.float32)
        return {"log_rows": log_rows_K} | {f"rules.{name}": array for name, array in found.items()}

    def _learned(self) -> Stacker | None:
        """The order that pilots have taught; None where there were none."""
        if not self.settings.pilots:
            return None
        names = [self._name_of_examples(pilot) for pilot in range(self.settings.pilots)]
        found = [self._mapped(name)[0] for name in names]
        inputs, scores, right = (
            np.concatenate([part[name] for part in found]) for name in ("inputs", "scores", "right")
        )
        return Stacker.learn(Examples(inputs, scores, right.astype(bool)), self.run.config.training.seed)

    def _merged(self, scratch: Path, prefix: str = "", reserved: int = 0) -> tuple[dict[str, NDArray[Any]], float]:
        """A set's parts as arrays of the file, mapped, and the smallest magnitude that the budget left.

        ``reserved`` bytes of the budget are for something else.
        """
        names = ("offsets", "features", "weights", "biases")
        found = [self._map(CLASSIFIERS, part)[0] for part in range(len(self._bounds(CLASSIFIERS)) - 1)]
        parts = [{name: arrays[prefix + name] for name in names} for arrays in found]
        K = self.store.n_classes
        budget = self.settings.bytes
        most = (
            None
            if budget is None
            else max(0, budget - reserved - RERANKING_CLASS_BYTES * K - 8) // RERANKING_WEIGHT_BYTES
        )
        n_kept, least = most, self._views[prefix].threshold
        while True:
            if most is not None:
                least = max(least, _magnitude(parts, n_kept or 0))
            offsets, begin = np.zeros(K + 1, np.int64), 0
            scales, biases = [], [part["biases"] for part in parts]
            with (scratch / f"{prefix}gaps").open("wb") as gaps_, (scratch / f"{prefix}codes").open("wb") as codes_:
                for part in parts:
                    ends, gaps, codes, scales_K = kernels.encode(
                        part["offsets"], part["features"], part["weights"], least
                    )
                    offsets[begin + 1 : begin + len(ends)] = offsets[begin] + ends[1:]
                    begin += len(ends) - 1
                    scales.append(scales_K)
                    gaps_.write(gaps.tobytes())
                    codes_.write(codes.tobytes())
            n = int(offsets[-1])
            if most is None or n <= most:
                break
            n_kept = (n_kept or 0) - (n - most)  # steps that had to be cut count as well
        mapped = {
            name: np.memmap(scratch / f"{prefix}{name}", dtype, "r") if n else np.empty(0, dtype)
            for name, dtype in (("gaps", np.int16), ("codes", np.int8))
        }
        whole = {"offsets": offsets, "scales": np.concatenate(scales), "biases": np.concatenate(biases)} | mapped
        return {prefix + name: array for name, array in whole.items()}, float(least)

    def _order(self, arrays: dict[str, NDArray[Any]], stacker: Stacker | None) -> tuple[Blend, bool]:
        """The best blend on held-out rows, see `mach.blending.choose`, and whether the learned order is as good."""
        settings, rows = self.settings, self.validation_rows[:MAX_VALIDATION_ROWS]
        blend = given(settings)
        if not len(rows) or (stacker is None and not is_open(settings)):
            return blend, stacker is not None
        options: dict[str, Any] = {"n_features": self.store.n_features, "row_features": self._row_features}
        reranker = Reranker(arrays, settings=settings, blend=blend, **options)
        found, stacked = [], []
        for batch, probs_NJB, columns in self.ensemble.answered(self._features(rows)):
            top = self.ensemble.topk(probs_NJB, columns, settings.candidates)
            assert isinstance(batch, SparseBatch)
            repeats = reranker.repeats(batch, top.ids_Nk)
            found.append((top.ids_Nk, top.scores_Nk, reranker.margins(batch, top.ids_Nk), *repeats))
            if stacker is not None:
                inputs_NCI = reranker.inputs(batch, top.ids_Nk, top.scores_Nk, probs_NJB)
                stacked.append(stacker.scores(top.scores_Nk, inputs_NCI))
        ids_NC, scores_NC, margins_NC, known_NC, alike_N = (np.concatenate(part) for part in zip(*found, strict=True))
        right_NC = right_of(self.store, rows, ids_NC)
        counts_K = learned_counts(self.run, self.store, self.validation_rows)
        judged = Judged(ids_NC, scores_NC, margins_NC, known_NC, alike_N, right_NC, counts_K)
        blend = choose(judged, settings) if is_open(settings) else blend
        if stacker is None:
            return blend, False
        gains_AN = np.stack([precisions(np.concatenate(stacked), right_NC), judged.gains(blend, settings.loss)])
        return blend, best_of(gains_AN, usual=0) == 0

    @property
    def _row_features(self) -> float:
        return self.store.n_nonzeros / max(self.store.n_rows, 1)

    @property
    def _is_validated(self) -> bool:
        return is_open(self.settings) and len(self.validation_rows) > 0

    def _features(self, rows: NDArray[np.int64]) -> csr_array:
        batch = read_batch(self.store, rows)
        assert isinstance(batch, SparseBatch)
        return batch.matrix(self.store.n_features)

    @property
    def _views(self) -> dict[str, View]:
        """Of every set, by what names of its arrays begin with."""
        further = {f"{name}.": further_view(name, self._row_features) for name in self.settings.views}
        return {"": own_view(self.settings)} | further

    @staticmethod
    def _name(stage: str, part: int) -> str:
        return f"{'rows' if stage == CANDIDATES else 'classes'}{part:03d}.safetensors"

    @staticmethod
    def _name_of_examples(pilot: int) -> str:
        return f"examples{pilot}.safetensors"

    def _map(self, stage: str, part: int) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        return self._mapped(self._name(stage, part))

    def _mapped(self, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        where: Place = self.folder / name
        if isinstance(where, Path):
            path = where
        else:
            remote = where
            path = kept(self._cache / name, lambda file: fetch(remote, file))
        arrays, notes = map_tensors(path)
        if notes.get("fingerprint") != self.fingerprint:
            raise StorageError(f"{where} was made with other settings: remove it and run the same `mach train` again")
        return arrays, notes

    @property
    def _cache(self) -> Path:
        return cache_folder() / "reranking" / self.fingerprint

    @property
    def _scratch_folder(self) -> Path | None:
        return self.folder if isinstance(self.folder, Path) else None

    def _tidy(self) -> None:
        if isinstance(self.folder, Path):
            for name in names_in(self.folder):
                if name.endswith((".safetensors", ".json")):
                    remove(self.folder / name)
        else:
            remove_folder(self.folder, first="plan.json")


def fitting_bytes(run: Run, store: Store) -> int:
    """Most memory that the rows of one class take while it is fitted, if all have as many features as the mean."""
    settings = run.config.reranking
    n_rows = min(int(run.class_counts_K().max(initial=0)) + settings.negatives, store.n_rows)
    n_features = store.n_nonzeros / max(store.n_rows, 1)
    n_paired = min(float(settings.pairs), n_features)
    return round(n_rows * (24 + 12 * (n_features + n_paired * max(n_paired - 1, 0) / 2)))


def learned_counts(run: Run, store: Store, held: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of every class, shape (K,), without those held out.

    Counted with the rest, a held-out row would make its own classes more frequent than they were to the networks, and
    the prior that it chooses too favourable to frequent classes.
    """
    counts_K = run.class_counts_K() - np.bincount(read_classes(store, held)[0], minlength=store.n_classes)
    return np.maximum(counts_K, 0)


def _magnitude(parts: list[dict[str, NDArray[Any]]], n_kept: int) -> float:
    """A magnitude that at most so many weights reach: exact to the upper 16 bits of a float32, by counting them."""
    counts = np.zeros(2**15 + 1, np.int64)
    for part in parts:
        bits = np.abs(np.asarray(part["weights"])).view(np.uint32) >> 16  # ascend as the magnitudes do
        counts[:-1] += np.bincount(bits, minlength=2**15)
    n_above = np.cumsum(counts[::-1])[::-1]
    bits = min(int(np.flatnonzero(n_above <= max(n_kept, 0))[0]), 0x7F7F)  # those of the largest finite number
    return float(np.array(bits << 16, np.uint32).view(np.float32))
