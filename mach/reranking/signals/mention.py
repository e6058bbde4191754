"""Mention: the name of a class stands in the query (`mach.reranking.kernels.mentions`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mach.data.words import words_by
from mach.errors import StorageError
from mach.reranking.kernels.mentions import (
    CODES,
    LEAST_LOG,
    LEVELS,
    MOST_LOG,
    N_COLUMNS,
    best_mentions,
    count_mentions,
    marks_of,
    mentions_of,
)
from mach.reranking.signals.contract import (
    PROPOSED,
    BlendedSignal,
    Evidence,
    Floats,
    Material,
    Newcomers,
    Scale,
    Shortlist,
    SignalFile,
    inserted,
)
from mach.reranking.spelling import EXACT, link, link_near, tokens_of

Table = tuple[NDArray[Any], ...]
Codes = NDArray[np.uint8]
SECTION = "mention."
DOUBT = 4.0  # rows that the mean of all names counts as beside a name's own
NAME_BYTES, LINK_BYTES = 50, 5  # of a class, with the inverted index; and of a link
LINKS = 2.0  # of a feature


class Mention(BlendedSignal):
    """Whether a class's name stands in the query, and what share of the training rows that mention it have the class.

    Only queries whose features are words have mentions. A file holds ``links.*``, the tokens of names that each feature
    spells; ``names.*``, the tokens of every name; ``index.*``, the names by their rarest token; ``classes``, where the
    names of each class begin; and of every name and level how many rows mention it, and what share of them has the
    class, as logarithms in 8 bits. Shares are shrunk to the mean of all names: `DOUBT`.
    """

    name = "mention"
    meaning = "The name of the class stands in the query; such a share of the rows that mention it have the class."
    strength = "mention"
    choices = (0.0, 0.08, 0.15, 0.3)
    labels = (
        "share of tokens", "level", "log share of rows", "log rows that mention it", "tokens", "within a longer name",
        "mean value", "log mentions of the query", "as it is",
    )  # fmt: skip
    is_young = True

    @classmethod
    def fit(cls, material: Material) -> Self:
        store = material.store
        features, texts = store.text_features, store.class_texts
        if features is None or texts is None or not (words := features.words()):
            return cls()
        cut, numbers = words_by(features.rule), dict[str, int]()
        names = [texts.spellings(k) for k in range(store.n_classes)]
        tokens_M = [
            [numbers.setdefault(t, len(numbers)) for t in tokens_of(name, cut)] for own in names for name in own
        ]
        offsets, tokens, levels = link(words, list(numbers))
        offsets = np.pad(offsets, (0, store.n_features - len(words)), mode="edge")
        name_offsets = np.cumsum([0, *map(len, tokens_M)], dtype=np.int64)
        name_tokens = np.array([token for found in tokens_M for token in found], np.int32)
        x_ND, y_NK = material.features, material.classes
        rows_D = np.bincount(x_ND.indices, minlength=store.n_features)
        rows_T = np.bincount(tokens, np.repeat(rows_D, np.diff(offsets)), len(numbers))
        rarest_M = np.array([min(found, key=rows_T.__getitem__, default=-1) for found in tokens_M], np.int64)
        indexed = np.argsort(rarest_M, kind="stable")[np.count_nonzero(rarest_M < 0) :].astype(np.int32)
        firsts = np.concatenate([[0], np.cumsum(np.bincount(rarest_M[indexed], minlength=len(numbers)))])
        arrays: dict[str, NDArray[Any]] = {
            "links.offsets": offsets, "names.offsets": name_offsets, "index.offsets": firsts.astype(np.int64),
            "classes": np.cumsum([0, *map(len, names)], dtype=np.int64),
            "links.tokens": tokens, "names.tokens": name_tokens, "index.names": indexed, "links.levels": levels,
        }  # fmt: skip
        made = cls({SECTION + name: array for name, array in arrays.items()})
        mentions_ML, right_ML = np.zeros((2, len(tokens_M), LEVELS), np.int64)
        rows = (x_ND.indptr.astype(np.int64), x_ND.indices.astype(np.int32), x_ND.data)
        classes = (y_NK.indptr.astype(np.int64), y_NK.indices)
        count_mentions(rows, classes, *made._tables(), made._marks, made._class_M, mentions_ML, right_ML)
        means_L = (right_ML.sum(axis=0) + 1) / (mentions_ML.sum(axis=0) + 1000)
        shares_ML = (right_ML + DOUBT * means_L) / (mentions_ML + DOUBT)
        made.arrays[SECTION + "shares"] = coded(np.log(shares_ML) - LEAST_LOG, -LEAST_LOG)
        made.arrays[SECTION + "rows"] = coded(np.log1p(mentions_ML), MOST_LOG)
        return made

    @classmethod
    def load(cls, file: SignalFile) -> Self:
        if not any(name.startswith(SECTION) for name in file.arrays):
            return cls()
        M = file.size(f"{SECTION}names.offsets") - 1
        T = file.size(f"{SECTION}index.offsets") - 1
        n_links, n_tokens = file.size(f"{SECTION}links.tokens"), file.size(f"{SECTION}names.tokens")
        n_indexed = file.size(f"{SECTION}index.names")
        ends = {"links.offsets": (file.n_features, n_links), "names.offsets": (M, n_tokens)}
        ends |= {"index.offsets": (T, n_indexed), "classes": (file.n_classes, M)}
        arrays = {name: file.offsets(SECTION + name, n, end) for name, (n, end) in ends.items()}
        for name, n, most in (
            ("links.tokens", n_links, T),
            ("names.tokens", n_tokens, T),
            ("index.names", n_indexed, M),
        ):
            arrays[name] = file.array(SECTION + name, np.int32, (n,))
            if n and not (arrays[name].min() >= 0 and arrays[name].max() < most):
                raise StorageError(f"{file.where}: {SECTION}{name} is not within 0..{most - 1}: train it again")
        arrays["links.levels"] = file.array(f"{SECTION}links.levels", np.uint8, (n_links,))
        if n_links and not 1 <= arrays["links.levels"].min() <= arrays["links.levels"].max() <= LEVELS:
            raise StorageError(f"{file.where}: {SECTION}links.levels is not within 1..{LEVELS}: train it again")
        arrays |= {name: file.array(SECTION + name, np.uint8, (M, LEVELS)) for name in ("shares", "rows")}
        return cls({SECTION + name: array for name, array in arrays.items()})

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        if not scale.has_names:
            return 0
        return scale.n_classes * NAME_BYTES + round(scale.n_features * (8 + LINKS * LINK_BYTES))

    def and_also(self, more: Newcomers) -> Self:
        """With the names of further classes.

        That rows mention such a name is told by the frequencies of its words, and that none of them had the class: so
        it counts as a name of a class without rows.
        """
        if not self.arrays or more.features is None:
            return self
        (links, linked, levels), (offsets, tokens), (firsts, indexed) = self._tables()
        words, cut, T = more.features.words(), words_by(more.features.rule), len(firsts) - 1
        feature_of, numbers, new = {word: n for n, word in enumerate(words)}, dict[str, int](), list[str]()
        names = [more.texts.spellings(a) for a in range(len(more))]
        tokens_M = [tokens_of(name, cut) for own in names for name in own]
        for token in dict.fromkeys(token for own in tokens_M for token in own):
            own = slice(*links[feature_of[token] : feature_of[token] + 2]) if token in feature_of else slice(0)
            known = linked[own][levels[own] == EXACT].tolist()  # the token of trained names that the word is
            numbers[token] = known[0] if known else T + len(new)
            new += [] if known else [token]
        near, (ends, found, how) = link_near(words, new)
        links, linked, levels = inserted(links, np.repeat(near, np.diff(ends)), (linked, T + found), (levels, how))
        sizes = np.array([len(own) for own in tokens_M])
        added = np.array([numbers[token] for own in tokens_M for token in own], np.int32)
        tokens, ends = np.append(tokens, added), np.append(offsets, offsets[-1] + np.cumsum(sizes))
        T, M = T + len(new), len(offsets) - 1
        uses_T = np.bincount(tokens, minlength=T)
        rarest = np.array(
            [min(own, key=uses_T.__getitem__, default=-1) for own in np.split(added, np.cumsum(sizes)[:-1])]
        )
        order = np.argsort(rarest, kind="stable")[np.count_nonzero(rarest < 0) :]
        firsts = np.pad(firsts, (0, len(new)), mode="edge")
        firsts, indexed = inserted(firsts, rarest[order], (indexed, M + order))
        classes = self.arrays[f"{SECTION}classes"]
        shares_ML, rows_ML = self._expected(more, (links, linked, levels), np.split(added, np.cumsum(sizes)[:-1]), T)
        arrays = {
            "links.offsets": links, "names.offsets": ends, "index.offsets": firsts,
            "classes": np.append(classes, classes[-1] + np.cumsum([len(own) for own in names])),
            "links.tokens": linked, "names.tokens": tokens, "index.names": indexed, "links.levels": levels,
            "shares": np.vstack([self.arrays[f"{SECTION}shares"], shares_ML]),
            "rows": np.vstack([self.arrays[f"{SECTION}rows"], rows_ML]),
        }  # fmt: skip
        return type(self)({SECTION + name: array for name, array in arrays.items()})

    def _expected(
        self, more: Newcomers, links: Table, names: Sequence[NDArray[np.int32]], n_tokens: int
    ) -> tuple[Codes, Codes]:
        """Codes of shares and rows of names that none of the rows that mention them has the class of.

        So many rows mention a name at a level or a better one as have its rarest token so.
        """
        offsets, tokens, levels = links
        rows_D = np.repeat(more.row_frequencies(), np.diff(offsets))
        rows_TL = np.stack(
            [np.bincount(tokens, rows_D * (levels >= L), n_tokens) for L in range(1, LEVELS + 2)], axis=1
        )
        least_ML = np.array([rows_TL[own].min(axis=0, initial=more.n_rows) * (len(own) > 0) for own in names])
        mentions_ML = least_ML[:, :-1] - least_ML[:, 1:]
        codes_ML = self.arrays[f"{SECTION}rows"]  # a name that no row mentions has the mean itself
        weights_ML = np.where(codes_ML == 0, 1e6, np.exp(codes_ML * (MOST_LOG / CODES)))
        logs_ML = self.arrays[f"{SECTION}shares"] * (-LEAST_LOG / CODES) + LEAST_LOG
        means_L = np.average(np.exp(logs_ML), axis=0, weights=weights_ML)
        shares_ML = DOUBT * means_L / (mentions_ML + DOUBT)
        return coded(np.log(np.maximum(shares_ML, 1e-9)) - LEAST_LOG, -LEAST_LOG), coded(
            np.log1p(mentions_ML), MOST_LOG
        )

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        columns_NCI = np.zeros((*shortlist.ids_NC.shape, N_COLUMNS), np.float32)
        if self.arrays:
            names_K, shares_ML, mentions_ML = (self.arrays[SECTION + name] for name in ("classes", "shares", "rows"))
            given = names_K, shares_ML, mentions_ML, shortlist.ids_NC
            mentions_of(shortlist.rows, *self._tables(), self._marks, *given, columns_NCI)
        return columns_NCI

    def candidates(self, batch: Any) -> NDArray[np.int64] | None:
        if not self.arrays:
            return None
        ids_NP = np.empty((len(batch), PROPOSED), np.int64)
        rows = (batch.indptr, batch.indices, batch.values)
        best_mentions(rows, *self._tables(), self._marks, self._class_M, self.arrays[f"{SECTION}shares"], ids_NP)
        return ids_NP

    def terms(self, columns_NCI: Floats, ids_NC: NDArray[np.int64], strength: float) -> Floats:
        """``strength * log share``: `LEAST_LOG` where the query does not mention the name."""
        return np.asarray(np.float32(strength) * np.minimum(columns_NCI[:, :, 2], np.float32(0)))

    def evidence(self, shortlist: Shortlist) -> list[Evidence] | None:
        """The features that spell the tokens of the class's name, of several that of the largest share of rows."""
        k, features = int(shortlist.ids_NC[0, 0]), shortlist.batch.indices.tolist()
        if not self.arrays or k < 0:
            return None
        (link_offsets, linked, levels), (offsets, tokens), _ = self._tables()
        spelt: dict[int, dict[int, int]] = {}
        for feature in features:
            for at in range(*link_offsets[feature : feature + 2].tolist()):
                spelt.setdefault(int(linked[at]), {})[feature] = int(levels[at])
        best: tuple[float, int, list[int]] = (0.0, 0, [])
        first, end = self.arrays[f"{SECTION}classes"][k : k + 2].tolist()
        for name in range(first, end):
            own = tokens[offsets[name] : offsets[name + 1]].tolist()
            hit = [token for token in own if token in spelt]
            rank = len(hit) / max(len(own), 1)
            if own and len(hit) == len(own):
                level = min(max(spelt[token].values()) for token in own)
                rank = 2.0 + float(self.arrays[f"{SECTION}shares"][name, level - 1])
            if rank > best[0]:
                best = rank, name, own
        found, (rank, name, own) = [], best
        for token in own:
            by_level = spelt.get(token, {})
            closest = [feature for feature, level in by_level.items() if level == max(by_level.values())]
            amount = 1 / (len(own) * max(len(closest), 1))
            found += [Evidence((feature,), amount, name - first if rank >= 2 else None) for feature in closest]
        return found

    def _tables(self) -> tuple[Table, Table, Table]:
        """Links, names and index, as compiled functions take them."""

        def table(part: str, *names: str) -> Table:
            return tuple(self.arrays[f"{SECTION}{part}.{name}"] for name in names)

        return (
            table("links", "offsets", "tokens", "levels"),
            table("names", "offsets", "tokens"),
            table("index", "offsets", "names"),
        )

    @property
    def _marks(self) -> Any:
        """Of each thread, made once: zeros for 200,000 tokens cost a query more than 0.3 ms."""
        if not hasattr(self._of_thread, "marks"):
            self._of_thread.marks = marks_of(len(self.arrays[f"{SECTION}index.offsets"]) - 1)
        return self._of_thread.marks

    @cached_property
    def _class_M(self) -> NDArray[np.int32]:
        """The class of every name."""
        names_K = self.arrays[f"{SECTION}classes"]
        return np.repeat(np.arange(len(names_K) - 1, dtype=np.int32), np.diff(names_K))


def coded(numbers: NDArray[np.float64], most: float) -> NDArray[np.uint8]:
    """Numbers from 0 to ``most`` in 8 bits."""
    return np.rint(np.clip(numbers, 0, most) * (CODES / most)).astype(np.uint8)
