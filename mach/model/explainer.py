"""How an explanation is found: every word is tried, and the score is taken apart.

For every word the query is scored again without it. Beside that the score is taken apart into one part a signal
(`mach.reranking.breakdown`), which add up to it, and a part into the words behind the features that a signal tells of.
Cost: a query for every word, some hundred evaluations of a learned order for every class.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import DenseBatch, SparseBatch
from mach.data.occurrences import Span, occurrences, words_of
from mach.errors import ConfigError, DataError
from mach.model.ask import Ask
from mach.model.classes.memory import PLAIN, RERANKED
from mach.model.explanation import Explanation, Part, Reason, Word
from mach.reranking.breakdown import breakdown
from mach.reranking.signals.contract import Evidence, Shortlist
from mach.sketch.terms import prior_terms

if TYPE_CHECKING:
    from mach.data.text import TextFeatures
    from mach.model.model import MachModel
    from mach.runs.ensemble import BucketScores

MOST_WORDS = 200  # of a query that are tried, those of largest value;
MOST_CHARACTERS = 2**22  # fewer of a long text, which is read anew for each,
LEAST_WORDS = 8  # but some
ROUNDING = 1e-5
MEANINGS = {
    "networks": "The networks give the class's buckets this probability on average, as a logarithm.",
    "examples": "The class was added: so much do the networks and its examples say of it.",
    "taught": "The query resembles one that the class was taught by.",
    "prior": "So common, or rare, is the class in the training rows.",
    "tail": "So much are rare classes favoured.",
}
CALLED = {"aggregate": "networks", "context": "query"}  # signals, as people call them
Words = tuple[str, ...]


class Explainer:
    """One query, with and without each of its words; explains any class.

    Parameters
    ----------
    model : MachModel
    query : text, or row of numbers
        A single one.
    rerank, tail
        As of `MachModel.topk`.

    Raises DataError when there is not one query, or it does not fit the model.
    """

    def __init__(self, model: MachModel, query: Any, *, rerank: bool = True, tail: float = 0.0) -> None:
        self.model, self.ask, self.answerer = model, Ask(rerank=rerank, tail=tail), model.answerer
        if isinstance(query, Sequence) and len(query) == 1 and isinstance(query[0], str):
            query = query[0]
        chunks = list(self.answerer.ensemble.answered(query))
        if sum(len(scores.batch) for scores in chunks) != 1:
            raise DataError("an explanation is of one query: give one text or one row of numbers")
        self.scores: BucketScores = chunks[0]
        self.reranker = self.answerer.reranker if rerank else None
        self.text: str | None = query if isinstance(query, str) else None

    def explain(self, ids: Iterable[int]) -> list[Explanation]:
        """Why the query has these classes; a DataError when one is removed."""
        ids_C = np.fromiter(ids, np.int64)
        if not len(ids_C):
            return []
        scores_1C, chances_1C, known_1 = self._scored([self.scores], ids_C)
        if len(gone := ids_C[np.isneginf(scores_1C[0])]):
            raise DataError(f"class {gone[0]} is removed and has no score: ask for one that is there")
        without_WC, chances_WC, _ = self._scored(self._deletions(), ids_C)
        lost_WC = scores_1C.astype(np.float64) - without_WC
        names = self.model.names(ids_C) if self.answerer.catalogue.has_names else [None] * len(ids_C)
        found = []
        for c, k in enumerate(ids_C.tolist()):
            chances = [None] * len(self.tried) if chances_WC is None else chances_WC[:, c].tolist()
            tried = zip(self.tried, lost_WC[:, c].tolist(), chances, strict=True)
            words = [Word(word, self.spans[word], lost, chance) for word, lost, chance in tried]
            start, parts = self._parts(k, float(scores_1C[0, c]))
            found.append(
                Explanation(
                    id=k,
                    name=names[c],
                    score=float(scores_1C[0, c]),
                    probability=None if chances_1C is None else float(chances_1C[0, c]),
                    known=bool(known_1[0]),
                    start=start,
                    parts=tuple(parts),
                    words=tuple(sorted(words, key=lambda word: -word.lost)),
                )
            )
        return found

    def _scored(
        self, chunks: Iterable[BucketScores], ids_C: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.bool_]]:
        """Scores of classes, shape (N, C), their probabilities where there are any, and whether queries are known."""
        scores, known = [np.empty((0, len(ids_C)), np.float32)], [np.empty(0, np.bool_)]
        for part in chunks:
            scores.append(self.answerer.score(part, np.tile(ids_C, (len(part.batch), 1)), self.ask))
            known.append(self.answerer.known(part, self.ask))
        scores_NC, known_N, chances = np.concatenate(scores), np.concatenate(known), None
        with suppress(ConfigError):
            options: dict[str, Any] = {"rerank": self.ask.rerank, "tail": self.ask.tail, "known": known_N}
            chances = self.model.probabilities(np.broadcast_to(ids_C, scores_NC.shape), scores_NC, **options)
        return scores_NC, chances, known_N

    def _deletions(self) -> Iterator[BucketScores]:
        """Bucket scores of the query without each of the words that are tried."""
        ensemble, batch = self.answerer.ensemble, self.scores.batch
        if not self.tried:
            return iter(())
        if self.text is not None:
            features = self._text_features
            would_count = features.rule < 3 or (features.config.hashing and features.config.characters)
            gap = " " if would_count else "\0"  # no word, but a piece: no later one moves up among the first
            return ensemble.answered([without(self.text, self.spans[word], gap) for word in self.tried])
        row_1D = batch.values_ND if isinstance(batch, DenseBatch) else batch.matrix(self.model.n_features).toarray()
        rows_WD = np.repeat(row_1D, len(self.tried), axis=0)
        rows_WD[np.arange(len(self.tried)), [number_of(word) for word in self.tried]] = 0
        return ensemble.answered(rows_WD)

    @cached_property
    def _row(self) -> dict[int, float]:
        """Features of the query and their values."""
        batch = self.scores.batch
        if isinstance(batch, SparseBatch):
            return dict(zip(batch.indices.tolist(), batch.values.tolist(), strict=True))
        return {i: value for i, value in enumerate(batch.values_ND[0].tolist()) if value}

    @cached_property
    def spans(self) -> dict[str, tuple[Span, ...]]:
        """Where words stand in the query, in its order; features of a row of numbers stand nowhere."""
        if self.text is None:
            return {name_of(feature): () for feature in self._row}
        spans: defaultdict[str, list[Span]] = defaultdict(list)
        for word, begin, end in words_of(self._text_features, self.text):
            spans[str(word)].append((begin, end))
        return {word: tuple(found) for word, found in spans.items()}

    @cached_property
    def tried(self) -> list[str]:
        """The words that are left out in turn, in the order of the query; of too many those of largest value."""
        most = min(MOST_WORDS, max(MOST_CHARACTERS // max(len(self.text or ""), 1), LEAST_WORDS))
        if len(self.spans) <= most:
            return list(self.spans)
        values = dict.fromkeys(self.spans, 0.0)
        for feature, value in self._row.items():
            for words, share in self._shares(feature).items():
                for word in words:
                    values[word] = values.get(word, 0.0) + share * abs(value)
        kept = sorted(self.spans, key=lambda word: -values[word])[:most]
        return [word for word in self.spans if word in set(kept)]

    @property
    def _text_features(self) -> TextFeatures:
        features = self.model.run.text_features
        assert features is not None
        return features

    @cached_property
    def _places(self) -> dict[int, Counter[Words]]:
        """The words that each feature of a text stands in, and how often."""
        assert self.text is not None
        tokens = words_of(self._text_features, self.text)
        begins, places = [begin for _, begin, _ in tokens], defaultdict[int, Counter[Words]](Counter)
        for feature, begin, end in occurrences(self._text_features, self.text):
            first = max(bisect_right(begins, begin) - 1, 0)
            within = []
            for word, word_begin, word_end in tokens[first:]:
                if word_begin >= end:
                    break
                if word_end > begin:
                    within.append(str(word))
            places[int(feature)][tuple(dict.fromkeys(within)) or (self.text[begin:end],)] += 1
        return places

    def _shares(self, feature: int) -> dict[Words, float]:
        """The words that a feature stands in, each with its share of the occurrences."""
        if self.text is None:
            return {(name_of(feature),): 1.0}
        found = self._places[feature]
        return {words: n / found.total() for words, n in found.items()}

    def _parts(self, k: int, score: float) -> tuple[float, list[Part]]:
        """The start and the parts of the score of a class."""
        answerer, scores, ids_11, start = self.answerer, self.scores, np.array([[k]]), 0.0
        added: dict[str, float] = {}
        parts: list[Part] = []
        tail = -float(answerer.without_tail(ids_11, np.zeros((1, 1), np.float32), self.ask.tail)[0, 0])
        if answerer.edits.is_trained_only:
            unlifted = score
        else:
            mode = PLAIN if self.reranker is None else RERANKED
            resemblance = answerer.memory.resemblance(scores.batch, mode)
            unlifted = float(answerer.unlifted(scores, ids_11, self.ask, resemblance)[0, 0])
        memory, pair, is_added = answerer.memory, (np.zeros(1, np.int64), ids_11[0]), k >= answerer.edits.n_trained
        reranker = self.reranker
        if is_added:
            reranker = memory.named if self.reranker is not None else None
            if reranker is not None and memory.by_texts(resemblance, scores, *pair)[0] < unlifted - tail - ROUNDING:
                reranker = None
            aggregates_11 = memory.aggregates(scores, *pair)[:, None]
        else:
            aggregates_11 = answerer.ensemble.score(scores.probs_NRB, scores.columns, ids_11)
        if reranker is not None:
            assert isinstance(scores.batch, SparseBatch)
            shortlist = Shortlist(scores.batch, ids_11, aggregates_11, scores.probs_NRB)
            start, found = breakdown(reranker, shortlist)
            for one in found:
                name = CALLED.get(one.signal.name, one.signal.name)
                parts.append(Part(name, one.signal.meaning, one.added, self._reasons(k, one.evidence)))
        elif is_added:
            added["examples"] = unlifted - tail
        else:
            counts_K = answerer.class_counts_K()[: answerer.edits.n_trained]
            added = {"networks": float(aggregates_11[0, 0])}
            if answerer.prior:
                added["prior"] = float(prior_terms(counts_K, answerer.prior)[k])
        added |= {"tail": tail} if self.ask.tail else {}
        added |= {"taught": score - unlifted} if score != unlifted else {}
        return start, parts + [Part(name, MEANINGS[name], value) for name, value in added.items()]

    def _reasons(self, k: int, evidence: Sequence[Evidence]) -> tuple[Reason, ...]:
        """Evidence by features as reasons by words, the largest first."""
        added: defaultdict[tuple[Words, int | None], float] = defaultdict(float)
        for one in evidence:
            for together in product(*(self._shares(feature).items() for feature in one.features)):
                words = sorted({word for own, _ in together for word in own}, key=self._order)
                added[tuple(words), one.name] += one.amount * float(np.prod([share for _, share in together]))
        texts, found = self.answerer.catalogue.texts, []
        for (words_, name), amount in sorted(added.items(), key=lambda item: -abs(item[1])):
            spans = sorted(span for word in words_ for span in self.spans.get(word, ()))
            spelt = None if name is None or texts is None else texts.spellings(k)[name]
            found.append(Reason(words_, tuple(spans), amount, spelt))
        return tuple(found)

    def _order(self, word: str) -> tuple[int, str]:
        return self._numbers.get(word, len(self._numbers)), word

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.spans)}


def name_of(feature: int) -> str:
    """What a feature of a row of numbers is called in place of a word."""
    return f"feature {feature}"


def number_of(name: str) -> int:
    """The feature that is called so."""
    return int(name.removeprefix("feature "))


def without(text: str, spans: Iterable[Span], gap: str = " ") -> str:
    """A text with gaps in place of some spans, so that what stands around them does not become one word.

    >>> without("to be or not to be", [(0, 2), (13, 15)])
    '  be or not   be'
    """
    parts, at = [], 0
    for begin, end in sorted(spans):
        parts.append(text[at:begin])
        at = max(at, end)
    return gap.join([*parts, text[at:]])
