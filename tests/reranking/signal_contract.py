"""What every signal keeps to; the tests of a signal inherit it and say which one they are of."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mach.data.batch import rows_of
from mach.data.class_texts import ClassTexts
from mach.errors import StorageError
from mach.files.tensors import map_tensors, write_tensors
from mach.reranking.signals import SIGNALS
from mach.reranking.signals.contract import BlendedSignal, Material, Newcomers, Scale, Shortlist, Signal, SignalFile
from tests.reranking.oracles import columns_of


def file_of(arrays: dict[str, NDArray], notes: dict[str, str], material: Material) -> SignalFile:
    return SignalFile("reranker.safetensors", arrays, notes, material.store.n_classes, material.store.n_features)


class SignalContract:
    """Laws of the signal ``kind``; ``free`` are arrays of any length, ``alone`` says whether one can be without others.

    Values equal the oracle's to ``tolerance``.
    """

    kind: type[Signal]
    free: tuple[str, ...] = ()
    alone = False
    tolerance = 1e-5

    @pytest.fixture
    def signal(self, material: Material) -> Signal:
        return self.kind.fit(material)

    @pytest.fixture
    def kept(self, signal: Signal) -> dict[str, NDArray]:
        return {name: np.array(array) for name, array in signal.arrays_for(1.0, in_order=True).items()}

    def test_it_is_listed_and_says_what_it_means(self, signal: Signal):
        assert self.kind in SIGNALS
        assert [kind.name for kind in SIGNALS].count(signal.name) == 1
        assert signal.meaning[0].isupper()
        assert signal.meaning.endswith(".")

    def test_it_equals_its_oracle(self, signal: Signal, shortlist: Shortlist):
        columns_NCI = signal.columns(shortlist)
        assert columns_NCI.dtype == np.float32
        assert columns_NCI.shape == (*shortlist.ids_NC.shape, len(signal.labels))
        assert np.isfinite(columns_NCI).all()
        assert np.ptp(columns_NCI, axis=(0, 1)).all(), "the data of this test tell nothing"
        np.testing.assert_allclose(columns_NCI, columns_of(signal, shortlist), rtol=1e-5, atol=self.tolerance)

    def test_it_equals_its_oracle_over_classes_that_came_later(
        self, signal: Signal, material: Material, shortlist: Shortlist
    ):
        texts, K = (
            ClassTexts.of(["Island", "Iron whales (Motif)", ""], [(), ("sea",), ()]),
            material.store.n_classes,
        )
        grown = signal.and_also(Newcomers(texts, material.store.text_features, len(material.rows), rarest=0))
        later = replace(
            shortlist, ids_NC=np.where(shortlist.ids_NC % 2 > 0, shortlist.ids_NC % 3 + K, shortlist.ids_NC)
        )
        columns_NCI = grown.columns(later)
        np.testing.assert_allclose(columns_NCI, columns_of(grown, later), rtol=1e-5, atol=self.tolerance)
        if signal.is_young and (ids_NP := grown.candidates(shortlist.batch)) is not None:
            assert {K, K + 1} < set(ids_NP.ravel().tolist())
            assert K + 2 not in ids_NP
            found = file_of(grown.arrays, {}, material)
            assert self.kind.load(replace(found, n_classes=K + 3)).arrays.keys() == grown.arrays.keys(), "it is whole"

    def test_evidence_adds_up_to_its_first_column(self, signal: Signal, shortlist: Shortlist):
        n_found = 0
        for n, c in np.argwhere(shortlist.ids_NC >= 0)[::5].tolist():
            one, bare = (
                Shortlist(
                    batch,
                    shortlist.ids_NC[[n], c : c + 1],
                    shortlist.scores_NC[[n], c : c + 1],
                    shortlist.probs_NRB[[n]],
                )
                for batch in (
                    rows_of(shortlist.batch, np.array([n])),
                    rows_of(shortlist.batch, np.array([len(shortlist.batch) - 1])),
                )
            )
            if (evidence := signal.evidence(one)) is None:
                return
            added = signal.columns(one)[0, 0, 0] - signal.columns(bare)[0, 0, 0]
            assert sum(part.amount for part in evidence) == pytest.approx(added, abs=1e-5)
            assert all(set(part.features) <= set(one.batch.indices.tolist()) for part in evidence)
            n_found += len(evidence)
        assert n_found

    def test_a_batch_is_its_queries_and_classes_one_by_one(self, signal: Signal, shortlist: Shortlist):
        columns_NCI = signal.columns(shortlist)
        for n in range(len(shortlist.ids_NC)):
            for span in (slice(None), slice(3, 4)):
                ids_1C, scores_1C = shortlist.ids_NC[[n], span], shortlist.scores_NC[[n], span]
                batch = rows_of(shortlist.batch, np.array([n]))
                one = signal.columns(Shortlist(batch, ids_1C, scores_1C, shortlist.probs_NRB[[n]]))  # type: ignore[arg-type]
                np.testing.assert_array_equal(one[0], columns_NCI[n, span])

    def test_absent_data_are_legal(self, material: Material, shortlist: Shortlist):
        absent = self.kind.load(file_of({}, {}, material))
        columns_NCI = absent.columns(shortlist)
        assert columns_NCI.shape == (*shortlist.ids_NC.shape, absent.n_columns)
        np.testing.assert_allclose(columns_NCI, columns_of(absent, shortlist), rtol=1e-5, atol=1e-5)
        assert absent.arrays_for(0.0, in_order=False) == {}

    def test_it_comes_back_from_disk(
        self, signal: Signal, kept: dict[str, NDArray], material: Material, shortlist: Shortlist, folder: Path
    ):
        path = folder / f"{signal.name}.safetensors"
        with path.open("wb") as file:
            write_tensors(file, kept, signal.notes)
        again = self.kind.load(file_of(*map_tensors(path), material))
        np.testing.assert_array_equal(again.columns(shortlist), signal.columns(shortlist))
        assert again.has_columns == signal.has_columns
        written = io.BytesIO()
        write_tensors(written, again.arrays_for(1.0, in_order=True), again.notes)
        assert written.getvalue() == path.read_bytes()

    def test_damaged_arrays_are_refused_in_one_line(self, signal: Signal, kept: dict[str, NDArray], material: Material):
        for name, array in kept.items():
            damaged = [array.astype(np.float64), array[None]]
            damaged += [array[:-1]] if name not in self.free else []
            spoiled = [kept | {name: bad} for bad in damaged]
            if not self.alone:
                spoiled.append({other: array for other, array in kept.items() if other != name})
            for arrays in spoiled:
                with pytest.raises(StorageError, match=r"^reranker.safetensors: .* train it again$"):
                    self.kind.load(file_of(arrays, signal.notes, material))

    def test_the_ledger_knows_of_its_bytes(self, kept: dict[str, NDArray], material: Material):
        store = material.store
        scale = Scale(
            store.n_classes, store.n_features, store.n_rows, len(store.class_ids), store.n_nonzeros / store.n_rows,
            pairs=3, counts_repeats=True, is_learned=True, has_names=True,
        )  # fmt: skip
        n_bytes = sum(array.nbytes for array in kept.values())
        assert n_bytes / 4 <= self.kind.expected_bytes(scale) <= 4 * n_bytes


class BlendedSignalContract(SignalContract):
    """Further laws of a signal that a blend can give a strength."""

    kind: type[BlendedSignal]

    def test_terms_never_raise_a_score(self, signal: BlendedSignal, shortlist: Shortlist):
        for strength in (0.5, *signal.choices):
            terms_NC = signal.terms(signal.columns(shortlist), shortlist.ids_NC, strength)
            assert terms_NC.dtype == np.float32
            assert terms_NC.shape == shortlist.ids_NC.shape
            assert (terms_NC <= 0).all()

    def test_terms_come_back_from_disk(
        self, signal: BlendedSignal, kept: dict[str, NDArray], material: Material, shortlist: Shortlist
    ):
        again = self.kind.load(file_of(kept, signal.notes, material))
        assert signal.has_terms
        assert again.has_terms
        assert not self.kind.load(file_of({}, {}, material)).has_terms
