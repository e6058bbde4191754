"""Every signal: the laws of all, and what is its own."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from mach.data.batch import SparseBatch
from mach.data.class_texts import ClassTexts
from mach.errors import StorageError
from mach.reranking.kernels.likeness import weights_of
from mach.reranking.signals import SIGNALS, expected_bytes, present
from mach.reranking.signals.classifiers import LOWEST_MARGIN, Classifiers
from mach.reranking.signals.contract import BlendedSignal, Material, Newcomers, Scale, Shortlist, Signal
from mach.reranking.signals.likeness import Likeness
from mach.reranking.signals.mention import Mention
from mach.reranking.signals.networks import Aggregate, Context
from mach.reranking.signals.prior import Prior
from mach.reranking.signals.repeats import Repeats
from mach.reranking.signals.rules import Rules
from mach.reranking.spelling import COMPOUND, EXACT, INFLECTED, INSIDE
from mach.sketch.terms import prior_terms
from tests.reranking.conftest import WORDS, D
from tests.reranking.oracles import best_mentions, columns_of, shared
from tests.reranking.signal_contract import BlendedSignalContract, SignalContract, file_of


class TestAggregate(SignalContract):
    kind = Aggregate
    tolerance = 2e-3  # log odds of a certain class in float32

    def test_no_class_and_certain_ones_have_finite_odds(self, shortlist: Shortlist):
        columns_NCI = Aggregate().columns(shortlist)
        assert columns_NCI[shortlist.ids_NC < 0][:, 0].tolist() == [-30.0] * int((shortlist.ids_NC < 0).sum())
        assert columns_NCI[0, 0] == pytest.approx(
            [-1e-3, np.log(np.exp(-1e-3) / (1 - np.exp(-1e-3))), np.exp(-1e-3)], rel=1e-4
        )


class TestContext(SignalContract):
    kind = Context

    def test_all_classes_of_a_query_have_the_same_context(self, shortlist: Shortlist):
        assert not np.ptp(Context().columns(shortlist), axis=1).any()

    def test_values_are_those_of_the_definition(self, shortlist: Shortlist):
        probs_NRB = np.array([[[0.9, 0.3, 0.1, 0.7], [0.9, 0.0, 0.1, 1.0]]], np.float32)
        one = Shortlist(shortlist.batch, shortlist.ids_NC[:1], shortlist.scores_NC[:1], probs_NRB)
        n_features = np.diff(shortlist.batch.indptr)[:1]
        batch = type(one.batch)(*(one.batch.indptr[:2], one.batch.indices[: n_features[0]], one.batch.values))
        found = Context().columns(Shortlist(batch, one.ids_NC, one.scores_NC, probs_NRB))[0, 0]
        np.testing.assert_allclose(found, np.log([1 + n_features[0], 2, 3, 3.5, 4.5, 4.5]), rtol=1e-5)


class TestPrior(BlendedSignalContract):
    kind = Prior
    alone = True

    def test_strengths_are_tried_without_held_out_rows_and_kept_with_them(
        self, material: Material, shortlist: Shortlist
    ):
        signal, ids_NC = Prior.fit(material), np.maximum(shortlist.ids_NC, 0)
        terms_NC = signal.terms(signal.columns(shortlist), shortlist.ids_NC, -0.5)
        np.testing.assert_array_equal(terms_NC, prior_terms(material.learned_K, -0.5)[ids_NC])
        kept = signal.arrays_for(-0.5, in_order=False)
        assert list(kept) == ["priors"]
        np.testing.assert_array_equal(kept["priors"], prior_terms(material.counts_K, -0.5))
        stored = Prior.load(file_of(kept, {}, material))
        np.testing.assert_array_equal(
            stored.terms(stored.columns(shortlist), shortlist.ids_NC, -0.5), kept["priors"][ids_NC]
        )

    def test_a_class_without_rows_is_further_from_one_row_than_this_from_seven(self, material: Material):
        few = replace(material, rows=material.rows[:2])
        rows_K = np.bincount(few.classes.indices, minlength=few.store.n_classes)
        log_rows = Prior.fit(few).arrays["log_rows"]
        np.testing.assert_array_equal(log_rows[rows_K > 0], np.log1p(rows_K[rows_K > 0], dtype=np.float32))
        assert 0 < (rows_K == 0).sum() < len(rows_K)
        assert np.all(log_rows[rows_K == 0] < np.log(2) - np.log(4))

    def test_an_added_class_is_to_an_order_as_those_without_rows_were(self, material: Material):
        texts = ClassTexts.of(["new"])
        for least in (-4.0, 0.0):  # in files of earlier versions 0
            signal = Prior({"log_rows": np.array([1.5, least, 0.7], np.float32)})
            grown = signal.and_also(Newcomers(texts, None, len(material.rows), rarest=1))
            assert grown.arrays["log_rows"].tolist() == [*signal.arrays["log_rows"].tolist(), least]


def without_pairs(part):
    """Fitted classes without the weights of products."""
    is_own = part["features"] < D
    offsets = np.concatenate([[0], np.cumsum(is_own)])[part["offsets"]]
    return part | {"offsets": offsets, "features": part["features"][is_own], "weights": part["weights"][is_own]}


class TestClassifiers(BlendedSignalContract):
    kind = Classifiers
    tolerance = 1e-4

    @pytest.mark.parametrize("loss", ["hinge", "logistic"])
    def test_extreme_margins_keep_scores_finite(self, loss):
        margins_NC1 = np.array([[[np.nan], [np.inf], [-np.inf], [-1e38]]], np.float32)
        terms_NC = Classifiers.of({}, loss).terms(margins_NC1, np.zeros((1, 4), np.int64), 3.0)
        assert np.isfinite(terms_NC).all()
        assert terms_NC[0, 1] == 0
        assert terms_NC[0, 2] == terms_NC[0, 3] < LOWEST_MARGIN

    def test_further_sets_of_earlier_versions_are_read(self, material: Material, shortlist: Shortlist):
        own = {name: np.array(array) for name, array in Classifiers.fit(material).arrays.items()}
        plain = Classifiers.fit(replace(material, parts=[without_pairs(part) for part in material.parts]))
        further = {f"{begin}.{name}": array for begin in ("presence", "bold") for name, array in plain.arrays.items()}
        notes = {"loss": "hinge", "pairs": "3", "power": "0.5", "views": "bold,presence", "row_features": "4.5"}
        signal = Classifiers.load(file_of(own | further, notes, material))
        assert signal.labels == ("margin", "margin presence", "margin bold")
        assert signal.sets["presence."].view.presence == np.float32(4.5**-0.5)
        np.testing.assert_allclose(signal.columns(shortlist), columns_of(signal, shortlist), atol=1e-4)
        with pytest.raises(StorageError, match="bold.gaps is missing"):
            Classifiers.load(file_of({n: a for n, a in (own | further).items() if n != "bold.codes"}, notes, material))

    @pytest.mark.parametrize(
        "notes",
        [
            {"loss": "squared"}, {"pairs": "many"}, {"pairs": "-1"}, {"pairs": "65"}, {"power": ""}, {"power": "nan"},
            {"power": "-1"}, {"power": "5"}, {"row_features": "inf"},
        ],
    )  # fmt: skip
    def test_damaged_notes_are_refused(self, notes, material: Material):
        with pytest.raises(StorageError, match="its metadata are damaged .* train it again"):
            Classifiers.load(file_of({}, notes, material))


class TestRules(SignalContract):
    kind = Rules

    def test_nothing_is_counted_where_no_order_is_learned(self, material: Material):
        settings = material.settings.model_copy(update={"keeps_inputs": False})
        material = replace(material, settings=settings)
        assert Rules.fit(material).arrays == {}
        assert Rules.fit(replace(material, teaches=True)).arrays

    def test_files_of_before_propose_nothing(self, material: Material, shortlist: Shortlist):
        fitted = Rules.fit(material)
        arrays = fitted.arrays_for(0.0, in_order=False)
        told = [
            Rules.load(file_of(arrays, notes, material)).candidates(shortlist.batch) for notes in (fitted.notes, {})
        ]
        np.testing.assert_array_equal(told[0], fitted.candidates(shortlist.batch))
        assert told[1] is None

    @pytest.mark.parametrize("number", [-1, 99])
    def test_classes_that_are_not_there_are_refused(self, number: int, material: Material):
        fitted = Rules.fit(material)
        arrays = fitted.arrays | {"rules.classes": np.full_like(fitted.arrays["rules.classes"], number)}
        with pytest.raises(StorageError, match="rules.classes is not within 0"):
            Rules.load(file_of(arrays, fitted.notes, material))


class TestRepeats(BlendedSignalContract):
    kind = Repeats
    free = ("repeats",)
    alone = True

    def test_strengths_below_0_put_last_what_is_known(self):
        columns_NC2 = np.log1p(np.array([[[0, 255], [1, 255], [5, 255], [255, 255]]], np.float32))
        for strength in (-12.0, -1.0, 1.0, 3.0):
            terms_NC = Repeats().terms(columns_NC2, np.zeros((1, 4), np.int64), strength)
            assert (np.diff(terms_NC[0]) * strength > 0).all()

    def test_nothing_is_counted_where_nothing_asks(self, material: Material):
        assert Repeats.fit(replace(material, counts_repeats=False)).arrays == {}

    def test_a_file_has_the_table_only_where_something_weighs_it(self, material: Material):
        signal = Repeats.fit(material)
        found = [signal.arrays_for(strength, in_order=order) for strength, order in ((0, False), (1, False), (0, True))]
        assert [list(arrays) for arrays in found] == [[], ["repeats"], ["repeats"]]


def proposed(signal: Signal, batch: SparseBatch) -> NDArray[np.int64]:
    ids_NP = signal.candidates(batch)
    assert ids_NP is not None
    return ids_NP


class TestMention(BlendedSignalContract):
    kind = Mention

    def test_a_mention_is_found_by_its_words(self, material: Material):
        signal, words = Mention.fit(material), {word: n for n, word in enumerate(WORDS)}

        def level_and_cover(text: str, k: int) -> tuple[float, float]:
            indices = np.array(sorted(words[word] for word in text.split()), np.int32)
            batch = SparseBatch(np.array([0, len(indices)]), indices, np.ones(len(indices), np.float32))
            one = np.zeros((1, 1), np.float32)
            found = signal.columns(Shortlist(batch, np.array([[k]]), one, one[None]))[0, 0]
            is_proposed = k in proposed(signal, batch)[0]
            assert is_proposed == (found[1] > 0)
            return found[1], found[5]

        found = {text: level_and_cover(text, 0) for text in ("whale", "whales", "whalebone", "sperm")}
        assert found == {"whale": (EXACT, 0), "whales": (INFLECTED, 0), "whalebone": (COMPOUND, 0), "sperm": (0, 0)}
        assert level_and_cover("sheetanchor", 4) == (INSIDE, 0)
        assert level_and_cover("sperm whales", 1) == (INFLECTED, 0)
        assert level_and_cover("sperm whales", 0) == (INFLECTED, 1)  # "Sperm whale" stands there
        assert level_and_cover("oil", 2) == (EXACT, 0)  # what is in brackets needs no word
        assert level_and_cover("oily", 2) == (0, 0)  # short words are looked for as they are

    def test_evidence_tells_the_name_and_what_spells_it(self, material: Material):
        signal, words = Mention.fit(material), {word: n for n, word in enumerate(WORDS)}

        def evidence(text: str) -> list[tuple[tuple[int, ...], float, int | None]]:
            indices = np.array(sorted(words[word] for word in text.split()), np.int32)
            batch, one = (
                SparseBatch(np.array([0, len(indices)]), indices, np.ones(len(indices), np.float32)),
                np.zeros((1, 1), np.float32),
            )
            found = signal.evidence(Shortlist(batch, np.array([[1]]), one, one[None]))
            assert found is not None
            return sorted((part.features, part.amount, part.name) for part in found)

        both = sorted(((words[word],), 0.5, 0) for word in ("sperm", "whales"))
        assert evidence("sperm whales oil") == both
        assert evidence("sperm oil") == [((words["sperm"],), 0.5, None)]  # not all of the name
        assert evidence("oil") == []

    def test_candidates_are_the_best_mentions(self, material: Material, shortlist: Shortlist):
        signal = Mention.fit(material)
        ids_NP = proposed(signal, shortlist.batch)
        np.testing.assert_array_equal(ids_NP, best_mentions(signal, shortlist.batch, ids_NP.shape[1]))
        assert (ids_NP >= 0).sum() > 5

    @pytest.mark.parametrize("lack", ["class_texts", "text_features"])
    def test_rows_without_words_or_classes_without_names_have_none(self, lack, material: Material):
        store = copy.copy(material.store)
        setattr(store, lack, None)
        signal = Mention.fit(replace(material, store=store))
        assert signal.arrays == {}
        assert signal.candidates(SparseBatch(np.array([0, 0]), np.empty(0, np.int32), np.empty(0, np.float32))) is None
        assert [one.name for one in present([signal, Aggregate()])] == ["aggregate"]

    @pytest.mark.parametrize("name", ["links.tokens", "names.tokens", "index.names", "links.levels"])
    def test_numbers_out_of_range_are_refused(self, name, material: Material):
        arrays = {n: np.array(array) for n, array in Mention.fit(material).arrays.items()}
        arrays[f"mention.{name}"][0] = 99
        with pytest.raises(StorageError, match=f"^reranker.safetensors: mention.{name} is not within .* again$"):
            Mention.load(file_of(arrays, {}, material))

    @pytest.mark.parametrize("name", ["names.offsets", "index.offsets"])
    def test_offsets_of_nothing_are_refused(self, name, material: Material):
        arrays = Mention.fit(material).arrays | {f"mention.{name}": np.empty(0, np.int64)}
        with pytest.raises(StorageError, match=f"mention.{name} does not ascend from 0"):
            Mention.load(file_of(arrays, {}, material))


class TestLikeness(BlendedSignalContract):
    kind = Likeness

    def test_candidates_are_those_that_share_most(self, material: Material, shortlist: Shortlist):
        signal = Likeness.fit(material)
        ids_NP = proposed(signal, shortlist.batch)
        sums_NK = shared(signal, shortlist.batch)
        for ids, sums in zip(ids_NP.tolist(), sums_NK.tolist(), strict=True):
            ranked = sorted((k for k, value in enumerate(sums) if value), key=lambda k: (-sums[k], k))
            assert ids == (ranked + [-1] * len(ids))[: len(ids)]
        assert (ids_NP >= 0).sum() > 5

    def test_weights_are_those_of_the_definition(self):
        # Two texts: one has feature 0 twice and 1 once, the other feature 1. Mean length 2.
        weights = weights_of(np.array([0, 2, 3]), np.array([0, 1, 1], np.int32), np.array([2, 1, 1]), 2)
        idf = np.log([1 + 1.5 / 1.5, 1 + 0.5 / 2.5])
        longer, shorter = 0.4 * (0.25 + 0.75 * 3 / 2), 0.4 * (0.25 + 0.75 / 2)
        expected = [idf[0] * 2 * 1.4 / (2 + longer), idf[1] * 1.4 / (1 + longer), idf[1] * 1.4 / (1 + shorter)]
        np.testing.assert_allclose(weights, expected)

    def test_numbers_out_of_range_are_refused(self, material: Material):
        arrays = {n: np.array(array) for n, array in Likeness.fit(material).arrays.items()}
        arrays["likeness.classes"][0] = 99
        with pytest.raises(
            StorageError, match=r"^reranker.safetensors: likeness.classes is not within 0..6: .* again$"
        ):
            Likeness.load(file_of(arrays, {}, material))

    def test_weights_of_nothing_are_refused(self, material: Material):
        arrays = {n: np.array(array) for n, array in Likeness.fit(material).arrays.items()}
        arrays["likeness.codes"][0] = 0
        with pytest.raises(StorageError, match=r"^reranker.safetensors: likeness.codes holds 0: train it again$"):
            Likeness.load(file_of(arrays, {}, material))


def test_every_signal_has_the_laws_tested():
    blended = {contract.kind for contract in BlendedSignalContract.__subclasses__()}
    others = {contract.kind for contract in SignalContract.__subclasses__() if contract is not BlendedSignalContract}
    assert blended == {kind for kind in SIGNALS if issubclass(kind, BlendedSignal)}
    assert others == set(SIGNALS) - blended


def test_bytes_of_a_re_ranker_are_those_of_its_signals():
    plain = Scale(n_classes=1000, n_features=500, n_rows=10_000, n_positives=20_000, row_features=10)
    assert expected_bytes(plain) == 1000 * 20 + 8 + 3 * 20_000 * 5
    counted = replace(plain, counts_repeats=True)
    assert expected_bytes(counted) - expected_bytes(plain) == 5 * 30_000
    learned = replace(plain, is_learned=True)
    assert expected_bytes(learned) - expected_bytes(plain) == 4 * 1000 + 12 * 500 + 5 * 80_000
    named = replace(plain, has_names=True)
    assert expected_bytes(named) - expected_bytes(plain) == 50 * 1000 + 18 * 500 + 22 * 1000 + 12 * 500
