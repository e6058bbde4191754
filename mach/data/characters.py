"""An embedded data set: describe a Unicode character in your own words, find it.

Classes are the named code points of this Python's `unicodedata`, in their order, without the blocks whose names
merely number them (ideographs of CJK and Tangut, syllables of Hangul): 33,513 classes in Unicode 14.

A description is made from a name as people remember one: words are left out or moved, abbreviated or mistyped, and
"the" or "of" comes in where no fitting name has it. Of the test rows of Unicode 14 44 % lack a word, 46 % have words
moved or abbreviated, and 33 % are mistyped. Three rules keep the rows exact and every one answerable:

- Where several names fit a description equally well, each is right. A name fits if every word of the description,
  before mistyping, is a different word of the name or, abbreviated, the beginning of one; the fewer of the name's
  words are left over, the better it fits. Blanks and hyphens separate words, their order does not count.
- A description that fits more than `MAX_RIGHT` names, or another name better than the one it was made from, is
  thrown away and another one made.
- A mistyped word is never a word or the beginning of a word of any name.

Train and test have no text in common, whatever their seeds and sizes: a checksum of a text says which of the two
may use it, and the bare names are for training.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice, pairwise
from math import inf
from random import Random
from typing import Literal, NamedTuple
from zlib import crc32

NUMBERED = ("CJK UNIFIED IDEOGRAPH-", "CJK COMPATIBILITY IDEOGRAPH-", "TANGUT IDEOGRAPH-", "HANGUL SYLLABLE ")
MAX_RIGHT = 10
MAX_ATTEMPTS = 40
TEST_SHARE_OF_TEXTS = 0.25
TEST_SHARE_OF_CLASSES = 0.38
# How often a change is tried; what remains differs, for not every name allows every change.
DROP, REORDER, ABBREVIATE, MISTYPE, FILL = 0.38, 0.17, 0.18, 0.22, 0.1
FILLERS = ("the", "of")
SHORTEST_ABBREVIATION = 3
SHORTEST_MISTYPED = 4
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {key: row[max(i - 1, 0) : i] + row[i + 1 : i + 2] for row in KEYBOARD for i, key in enumerate(row)}


class Token(NamedTuple):
    """A word of a description before mistyping: where it stands in the name, and how it is spelt."""

    place: int
    word: str
    is_prefix: bool = False


class Description(NamedTuple):
    """A row: its text, and the classes that are right."""

    text: str
    classes: list[int]


def class_names() -> list[str]:
    """Names of the classes in the order of their code points, as Unicode writes them.

    >>> class_names()[0], len(class_names()) > 33_000
    ('SPACE', True)
    """
    return list(_index().names)


def rows(
    split: Literal["train", "test"],
    seed: int = 0,
    rows_per_class: int = 10,
    report: Callable[[float], None] = lambda fraction: None,
) -> Iterator[tuple[str, list[str]]]:
    """Descriptions with the names of all classes that are right, in the order of classes.

    The train split has the bare name of every class and up to ``rows_per_class - 1`` descriptions; the test split
    has one description of 38 % of the classes, 12.7 thousand rows. All texts of a split differ. The rows
    depend on the arguments and the version of Unicode alone; all of train take about 15 s, of test 2 s. On the way
    ``report`` is called with the share of classes done.
    """
    names = _index().names
    for description in _descriptions(split, seed, rows_per_class, report):
        yield description.text, [names[k] for k in description.classes]


def _descriptions(
    split: str, seed: int, rows_per_class: int, report: Callable[[float], None] = lambda fraction: None
) -> Iterator[Description]:
    index = _index()
    seen = {name.lower() for name in index.names}
    for k, name in enumerate(index.names):
        if k % 256 == 0:
            report(k / len(index.names))
        random = Random(f"{seed} {split} {name}")
        if split == "train":
            tokens = [Token(place, word) for place, word in enumerate(index.words[k])]
            yield Description(name.lower(), index.fitting(tokens, len(tokens)))
            n_rows = rows_per_class - 1
        else:
            n_rows = int(random.random() < TEST_SHARE_OF_CLASSES)
        for _ in range(n_rows * MAX_ATTEMPTS):
            if n_rows == 0:
                break
            description = _describe(k, random)
            if description is None or description.text in seen:
                continue
            is_for_test = crc32(description.text.encode()) < TEST_SHARE_OF_TEXTS * 2**32
            if is_for_test == (split == "test"):
                seen.add(description.text)
                n_rows -= 1
                yield description
    report(1.0)


class _Index:
    """Names, their words, and the classes whose names have a word or the beginning of one."""

    def __init__(self) -> None:
        named = (unicodedata.name(chr(code_point), "") for code_point in range(0x110000))
        self.names = [name for name in named if name and not name.startswith(NUMBERED)]
        self.words = [tuple(filter(None, re.split("[ -]", name.lower()))) for name in self.names]
        self.with_word: dict[str, set[int]] = defaultdict(set)
        for k, words in enumerate(self.words):
            for word in words:
                self.with_word[word].add(k)
        self.vocabulary = sorted(self.with_word)
        self.with_prefix: dict[str, set[int]] = {}

    def beginning_with(self, prefix: str) -> list[str]:
        """All words that begin so; they are ASCII, so that none comes behind the last sign."""
        return self.vocabulary[bisect_left(self.vocabulary, prefix) : bisect_left(self.vocabulary, prefix + "\x7f")]

    def containing(self, token: Token) -> set[int]:
        if not token.is_prefix:
            return self.with_word[token.word]
        if token.word not in self.with_prefix:
            classes = (self.with_word[word] for word in self.beginning_with(token.word))
            self.with_prefix[token.word] = set().union(*classes)
        return self.with_prefix[token.word]

    def fitting(self, tokens: Sequence[Token], n_words: float = inf) -> list[int]:
        """Classes whose names fit and have at most ``n_words`` words, ascending; of more than `MAX_RIGHT` only some."""
        fewest, *others = sorted(map(self.containing, tokens), key=len)
        classes = (k for k in fewest.intersection(*others) if len(self.words[k]) <= n_words)
        if any(token.is_prefix for token in tokens) or len({token.word for token in tokens}) < len(tokens):
            classes = (k for k in classes if _fits(tokens, self.words[k]))
        return sorted(islice(classes, MAX_RIGHT + 1))


@cache
def _index() -> _Index:
    return _Index()


def _fits(tokens: Sequence[Token], words: Sequence[str]) -> bool:
    """Whether every token finds a word of its own.

    Taking the tokens from the strictest to the loosest needs no search: the words that suit one of them are
    among those that suit another, or the two have none in common.
    """
    left = list(words)
    for token in sorted(tokens, key=lambda token: (token.is_prefix, -len(token.word))):
        suitable = (w for w in left if (w.startswith(token.word) if token.is_prefix else w == token.word))
        word = next(suitable, None)
        if word is None:
            return False
        left.remove(word)
    return True


def _describe(k: int, random: Random) -> Description | None:
    """One attempt at a description of class ``k``; None where it would not be a good one."""
    index = _index()
    words = index.words[k]
    tokens = [Token(place, word) for place, word in enumerate(words)]
    for share, change in ((DROP, _drop), (REORDER, _reorder), (ABBREVIATE, _abbreviate)):
        if random.random() < share:
            change(tokens, random)
    classes = index.fitting(tokens, len(words))
    if len(classes) > MAX_RIGHT or any(len(index.words[other]) < len(words) for other in classes):
        return None
    spellings = [token.word for token in tokens]
    if random.random() < MISTYPE:
        _mistype(spellings, random)
    text = _write(index.names[k], tokens, spellings, random)
    if random.random() < FILL:
        filler = random.choice(FILLERS)
        if not index.fitting([*tokens, Token(-1, filler)]):
            blank = random.choice([-1, *(i for i, c in enumerate(text) if c == " ")])
            text = f"{text[: blank + 1]}{filler} {text[blank + 1 :]}"
    return Description(text, classes)


def _drop(tokens: list[Token], random: Random) -> None:
    """Leave out one to three words, mostly common ones; one word stays."""
    n_words = len(tokens)
    n_left_out = min(n_words - 1, 1)
    if n_words > 3:
        n_left_out = random.choice((1, 1, 2) if n_words < 7 else (1, 2, 3))
    for _ in range(n_left_out):
        commonness = [len(_index().with_word[token.word]).bit_length() for token in tokens]
        tokens.remove(random.choices(tokens, commonness)[0])


def _reorder(tokens: list[Token], random: Random) -> None:
    """Begin in the middle, swap neighbours or mix all words."""
    if len(tokens) < 2:
        return
    cut = random.randrange(1, len(tokens))
    kind = random.randrange(4)
    if kind < 2:
        tokens[:] = tokens[cut:] + tokens[:cut]
    elif kind == 2:
        tokens[cut - 1], tokens[cut] = tokens[cut], tokens[cut - 1]
    else:
        random.shuffle(tokens)


def _abbreviate(tokens: list[Token], random: Random) -> None:
    """Cut one or two longer words of letters short."""
    long = [i for i, token in enumerate(tokens) if len(token.word) > SHORTEST_ABBREVIATION + 1 and token.word.isalpha()]
    for i in random.sample(long, min(len(long), random.choice((1, 1, 2)))):
        end = random.randrange(SHORTEST_ABBREVIATION, min(len(tokens[i].word), 7))
        tokens[i] = tokens[i]._replace(word=tokens[i].word[:end], is_prefix=True)


def _mistype(spellings: list[str], random: Random) -> None:
    """Make a typing error in one word, seldom in two; none that makes the beginning of another word."""
    long = [i for i, word in enumerate(spellings) if len(word) >= SHORTEST_MISTYPED and word.isalpha()]
    chosen = random.sample(long, min(len(long), random.choice((1, 1, 1, 1, 2))))
    for i in chosen:
        word = _with_error(spellings[i], random)
        if not _index().beginning_with(word):
            spellings[i] = word


def _with_error(word: str, random: Random) -> str:
    i = random.randrange(len(word) - 1)
    match random.randrange(4):
        case 0:
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        case 1:
            return word[:i] + word[i + 1 :]
        case 2:
            return word[:i] + random.choice(word[i] + NEIGHBOURS[word[i]]) + word[i:]
        case _:
            return word[:i] + random.choice(NEIGHBOURS[word[i]]) + word[i + 1 :]


def _write(name: str, tokens: list[Token], spellings: list[str], random: Random) -> str:
    """Put the words together, with hyphens as in the name or without, now and then a comma where order breaks."""
    hyphens = random.random() < 0.5
    commas = random.random() < 0.25
    separators = re.findall("[ -]+", name)
    text = spellings[0]
    for (before, after), spelling in zip(pairwise(tokens), spellings[1:], strict=True):
        if after.place == before.place + 1 and hyphens and separators[before.place] == "-":
            text += "-" + spelling
        else:
            text += (", " if commas and after.place < before.place else " ") + spelling
    return text
