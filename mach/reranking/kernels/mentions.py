"""Names that a row mentions: names are tokens, a row marks those that its words spell, fully or nearly.

A row *mentions* a name when it marks all of its tokens. Links lead from features to the tokens that their words spell,
with a level that says how well; that of a mention is its worst token's. An index leads from tokens to the names whose
rarest token they are, so that a row looks at few names. `mach.reranking.signals.mention` makes both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.files.compiled import kernel
from mach.reranking.kernels.best import keep

LEVELS = 4
MOST_MENTIONS = 4096  # of a row: further ones are not looked at
CODES = 255
LEAST_LOG, MOST_LOG = -9.0, 14.0  # of stored shares, and of stored numbers of rows
COVERED = np.float32(2.0)  # what a name within a longer name gives up among the candidates, as a logarithm
N_COLUMNS = 9
Array = NDArray[Any]


@kernel(error_model="numpy")
def _mark(csr: tuple[Array, ...], row: int, links: tuple[Array, ...], marks: tuple[Array, ...]) -> int:
    """Mark the tokens of a row: their level, and the largest value of a word that spells them; returns their number.

    An entry of value 0 counts: no training row has its word, but the query. So rare a word has the row's largest value.
    """
    (indptr, indices, values), (offsets, tokens, levels), (level_T, value_T, _, marked) = csr, links, marks
    n, largest = 0, np.float32(0)
    for j in range(indptr[row], indptr[row + 1]):
        largest = max(largest, abs(values[j]))
    for j in range(indptr[row], indptr[row + 1]):
        feature, value = indices[j], abs(values[j]) if values[j] != 0 else largest
        if not 0 <= feature < len(offsets) - 1:
            continue
        for link in range(offsets[feature], offsets[feature + 1]):
            token = tokens[link]
            if level_T[token] == 0:
                marked[n] = token
                n += 1
            level_T[token] = max(level_T[token], levels[link])
            value_T[token] = max(value_T[token], value)
    return n


@kernel(error_model="numpy")
def _clear(n_marked: int, marks: tuple[Array, ...]) -> None:
    level_T, value_T, longest_T, marked = marks
    for i in range(n_marked):
        level_T[marked[i]], value_T[marked[i]], longest_T[marked[i]] = 0, 0, 0


@kernel(error_model="numpy")
def _level(name: int, names: tuple[Array, ...], level_T: Array) -> int:
    """The level of a name's worst token; 0 where one is not marked."""
    offsets, tokens = names
    level = LEVELS
    for i in range(offsets[name], offsets[name + 1]):
        level = min(level, level_T[tokens[i]])
    return level if offsets[name + 1] > offsets[name] else 0


@kernel(error_model="numpy")
def _mentioned(
    n_marked: int, marks: tuple[Array, ...], names: tuple[Array, ...], index: tuple[Array, ...], found: Array
) -> int:
    """Write the names that are mentioned into ``found``, and of every token the tokens of its longest one."""
    level_T, _, longest_T, marked = marks
    (offsets, tokens), (firsts, indexed) = names, index
    n = 0
    for i in range(n_marked):
        for entry in range(firsts[marked[i]], firsts[marked[i] + 1]):
            name = indexed[entry]
            if n < len(found) and _level(name, names, level_T) > 0:
                found[n] = name
                n += 1
                for j in range(offsets[name], offsets[name + 1]):
                    longest_T[tokens[j]] = max(longest_T[tokens[j]], offsets[name + 1] - offsets[name])
    return n


@kernel(error_model="numpy")
def _is_covered(name: int, names: tuple[Array, ...], longest_T: Array) -> bool:
    """Whether each token of a name stands in a longer name that is mentioned as well."""
    offsets, tokens = names
    for i in range(offsets[name], offsets[name + 1]):
        if longest_T[tokens[i]] <= offsets[name + 1] - offsets[name]:
            return False
    return True


def marks_of(n_tokens: int) -> tuple[Array, Array, Array, Array]:
    """Of every token no mark: its level, its value, its longest name; and room for those that are marked."""
    return (
        np.zeros(n_tokens, np.uint8),
        np.zeros(n_tokens, np.float32),
        np.zeros(n_tokens, np.int32),
        np.empty(n_tokens, np.int32),
    )


@kernel(error_model="numpy")
def count_mentions(
    csr: tuple[Array, ...],
    classes: tuple[Array, ...],
    links: tuple[Array, ...],
    names: tuple[Array, ...],
    index: tuple[Array, ...],
    marks: tuple[Array, ...],
    class_M: Array,
    mentions_ML: Array,
    right_ML: Array,
) -> None:
    """Count the rows that mention each name, by level - 1, and those of them that have its class.

    ``classes`` are indptr and ids of the rows' classes, ``class_M`` the class of every name. ``marks`` are of
    `marks_of`, and are left as they were, here and below.
    """
    found = np.empty(min(len(class_M), MOST_MENTIONS), np.int32)
    indptr, ids = classes
    for row in range(len(csr[0]) - 1):
        n_marked = _mark(csr, row, links, marks)
        for i in range(_mentioned(n_marked, marks, names, index, found)):
            name = found[i]
            level = _level(name, names, marks[0])
            mentions_ML[name, level - 1] += 1
            for j in range(indptr[row], indptr[row + 1]):
                right_ML[name, level - 1] += ids[j] == class_M[name]
        _clear(n_marked, marks)


@kernel(error_model="numpy")
def best_mentions(
    csr: tuple[Array, ...],
    links: tuple[Array, ...],
    names: tuple[Array, ...],
    index: tuple[Array, ...],
    marks: tuple[Array, ...],
    class_M: Array,
    shares_ML: Array,
    ids_NP: Array,
) -> None:
    """Write the classes of the names that are mentioned, those of largest share first; -1 for none, none twice.

    Names within longer ones come later. Of equal ones the first class is first.
    """
    found = np.empty(min(len(class_M), MOST_MENTIONS), np.int32)
    best_P = np.empty(ids_NP.shape[1], np.float32)
    for row in range(len(csr[0]) - 1):
        n_marked = _mark(csr, row, links, marks)
        ids_P = ids_NP[row]
        ids_P[:], best_P[:] = -1, -np.inf
        for i in range(_mentioned(n_marked, marks, names, index, found)):
            name = found[i]
            share = np.float32(shares_ML[name, _level(name, names, marks[0]) - 1])
            if _is_covered(name, names, marks[2]):
                share -= COVERED * np.float32(CODES) / np.float32(-LEAST_LOG)
            keep(ids_P, best_P, class_M[name], share)
        _clear(n_marked, marks)


@kernel(error_model="numpy")
def mentions_of(
    csr: tuple[Array, ...],
    links: tuple[Array, ...],
    names: tuple[Array, ...],
    index: tuple[Array, ...],
    marks: tuple[Array, ...],
    names_K: Array,
    shares_ML: Array,
    mentions_ML: Array,
    ids_NC: Array,
    out_NCI: Array,
) -> None:
    """What a row's mention of each class is; names of class k are ``names_K[k]..names_K[k + 1]``, the best one counts.

    ``out_NCI`` (float32) gets the share of the name's tokens that the row marks, and their mean value. Where all are
    marked: the level, the logarithms of share and rows, the number of tokens, and whether longer names cover it; else
    0, `LEAST_LOG`, 0, 0 and 0. At last come the logarithm of the row's mentions, and whether the name stands there as
    it is. For ids of -1 all is 0.
    """
    found = np.empty(min(len(names[0]) - 1, MOST_MENTIONS), np.int32)
    level_T, value_T, longest_T, _ = marks
    offsets, tokens = names
    a_share, a_number = np.float32(-LEAST_LOG / CODES), np.float32(MOST_LOG / CODES)
    for row in range(len(csr[0]) - 1):
        n_marked = _mark(csr, row, links, marks)
        n_found = np.log1p(np.float32(_mentioned(n_marked, marks, names, index, found)))
        for c in range(ids_NC.shape[1]):
            k, out_I = ids_NC[row, c], out_NCI[row, c]
            out_I[:] = 0
            if k < 0:
                continue
            out_I[2], out_I[7] = LEAST_LOG, n_found
            best = np.float32(-1)
            for name in range(names_K[k], names_K[k + 1]):
                n_tokens, n_hit, value = offsets[name + 1] - offsets[name], 0, np.float32(0)
                if n_tokens == 0:
                    continue
                for i in range(offsets[name], offsets[name + 1]):
                    n_hit += level_T[tokens[i]] > 0
                    value += value_T[tokens[i]]
                level = _level(name, names, level_T)
                hit = np.float32(n_hit) / np.float32(n_tokens)
                rank = hit if level == 0 else np.float32(2) + np.float32(shares_ML[name, level - 1])
                if rank <= best:
                    continue
                best = rank
                out_I[0], out_I[6] = hit, value / np.float32(n_tokens)
                if level > 0:
                    out_I[1], out_I[4] = level, n_tokens
                    out_I[2] = (np.float32(shares_ML[name, level - 1]) - np.float32(CODES)) * a_share
                    out_I[3] = np.float32(mentions_ML[name, level - 1]) * a_number
                    out_I[5] = _is_covered(name, names, longest_T)
                    out_I[8] = level == LEVELS
        _clear(n_marked, marks)
