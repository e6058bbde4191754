"""The work of a whole training, stage by stage, before it is done: what its outlook begins with.

Seconds are those of one core of the machine on which they were fitted (docs/log.md, 2026-12-01). Only their ratios
matter once something was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from mach.config import Config
from mach.data.store import Store
from mach.files.places import names_in
from mach.reranking.fitting import (
    LEAST_FUNCTIONS,
    LEAST_TEACHING_ROWS,
    MAX_PARTS,
    MAX_TEACHING_ROWS,
    MAX_VALIDATION_ROWS,
    PAIRS_A_PART,
    examples_of,
    n_listed,
)
from mach.reranking.order import BATCH, EPOCHS, FEW_STEPS, FOLDS, LEAST_STEPS
from mach.reranking.parts import CANDIDATES, CLASSIFIERS, MIN_ROW_PARTS, ROWS_A_PART
from mach.reranking.record import is_due
from mach.reranking.settings import FitSettings, likens
from mach.runs.run import Run
from mach.training.launch.display import stage_name
from mach.training.outlook import OF_THE_JOB, Stage
from mach.training.pilot import LEARNED, repetitions_of

TRAINING, TEACHING, ORDER, CALIBRATING = "training", "teaching", "order", "calibrating"

# Seconds of one core, each for one of what is said behind it.
STEP_ROW, STEP_INPUT = 3e-6, 4.9e-10  # a row; a feature of it and unit of the first layer
STEP_WEIGHT = 3.2e-11  # a row and weight of the other layers
ANSWER_ROW, ANSWER_INPUT, ANSWER_WEIGHT, ANSWER_CLASS = 6e-6, 7e-10, 3e-11, 4e-10  # as above; a class and hash function
PAIR, PAIR_FEATURE = 1e-7, 2.6e-8  # a row and class to tell apart; a feature of that row
RERANKED = 1.7e-6  # a candidate of a query
ORDER_STEP, FEW_STEP = 1.8e-3, 0.09  # a step of learning an order; that share of it where held-out rows teach
FIXED, BEGUN = 0.3, 1.0  # a stage; one whose workers begin with it


@dataclass(frozen=True)
class Work:
    """What decides the work of a run: its configuration, and N, K and the features and classes of a row."""

    config: Config
    n_rows: int
    n_classes: int
    row_features: float
    row_classes: float
    likens: bool = False  # `mach.reranking.settings.likens`

    @classmethod
    def of(cls, config: Config, store: Store) -> Work:
        """That of a configuration that is filled in."""
        n_rows = max(store.n_rows, 1)
        row_features = store.n_features if store.is_dense else store.n_nonzeros / n_rows
        row_classes = len(store.class_ids) / n_rows
        return cls(config, store.n_rows, store.n_classes, row_features, row_classes, likens(config, store))

    def row_seconds(self) -> float:
        """Seconds that a row of a step takes."""
        n_inputs, n_others = self._weights()
        return STEP_ROW + STEP_INPUT * n_inputs + STEP_WEIGHT * n_others

    def training(self, n_repetitions: int) -> float:
        """Seconds of the training of some repetitions."""
        return BEGUN + n_repetitions * self.n_rows * self.config.training.epochs * self.row_seconds()

    def answers(self, n_rows: float, n_repetitions: int) -> float:
        """Seconds of the shortlists of some queries."""
        n_inputs, n_others = self._weights()
        n_functions = self.config.hashing.heads * self.n_classes
        a_row = ANSWER_ROW + ANSWER_INPUT * n_inputs + ANSWER_WEIGHT * n_others + ANSWER_CLASS * n_functions
        return n_rows * n_repetitions * a_row

    def candidates(self) -> float:
        """Seconds of the candidates of all training rows."""
        n = min(self.config.hashing.repetitions, -(-LEAST_FUNCTIONS // self.config.hashing.heads))
        return BEGUN + self.answers(self.n_rows, n)

    def classifiers(self, *, keeps_inputs: bool) -> float:
        """Seconds of the classifiers of all classes."""
        n_paired = min(self.config.reranking.pairs, self.row_features)
        n_pairs = self.n_pairs(keeps_inputs=keeps_inputs)
        return FIXED + n_pairs * (PAIR + PAIR_FEATURE * (self.row_features + n_paired * max(n_paired - 1, 0) / 2))

    def n_pairs(self, *, keeps_inputs: bool) -> float:
        """Pairs of a row and a class that it has, or lists and is told apart from."""
        listed = n_listed(self.config.reranking.candidates, self.row_classes, keeps_inputs=keeps_inputs)
        n_own = self.n_rows * self.row_classes
        return n_own + min(self.n_rows * listed, FitSettings().negatives * (n_own + self.n_classes))

    def judging(self, n_rows: float) -> float:
        """Seconds of shortlists that are ordered anew."""
        return self.answers(n_rows, self.config.hashing.repetitions) + n_rows * RERANKED * self._listed()

    def order(self) -> float:
        """Seconds of the choice of a blend, and of the order that pilots teach, or else held-out rows."""
        pilots, n_held = self.config.reranking.pilots, min(self.n_held, MAX_VALIDATION_ROWS)
        n_taught = pilots * min(self.n_rows * (1 - LEARNED), MAX_TEACHING_ROWS)
        n_steps = max(EPOCHS * n_taught / BATCH, LEAST_STEPS) if pilots else 0
        if not pilots and n_held >= LEAST_TEACHING_ROWS:
            n_steps = FEW_STEP * max(EPOCHS * n_held / BATCH, FOLDS * FEW_STEPS)
        return FIXED + self.judging(n_held) + ORDER_STEP * n_steps

    @property
    def n_held(self) -> float:
        """Rows that are held out."""
        return self.n_rows * (self.config.data.validation_fraction or 0.0)

    def pilot(self) -> Work:
        """The work of a run that teaches this one."""
        config = self.config.changed(hashing={"repetitions": repetitions_of(self.config)}, reranking={"pilots": 0})
        return Work(config, round(self.n_rows * LEARNED), self.n_classes, self.row_features, self.row_classes)

    def _listed(self) -> int:
        return min(self.config.reranking.candidates, self.n_classes)

    def _weights(self) -> tuple[float, float]:
        """Weights that a row meets, of the first layer and of the others."""
        n_outputs = self.config.hashing.heads * (self.config.hashing.buckets or 0)
        first, *others = pairwise([self.row_features, *self.config.network.hidden, n_outputs])
        return first[0] * first[1], sum(above * below for above, below in others)


def stages_of(run: Run, store: Store, n_workers: Callable[[int], int], repetitions: list[int] | None) -> list[Stage]:
    """What is still to be done of a run, of which some repetitions are wanted, by default all.

    ``n_workers`` tells how many will share so many parts.
    """
    n_repetitions = run.config.hashing.repetitions
    unfinished = [r for r in range(n_repetitions) if not run.repetition(r).is_done]
    missing = [r for r in unfinished if repetitions is None or r in repetitions]
    work = Work.of(run.config, store)
    reranks = run.config.reranking.candidates > 0 and missing == unfinished and (bool(missing) or is_due(run))
    there = () if missing else names_in(run.reranking_folder)
    n_pilots = 0 if work.likens else run.config.reranking.pilots
    pilots = [pilot for pilot in range(n_pilots) if examples_of(pilot) not in there]
    found = list(stages(work, n_workers, len(missing), pilots if reranks else [], reranks=reranks))
    return found if missing == unfinished else found[:1]


def stages(
    work: Work, n_workers: Callable[[int], int], n_repetitions: int, pilots: Iterable[int], *, reranks: bool
) -> Iterator[Stage]:
    """The stages of a run of which so many repetitions, these pilots and perhaps the re-ranker are missing."""
    keeps_inputs = work.config.reranking.pilots > 0
    yield from _networks(work, n_workers, n_repetitions)
    for pilot in pilots:
        theirs = work.pilot()
        yield from (
            replace(stage, name=of_pilot(pilot, stage.name))
            for stage in (
                *_networks(theirs, n_workers, theirs.config.hashing.repetitions),
                *_reranker(theirs, n_workers, keeps_inputs=True),
                Stage(TEACHING, theirs.judging(min(work.n_rows - theirs.n_rows, MAX_TEACHING_ROWS))),
            )
        )
    if reranks:
        yield from _reranker(work, n_workers, keeps_inputs=keeps_inputs)
    if work.n_held:
        yield Stage(CALIBRATING, FIXED + 2 * work.judging(work.n_held))


def of_pilot(pilot: int, stage: str) -> str:
    """What a stage of a pilot is called."""
    return f"pilot {pilot + 1}{OF_THE_JOB}{stage}"


def _networks(work: Work, n_workers: Callable[[int], int], n_repetitions: int) -> Iterator[Stage]:
    if n_repetitions:
        yield _shared(TRAINING, work.training(n_repetitions), n_repetitions, n_workers)


def _reranker(work: Work, n_workers: Callable[[int], int], *, keeps_inputs: bool) -> Iterator[Stage]:
    if not work.likens:
        n_parts = max(MIN_ROW_PARTS, -(-work.n_rows // ROWS_A_PART))
        yield _shared(stage_name(CANDIDATES), work.candidates(), n_parts, n_workers)
        n_parts = min(math.ceil(work.n_pairs(keeps_inputs=keeps_inputs) / PAIRS_A_PART) or 1, MAX_PARTS)  # about
        seconds = _shared(CLASSIFIERS, work.classifiers(keeps_inputs=keeps_inputs), n_parts, n_workers).seconds
        yield Stage(stage_name(CLASSIFIERS), seconds)
    yield Stage(stage_name(ORDER), work.order())


def _shared(name: str, seconds: float, n_parts: int, n_workers: Callable[[int], int]) -> Stage:
    n = max(n_workers(n_parts), 1)
    return Stage(name, seconds * -(-n_parts // n) / n_parts, n_parts, n)
