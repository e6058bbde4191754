"""Train a run's re-ranker in parts: candidates of training rows first, classifiers of classes next, then one file.

Where an order is learned, pilots (`mach.training.pilot`) leave their examples here first. Hard negatives of a class are
the rows in whose candidates it stands though it is not theirs; the candidates come from the finished repetitions. A
part is a file of the folder ``reranking``, whole or absent, so whoever makes it may die at any moment and parts that
are there are not made again. The parts of rows follow from their number, and every class is fitted alone
(`mach.reranking.kernels.rerank`): neither workers nor the cut of the classes change a bit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch, read_classes, right_of
from mach.data.kernels.views import N_HASHED
from mach.data.store import Store
from mach.files.places import atomic_file, names_in, sweep
from mach.files.records import write_json
from mach.files.tensors import write_tensors
from mach.reranking.blend import OF_DOCUMENTS, UNTRIED, Blend, Trial, best_of, choose, precisions
from mach.reranking.candidates import lifted, proposed, widened
from mach.reranking.kernels.rerank import fit_classes
from mach.reranking.model import Reranker
from mach.reranking.order import FLOOR, OTHERS, SECTION, LearnedOrder, taught
from mach.reranking.parts import CANDIDATES, CLASSIFIERS, STAGES, Parts, name_of
from mach.reranking.record import Record, fingerprint
from mach.reranking.settings import FitSettings, fit_settings, likens
from mach.reranking.signals import SIGNALS, present
from mach.reranking.signals.contract import BlendedSignal, Material, Shortlist, Signal, features_of
from mach.reranking.signals.networks import Aggregate
from mach.reranking.signals.prior import NO_ROWS
from mach.runs.ensemble import Ensemble
from mach.runs.repetition import RepetitionFiles
from mach.runs.run import Run

PAIRS_A_PART, MAX_PARTS = 2**18, 128  # some seconds each; every part of classes reads all candidates
CHUNK_ROWS = 4096
LEAST_FUNCTIONS = 2  # that tell candidates of training rows
LISTED, LISTED_A_CLASS = 50, 5  # for a learned order: candidates of a training row, or of each class that one has
MAX_VALIDATION_ROWS = 10_000
MAX_TEACHING_ROWS = 20_000  # of a pilot
LEAST_TEACHING_ROWS = 400  # held-out ones, where there is no pilot
SURE_ERRORS = 2.0  # standard errors by which a blend is surely better than an order that the same rows taught
EXAMPLES = ("inputs", "scores", "right")  # arrays that a pilot leaves


class RerankerTraining:
    """The making of a re-ranker for a run whose repetitions are finished, from a store of its sparse training rows."""

    def __init__(self, run: Run, store: Store) -> None:
        self.run, self.store, self.config = run, store, run.config.reranking
        self.fingerprint = fingerprint(run)
        self.folder = Parts(run.reranking_folder, self.fingerprint)
        self.files = RepetitionFiles(run.reranking_folder, -1, run.path)  # lock and log
        self.rows, self.validation_rows = store.split(run.config.data.validation_fraction, run.config.training.seed)
        self.likens = likens(run.config, store)

    @property
    def settings(self) -> FitSettings:
        """How classifiers are fitted; the plan says it, once the work has begun."""
        settings = self.folder.plan.settings
        assert settings is not None, "a plan without settings counts as none"
        return settings

    def begin(self, settings: FitSettings | None = None) -> None:
        """Cut the rows; what is there of other settings or weights is removed first.

        Settings are given where they are another fitting's, as pilots take those of their run; else they suit the rows.
        """
        wanted = settings or fit_settings(self.config, self.store, self.run.retired)
        self.folder.begin(wanted, len(self.rows), is_given=settings is not None)
        sweep(self.files.folder)

    def parts(self, stage: str) -> tuple[range, list[int]]:
        """The parts of a stage, numbered through all stages, and which of them are missing.

        The classes are cut once it is their turn. Where likeness decides, there is nothing to fit.
        """
        if self.likens:
            return range(0), []
        if stage != CANDIDATES and not self.folder.plan.classes:
            self._cut_classes()
        names, there = self.folder.names(stage), set(names_in(self.run.reranking_folder))
        first = 0 if stage == CANDIDATES else len(self.folder.plan.rows) - 1
        numbers = range(first, first + len(names))
        return numbers, [number for number, name in zip(numbers, names, strict=True) if name not in there]

    def make(self, number: int, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Make the part of this number; False if it was told to stop before it was whole."""
        started = time.process_time()
        n_row_parts = len(self.folder.plan.rows) - 1
        stage, part = (CANDIDATES, number) if number < n_row_parts else (CLASSIFIERS, number - n_row_parts)
        begin, end = self.folder.bounds(stage)[part : part + 2]
        made = self._candidates(begin, end, should_stop) if stage == CANDIDATES else self._classifiers(begin, end)
        if made is not None:
            arrays, notes = made
            self.folder.write(name_of(stage, part), arrays, notes, started)
        return made is not None

    def missing_pilots(self) -> list[int]:
        """Pilots that have not taught yet."""
        if self.likens:
            return []
        there = names_in(self.run.reranking_folder)
        return [pilot for pilot in range(self.config.pilots) if examples_of(pilot) not in there]

    def examine(self, pilot: int, run: Run, rows: NDArray[np.int64]) -> None:
        """Keep what a finished pilot knows of rows that it has not seen, and whether it is right."""
        started = time.process_time()
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_TEACHING_ROWS)).astype(int))]
        reranker = Reranker.load(run)
        assert reranker is not None
        found = []
        with Ensemble(run, run.finished()) as ensemble:
            for part, whole in self._shortlists(ensemble, rows, reranker.signals):
                assert whole.proposed_NP is not None
                best_NT = taught(reranker.blended(whole), whole.ids_NC, whole.proposed_NP, OTHERS)
                ids_NT = np.take_along_axis(whole.ids_NC, best_NT, axis=1)
                scores_NT = np.take_along_axis(whole.scores_NC, best_NT, axis=1)
                inputs_NTI = reranker.inputs(Shortlist(whole.batch, ids_NT, scores_NT, whole.probs_NRB))
                scores_NT = lifted(scores_NT, ids_NT, whole.proposed_NP, FLOOR)
                found.append((inputs_NTI, scores_NT, right_of(self.store, part, ids_NT).astype(np.uint8)))
        arrays = map(np.concatenate, zip(*found, strict=True))
        self.folder.write(examples_of(pilot), dict(zip(EXAMPLES, arrays, strict=True)), {}, started)

    def finish(self) -> Record:
        """Fit the other signals, choose the blend or learn the order, write the file, tidy up."""
        started = time.process_time()
        folder, config, settings = self.folder, self.config, self.settings
        notes = [] if self.likens else [folder.map(name)[1] for stage in STAGES for name in folder.names(stage)]
        here = self.run.reranking_folder  # large files go to the run's own disk, if it has one
        with tempfile.TemporaryDirectory(prefix="mach-", dir=here if isinstance(here, Path) else None) as scratch:
            material = self._material(Path(scratch))
            signals = present(kind.fit(material) for kind in SIGNALS)
            order = self._order()
            blend, order = self._choice(signals, order)
            in_order = order is not None or (settings.keeps_inputs and not config.pilots)
            arrays = {SECTION + name: a for name, a in order.arrays.items()} if order else {}
            metadata = {"fingerprint": self.fingerprint, "candidates": str(config.candidates)}
            metadata |= {name: repr(strength) for name, strength in blend.strengths.items()}
            metadata |= {"signals": ",".join(one.name for one in signals if one.has_columns)} if in_order else {}
            metadata |= {"floor": repr(order.floor)} if order else {}
            for signal in signals:
                arrays |= signal.arrays_for(blend.of(signal), in_order=in_order)
                metadata |= signal.notes
            with atomic_file(self.run.reranker_file) as file:
                digest = write_tensors(file, arrays, metadata)
        strengths: dict[str, Any] = dict(blend.strengths)
        record = Record(
            fingerprint=self.fingerprint,
            repetitions=self.run.finished(),
            settings=config.model_dump() | settings.model_dump(),
            **strengths,
            validated=len(self.validation_rows) > 0,
            learned=order is not None,
            n_weights=len(arrays.get("codes", ())),
            n_bytes=sum(array.nbytes for array in arrays.values()),
            n_pairs=sum(int(note.get("n_pairs", 0)) for note in notes),
            cpu_seconds=round(sum(float(note["seconds"]) for note in notes) + time.process_time() - started, 2),
            digest=digest,
        )
        write_json(self.run.reranked, record.model_dump())
        folder.tidy()
        return record

    def _candidates(self, begin: int, end: int, should_stop: Callable[[], bool]) -> Any:
        """Best classes of some training rows by some of the repetitions, whose hard negatives they are.

        Fewer than the C of a query do where an order is learned: what stands far down a list is not taken for one of
        the best there, and half of them is half of the fitting. So do those of `LEAST_FUNCTIONS` hash functions: on the
        rows they have learned from all agree about the best, and parts that ask different repetitions give a class more
        kinds of negatives.
        """
        finished, store = self.run.finished(), self.store
        row_classes = len(store.class_ids) / max(store.n_rows, 1)
        n_taken = n_listed(self.config.candidates, row_classes, keeps_inputs=self.settings.keeps_inputs)
        n = min(len(finished), -(-LEAST_FUNCTIONS // self.run.config.hashing.heads))
        first = self.folder.plan.rows.index(begin) * n
        asked = sorted(finished[(first + i) % len(finished)] for i in range(n))
        found = []
        with Ensemble(self.run, asked) as ensemble:
            for first in range(begin, end, CHUNK_ROWS):
                if should_stop():
                    return None
                queries = features_of(self.store, self.rows[first : min(first + CHUNK_ROWS, end)])
                found += [top.ids_Nk.astype(np.int32) for top in ensemble.search(queries, n_taken)]
        return {"ids": np.concatenate(found)}, {}

    def _classifiers(self, begin: int, end: int) -> Any:
        """Classifiers of some classes."""
        settings, store = self.settings, self.store
        *arrays, n_pairs = fit_classes(
            store.feature_indptr,
            store.feature_indices,
            store.feature_values,
            *self._rows_by_class(begin, end, are_listed=False),
            *self._rows_by_class(begin, end, are_listed=True),
            store.n_features,
            settings.pairs,
            settings.loss == "logistic",
            settings.cost,
            settings.negatives,
            settings.iterations,
            settings.tolerance,
            settings.threshold,
            settings.class_weights or store.n_features + N_HASHED,
            begin,
            settings.power,
        )
        names = ("offsets", "features", "weights", "biases")
        return dict(zip(names, arrays, strict=True)), {"n_pairs": str(n_pairs)}

    def _rows_by_class(self, begin: int, end: int, *, are_listed: bool) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """CSR of classes: the rows that have each of them, or list it among their candidates, in ascending order."""
        classes, rows = [], []
        for part, (first, last) in enumerate(pairwise(self.folder.bounds(CANDIDATES))):
            some = self.rows[first:last]
            if are_listed:
                ids_NC = self.folder.map(name_of(CANDIDATES, part))[0]["ids"]
                ids, counts = ids_NC.ravel(), np.full(len(some), ids_NC.shape[1])
            else:
                ids, counts = read_classes(self.store, some)
            places = np.flatnonzero((ids >= begin) & (ids < end))
            classes.append(ids[places] - begin)
            rows.append(some[np.searchsorted(np.cumsum(counts), places, side="right")])
        ids = np.concatenate(classes)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=end - begin))])
        order = np.argsort(ids.astype(np.min_scalar_type(end - begin)), kind="stable")  # 16 bits are sorted by digits
        return indptr, np.concatenate(rows)[order].astype(np.int32)

    def _cut_classes(self) -> None:
        """Cut the classes into parts of about as many pairs of row and class."""
        K = self.store.n_classes
        pairs_K = np.zeros(K, np.int64)
        for name in self.folder.names(CANDIDATES):
            ids_NC = self.folder.map(name)[0]["ids"]
            pairs_K += np.bincount(ids_NC.ravel() + 1, minlength=K + 1)[1:]
        rows_K = self.run.class_counts_K()
        np.minimum(pairs_K, self.settings.negatives * (rows_K + 1), out=pairs_K)
        totals_K = np.cumsum(pairs_K + rows_K + 1)
        n_parts = min(max(1, -(-int(totals_K[-1]) // PAIRS_A_PART)), MAX_PARTS, K)
        cuts = np.searchsorted(totals_K, totals_K[-1] * np.arange(1, n_parts) / n_parts)
        self.folder.cut_classes(np.unique([0, *cuts.tolist(), K]).tolist())

    def _material(self, scratch: Path) -> Material:
        repeats = self.config.repeats
        is_of_use = len(self.validation_rows) > 0 or self.settings.keeps_inputs
        return Material(
            store=self.store,
            rows=self.rows,
            settings=self.settings,
            counts_K=self.run.class_counts_K(),
            learned_K=learned_counts(self.run, self.store, self.validation_rows),
            counts_repeats=is_of_use and not self.likens if repeats is None else repeats != 0,
            parts=[] if self.likens else [self.folder.map(name)[0] for name in self.folder.names(CLASSIFIERS)],
            teaches=self._teaches(len(self.validation_rows)),
            scratch=scratch,
        )

    def _order(self) -> LearnedOrder | None:
        """The order that pilots have taught; None where there were none."""
        if self.likens or not self.config.pilots:
            return None
        found = [self.folder.map(examples_of(pilot))[0] for pilot in range(self.config.pilots)]
        T = min(part["right"].shape[1] for part in found)  # pilots of earlier versions taught others, the best first
        inputs, scores, right = (np.concatenate([part[name][:, :T] for part in found]) for name in EXAMPLES)
        log_rows = inputs[:, :, len(Aggregate.labels)]  # of the second signal
        log_rows[log_rows == 0] = NO_ROWS  # pilots of earlier versions left 0
        return LearnedOrder.learn(inputs, scores, right.astype(bool), self.run.config.training.seed)

    def _choice(self, signals: Sequence[Signal], order: LearnedOrder | None) -> tuple[Blend, LearnedOrder | None]:
        """The best blend on held-out rows, and the order of pilots unless the blend is better.

        Where there are no pilots these rows teach it. Rows that are phrases of the texts that queries are likened to
        choose nothing.
        """
        given = {} if self.config.repeats is None else {"repeats": self.config.repeats}
        if self.likens:
            return Blend(OF_DOCUMENTS | given), None
        rows = self.validation_rows[:MAX_VALIDATION_ROWS]
        if not len(rows):
            return Blend(UNTRIED | given), order
        teaches = order is None and self._teaches(len(rows))
        asked = [one for one in signals if order or teaches or isinstance(one, BlendedSignal)]
        parts: list[tuple[Any, ...]] = []
        with Ensemble(self.run, self.run.finished()) as ensemble:
            for _, shortlist in self._shortlists(ensemble, rows, signals):
                assert shortlist.proposed_NP is not None
                columns_NCI = np.concatenate([one.columns(shortlist) for one in asked], axis=2)
                parts.append((shortlist.ids_NC, shortlist.scores_NC, shortlist.proposed_NP, columns_NCI))
        ids_NC, scores_NC, proposed_NP, inputs_NCI = map(np.concatenate, zip(*parts, strict=True))
        ends = np.cumsum([one.n_columns for one in asked])
        columns = dict(zip((one.name for one in asked), np.split(inputs_NCI, ends[:-1], axis=2), strict=True))
        trial = Trial(signals, ids_NC, scores_NC, columns, right_of(self.store, rows, ids_NC))
        blend = choose(trial, self.settings, given)
        if teaches:
            return blend, taught_crosswise(trial, blend, proposed_NP, inputs_NCI, self.run.config.training.seed)
        if order:
            ordered_NC = order.scores(lifted(scores_NC, ids_NC, proposed_NP, order.floor), inputs_NCI)
            gains_AN = np.stack([precisions(ordered_NC, trial.right_NC), trial.gains(blend)])
            order = order if best_of(gains_AN, usual=0) == 0 else None
        return blend, order

    def _teaches(self, n_held: int) -> bool:
        """Whether so many held-out rows teach an order: not where pilots do or did, nor where repeats are given.

        A repeat's strength that is given says what a user wants, which an order would not heed.
        """
        has_logs = self.run.config.decoding.aggregate in {"auto", "log-mean"}
        is_wanted = not (self.likens or self.settings.keeps_inputs or self.config.repeats)
        return n_held >= LEAST_TEACHING_ROWS and has_logs and is_wanted

    def _shortlists(
        self, ensemble: Ensemble, rows: NDArray[np.int64], signals: Sequence[Signal]
    ) -> Iterator[tuple[NDArray[np.int64], Shortlist]]:
        """Shortlists of some rows by an ensemble and what signals propose, a few rows at a time."""
        for begin in range(0, len(rows), CHUNK_ROWS):
            part = rows[begin : begin + CHUNK_ROWS]
            done = 0
            for batch, probs_NRB, columns in ensemble.answered(features_of(self.store, part)):
                assert isinstance(batch, SparseBatch)
                top = ensemble.topk(probs_NRB, columns, self.config.candidates)
                proposed_NP, aggregates = proposed(signals, batch), partial(ensemble.score, probs_NRB, columns)
                for more_NP in (proposed(signals, batch, lifts=False), proposed_NP):
                    top = widened(top, more_NP, aggregates)
                shortlist = Shortlist(batch, top.ids_Nk, top.scores_Nk, probs_NRB, proposed_NP)
                yield part[done : done + len(batch)], shortlist
                done += len(batch)


def taught_crosswise(
    trial: Trial, blend: Blend, proposed_NP: NDArray[np.int64], inputs_NCI: NDArray[np.float32], seed: int
) -> LearnedOrder | None:
    """An order that held-out rows teach, unless the blend is surely better than networks that have not seen them.

    The blend was chosen on these very rows, and each network has seen half of them, but the order will be that of both:
    on rows that nobody had seen it gained half a point or a whole one more than here (docs/log.md). The inputs are the
    columns of all signals for the candidates of the trial.
    """
    best_NT = taught(trial.scores(blend), trial.ids_NC, proposed_NP)
    lifted_NC = lifted(trial.scores_NC, trial.ids_NC, proposed_NP, FLOOR)
    lifted_NT, right_NT = (np.take_along_axis(some, best_NT, axis=1) for some in (lifted_NC, trial.right_NC))
    inputs_NTI = np.take_along_axis(inputs_NCI, best_NT[:, :, None], axis=1)
    order = LearnedOrder.learn(inputs_NTI, lifted_NT, right_NT.astype(bool), seed, crosswise=True)
    ordered_N = precisions(order.crosswise(lifted_NC, inputs_NCI), trial.right_NC)
    return order if best_of(np.stack([ordered_N, trial.gains(blend)]), 0, SURE_ERRORS) == 0 else None


def examples_of(pilot: int) -> str:
    """The file that a pilot leaves."""
    return f"examples{pilot}.safetensors"


def n_listed(candidates: int, row_classes: float, *, keeps_inputs: bool) -> int:
    """How many candidates of a training row classes are told apart from."""
    return min(candidates, max(LISTED, round(LISTED_A_CLASS * row_classes))) if keeps_inputs else candidates


def fitting_bytes(run: Run, store: Store) -> int:
    """Most memory that the rows of one class take while it is fitted, if all have as many features as the mean."""
    settings = fit_settings(run.config.reranking, store, run.retired)
    n_rows = min((int(run.class_counts_K().max(initial=0)) + 1) * (1 + settings.negatives), store.n_rows)
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
