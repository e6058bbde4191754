"""Which words of a vocabulary spell the tokens of names: as they are, inflected, or within compounds.

A token is cut to four fifths of its letters. Words that begin with that are its inflections, or compounds where they
are much longer; words that hold it further inside are compounds as well. Tokens of up to four letters, and those with
anything but letters, are only spelt as they are.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mach.data.words import Cut

EXACT, INFLECTED, COMPOUND, INSIDE = 4, 3, 2, 1  # levels
WHOLE = 4  # tokens of so few letters are not cut
ENDING = 2  # letters that a word may have beyond its token and be an inflection
LEAST_INSIDE = 5  # letters of what is looked for inside of words
_QUALIFIED = re.compile(r"(.*\S)\s*\([^()]*\)\s*", re.DOTALL)

Links = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]  # offsets of words, tokens, levels


def tokens_of(name: str, cut: Cut) -> list[str]:
    """The distinct tokens of a name, without what stands in brackets at its end, which tells it from others alike.

    >>> from mach.data.words import words_by
    >>> tokens_of("Tunnel (Rechnernetz)", words_by(2)), tokens_of("(Un-)Schärfe", words_by(2))
    (['tunnel'], ['un', 'schärfe'])
    """
    qualified = _QUALIFIED.fullmatch(name)
    for text in (qualified[1], name) if qualified else (name,):
        if found := cut(unicodedata.normalize("NFKC", text).lower()):
            return list(dict.fromkeys(found))
    return []


def link(words: Sequence[str], tokens: Sequence[str]) -> Links:
    """The tokens that each word spells, ascending, and how well.

    Cost: a look-up for every part of a word that is as long as a cut token.

    >>> offsets, found, levels = link(["whales", "sperm"], ["whale", "sperm", "oil"])
    >>> offsets.tolist(), found.tolist(), levels.tolist()
    ([0, 1, 2], [0, 1], [3, 4])
    """
    by_stem: defaultdict[str, list[int]] = defaultdict(list)
    for number, token in enumerate(tokens):
        by_stem[stem(token)].append(number)
    lengths = sorted({len(part) for part in by_stem})
    inner = [length for length in lengths if length >= LEAST_INSIDE]
    offsets, found, levels = np.zeros(len(words) + 1, np.int64), [], []
    for n, term in enumerate(words):
        word = "" if " " in term else term  # each word of an n-gram is a term of its own
        spelt: dict[int, int] = {}
        for length in lengths:
            if length > len(word):
                break
            for number in by_stem.get(word[:length], ()):
                level = _level(word, tokens[number], length)
                if level:
                    spelt[number] = level
        for begin in range(2, len(word) - LEAST_INSIDE + 1):
            for length in inner:
                if begin + length > len(word):
                    break
                for number in by_stem.get(word[begin : begin + length], ()):
                    if length < len(tokens[number]) or tokens[number].isalpha():
                        spelt.setdefault(number, INSIDE)
        for number in sorted(spelt):
            found.append(number)
            levels.append(spelt[number])
        offsets[n + 1] = len(found)
    return offsets, np.array(found, np.int32), np.array(levels, np.uint8)


def link_near(words: Sequence[str], tokens: Sequence[str]) -> tuple[NDArray[np.int64], Links]:
    """The numbers of the words that may spell one of a few tokens, and the links of these words.

    Cost: a search for every token in all words, a millisecond in a million letters.

    >>> near, (offsets, found, levels) = link_near(["oil", "anchorage", "sheetanchor"], ["anchor"])
    >>> near.tolist(), offsets.tolist(), found.tolist(), levels.tolist()
    ([1, 2], [0, 1, 2], [0, 0], [2, 1])
    """
    text, near = "\n".join(["", *words]), set[int]()
    begins = np.cumsum([0, *(len(word) + 1 for word in words)])
    for part in {stem(token) for token in tokens}:
        looked_for = part if len(part) >= LEAST_INSIDE else f"\n{part}"
        at = text.find(looked_for)
        while at >= 0:
            number = int(np.searchsorted(begins, at, side="right")) - 1
            near.add(number)
            at = text.find(looked_for, int(begins[number + 1]))
    numbers = np.array(sorted(near), np.int64)
    return numbers, link([words[n] for n in numbers.tolist()], tokens)


def stem(token: str) -> str:
    """A token without its last fifth, unless it is short or no word."""
    if len(token) <= WHOLE or not token.isalpha():
        return token
    return token[: -(-4 * len(token) // 5)]


def _level(word: str, token: str, length: int) -> int:
    """How well a word that begins with a token's stem of such a length spells the token; 0: not at all."""
    if word == token:
        return EXACT
    if length == len(token):  # it is not cut
        return 0
    return INFLECTED if len(word) <= len(token) + ENDING else COMPOUND
