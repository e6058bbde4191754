"""Words of every script stay whole, by a rule that is also spelled out a character at a time."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mach.config import TextConfig
from mach.data.text import TextFeatures
from mach.data.words import MARKED, words_by

LETTERS = st.text(st.sampled_from("ab1_.+# \u0301\u200d\u093f\u0928\U00011038\U00011013é½\n"), max_size=12)


def words_of(text: str) -> list[str]:
    """Rule 2, straight from its definition."""

    def is_word(c: str) -> bool:
        return c.isalnum() or c == "_"

    def is_inside(c: str) -> bool:
        return is_word(c) or unicodedata.category(c)[0] == "M" or c in "\u200c\u200d"

    def is_letter(c: str) -> bool:
        return c.isalnum() and not c.isdecimal()

    def reach(begin: int) -> int:
        return next((i for i in range(begin, len(text)) if not is_inside(text[i])), len(text))

    words, i = [], 0
    while i < len(text):
        end = reach(i + 1)
        if is_word(text[i]):
            after = text[end : end + 3]
            if after.startswith("++") and not (after[2:] and (is_letter(after[2]) or after[2] in "_+")):
                end += 2
            elif end == i + 1 and is_letter(text[i]) and not (i and is_inside(text[i - 1])) and after[:1] == "#":
                end += not (after[1:2] and (is_word(after[1]) or after[1] == "#"))
        elif text[i] == "." and not (i and (is_inside(text[i - 1]) or text[i - 1] == ".")):
            name = text[i + 1 : end]
            end = end if 2 <= len(name) <= 4 and all("a" <= c <= "z" for c in name) else i + 1
            if end == i + 1:
                i = end
                continue
        else:
            i += 1
            continue
        words.append(text[i:end])
        i = end
    return words


@given(LETTERS)
@example(".ab\u0301")
@example("a\u0301b#")
@example("c++11")
def test_rule_2_is_its_definition(text):
    assert words_by(2)(text) == words_of(text)


def test_all_marks_of_this_unicode_are_inside_words():
    marks = [chr(p) for p in range(0x110000) if unicodedata.category(chr(p))[0] == "M"]
    assert {ord(mark) for mark in marks} <= {p for points in MARKED for p in points}
    assert [mark for mark in marks if words_by(2)(f"a{mark}b") != [f"a{mark}b"]] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("తెలుగు భాష", ["తెలుగు", "భాష"]),
        ("ที่นี่ ภาษาไทย", ["ที่นี่", "ภาษาไทย"]),
        ("مُحَمَّدٌ كِتَابٌ", ["مُحَمَّدٌ", "كِتَابٌ"]),
        ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("ශ්\u200dරී ලංකා", ["ශ්\u200dරී", "ලංකා"]),
        ("ខ្មែរ မြန်မာ", ["ខ្មែរ", "မြန်မာ"]),
        ("C++, C#, C and F#.", ["c++", "c#", "c", "and", "f#"]),
        ("(.NET) ASP.NET node.js Notepad++ C++17", [".net", "asp", "net", "node", "js", "notepad++", "c++", "17"]),
        ("a+b a++b 1+1=2 x...y end.The #tag", ["a", "b", "a", "b", "1", "1", "2", "x", "y", "end", "the", "tag"]),
    ],
)
def test_words_of_all_scripts_stay_whole(text, words):
    features = TextFeatures(TextConfig()).fit([text])
    assert features.n_features == len(set(words))
    for word in words:
        indptr, _, _ = features.transform([word])
        assert indptr.tolist() == [0, 1], word
    assert words_by(2)(unicodedata.normalize("NFKC", text).lower()) == [
        unicodedata.normalize("NFKC", word) for word in words
    ]
