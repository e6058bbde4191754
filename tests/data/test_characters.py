import hashlib
import json
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import islice, permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.data import characters as module
from mach.data.characters import MAX_RIGHT, Description, Token, class_names, rows

INDEX = module._index()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tested() -> list[Description]:
    return list(module._descriptions("test", 0, 10))


@pytest.fixture(scope="module")
def trained() -> list[Description]:
    return list(module._descriptions("train", 5, 3))


def words_of(text: str) -> list[str]:
    return re.findall("[^ ,-]+", text.lower())


BAGS = {name: Counter(words_of(name)) for name in class_names()}


def right_by_definition(words: list[str]) -> list[str]:
    """The shortest names that have all the words, by going through every name."""
    wanted = Counter(words)
    fitting = [(name, bag.total()) for name, bag in BAGS.items() if bag.keys() >= wanted.keys() and bag >= wanted]
    fewest = min((n_words for _, n_words in fitting), default=0)
    return [name for name, n_words in fitting if n_words == fewest]


def test_classes_are_the_named_code_points_in_order():
    names = class_names()
    assert 33_000 < len(names) < 40_000
    assert len(set(names)) == len(names)
    code_points = [ord(unicodedata.lookup(name)) for name in names]
    assert code_points == sorted(code_points)
    assert not [name for name in names if re.match("CJK (UNIFIED|COMPATIBILITY) IDEOGRAPH-|HANGUL SYLLABLE ", name)]
    assert {"SPACE", "PILE OF POO", "CJK RADICAL SUN", "HANGUL CHOSEONG KIYEOK", "NO-BREAK SPACE"} <= set(names)
    if unicodedata.unidata_version == "14.0.0":
        assert len(names) == 33_513


def known_words(row: Description) -> list[str]:
    """Words of a description that are not mistyped."""
    return [word for word in words_of(row.text) if word not in ("the", "of") and any(INDEX.beginning_with(word))]


def test_mix_of_the_test_split(tested):
    n_lacking = n_changed = n_mistyped = 0
    for row in tested:
        known, words = known_words(row), [word for word in words_of(row.text) if word not in ("the", "of")]
        own = [word for word in INDEX.words[row.classes[0]] if word not in ("the", "of")]
        assert all(any(word.startswith(beginning) for word in own) for beginning in known)
        n_lacking += len(words) < len(own)
        n_mistyped += len(known) < len(words)
        left = iter(own)
        n_changed += not all(word in left for word in known)  # abbreviated, or in another order
    assert 10_000 <= len(tested) <= 15_000
    assert n_lacking > 0.4 * len(tested)
    assert n_changed > 0.4 * len(tested)
    assert n_mistyped > 0.25 * len(tested)


def test_texts_are_unique_and_held_out(tested, trained):
    texts, train_texts = [row.text for row in tested], [row.text for row in trained]
    assert len(set(texts)) == len(texts)
    assert len(set(train_texts)) == len(train_texts)
    assert not set(texts) & set(train_texts)
    assert {name.lower() for name in class_names()} <= set(train_texts)


def test_train_has_the_rows_asked_for(trained):
    names = class_names()
    assert len(trained) > 2.95 * len(names)
    first = trained[0]
    assert (first.text, [names[k] for k in first.classes]) == ("space", ["SPACE"])


@pytest.mark.parametrize("split", ["tested", "trained"])
def test_right_classes_fit_equally_and_are_few(split, request):
    for row in request.getfixturevalue(split):
        assert 1 <= len(row.classes) <= MAX_RIGHT
        assert sorted(set(row.classes)) == row.classes
        assert len({len(INDEX.words[k]) for k in row.classes}) == 1


def test_right_classes_follow_the_definition(tested, trained):
    readable = [
        row for row in tested + trained if set(words_of(row.text)) <= {"the", "of", *INDEX.words[row.classes[0]]}
    ]
    several = [row for row in readable if len(row.classes) > 1]
    names = class_names()
    for row in random.Random(0).sample(readable, 40) + random.Random(1).sample(several, 40):
        words = words_of(row.text)
        expected = right_by_definition(words)
        for filler in ("the", "of"):
            if not expected:  # a filler comes in only where no fitting name has it
                expected = right_by_definition([word for word in words if word != filler])
        assert [names[k] for k in row.classes] == expected


@pytest.mark.parametrize(
    ("description", "n_words", "expected"),
    [
        # "~" marks an abbreviated word
        ("euro sign", 2, ["EURO SIGN"]),
        ("sign euro~", 2, ["EURO SIGN"]),
        ("euro", 2, ["EURO SIGN"]),
        ("a letter small latin", 4, ["LATIN SMALL LETTER A"]),
        ("gre~ small letter alp~", 4, ["GREEK SMALL LETTER ALPHA"]),
        ("letter a tibetan", 3, ["TIBETAN LETTER A", "TIBETAN LETTER -A"]),
        ("dog radical", 3, ["CJK RADICAL DOG", "KANGXI RADICAL DOG"]),
        ("party party horn~", 7, ["FACE WITH PARTY HORN AND PARTY HAT"]),
        ("du du over", 5, ["CUNEIFORM SIGN DU OVER DU"]),
        ("euro euro", 9, []),
        ("euro sign", 1, []),
    ],
)
def test_right_classes_checked_by_hand(description, n_words, expected):
    tokens = [Token(i, word.rstrip("~"), word.endswith("~")) for i, word in enumerate(description.split())]
    assert [class_names()[k] for k in INDEX.fitting(tokens, n_words)] == sorted(expected, key=class_names().index)


@given(
    tokens=st.lists(st.builds(Token, st.just(0), st.text("ab", min_size=1, max_size=3), st.booleans()), max_size=4),
    words=st.lists(st.text("ab", min_size=1, max_size=4), max_size=5),
)
def test_every_token_finds_a_word_of_its_own(tokens, words):
    by_trial = any(
        all(
            word.startswith(token.word) if token.is_prefix else word == token.word
            for token, word in zip(tokens, chosen, strict=True)
        )
        for chosen in permutations(words, len(tokens))
    )
    assert module._fits(tokens, words) == by_trial


@given(st.sampled_from([word for word in INDEX.vocabulary if word.isalpha() and len(word) >= 4]), st.integers(0))
def test_a_typing_error_is_one_edit(word, seed):
    typed = module._with_error(word, random.Random(seed))
    assert typed.isalpha()
    assert typed.islower()
    transposed = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    shortened = {word[:i] + word[i + 1 :] for i in range(len(word))}
    typed_shortened = {typed[:i] + typed[i + 1 :] for i in range(len(typed))}
    assert typed in transposed | shortened or word in typed_shortened or shortened & typed_shortened


@pytest.mark.parametrize(("split", "golden"), [("train", "484a806cef2ca183"), ("test", "74ea5df1d819f015")])
def test_rows_are_the_same_everywhere(split, golden):
    program = (
        "from itertools import islice; from mach.data.characters import rows;"
        f"print(list(islice(rows({split!r}, seed=3), 600)), end='')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(module.__file__).parents[2])},
        capture_output=True,
        check=True,
        text=True,
    )
    assert run.stdout == repr(list(islice(rows(split, seed=3), 600)))
    if unicodedata.unidata_version == "14.0.0":
        assert hashlib.blake2b(run.stdout.encode(), digest_size=8).hexdigest() == golden


def test_progress_rises_to_one():
    fractions: list[float] = []
    list(rows("test", report=fractions.append))
    assert fractions == sorted(set(fractions))
    assert (fractions[0], fractions[-1]) == (0, 1)
    assert len(fractions) > 50


def test_the_seed_makes_other_rows():
    one, same, other = ([text for text, _ in islice(rows("test", seed=seed), 300)] for seed in (0, 0, 1))
    assert one == same
    assert len(set(one) & set(other)) < 30


def test_the_demo_shows_answers_as_characters():
    answer = json.dumps({"query": "snowman", "names": ["SNOWMAN", "GREEK SMALL LETTER ALPHA"]})
    shown = subprocess.run(
        [sys.executable, "scripts/characters.py"], cwd=ROOT, input=answer, capture_output=True, text=True, check=True
    ).stdout
    assert shown.split() == ["snowman", "☃", "snowman", "α", "greek", "small", "letter", "alpha"]
