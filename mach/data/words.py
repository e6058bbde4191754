r"""How words are cut out of text, by numbered rules: text features keep the one that they were fitted by.

====== ==========================================================================================================
rule 1 runs of letters, digits and ``_`` (``\w+``), as earlier versions had them: words end at combining marks, so that
       Hindi or vocalised Arabic loses its vowels, and ``C++`` and ``C#`` are the word c
rule 2 such runs with the combining marks and joiners inside them, as Unicode's annex 29 has it (rule WB4). Besides, a
       word keeps ``++`` behind it, one of one letter ``#``, and one of 2 to 4 letters the dot before it where nothing
       of a word or dot stands before that: ``c++``, ``c#``, ``.net``
rule 3 the same, and what the first `LEAD` pieces between blanks hold counts `TIMES` times: texts begin with a title, or
       with what they are about
====== ==========================================================================================================

No rule looks beyond blanks, and none divides scripts that put none between words (Thai, Chinese): what stands
between blanks or punctuation is one word there, and n-grams of characters find its parts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

RULE = 3  # of new text features
LEAD, TIMES = 12, 3
BEYOND = "\U00010000"  # the basic plane ends before it
JOINERS = "\u200c\u200d"  # zero-width non-joiner and joiner
# Where combining marks are, all of them up to Unicode 16; a look at all of Unicode would take ten times as long.
MARKED = (range(0x300, 0x1F000), range(0xE0100, 0xE01F0))

Cut = Callable[[str], list[str]]  # the words of a text in their order

_RUNS = re.compile(r"\w+").findall
_DOTTED = re.compile(r"\.(?<![\w.]\.)[a-z]").search


def words_by(rule: int) -> Cut:
    """What cuts texts, in NFKC and lower case, by a rule.

    Examples
    --------
    >>> words_by(2)("हिन्दी in c++"), words_by(1)("हिन्दी in c++")
    (['हिन्दी', 'in', 'c++'], ['ह', 'न', 'द', 'in', 'c'])
    """
    return _RUNS if rule == 1 else _whole_words


def _whole_words(text: str) -> list[str]:
    """By rule 2; most texts have nothing that tells it from rule 1, which is three times as fast."""
    if text.isalnum():
        return [text]
    is_marked = not text.isascii() and _patterns().suspect(text)
    if is_marked or "#" in text or "++" in text or ("." in text and _DOTTED(text)):
        return _patterns().words(text)
    return _RUNS(text)


class _Patterns(NamedTuple):
    suspect: Callable[[str], re.Match[str] | None]  # finds marks, joiners and all beyond the basic plane
    words: Cut


@cache
def _patterns() -> _Patterns:
    points = [p for points in MARKED for p in points if unicodedata.category(chr(p)).startswith("M")]
    begins = [p for p, before in zip(points, [-1, *points], strict=False) if p != before + 1]
    ends = [p for p, after in zip(points, [*points[1:], -1], strict=True) if p != after - 1]
    spans = [f"{chr(begin)}-{chr(end)}" for begin, end in zip(begins, ends, strict=True)]
    basic = "".join(span for span in spans if span < BEYOND) + JOINERS  # re has a bitmap for these, no other ranges
    marks = f"{basic}{''.join(span for span in spans if span >= BEYOND)}"
    signs = rf"\+\+(?![^\W\d]|\+)|(?<![\w{marks}].)(?<=[^\W\d_])#(?![\w#])"
    dotted = rf"\.(?<![\w{marks}.]\.)[a-z]{{2,4}}(?![\w{marks}])"
    return _Patterns(
        re.compile(f"[{basic}{BEYOND}-\U0010ffff]").search,
        re.compile(rf"\w+(?:[{marks}]+\w*)*(?:{signs})?|{dotted}", re.DOTALL).findall,
    )
