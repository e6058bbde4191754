"""Explanations: parts that add up to the score, and words without which it is what they say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner

from mach.cli import main
from mach.config import TextConfig
from mach.data.text import TextFeatures
from mach.errors import DataError
from mach.model.explainer import MOST_WORDS, Explainer, without
from mach.model.explanation import Explanation, Word
from mach.model.loading import load
from mach.model.model import MachModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
# A learned order with added classes, one with two columns of classifiers and phrases, a blend with pairs, repeats,
# n-grams of characters, no re-ranker but a prior, numbers, dense rows.
KINDS = ["order-edited", "all-keys", "edited", "reranked-repeats", "documents", "int8", "table", "dense"]


def opened(kind: str) -> tuple[MachModel, list]:
    folder = FIXTURES / f"run-format-1-{kind}"
    queries = json.loads((folder / "expected.json").read_text())["queries"]
    return load(folder), queries if isinstance(queries[0], str) else list(np.array(queries, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_score_that_queries_get(kind: str):
    model, queries = opened(kind)
    hows: list[dict[str, Any]] = [{}, {"tail": 0.5}, *([{"rerank": False}] if model.reranker else [])]
    n_reasons = 0
    for query in queries[:4]:
        for how in hows:
            ids, scores = model.topk(query, 4, **how)
            for why, score in zip(model.explain(query, ids, **how), scores.tolist(), strict=True):
                assert why.score == pytest.approx(score, abs=1e-5)
                assert why.start + sum(part.added for part in why.parts) == pytest.approx(score, abs=1e-4)
                assert {part.name for part in why.parts} >= ({"tail"} if how.get("tail") else set())
                n_reasons += sum(len(part.reasons) for part in why.parts)
            if model.calibration:
                chances = model.topk(query, 4, probabilities=True, **how)[1]
                assert [why.probability for why in model.explain(query, ids, **how)] == pytest.approx(chances.tolist())
    assert bool(n_reasons) == bool(model.reranker)


@pytest.mark.parametrize("kind", ["order-edited", "all-keys", "documents", "table", "dense"])
def test_a_word_is_worth_what_the_score_loses_without_it(kind: str):
    model, queries = opened(kind)
    for query in queries[:2]:
        ids = model.topk(query, 3)[0]
        for why in model.explain(query, ids):
            assert [word.lost for word in why.words] == sorted((word.lost for word in why.words), reverse=True)
            for word in why.words:
                if isinstance(query, str):
                    letters = list(query)
                    for begin, end in word.spans:
                        assert query[begin:end].lower() == word.text
                        letters[begin:end] = " " * (end - begin)
                    left = "".join(letters)
                else:
                    left = query.copy()
                    left[int(word.text.removeprefix("feature "))] = 0
                assert why.score - word.lost == pytest.approx(model.score(left, [why.id])[0], abs=1e-4)


def test_the_words_of_a_class_are_named_first():
    model, _ = opened("order-views")
    right = []
    for query in ("a blue hat beside a green car ala", "black cup ene white hat", "omo red car and yellow cup"):
        words = query.split()
        for name in (f"{a} {b}" for a, b in itertools.pairwise(words) if b in ("hat", "car", "cup")):
            why = model.explain(query, name)
            assert why.name == name
            assert why.words[0].lost > 0
            right.append({word.text for word in why.words[:2]} == set(name.split()))
            [part] = [part for part in why.parts if part.name == "classifiers"]
            assert {word for reason in part.reasons[:2] for word in reason.words} <= set(words)
    assert np.mean(right) >= 0.8, right


def test_pairs_are_named_and_marked():
    model, _ = opened("order-edited")
    query = "Red cup, ala RED"
    [part] = [part for part in model.explain(query, "red cup").parts if part.name == "classifiers"]
    pair = next(reason for reason in part.reasons if len(reason.words) == 2)
    assert pair.words == ("red", "cup")
    assert [query[begin:end] for begin, end in pair.spans] == ["Red", "cup", "RED"]
    assert part.rest == pytest.approx(0, abs=1e-4)


def test_it_is_told_in_plain_words_and_in_json():
    model, _ = opened("order-edited")
    why = model.explain("red cup ala", "red cup")
    told = str(why).splitlines()
    assert told[0] == f"red cup, probability {why.probability:.4f}"
    assert told[1].startswith("  because of red (")
    assert f"{why.words[0].probability:.4f} without it" in told[1]
    assert told[-1].startswith(f"  score {why.score:.2f}: ")
    again = json.loads(json.dumps(why.to_dict()))
    assert again["words"][0] == {
        "text": "red", "spans": [[0, 3]], "lost": why.words[0].lost, "probability": why.words[0].probability,
    }  # fmt: skip
    assert again["start"] + sum(part["added"] for part in again["parts"]) == pytest.approx(again["score"], abs=1e-4)


def test_words_without_which_a_class_stays_as_likely_are_not_said_to_change_it():
    words = (Word("lamp", (), 0.4, 0.5), Word("old", (), 0.2, 0.90001), Word("the", (), -0.3, 0.9))
    why = Explanation(3, "lamps", -1.0, 0.9, True, 0.0, (), words)
    assert list(why.lines())[:-1] == ["because of lamp (0.5000 without it)"]
    assert next(iter(replace(why, words=words[1:]).lines())) == "no word of the query speaks for it"
    scored = tuple(replace(word, probability=None) for word in words)
    assert list(replace(why, probability=None, words=scored).lines())[:-1] == [
        "because of lamp (score -1.40 without it), old (score -1.20 without it)",
        "in spite of the (score -0.70 without it)",
    ]


def test_a_query_without_words_and_one_of_unknown_ones():
    model, _ = opened("edited")
    nothing = model.explain("", 0)
    assert (nothing.words, nothing.known) == ((), False)
    assert "no word of the query speaks for it" in str(nothing)
    unknown = model.explain("zzz", 0)
    assert [(word.text, word.lost) for word in unknown.words] == [("zzz", 0.0)]
    assert not unknown.known


def test_of_many_words_those_of_largest_value_are_tried():
    model, _ = opened("edited")
    noise = " ".join(f"unknown{n}" for n in range(MOST_WORDS + 50))
    why = model.explain(f"{noise} red cup", "red cup")
    assert len(why.words) == MOST_WORDS
    assert {"red", "cup"} <= {word.text for word in why.words}


def test_what_is_left_out_moves_no_later_word_up_among_the_first(monkeypatch: pytest.MonkeyPatch):
    model, _ = opened("order-views")
    text, asked = " ".join(["red", *(f"w{n}" for n in range(11)), "cup"]), []

    def answered(texts: list[str]) -> Iterator[Any]:
        asked.append(texts)
        return iter(())

    monkeypatch.setattr(model.answerer.ensemble, "answered", answered)
    explainer = Explainer.__new__(Explainer)
    explainer.model, explainer.answerer, explainer.text = model, model.answerer, text
    explainer.scores = cast(Any, SimpleNamespace(batch=None))
    for rule, gap in ((2, " "), (3, "\0")):
        features = TextFeatures(TextConfig(), rule).fit([text])
        monkeypatch.setattr(Explainer, "_text_features", features)
        list(explainer._deletions())
        assert asked[-1][0] == gap + text[len("red") :]
    row = dict(zip(*features.transform(asked[-1][:1])[1:], strict=True))
    cup, other = (row[features.words().index(word)] for word in ("cup", "w3"))
    assert other == pytest.approx(3 * cup)


def test_what_cannot_be_explained_is_refused():
    model, _ = opened("edited")
    with pytest.raises(DataError, match="one query"):
        model.explain(["red cup", "blue hat"], 0)
    with pytest.raises(DataError, match="no class named"):
        model.explain("red cup", "no such")
    with pytest.raises(DataError, match="removed"):
        model.explain("red cup", int(model.classes.edits.removed[0]))
    assert model.explain("red cup", []) == []
    assert Explainer(model, ["red cup"]).text == "red cup"
    assert without("red cup", [(0, 3)]) == "  cup"


def test_the_shell_tells_why():
    def mach(*more: str) -> str:
        run = FIXTURES / "run-format-1-order-edited"
        done = CliRunner().invoke(main, ["query", str(run), "red cup ala", "-k", "2", "--explain", *more])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    lines = mach().splitlines()
    because = [n for n, line in enumerate(lines) if line.startswith(f"{' ' * 26}because of ")]
    assert [lines[n - 1].split(maxsplit=2)[2] for n in because] == ["red cup", "striped cup"]
    told = json.loads(mach("--json", "--scores"))
    assert [why["id"] for why in told["explanations"]] == told["ids"]
    assert [why["score"] for why in told["explanations"]] == pytest.approx(told["scores"], abs=1e-5)
