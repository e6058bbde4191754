"""Where in a text its features stand: the terms of `mach.data.text` and the words of `mach.data.words`, with offsets.

Terms are cut out of a text in NFKC and lower case; offsets are those of the text as it was given.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mach.data.text import TextFeatures
from mach.data.words import Cut, words_by

Span = tuple[int, int]  # begin and end, in characters of a text
_RUNS = re.compile(r"\S+|\s+")
_LATER_JAMO = range(0x1160, 0x1200)  # vowels and final consonants of Hangul, which join what stands before them


class Occurrence(NamedTuple):
    """A feature or word of a text, and where it stands."""

    what: int | str
    begin: int
    end: int


def occurrences(features: TextFeatures, text: str) -> list[Occurrence]:
    """All features of a text, as often as they occur there; padding of n-grams of characters is left out.

    Examples
    --------
    >>> from mach.config import TextConfig
    >>> features = TextFeatures(TextConfig(words=[1, 2])).fit(["red apple"])
    >>> [tuple(one) for one in occurrences(features, "RED  apple")]
    [(1, 0, 3), (0, 5, 10), (2, 0, 10)]
    """
    plain, spans = _plain(text)
    cut, config, (words, characters) = words_by(features.rule), features.config, features.tables
    found = []

    def add(number: int, begin: int, end: int) -> None:
        if number >= 0:
            found.append(Occurrence(number, spans[begin][0], spans[end - 1][1]))

    for piece in re.finditer(r"\S+", plain):
        at, end = piece.span()
        if config.words and config.words[0] == 1:
            for word, begin in _located(piece[0], cut):
                add(words[word], at + begin, at + begin + len(word))
        if config.characters:
            padded, (shortest, longest) = f" {piece[0]} ", config.characters
            for n in range(shortest, max(shortest, min(longest, len(padded))) + 1):
                for i in range(max(1, len(padded) - n + 1)):
                    begin = min(max(at + i - 1, at), end - 1)
                    add(characters[padded[i : i + n]], begin, min(max(at + i - 1 + n, begin + 1), end))
    if config.words and config.words[1] > 1:
        tokens = [*_located(plain, cut)]
        for n in range(max(config.words[0], 2), config.words[1] + 1):
            for i in range(len(tokens) - n + 1):
                phrase = tokens[i : i + n]
                add(words[" ".join(word for word, _ in phrase)], phrase[0][1], phrase[-1][1] + len(phrase[-1][0]))
    return found


def words_of(features: TextFeatures, text: str) -> list[Occurrence]:
    """All words of a text as text features cut them, in NFKC and lower case, known or not."""
    plain, spans = _plain(text)
    cut = words_by(features.rule)
    return [Occurrence(w, spans[at][0], spans[at + len(w) - 1][1]) for w, at in _located(plain, cut)]


def unknown_words(features: TextFeatures, texts: Iterable[str]) -> tuple[list[str], int]:
    """The words of texts that are no feature and have none in them, each once, and how many words there are.

    Examples
    --------
    >>> from mach.config import TextConfig
    >>> features = TextFeatures(TextConfig()).fit(["red apple"])
    >>> unknown_words(features, ["Red pear", "a pear"])
    (['pear', 'a'], 3)
    """
    words = list(dict.fromkeys(str(one.what) for text in texts for one in words_of(features, text)))
    indptr, indices, _ = features.counted(words)
    n_known = np.append(0, np.cumsum(features.is_known(indices)))[indptr]
    return [word for word, n in zip(words, np.diff(n_known), strict=True) if not n], len(words)


def _located(text: str, cut: Cut) -> Iterator[tuple[str, int]]:
    """Words of a text and where they begin: no word stands between two that follow each other."""
    at = 0
    for word in cut(text):
        at = text.index(word, at)
        yield word, at
        at += len(word)


def _plain(text: str) -> tuple[str, list[Span]]:
    """A text in NFKC and lower case, and of each of its characters where in the text it comes from.

    That is a character and the marks behind it; where characters join in other ways, all that stands between blanks.
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    if text.isascii():
        return plain, [(i, i + 1) for i in range(len(text))]
    for parts in (_clusters(text), [found.span() for found in _RUNS.finditer(text)]):
        pieces = [unicodedata.normalize("NFKC", text[begin:end]).lower() for begin, end in parts]
        if _without_final("".join(pieces)) == _without_final(plain):
            return plain, [span for span, piece in zip(parts, pieces, strict=True) for _ in piece]
    return plain, [(0, len(text))] * len(plain)


def _clusters(text: str) -> list[Span]:
    begins = [i for i, c in enumerate(text) if i == 0 or not (unicodedata.combining(c) or ord(c) in _LATER_JAMO)]
    return list(zip(begins, [*begins[1:], len(text)], strict=True))


def _without_final(text: str) -> str:
    return text.replace("ς", "σ")  # which of them lower case takes depends on what follows
