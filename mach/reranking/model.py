"""The re-ranker of a run as it answers: signals, and the blend or learned order that makes one score of them.

``reranker.safetensors`` holds the arrays of the signals that it needs (`mach.reranking.signals`) and those of a learned
order, named ``stacker.*``. Its metadata hold the fingerprint, C, the strengths of the blend, the notes of the signals,
and with a learned order their names: the file is whole by itself. Files without priors, of the first version, have 0
for all of them, those without a loss the squared hinge, without pairs none, a power of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from mach.config.keys import MAX_CANDIDATES
from mach.errors import StorageError
from mach.files.places import is_there
from mach.files.tensors import map_tensors
from mach.reranking.blend import WEIGHT, Blend
from mach.reranking.candidates import lifted, proposed
from mach.reranking.order import SECTION, LearnedOrder
from mach.reranking.record import local_file
from mach.reranking.signals import SIGNALS, present
from mach.reranking.signals.contract import BlendedSignal, Floats, Newcomers, Shortlist, Signal, SignalFile
from mach.sketch.answers import TopK
from mach.sketch.terms import reorder

if TYPE_CHECKING:
    from mach.data.batch import SparseBatch
    from mach.runs.run import Run

OLD_ORDER = "prior,rules"  # signals whose data a learned order of earlier versions cannot do without


class Reranker:
    """Puts shortlists of C ``candidates`` in a better order, by the learned order if there is one, else by the blend.

    Safe to share between threads.
    """

    def __init__(
        self, signals: Sequence[Signal], blend: Blend, candidates: int, order: LearnedOrder | None = None
    ) -> None:
        self.signals, self.blend, self.candidates, self.order = signals, blend, candidates, order

    @classmethod
    def load(cls, run: Run) -> Self | None:
        """The re-ranker of a run, mapped; None where it has none, or its configuration says that it wants none.

        A StorageError where the file is damaged or of another run.
        """
        if run.config.reranking.candidates == 0 or not is_there(run.reranked):
            return None
        arrays, notes = map_tensors(local_file(run))
        if run.manifest.dense_input:
            raise StorageError(f"{run.reranker_file}: the networks take dense rows, which none is made for: remove it")
        file = SignalFile(run.reranker_file, arrays, notes, run.manifest.n_classes, run.manifest.n_features)
        missing = [name for name in ("candidates", WEIGHT) if name not in notes]
        if missing:
            raise StorageError(f"{file.where}: its metadata lack {', '.join(missing)}: train it again")
        signals = present(kind.load(file) for kind in SIGNALS)
        blended = [one for one in signals if isinstance(one, BlendedSignal)]
        blend = Blend({one.strength: file.number(one.strength, 0.0) for one in blended})
        order = LearnedOrder.load(file)
        in_order = notes.get("signals", OLD_ORDER).split(",") if order else []
        missing = [one.name for one in signals if one.name in in_order and not one.has_columns]
        missing += [one.name for one in blended if blend.of(one) and not one.has_terms]
        if missing:
            raise StorageError(f"{file.where}: the arrays of its {missing[0]} are missing: train it again")
        known = {name for one in signals for name in one.arrays}
        known |= {SECTION + name for name in order.arrays} if order else set()
        if others := arrays.keys() - known:
            raise StorageError(f"{file.where}: {min(others)!r:.80} is no array that it needs: train it again")
        n_columns = sum(signal.n_columns for signal in signals)
        if order and len(order.arrays["means"]) != n_columns:
            raise StorageError(f"{file.where}: its learned order is no network of {n_columns} inputs: train it again")
        return cls(signals, blend, file.number("candidates", 0, 0, MAX_CANDIDATES), order)

    def blind(self, fold: int) -> Reranker:
        """The same with what of its order has not seen a fold of the held-out rows, see `LearnedOrder.blind`."""
        order = None if self.order is None else self.order.blind(fold)
        return Reranker(self.signals, self.blend, self.candidates, order)

    def and_also(self, more: Newcomers) -> Reranker:
        """The same with classes that came after the training, which it knows by their texts alone."""
        return Reranker([one.and_also(more) for one in self.signals], self.blend, self.candidates, self.order)

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays, on disk and in memory once every page was touched."""
        found = [array for one in (*self.signals, self.order) if one for array in one.arrays.values()]
        return sum(array.nbytes for array in found)

    def inputs(self, shortlist: Shortlist) -> NDArray[np.float32]:
        """What a learned order weighs: the columns of all signals, shape (N, C, I)."""
        return np.concatenate([signal.columns(shortlist) for signal in self.signals], axis=2)

    def blended(self, shortlist: Shortlist) -> NDArray[np.float32]:
        """Scores by the blend, shape (N, C)."""
        return self.blend.scores(
            shortlist.scores_NC, shortlist.ids_NC, self.signals, lambda signal: signal.columns(shortlist)
        )

    def rescore(self, shortlist: Shortlist) -> NDArray[np.float32]:
        """Scores of given classes by the learned order, else the blend, shape (N, C)."""
        if self.order is None:
            return self.blended(shortlist)
        proposed_NP = self.proposed(shortlist.batch) if shortlist.proposed_NP is None else shortlist.proposed_NP
        scores_NC = lifted(shortlist.scores_NC, shortlist.ids_NC, proposed_NP, self.order.floor)
        return self.order.scores(scores_NC, self.inputs(shortlist))

    def proposed(self, batch: SparseBatch, *, lifts: bool = True) -> NDArray[np.int64]:
        """Classes that signals propose beside the networks' candidates (`mach.reranking.candidates.proposed`)."""
        return proposed(self.signals, batch, lifts=lifts)

    def rerank(
        self,
        batch: SparseBatch,
        top: TopK,
        proposed_NP: NDArray[np.int64],
        k: int,
        probs_NRB: Floats,
        terms_K: Floats | None = None,
    ) -> TopK:
        """The best k of the candidates, also by further terms of their classes, see `mach.sketch.terms.reorder`.

        Classes that were proposed are among them, as far as they are allowed; so no other class exceeds its aggregate.
        """
        scores_NC = self.rescore(Shortlist(batch, top.ids_Nk, top.scores_Nk, probs_NRB, proposed_NP))
        return reorder(top, scores_NC if terms_K is None else scores_NC + terms_K[top.ids_Nk], k)
