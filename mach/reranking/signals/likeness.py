"""Likeness: what a query and the text of a class share (`mach.reranking.kernels.likeness`)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch
from mach.errors import StorageError
from mach.reranking.kernels.likeness import CODES, likeness_of, most_alike, scratch_of, weights_of
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

SECTION = "likeness."
CLASS_BYTES, FEATURE_BYTES, ENTRY_BYTES = 4, 12, 6
ENTRIES = 3  # of a class's text, as of a name
BLOCK = 2**14  # texts that are counted at once


class Likeness(BlendedSignal):
    """BM25 of query and all that a class says of itself: its names, and a description.

    Where classes say no more than names it gains nothing beside `Mention` on tib-gnd, but a class without rows may be
    found by it alone (``docs/log.md``): it is made for names as well.

    A file holds ``offsets``, ``classes`` and ``codes``, the classes whose texts have each feature and their weights in
    16 bits; ``scale``, what one is worth; ``totals``, the weights of every text, in codes; and
    ``counts``, what turns values of features to counts, but for the length of the row.
    """

    name = "likeness"
    meaning = "The query and what the class says of itself share words, rare ones above all."
    strength = "likeness"
    choices = (0.0, 1.0, 3.0, 10.0, 30.0)
    labels = ("log of what is shared", "share of the largest of the query", "share of the class's own")
    is_young = True

    @classmethod
    def fit(cls, material: Material) -> Self:
        store, K, D = material.store, material.store.n_classes, material.store.n_features
        features, texts = store.text_features, store.class_texts
        if features is None or texts is None:
            return cls()
        parts = [features.counted([texts.whole(k) for k in range(b, min(b + BLOCK, K))]) for b in range(0, K, BLOCK)]
        sizes = np.concatenate([np.diff(part[0]) for part in parts])
        indices, counts = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        weights = weights_of(np.append(0, np.cumsum(sizes)), indices, counts, D)
        scale = max(float(weights.max(initial=0)), 1e-6) / CODES
        codes, classes = np.maximum(np.rint(weights / scale), 1), np.repeat(np.arange(K, dtype=np.int32), sizes)
        order = np.argsort(indices, kind="stable")
        arrays: dict[str, NDArray[Any]] = {
            "offsets": np.append(0, np.cumsum(np.bincount(indices, minlength=D))).astype(np.int64),
            "classes": classes[order],
            "codes": codes[order].astype(np.uint16),
            "scale": np.array([scale], np.float32),
            "totals": np.bincount(classes, codes, K).astype(np.float32),
            "counts": features.counts_of_values(),
        }
        return cls({SECTION + name: array for name, array in arrays.items()})

    @classmethod
    def load(cls, file: SignalFile) -> Self:
        if not any(name.startswith(SECTION) for name in file.arrays):
            return cls()
        K, n = file.n_classes, file.size(f"{SECTION}classes")
        arrays = {f"{SECTION}offsets": file.offsets(f"{SECTION}offsets", file.n_features, n)}
        sizes = {"classes": n, "codes": n, "scale": 1, "totals": K, "counts": file.n_features}
        dtypes: dict[str, Any] = {"classes": np.int32, "codes": np.uint16}
        for name, size in sizes.items():
            arrays[SECTION + name] = file.array(SECTION + name, dtypes.get(name, np.float32), (size,))
        classes = arrays[f"{SECTION}classes"]
        if n and not 0 <= classes.min() <= classes.max() < K:
            raise StorageError(f"{file.where}: {SECTION}classes is not within 0..{K - 1}: train it again")
        if n and not arrays[f"{SECTION}codes"].all():  # by sums of 0 the kernels know classes that they have not met
            raise StorageError(f"{file.where}: {SECTION}codes holds 0: train it again")
        return cls(arrays)

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        if not scale.has_names:
            return 0
        return scale.n_features * FEATURE_BYTES + scale.n_classes * (CLASS_BYTES + ENTRIES * ENTRY_BYTES)

    def and_also(self, more: Newcomers) -> Self:
        """Texts as rare and as long as those of trained classes; a text's length is the number of its features."""
        if not self.arrays or more.features is None:
            return self
        offsets, classes, codes, _ = self._index
        totals_K, scale = self.arrays[f"{SECTION}totals"], float(self.arrays[f"{SECTION}scale"][0])
        indptr, indices, _ = more.features.counted([more.texts.whole(a) for a in range(len(more))])
        weights = weights_of(indptr, indices, np.ones_like(indices), 0, np.diff(offsets), len(totals_K))
        added, sizes = np.clip(np.rint(weights / scale), 1, CODES), np.diff(indptr)
        owners, order = np.repeat(np.arange(len(more)) + len(totals_K), sizes), np.argsort(indices, kind="stable")
        entries = ((classes, owners[order]), (codes, added[order]))
        arrays = dict(zip(("offsets", "classes", "codes"), inserted(offsets, indices[order], *entries), strict=True))
        arrays["totals"] = np.append(totals_K, np.add.reduceat(np.append(added, 0), indptr[:-1]) * (sizes > 0)).astype(
            np.float32
        )
        arrays = self.arrays | {SECTION + name: array for name, array in arrays.items()}
        return type(self)(arrays)

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        columns_NC3 = np.zeros((*shortlist.ids_NC.shape, 3), np.float32)
        if self.arrays:
            totals_K = self.arrays[f"{SECTION}totals"]
            likeness_of(shortlist.rows, self._index, totals_K, self._scratch, shortlist.ids_NC, columns_NC3)
            columns_NC3[:, :, 0] = np.log1p(columns_NC3[:, :, 0] * self.arrays[f"{SECTION}scale"])
        return columns_NC3

    def candidates(self, batch: SparseBatch) -> NDArray[np.int64] | None:
        if not self.arrays:
            return None
        ids_NP = np.empty((len(batch), PROPOSED), np.int64)
        rows = (batch.indptr, batch.indices, batch.values)
        most_alike(rows, self._index, self._scratch, ids_NP)
        return ids_NP

    def terms(self, columns_NCI: Floats, ids_NC: NDArray[np.int64], strength: float) -> Floats:
        """``strength * (share - 1)`` of the most that the query shares with any class."""
        return np.asarray(np.float32(strength) * (np.minimum(columns_NCI[:, :, 1], np.float32(1)) - np.float32(1)))

    def evidence(self, shortlist: Shortlist) -> list[Evidence] | None:
        """The features that the query and the class's text share, in proportion to their weights."""
        k, batch = int(shortlist.ids_NC[0, 0]), shortlist.batch
        if not self.arrays or k < 0:
            return None
        offsets, classes, codes, counts = self._index
        often = np.abs(batch.values) * counts[batch.indices]
        once, weights = min(often[often > 0].tolist(), default=1.0), dict[int, float]()
        for feature, n in zip(batch.indices.tolist(), often.tolist(), strict=True):
            own = slice(offsets[feature], offsets[feature + 1])
            if weight := float(codes[own][classes[own] == k].sum()):
                weights[feature] = weight * max(np.rint(n / once), 1)
        total = float(self.columns(shortlist)[0, 0, 0]) / max(sum(weights.values()), 1)
        return [Evidence((feature,), weight * total) for feature, weight in weights.items()]

    @property
    def _index(self) -> Any:
        return tuple(self.arrays[SECTION + name] for name in ("offsets", "classes", "codes", "counts"))

    @property
    def _scratch(self) -> Any:
        """Of each thread, made once: zeros for 200,000 classes cost a query some 0.3 ms."""
        if not hasattr(self._of_thread, "scratch"):
            self._of_thread.scratch = scratch_of(len(self.arrays[f"{SECTION}totals"]))
        return self._of_thread.scratch
