"""Classes that signals propose: candidates of a query beside those of the networks, never-trained ones among them."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mach.config import parse_config
from mach.data.batch import SparseBatch
from mach.errors import OmissionWarning
from mach.model.loading import load
from mach.model.model import MachModel
from mach.reranking.order import FLOOR
from mach.reranking.signals.contract import Shortlist
from mach.training.conductor import train

N_CLASSES, N_WORDS, LISTED = 40, 60, 5
UNSEEN = N_CLASSES  # the class of the table that no row has


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MachModel]:
    """A run with a learned order, whose networks list few classes."""
    folder = tmp_path_factory.mktemp("proposals")
    generator = np.random.default_rng(0)
    with (folder / "classes.csv").open("w", newline="") as file:
        names = [(f"id{k}", f"name{k}", f"other{k}") for k in range(N_CLASSES)]
        csv.writer(file).writerows([("id", "name", "alternatives"), *names, ("new", "lighthouse keeper", "wickie")])
    with (folder / "rows.csv").open("w", newline="") as file:
        rows = [("text", "classes")]
        for n in range(300):
            k = n % N_CLASSES
            words = " ".join(f"word{word}" for word in generator.integers(0, N_WORDS, 6))
            rows.append((f"name{k if n % 3 else generator.integers(N_CLASSES)} {words} word{k}", f"id{k}"))
        csv.writer(file).writerows(rows)
    config = {
        "data": {"train": str(folder / "rows.csv"), "classes": str(folder / "classes.csv"), "cache": str(folder / "c")},
        "hashing": {"repetitions": 2, "heads": 1, "buckets": 16},
        "network": {"hidden": [16]},
        "training": {"epochs": 3, "batch": 32},
        "reranking": {"candidates": LISTED, "pilots": 1},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mach.reranking.order.LEAST_STEPS", 500)
        with pytest.warns(OmissionWarning, match="1 of 41 classes have no training row"):
            made = train(parse_config(config, "test"), folder / "run", launcher="here")
    with made as model:
        yield model


QUERIES = ["the lighthouse keepers of word3", "wickie", "name7 word1 word2", "word5 word6", "nothing known"]


def test_a_class_without_rows_answers_to_its_names(model: MachModel):
    assert model.reranker is not None
    assert model.reranker.order is not None
    ids_N5, _ = model.topk(QUERIES, k=LISTED)
    for n in (0, 1):
        assert UNSEEN in ids_N5[n]


def test_a_query_of_words_that_only_names_have_is_known(model: MachModel):
    queries = ["wickie", "lighthouse keeper", "word1", "nothing known"]
    found = model.search(queries, k=LISTED)
    assert found.known_N.tolist() == [True, True, True, False]
    assert (found.ids_Nk[:2] == UNSEEN).any(axis=1).all()
    assert [bool(model.search(query, k=1).known_N[0]) for query in queries] == [True, True, True, False]
    assert model.search(queries, k=1, rerank=False).known_N.tolist() == [False, False, True, False]
    assert model.explain("wickie", [UNSEEN])[0].known


def test_an_order_lifts_proposed_classes_alone(model: MachModel):
    reranker = model.reranker
    assert reranker is not None
    assert reranker.order is not None
    assert reranker.order.floor == FLOOR
    before = model.score(QUERIES, [UNSEEN, 3])
    try:
        reranker.order.floor = -np.inf
        without = model.score(QUERIES, [UNSEEN, 3])
        aggregates = model.score(QUERIES, [UNSEEN, 3], rerank=False)
        reranker.order.floor = 0.0
        lifted = model.score(QUERIES, [UNSEEN, 3]) - without
    finally:
        reranker.order.floor = FLOOR
    assert (before >= without).all()
    is_proposed = np.array([[True, False], [True, False], *[[False, False]] * 3])
    np.testing.assert_allclose(lifted, np.where(is_proposed, -aggregates, 0), atol=1e-5)


def test_proposed_classes_have_the_scores_of_given_ones(model: MachModel):
    top = model.search(QUERIES, k=LISTED)
    np.testing.assert_array_equal(model.score(QUERIES, top.ids_Nk), top.scores_Nk)
    for n, query in enumerate(QUERIES):
        alone = model.search([query], k=LISTED)
        np.testing.assert_array_equal(alone.ids_Nk[0], top.ids_Nk[n])
        np.testing.assert_array_equal(alone.scores_Nk[0], top.scores_Nk[n])


def test_no_class_beside_the_candidates_is_above_the_bound(model: MachModel):
    top = model.search(QUERIES, k=LISTED)
    assert top.exact_N.all()
    everything = np.arange(model.n_classes)
    scores_NK = model.score(QUERIES, everything)
    for n, ids in enumerate(top.ids_Nk):
        assert (np.delete(scores_NK[n], ids) <= top.bound_N[n]).all()


def test_only_allowed_classes_are_proposed(model: MachModel):
    allowed = np.setdiff1d(np.arange(model.n_classes), [UNSEEN, 7])
    ids_N5, _ = model.topk(QUERIES, k=LISTED, allowed=allowed)
    assert np.isin(ids_N5, allowed).all()
    assert model.topk(QUERIES[:1], k=1, allowed=[UNSEEN])[0].tolist() == [[UNSEEN]]


@pytest.fixture
def grown(model: MachModel, tmp_path: Path) -> Iterator[MachModel]:
    """The same with classes that came afterwards, which are known by their names alone."""
    shutil.copytree(str(model.run.path), tmp_path / "run")
    with load(tmp_path / "run") as made:
        made.classes.add(["name7 keeper", "word59"], alternatives=[["lighthouse wickie"], []])
        yield made


ADDED = UNSEEN + 1


def test_an_added_class_answers_to_its_names_and_says_so(grown: MachModel):
    for query in ("word1 keeper of name7 word2", "word3 lighthouse word4 wickie"):
        ids = grown.topk(query, k=LISTED)[0].tolist()
        assert ADDED in ids
        assert ADDED + 1 not in ids[: ids.index(ADDED)]
        [why] = grown.explain(query, [ADDED])
        assert why.start + sum(part.added for part in why.parts) == pytest.approx(why.score, abs=1e-4)
        spelt = {reason.name for part in why.parts if part.name == "mention" for reason in part.reasons}
        assert spelt == {"name7 keeper" if "name7" in query else "lighthouse wickie"}
    grown.classes.remove(ADDED)
    assert ADDED not in grown.topk("word1 keeper of name7 word2", k=grown.n_classes)[0]


def test_an_added_class_is_weighed_like_a_trained_one_without_rows(grown: MachModel):
    [again] = grown.classes.add("keeper lighthouse", alternatives=[["wickie"]])
    reranker = grown.answerer.memory.named
    assert reranker is not None
    batch = next(iter(grown.answerer.ensemble.read(["the lighthouse keepers of word3", "wickie", "word1"])))
    assert isinstance(batch, SparseBatch)
    scores = np.full((3, 2), -5, np.float32), np.full((3, 1, 4), 0.1, np.float32)
    shortlist = Shortlist(batch, np.tile([UNSEEN, again], (3, 1)), *scores)
    for signal in reranker.signals:
        columns = signal.columns(shortlist)
        np.testing.assert_allclose(columns[:, 0], columns[:, 1], rtol=0.01, err_msg=signal.name)
    both = reranker.rescore(shortlist)
    np.testing.assert_allclose(both[:, 0], both[:, 1], atol=0.02)
    assert (both[:2] > both[2:]).all()


def test_an_added_name_may_have_a_word_that_nobody_wrote(grown: MachModel):
    [again] = grown.classes.add("name7 zzyzx")
    assert again in grown.topk("word1 name7 zzyzx", k=LISTED)[0]


def test_a_query_that_asks_about_no_added_class_is_scored_as_before(grown: MachModel):
    trained = np.arange(UNSEEN + 1)
    with load(grown.run.path, version=0) as before:
        np.testing.assert_array_equal(grown.score(QUERIES, trained), before.score(QUERIES, trained))


def test_an_example_that_speaks_of_no_added_name_is_learned(grown: MachModel):
    [shown] = grown.classes.add(["tower"], [["word1 word2"]])
    assert shown in grown.topk("word1 word2", k=LISTED)[0]
