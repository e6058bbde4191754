r"""Text as sparse features: n-grams of words and of characters, a fitted vocabulary or feature hashing, tf-idf.

Terms are those of scikit-learn's ``TfidfVectorizer``: words are cut out by a rule (`mach.data.words`), n-grams of words
are joined by a blank, n-grams of characters are taken within the pieces between blanks (``char_wb``: a piece is padded
by one blank on either side). Before that a text is brought to Unicode's NFKC and to lower case. A word and an n-gram of
characters with the same spelling are two terms. What stands at the beginning of a text counts more, by the same rule.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mach.config import TextConfig
from mach.data.terms import Tables, Vocabulary, hashed_tables, numbered_tables, ranked
from mach.data.words import LEAD, RULE, TIMES, words_by
from mach.errors import ConfigError, DataError, StorageError
from mach.files.arrays import read_array
from mach.files.records import first_of, parse_json, shortened
from mach.files.regular import read_regular

MAX_PIECES = 2**17  # kept with their ids: about 300 bytes each with n-grams of 3 to 5 characters
LONGEST_PIECE = 48  # longer ones hardly repeat and are not kept
BLOCK_IDS = 2**18  # rows are counted in blocks of about so many ids, so that memory does not grow with the rows
BLOCK_ROWS = 2**15
MIN_CANDIDATES = 2**20

Csr: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]  # indptr, indices, values


class TextFeatures:
    """Turns texts into rows of a sparse matrix.

    Parameters
    ----------
    config : TextConfig
    rule : int
        How words are cut and counted (`mach.data.words`); 1 and 2 are those of earlier versions, as in their files.

    Attributes
    ----------
    n_features : int
        D: ``config.n_features`` with hashing, otherwise the number of terms found by `fit`.

    Raises ConfigError when ``min_rows`` is set although hashed features have no vocabulary.

    Examples
    --------
    >>> features = TextFeatures(TextConfig(words=[1, 1])).fit(["red apple", "green apple"])
    >>> features.n_features
    3
    >>> indptr, indices, values = features.transform(["apple, apple!", "pear"])
    >>> indptr.tolist(), indices.tolist(), values.tolist()
    ([0, 1, 1], [0], [1.0])
    """

    def __init__(self, config: TextConfig, rule: int = RULE, *, reads_list: bool = False) -> None:
        if config.hashing and config.min_rows > 1:
            raise ConfigError(f"min_rows = {config.min_rows} needs a vocabulary: set hashing = false or min_rows = 1")
        self.config, self.rule = config, rule
        self.reads_list = reads_list  # whether words of a plain list of class names are among the terms
        self.n_features = config.n_features
        self._n_rows: int | None = None  # that it was fitted to; earlier versions did not record it
        self._is_weighted = True  # by inverse row frequencies; only features of earlier versions may be not
        self._idf: NDArray[np.float32] = np.ones(0, dtype=np.float32)
        self._terms: _Terms | None = None

    def fit(self, texts: Iterable[str], class_texts: Iterable[str] = (), of: str = "these") -> Self:
        """Learn the vocabulary and the inverse row frequencies in one pass.

        The vocabulary holds the ``n_features`` terms of the highest row frequency among those in at least
        ``min_rows`` rows; ids are words first, then characters, each by falling frequency and then by spelling.
        The order of rows does not matter up to ``max(4 * n_features, 2**20)`` distinct terms (about 150 bytes each).
        Beyond, the rarer half is forgotten, and a term that comes back counts from 0 again: lossy counting (Manku &
        Motwani, VLDB 2002), which errs for terms about as rare as the forgotten ones.

        Terms of ``class_texts`` are chosen first, up to half of ``n_features``, those that most of these texts have;
        ids go as if all rows did. What no row has weighs 0: an entry of value 0 shows it, and networks read the same.

        Raises DataError when an element is no string, or no term occurs in ``min_rows`` rows.
        """
        config = self.config
        terms = _Terms(config, hashed_tables(config) if config.hashing else numbered_tables([]), self.rule)
        limit = max(4 * config.n_features, MIN_CANDIDATES)
        n_rows, frequencies = 0, np.zeros(0, dtype=np.int64)
        for ids, lengths in terms.blocks(texts):
            n_terms = config.n_features if config.hashing else sum(map(len, terms.tables))
            _, indices, _ = _count(ids, lengths, n_terms)
            frequencies = np.pad(frequencies, (0, n_terms - len(frequencies)))
            frequencies += np.bincount(indices, minlength=n_terms)
            n_rows += len(lengths)
            if n_terms > limit and not config.hashing:
                ranking = ranked(terms.tables, frequencies, limit // 2, min_rows=1)
                frequencies = frequencies[[former for *_, former in ranking]]
                terms.tables = numbered_tables(ranking)
                terms.pieces.clear()
        if not config.hashing:
            in_rows, in_classes = frequencies, np.zeros(0, np.int64)
            for ids, lengths in terms.blocks(class_texts):
                _, indices, _ = _count(ids, lengths, n_terms := sum(map(len, terms.tables)))
                in_classes = np.pad(in_classes, (0, n_terms - len(in_classes)))
                in_classes += np.bincount(indices, minlength=n_terms)
            if len(in_classes):
                in_rows = np.pad(in_rows, (0, len(in_classes) - len(in_rows)))
                most = np.argsort(-in_classes, kind="stable")[: config.n_features // 2]
                frequencies = in_rows.copy()
                frequencies[most] += np.where(in_classes[most] > 0, n_rows, 0)
            ranking = ranked(terms.tables, frequencies, config.n_features, config.min_rows)
            if not ranking:
                raise DataError(
                    f"no term occurs in min_rows = {config.min_rows} of the {n_rows} texts of {of}: lower it or check "
                    "them"
                )
            frequencies = in_rows[[former for *_, former in ranking]]
            words, characters = numbered_tables(ranking)
            terms = _Terms(config, (Vocabulary(words), Vocabulary(characters)), self.rule)
            self.n_features = len(ranking)
        self._idf = _idf(frequencies, n_rows)
        if not config.hashing:
            self._idf[frequencies == 0] = 0
        self._terms, self._n_rows = terms, None if self.rule == 1 else n_rows
        return self

    def transform(self, texts: Sequence[str]) -> Csr:
        """Rows of a CSR matrix with ``n_features`` columns; every row that is not empty has L2 norm 1.

        A row depends on its text alone, bit for bit; its indices are ascending and unique.

        Raises ConfigError before `fit`, and DataError when an element is no string.
        """
        lead = LEAD if self.rule > 2 else 0
        blocks = [self._weigh(*block) for block in self._fitted().blocks(texts, lead)]
        lengths, indices, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), indices, values

    def words(self) -> list[str]:
        """The words of features 0, 1, ..., n-grams of words among them; none where terms are hashed."""
        return [] if self.config.hashing else list(self._fitted().tables[0])

    def counts_of_values(self) -> NDArray[np.float32]:
        """What values of the columns, by whatever their row is scaled, take to become counts: float32 of shape (D,)."""
        idf = self._idf if self._is_weighted else np.ones(self.n_features, np.float32)
        return np.where(idf > 0, 1 / np.maximum(idf, np.float32(1e-6)), np.float32(0)).astype(np.float32)

    def counted(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """Features of texts and how often each occurs, unweighted, as CSR: those of class texts are found in queries.

        >>> features = TextFeatures(TextConfig()).fit(["red apple"], class_texts=["apple tree"])
        >>> indptr, indices, counts = features.counted(["tree, tree!", "pear"])
        >>> indptr.tolist(), counts.tolist(), features.transform(["a tree"])[2].tolist()
        ([0, 1, 1], [2], [0.0])
        """
        blocks = [(lengths, *_count(ids, lengths, self.n_features)) for ids, lengths in self._fitted().blocks(texts)]
        sizes = np.concatenate([np.bincount(rows, minlength=len(lengths)) for lengths, rows, _, _ in blocks])
        indices, counts = (np.concatenate([block[i] for block in blocks]) for i in (2, 3))
        return np.append(0, np.cumsum(sizes)).astype(np.int64), indices.astype(np.int32), counts

    @property
    def tables(self) -> Tables:
        """Ids of words and of n-grams of characters, by their spelling; -1 for others. ConfigError before `fit`."""
        return self._fitted().tables

    def is_known(self, indices: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether terms occurred in the texts that were fitted: a hashed one can be the column of none of these."""
        if self._n_rows is None or not self.config.hashing:
            return np.ones(len(indices), np.bool_)
        return np.asarray(self._idf[indices] != _idf(np.zeros(1, np.int64), self._n_rows))

    def fingerprint(self) -> str:
        """Digest of configuration, terms and inverse row frequencies; equal ones give equal features."""
        return _digest(self._description(), self._spelling(), self._idf)

    def save(self, folder: Path) -> None:
        """Write ``terms.txt`` (UTF-8, one a line), ``idf.npy`` and, last, ``text.json`` into an existing folder."""
        description = self._description() | {"fingerprint": self.fingerprint()}
        (folder / "terms.txt").write_bytes(self._spelling())
        np.save(folder / "idf.npy", self._idf.astype("<f4"), allow_pickle=False)
        (folder / "text.json").write_text(json.dumps(description, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote and verify its fingerprint; 300 thousand terms take about 0.1 s.

        Raises StorageError when a file is missing, damaged, of another format or does not belong to the others.
        """
        n_features, description = cls.described(folder)
        path = folder / "terms.txt"
        try:
            spelling = read_regular(path)
            path = folder / "idf.npy"
            idf = read_array(path)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; copy or fit the text features anew") from error
        fingerprint = description.pop("fingerprint")
        if _digest(description, spelling, idf) != fingerprint:
            raise StorageError(
                f"{folder}: text.json, terms.txt and idf.npy do not belong together, or one is damaged; copy or fit "
                "them anew"
            )
        is_weighted = description["config"].pop("tfidf", True)
        n = n_features if is_weighted else 0
        if idf.dtype != np.float32 or idf.shape != (n,) or not np.isfinite(idf).all():
            raise StorageError(f"{path} is {idf.dtype} of shape {idf.shape}: need {n} finite numbers (float32)")
        told, rule = TextConfig.model_validate(description["config"]), description["format"]
        features = cls(told, rule, reads_list=description.get("reads_list", False))
        features._n_rows = description.get("n_rows")
        features.n_features, features._idf, features._is_weighted = description["n_features"], idf, is_weighted
        tables = hashed_tables(features.config)
        if not features.config.hashing:
            n_words, terms = description["n_words"], _terms_of(spelling, folder / "terms.txt")
            if len(terms) != n_features:
                raise StorageError(f"{folder / 'terms.txt'} has {len(terms)} terms, text.json {n_features} features")
            words, characters = terms[:n_words], terms[n_words:]
            tables = Vocabulary(zip(words, count())), Vocabulary(zip(characters, count(n_words)))
            if sum(map(len, tables)) != n_features:
                raise StorageError(f"{folder / 'terms.txt'} has terms twice: copy or fit the text features anew")
        features._terms = _Terms(features.config, tables, description["format"])
        return features

    @classmethod
    def described(cls, folder: Path) -> tuple[int, dict[str, Any]]:
        """D, and what else text.json says; a StorageError when it is missing or damaged. No other file is read."""
        path = folder / "text.json"
        try:
            told = parse_json(read_regular(path), path)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; copy or fit the text features anew") from error
        rule = told.get("format") if isinstance(told, dict) else None
        if type(rule) is not int or not 1 <= rule <= RULE:
            has = f"has format {shortened(told.get('format'))}" if isinstance(told, dict) else "is no object"
            raise StorageError(f"{path} {has}, this version reads 1 to {RULE}")
        try:
            config = TextConfig.model_validate({key: value for key, value in told["config"].items() if key != "tfidf"})
        except (ValueError, KeyError, AttributeError) as error:
            reason = first_of(error) if isinstance(error, ValidationError) else f"{error!s:.60}"
            raise StorageError(f"{path}: config: {reason}: copy or fit the text features anew") from error
        n_words, n_features, fingerprint = (told.get(name, "") for name in ("n_words", "n_features", "fingerprint"))
        most = config.n_features
        for name, value, least in (("n_features", n_features, 1), ("n_words", n_words, 0)):
            if type(value) is not int or not least <= value <= most:
                raise StorageError(f"{path}: {name} is {shortened(value)}: need {least} to {most}")
            most = int(value)
        if config.hashing and n_features != config.n_features:
            raise StorageError(
                f"{path}: terms are hashed to {config.n_features} columns, and n_features is {n_features}"
            )
        if not isinstance(told.get("reads_list", False), bool):
            raise StorageError(f"{path}: reads_list is {shortened(told['reads_list'])}: need true or false")
        if (n_rows := told.get("n_rows")) is not None and (type(n_rows) is not int or not 1 <= n_rows < 2**48):
            raise StorageError(f"{path}: n_rows is {shortened(n_rows)}: need at least 1")
        if not (isinstance(fingerprint, str) and fingerprint and isinstance(told["config"].get("tfidf", True), bool)):
            raise StorageError(f"{path}: its fingerprint or config.tfidf is missing or damaged: copy it anew")
        return n_features, told

    def _fitted(self) -> _Terms:
        if self._terms is None:
            raise ConfigError("these text features know no vocabulary or frequencies yet: call fit or load first")
        return self._terms

    def _description(self) -> dict[str, Any]:
        n_words = len(self._fitted().tables[0])
        config = self.config.model_dump() | {"tfidf": self._is_weighted}
        sizes = {"n_words": n_words, "n_features": self.n_features}
        sizes |= {"reads_list": True} if self.reads_list else {}
        return {"format": self.rule, "config": config} | sizes | ({} if self.rule == 1 else {"n_rows": self._n_rows})

    def _spelling(self) -> bytes:
        words, characters = self._fitted().tables
        return "\n".join([*words, *characters]).encode("utf-8", "surrogatepass")

    def _weigh(self, ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> Csr:
        """Lengths of the rows without repeated terms, these terms, and their values."""
        rows, indices, counts = _count(ids, lengths, self.n_features)
        values = counts.astype(np.float64)
        if self.config.sublinear:
            values = 1 + np.log(values)
        if self._is_weighted:
            values *= self._idf[indices]
        squares = np.bincount(rows, weights=values * values, minlength=len(lengths))
        values /= np.sqrt(np.where(squares > 0, squares, 1))[rows]
        return np.bincount(rows, minlength=len(lengths)), indices.astype(np.int32), values.astype(np.float32)


class _Terms:
    """Ids of a text's terms, by one table a kind of term."""

    def __init__(self, config: TextConfig, tables: Tables, rule: int) -> None:
        self.config, self.tables, self.words = config, tables, words_by(rule)
        self.pieces = _Pieces(self)

    def blocks(self, texts: Iterable[str], lead: int = 0) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Ids of all rows' terms, one after another, and their number a row; the last block may have no row.

        Those of the first ``lead`` pieces and words stand there `TIMES` times.
        """
        if isinstance(texts, str):
            raise DataError("texts is a single string: put it into a list")
        rows: list[bytes] = []
        n_bytes = 0
        for n, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {n} is {text!r:.40}: every text must be a string")
            rows.append(self.row(text, lead))
            n_bytes += len(rows[-1])
            if n_bytes >= 4 * BLOCK_IDS or len(rows) >= BLOCK_ROWS:
                yield _joined(rows)
                rows, n_bytes = [], 0
        yield _joined(rows)

    def row(self, text: str, lead: int) -> bytes:
        if not text.isascii():  # NFKC leaves ASCII alone
            text = unicodedata.normalize("NFKC", text)
        text = text.lower()
        pieces = [*map(self.pieces.__getitem__, text.split())]
        ids = b"".join(pieces + pieces[:lead] * (TIMES - 1))
        if self.config.words and self.config.words[1] > 1:
            tokens, (shortest, longest) = self.words(text), self.config.words
            for n in range(max(shortest, 2), longest + 1):
                phrases = [*map(" ".join, zip(*(tokens[i:] for i in range(n)), strict=False))]
                ids += _pack(map(self.tables[0].__getitem__, phrases + phrases[:lead] * (TIMES - 1)))
        return ids

    def piece(self, piece: str) -> bytes:
        """Ids of the single words and the n-grams of characters of one piece."""
        ids = b""
        if self.config.words and self.config.words[0] == 1:
            ids += _pack(map(self.tables[0].__getitem__, self.words(piece)))
        if self.config.characters:
            padded, (shortest, longest) = f" {piece} ", self.config.characters
            longest = max(shortest, min(longest, len(padded)))  # a piece shorter than any n-gram is one term
            grams = (
                padded[i : i + n] for n in range(shortest, longest + 1) for i in range(max(1, len(padded) - n + 1))
            )
            ids += _pack(map(self.tables[1].__getitem__, grams))
        return ids


class _Pieces(dict[str, bytes]):
    """Ids of pieces met before, as bytes of int32, so that a row is one join; when full it is emptied."""

    def __init__(self, terms: _Terms) -> None:
        self.terms = terms

    def __missing__(self, piece: str) -> bytes:
        ids = self.terms.piece(piece)
        if len(piece) <= LONGEST_PIECE:
            if len(self) >= MAX_PIECES:
                self.clear()
            self[piece] = ids
        return ids


def _pack(ids: Iterable[int]) -> bytes:
    return array("i", [i for i in ids if i >= 0]).tobytes()


def _idf(frequencies: NDArray[np.int64], n_rows: int) -> NDArray[np.float32]:
    return np.asarray(np.log((1 + n_rows) / (1 + frequencies)) + 1, np.float32)


def _joined(rows: list[bytes]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    return np.frombuffer(b"".join(rows), dtype=np.int32), np.array([*map(len, rows)], dtype=np.int64) // 4


def _count(
    ids: NDArray[np.int32], lengths: NDArray[np.int64], n_terms: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Row, term and number of occurrences of every distinct term of every row, ordered by row and term."""
    keys = np.repeat(np.arange(len(lengths)) * n_terms, lengths)
    keys += ids
    keys.sort(kind="stable")  # a merge sort: rows are in order already
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    rows, indices = np.divmod(keys[firsts], max(n_terms, 1))
    return rows, indices, np.diff(firsts, append=len(keys))


def _terms_of(spelling: bytes, path: Path) -> list[str]:
    try:
        return spelling.decode("utf-8", "surrogatepass").split("\n")
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is no UTF-8 ({error.reason} at byte {error.start}): copy it anew") from error


def _digest(description: dict[str, Any], spelling: bytes, idf: NDArray[np.float32]) -> str:
    digest = hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16)
    for part in (spelling, str(idf.shape).encode(), idf.astype("<f4", copy=False).tobytes()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
