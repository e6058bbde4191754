"""What reading rows leaves out: counted in the record of a store, told by every verb, and refused where it is much."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.store import Store
from mach.errors import DataError, OmissionWarning, counted

NOTES = ("unknown_classes", "cells", "blank_words")  # keys of a store's record, beside its counts
SEPARATORS = "|;,\t"
# What programs write where nothing is. A class may well be called so, as NA is a country's code: it is only told.
BLANK_WORDS = frozenset({"nan", "NaN", "NAN", "null", "NULL", "None", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaT"})
N_SHOWN, MOST_CHARACTERS = 3, 60  # names or rows that a line shows, and the most of a name
# An old or misspelt list loses a few of the names in training rows; one that loses more is another list, or the rows'
# cells were not separated.
MOST_NAMES = 1 / 5
# Rows to measure on hold classes that training never met: 9 % of label uses in gnd-core. From half on what is left says
# little of the rows.
MOST_NAMES_MEASURED = 1 / 2
# Rows without a class are what all classes are told from, so that many may be in order; most rows without a class or a
# feature mean another column.
MOST_ROWS = 1 / 2


class Cells:
    """Cells of the class column that hold one string, and how many of them hold a sign that may separate names.

    Once a cell holds the separator that was ``given``, it is the right one, and cells are counted no longer. Names that
    seem to mean that there is none are counted throughout.

    >>> cells = Cells()
    >>> for cell in ("a|b", "c|d, e", "f"):
    ...     cells.count(cell)
    >>> cells.separator
    '|'
    """

    def __init__(self, given: str | None = None) -> None:
        self.given = given
        self.clear()

    def clear(self) -> None:
        """Begin to count, as every pass over a source does."""
        self.n, self.is_divided = 0, False
        self.n_with = dict.fromkeys(SEPARATORS, 0)
        self.blank_words = dict[str, int]()

    def named(self, names: Sequence[str]) -> None:
        """Count what a row's classes are called."""
        for name in names:
            if name in BLANK_WORDS:
                self.blank_words[name] = self.blank_words.get(name, 0) + 1

    def count(self, cell: str) -> None:
        self.is_divided = self.is_divided or bool(self.given and self.given in cell)
        if self.is_divided:
            return
        self.n += 1
        for sign in SEPARATORS:
            if sign in cell:
                self.n_with[sign] += 1

    @property
    def separator(self) -> str | None:
        """The sign that most cells hold, where the given one divides none."""
        if self.is_divided:
            return None
        sign = max(SEPARATORS, key=lambda sign: self.n_with[sign])
        return sign if 2 * self.n_with[sign] > self.n else None

    def notes(self) -> dict[str, Any]:
        """For the store's record."""
        sign = self.separator
        blank = {"blank_words": self.blank_words} if self.blank_words else {}
        return blank | ({} if sign is None else {"cells": {"sign": sign, "n_with": self.n_with[sign], "n": self.n}})


class Unknown:
    """Class names of rows that are none of the known classes: how many, and the first."""

    def __init__(self) -> None:
        self.n = 0
        self.first: dict[str, None] = {}

    def count(self, name: str) -> None:
        self.n += 1
        if len(self.first) < N_SHOWN:
            self.first[name[:MOST_CHARACTERS]] = None

    def notes(self) -> dict[str, Any]:
        """For the store's record."""
        return {"unknown_classes": list(self.first)} if self.n else {}


def told(store: Store, *, is_query: bool = False, measures: bool = True) -> list[str]:
    """What was left out of the rows of a store or is missing in them, a line a kind.

    Rows to ask about (``is_query``) may have no class at all; where nothing is measured on them, none is missed.
    """
    meta, lines = store.meta, []
    source = meta["source"]
    if cells := meta.get("cells"):
        lines.append(
            f"{source}: {cells['n_with']:,} of {cells['n']:,} cells of classes hold {cells['sign']!r}, and each "
            f"is read as one name: if it separates names, set data.class_separator = {json.dumps(cells['sign'])}"
        )
    if not is_query and (words := meta.get("blank_words")):
        found = ", ".join(f"{word!r} ({counted(n, 'row')})" for word, n in words.items())
        lines.append(f"{source}: {found} is a class like others: where it means that there is none, empty such cells")
    if unknown := meta["n_unknown_classes"]:
        where = "unknown to the run" if is_query else "not in data.classes"
        names = meta.get("unknown_classes", [])
        lines.append(
            f"{source}: {counted(unknown, 'class name')} of its rows left out, {where}{_such_as(map(repr, names))}"
        )
    n = meta["n_rows_without_classes"]
    if n and not (is_query and (n == store.n_rows or not measures)):
        missed = "; measures count them as misses" if is_query else ""
        lines.append(rows_without("class", source, store.class_indptr, n) + missed)
    if n := meta["n_rows_without_features"]:
        lines.append(rows_without("known feature", source, store.feature_indptr, n))
    if meta.get("lists_classes") and (n := int(np.count_nonzero(store.class_counts() == 0))):
        lines.append(f"{source}: {n:,} of {store.n_classes:,} classes have no training row")
    return lines


def warn(store: Store, *, is_query: bool = False, measures: bool = True) -> None:
    """Tell as warnings."""
    for line in told(store, is_query=is_query, measures=measures):
        warnings.warn(line, OmissionWarning, stacklevel=3)


def refuse(store: Store) -> None:
    """Raise a DataError where more was left out of training rows than slips explain."""
    meta = store.meta
    _refuse_unknown(store, MOST_NAMES, "not in data.classes", "correct the list or the rows")
    for what, n, indptr, repair in (
        ("class", meta["n_rows_without_classes"], "class_indptr", "data.class_column and data.classes"),
        ("known feature", meta["n_rows_without_features"], "feature_indptr", "data.text_columns"),
    ):
        if n > MOST_ROWS * store.n_rows:
            line = rows_without(what, meta["source"], getattr(store, indptr), n)
            raise DataError(f"{line}; at most {MOST_ROWS:.0%} may: leave such rows out, or check {repair}")


def require_classes(store: Store) -> None:
    """Raise a DataError where too few of the rows' classes are known: nothing could be measured on them."""
    if not len(store.class_ids):
        raise DataError(
            f"{store.meta['source']} has no row with a known class: check data.class_column and data.class_separator"
        )
    _refuse_unknown(store, MOST_NAMES_MEASURED, "unknown to the run", "give rows of its classes, or train on these")


def _refuse_unknown(store: Store, most: float, where: str, repair: str) -> None:
    """Raise a DataError where more than a share of the classes that rows name are unknown."""
    unknown, meta = store.meta["n_unknown_classes"], store.meta
    n = unknown + len(store.class_ids)
    if unknown > most * n:
        if cells := meta.get("cells"):
            repair = f"set data.class_separator = {json.dumps(cells['sign'])}, which most cells hold, or {repair}"
        names = _such_as(map(repr, meta.get("unknown_classes", [])))
        raise DataError(
            f"{meta['source']}: {unknown:,} of {n:,} class names of its rows are {where}{names}; at most {most:.0%} "
            f"may be: {repair}"
        )


def rows_without(what: str, source: str, indptr: NDArray[np.int64], n: int) -> str:
    """A line on the n rows that hold nothing, and the first of them."""
    return f"{source}: {n:,} of {len(indptr) - 1:,} rows have no {what}{_such_as(_rows_shown(indptr), 'row ')}"


def _such_as(values: Any, what: str = "") -> str:
    shown = [f"{what}{value:.60}" for value in values]
    return f", such as {', '.join(shown)}" if shown else ""


def _rows_shown(indptr: NDArray[np.int64]) -> Sequence[str]:
    """The first rows, from 0, that hold nothing; the search ends with them."""
    found: list[int] = []
    for begin in range(0, len(indptr) - 1, 2**20):
        found += (begin + np.flatnonzero(np.diff(indptr[begin : begin + 2**20 + 1]) == 0)[:N_SHOWN]).tolist()
        if len(found) >= N_SHOWN:
            break
    return [str(row) for row in found[:N_SHOWN]]
