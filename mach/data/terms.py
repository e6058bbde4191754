"""Tables of terms: what number a term of a text has, by a vocabulary or by hashing."""

from __future__ import annotations

from typing import TypeAlias
from zlib import crc32

from mach.config import TextConfig

Tables: TypeAlias = tuple[dict[str, int], dict[str, int]]  # ids of words, ids of n-grams of characters


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
