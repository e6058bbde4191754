"""Where features stand in a text, against the features that the text has."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mach.config import TextConfig
from mach.data.occurrences import occurrences, words_of
from mach.data.text import TextFeatures

LETTERS = "ab.#+ \u00a0\u00a8\u0301\u0307\u200dAİßΣςﬁC가\u1100\u1161\u11a8हि9_\n"
KINDS = [
    TextConfig(words=[1, 2], characters=[1, 3]),
    TextConfig(words=[2, 3], characters=None),
    TextConfig(words=None, characters=[2, 4]),
    TextConfig(words=[1, 1], characters=[3, 3], hashing=True, n_features=64),
]


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("rule", [1, 2])
@given(text=st.text(LETTERS, max_size=24))
@example(text="ﬁsh in İstanbul, C++ and .NET: ΟΔΟΣ ΟΔΟΣ")
@example(text="a\u00a8b 각 A\u030a.net")
def test_each_feature_is_found_as_often_as_the_text_has_it(config: TextConfig, rule: int, text: str):
    features = TextFeatures(config, rule)
    features.fit([text, "ab ba ab"])
    _, indices, counts = features.counted([text])
    found = occurrences(features, text)
    assert Counter(one.what for one in found) == dict(zip(indices.tolist(), counts.tolist(), strict=True))
    assert all(0 <= one.begin < one.end <= len(text) for one in found)


def test_offsets_are_those_of_the_text_as_it_was_given():
    features = TextFeatures(TextConfig(words=[1, 2], characters=[3, 3])).fit(["the ﬁsh of İstanbul İstanbul"])
    text = "İstanbul:  The ﬁsh"
    assert [(one.what, text[one.begin : one.end]) for one in words_of(features, text)] == [
        ("i̇stanbul", "İstanbul"),
        ("the", "The"),
        ("fish", "ﬁsh"),
    ]
    words, characters = features.tables
    places = {one.what: text[one.begin : one.end] for one in occurrences(features, text)}
    assert places[words["the fish"]] == "The ﬁsh"
    assert places[characters[" th"]] == "Th"  # without the padding
    assert places[characters["fis"]] == "ﬁs"  # both letters of the ligature


def test_where_characters_join_otherwise_all_between_blanks_is_marked():
    features, text = TextFeatures(TextConfig()).fit(["x"]), "one \u09c7\u09be two"  # which NFKC makes one of
    assert len(unicodedata.normalize("NFKC", text)) == len(text) - 1
    assert [text[one.begin : one.end] for one in words_of(features, text)][-1] == "two"
