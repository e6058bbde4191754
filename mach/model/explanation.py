"""Why a class has its score, for people and machines; `mach.model.explainer` finds it out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mach.data.occurrences import Span

SHOWN = 5  # words, and reasons of a part, on a terminal,
LEAST = 0.005  # that count so much or more


@dataclass(frozen=True)
class Word:
    """A word of the query, or a feature of a row of numbers, and what the class is worth without it.

    Attributes
    ----------
    text : str
        As text features read it, in lower case; of a feature its number.
    spans : tuple of (int, int)
        Where it begins and ends in the query, in characters, as often as it stands there; of a feature none.
    lost : float
        How much higher the score is with it. Below 0 it speaks against the class.
    probability : float or None
        Of the class for the query without it.
    """

    text: str
    spans: tuple[Span, ...]
    lost: float
    probability: float | None


@dataclass(frozen=True)
class Reason:
    """Words that count together within a part: one, or those of a phrase or of a pair of features.

    ``name`` is the name of the class that they spell, as far as they do.
    """

    words: tuple[str, ...]
    spans: tuple[Span, ...]
    added: float
    name: str | None = None


@dataclass(frozen=True)
class Part:
    """What a signal adds to the score; its reasons add up to it less ``rest``."""

    name: str
    meaning: str
    added: float
    reasons: tuple[Reason, ...] = ()

    @property
    def rest(self) -> float:
        """What no word is known to have added."""
        return self.added - sum(reason.added for reason in self.reasons)


@dataclass(frozen=True)
class Explanation:
    """Why a query has a class: ``start`` and what the parts added are the score, up to 1e-4.

    Attributes
    ----------
    id, name : int, str or None
        The class.
    score, probability : float, float or None
        As `MachModel.topk` tells them; a run without calibration has no probability.
    known : bool
        Whether the model knows any feature of the query; else the answer says nothing of it.
    start : float
        What a learned order gives a class before it is told anything of it; else 0.
    parts : tuple of Part
        By signal.
    words : tuple of Word
        Those first that the score loses most without; at most 200, of long texts fewer.
    """

    id: int
    name: str | None
    score: float
    probability: float | None
    known: bool
    start: float
    parts: tuple[Part, ...]
    words: tuple[Word, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON; spans are offsets in characters of the query."""
        return {
            "id": self.id,
            "name": self.name,
            "score": self.score,
            "probability": self.probability,
            "known": self.known,
            "start": self.start,
            "parts": [asdict(part) | {"rest": part.rest} for part in self.parts],
            "words": [asdict(word) for word in self.words],
        }

    def lines(self) -> Iterator[str]:
        """It in plain words, for a terminal."""
        told = [word for word in self.words if self._matters(word)]
        spoke = [self._without(word) for word in told if word.lost >= LEAST][:SHOWN]
        if spoke:
            yield f"because of {', '.join(spoke)}"
        elif heavy := self._heaviest():
            yield f"no single word decides it, it stays as likely without any one; most weight have {', '.join(heavy)}"
        else:
            yield "no word of the query speaks for it"
        if against := [self._without(word) for word in told[::-1] if word.lost <= -LEAST][:SHOWN]:
            yield f"in spite of {', '.join(against)}"
        names = {reason.name: None for part in self.parts for reason in part.reasons if reason.name}
        for name in names:
            words = [word for part in self.parts for one in part.reasons if one.name == name for word in one.words]
            yield f"its name {name!r} stands in the text: {', '.join(dict.fromkeys(words))}"
        terms = [f"{self.start:.2f} to begin with"] if self.start else []
        for part in self.parts:
            if abs(part.added) < LEAST and not part.reasons:
                continue
            shares = [(" + ".join(one.words), one.added) for one in part.reasons[:SHOWN]]
            shares += [("all else", part.added - sum(one for _, one in shares))] if shares else []
            added = ", ".join(f"{what} {one:+.2f}" for what, one in shares if abs(one) >= LEAST)
            terms.append(f"{part.name} {part.added:+.2f}" + (f" ({added})" if added else ""))
        yield f"score {self.score:.2f}: {', '.join(terms)}"

    def __str__(self) -> str:
        title = f"class {self.id}" if self.name is None else self.name
        chance = f", probability {self.probability:.4f}" if self.probability is not None else ""
        return "\n  ".join([f"{title}{chance}", *self.lines()])

    def _heaviest(self) -> list[str]:
        """Words that speak for it by the parts of the score, though leaving one out changes little."""
        reasons = sorted((one for part in self.parts for one in part.reasons), key=lambda one: -one.added)
        return list(dict.fromkeys(" + ".join(one.words) for one in reasons if one.added >= LEAST))[:SHOWN]

    def _matters(self, word: Word) -> bool:
        """Whether what is printed changes without it: a score may where a probability does not."""
        if word.probability is None or self.probability is None:
            return abs(word.lost) >= LEAST
        return f"{word.probability:.4f}" != f"{self.probability:.4f}"

    def _without(self, word: Word) -> str:
        if word.probability is None or self.probability is None:
            return f"{word.text} (score {self.score - word.lost:.2f} without it)"
        return f"{word.text} ({word.probability:.4f} without it)"
