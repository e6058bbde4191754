"""Phrases sampled from documents: training rows for classes of which nothing is known but their own texts.

A document is a class: its name, *strong* texts that people would ask for as they are (a title), and *weak* ones of
which any passage may be asked for (a description). Its rows are every strong text, all its texts in one, and phrases:
a text is drawn, half of the time a strong one; of a weak one a passage of 2 words or more, short ones more often; then
words are left out at random, and others mistyped or cut short. Words that many documents have come from many, so a
network learns how the odds are shared among these.

The phrases of a document depend on its name and its texts, not on other documents or their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from mach.config import DataConfig
from mach.errors import DataError

# With 8 phrases that left out twice as many words, P@1 of the embedded set's names was 72 instead of 86 (docs/log.md).
PHRASES = 16  # of a document
WORD_DROPOUT = 0.1  # share of words that phrases leave out
TYPOS = 0.1  # share of longer words that are mistyped or cut short
SHORTEST_PASSAGE, LONGEST_PASSAGE = 2, 32  # words
SHORTEST_MISTYPED = 4  # letters of a word
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Document:
    """A class by its own texts."""

    name: str
    strong: Sequence[str]
    weak: Sequence[str] = ()

    @property
    def text(self) -> str:
        return " ".join([*self.strong, *self.weak])


def documents_of(rows: Iterable[tuple[list[str], list[str]]], config: DataConfig, source: str) -> Iterator[Document]:
    """Documents of a table's rows, each the texts of its strong and then its weak columns, and its class names.

    Raises DataError when a row has not exactly one name, or no text.
    """
    n_strong = len(config.strong_columns or []) if config.strong_columns or config.weak_columns else 1
    for number, (texts, names) in enumerate(rows, 1):
        if len(names) != 1:
            raise DataError(
                f"{source}: document {number} has {len(names)} names in column {config.class_column!r}: give it one"
            )
        strong, weak = (list(filter(str.strip, part)) for part in (texts[:n_strong], texts[n_strong:]))
        if not strong and not weak:
            raise DataError(f"{source}: document {number}, {names[0]!r:.60}, has no text: leave it out or give it one")
        yield Document(names[0], strong, weak)


def phrases(document: Document) -> list[str]:
    """Training texts of a document: its strong texts, all of it, and `PHRASES` phrases.

    Examples
    --------
    >>> phrases(Document("c", ["the black queen of chess"]))[:4]
    ['the black queen of chess', 'the black queen of chess', 'the lack queen of chess', 'the black queen of schess']
    """
    random = Random(f"0 {document.name} {document.text}")
    whole = list(dict.fromkeys([*document.strong, document.text]))
    sampled = []
    for _ in range(PHRASES):
        is_strong = bool(document.strong) and (not document.weak or random.random() < 0.5)
        words = random.choice(document.strong if is_strong else document.weak).split()
        if not is_strong:
            words = _passage(words, random)
        words = [
            _mistyped(word, random) if len(word) >= SHORTEST_MISTYPED and random.random() < TYPOS else word
            for word in _thinned(words, random)
        ]
        sampled.append(" ".join(words))
    return whole + sampled


def _passage(words: list[str], random: Random) -> list[str]:
    """Consecutive words; one of half the length is twice as likely."""
    longest = min(len(words), LONGEST_PASSAGE)
    if longest <= SHORTEST_PASSAGE:
        return words
    n = round(SHORTEST_PASSAGE * (longest / SHORTEST_PASSAGE) ** random.random())
    begin = random.randrange(len(words) - n + 1)
    return words[begin : begin + n]


def _thinned(words: list[str], random: Random) -> list[str]:
    """What is left when words are left out; of half the phrases none is, and one word always stays."""
    if random.random() < 0.5 or not words:
        return words
    left = [word for word in words if random.random() >= 2 * WORD_DROPOUT]
    return left or [random.choice(words)]


def _mistyped(word: str, random: Random) -> str:
    """A word with two letters swapped, one missing, one added or another one, or cut short."""
    i = random.randrange(len(word) - 1)
    match random.randrange(5):
        case 0:
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        case 1:
            return word[:i] + word[i + 1 :]
        case 2:
            return word[:i] + random.choice(LETTERS) + word[i:]
        case 3:
            return word[:i] + random.choice(LETTERS) + word[i + 1 :]
        case _:
            return word[: random.randrange(SHORTEST_MISTYPED - 1, len(word))]
