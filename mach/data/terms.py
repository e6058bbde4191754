"""Tables of terms: what number a term of a text has, by a vocabulary or by hashing."""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from typing import TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from mach.config import TextConfig

Tables: TypeAlias = tuple[dict[str, int], dict[str, int]]  # ids of words, ids of n-grams of characters
Ranking: TypeAlias = list[tuple[int, int, str, int]]  # kind (0 a word), minus row frequency, term, former id


class Vocabulary(dict[str, int]):
    """Ids of the known terms; -1 for any other."""

    def __missing__(self, term: str) -> int:
        return -1


class Hashed(dict[str, int]):
    """Computes ids: the CRC-32 of the term's UTF-8 bytes, begun with the kind of term, modulo D. Stores nothing."""

    def __init__(self, kind: int, n_features: int) -> None:
        self.kind, self.n_features = kind, n_features

    def __missing__(self, term: str) -> int:
        return crc32(term.encode("utf-8", "surrogatepass"), self.kind) % self.n_features


def hashed_tables(config: TextConfig) -> Tables:
    """Tables that hash every term to a column."""
    return Hashed(0, config.n_features), Hashed(1, config.n_features)


def numbered_tables(ranking: Ranking) -> Tables:
    """Tables with the ranked terms as 0, 1, ...; looking up a new term gives it the next number."""
    following = count(len(ranking)).__next__
    tables = defaultdict[str, int](following), defaultdict[str, int](following)
    for number, (kind, _, term, _) in enumerate(ranking):
        tables[kind][term] = number
    return tables


def ranked(tables: Tables, frequencies: NDArray[np.int64], n_terms: int, min_rows: int) -> Ranking:
    """The at most ``n_terms`` most frequent terms, words first, then by frequency and spelling."""
    least = min_rows
    if n_terms < len(frequencies):
        least = max(least, int(-np.partition(-frequencies, n_terms - 1)[n_terms - 1]))
    negative = (-frequencies).tolist()
    frequent = [
        (negative[former], kind, term, former)
        for kind, table in enumerate(tables)
        for term, former in table.items()
        if negative[former] <= -least
    ]
    return sorted((kind, rank, term, former) for rank, kind, term, former in sorted(frequent)[:n_terms])
