"""Classifiers: one sparse linear classifier a class, which tells its rows from those that networks take for them.

A set holds, for K classes, ``offsets`` (int64, K + 1), ``scales`` and ``biases`` (float32, K), and for every stored
weight its feature as a step from the class's feature before (``gaps``, int16; the first from 0) and its value
(``codes``, int8, times the class's scale): 3 bytes a weight and 16 a class. Steps above `GAP` are cut by codes of 0.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from mach.config.keys import MAX_PAIRS
from mach.data.rows import RowView
from mach.errors import StorageError
from mach.reranking.kernels.rerank import UNSEEN, margins
from mach.reranking.settings import Loss
from mach.reranking.signals.contract import (
    Arrays,
    BlendedSignal,
    Evidence,
    Floats,
    Material,
    Newcomers,
    Scale,
    Shortlist,
    SignalFile,
)

if TYPE_CHECKING:
    from mach.data.batch import SparseBatch

NAMES = ("offsets", "gaps", "codes", "scales", "biases")
GAP = 2**15 - 1  # the widest step
CLASS_BYTES, WEIGHT_BYTES = 16, 3
WEIGHTS = 0.5  # a feature of a row and class of it, measured on gnd-core,
PAIR_WEIGHTS = 0.08  # and a pair of features of it, on tate-leaf
MOST_POWER = 4.0  # that a run of any version has
LOWEST_MARGIN = np.float32(-1e6)  # keeps every score finite
FORMULAS: dict[Loss, str] = {"hinge": "max(0, 1 - margin)^2", "logistic": "log(1 + exp(-margin))"}
# Runs of earlier versions may have further sets, which a learned order weighs. "presence" sees no values but that a
# feature is there; rows of average length have length 1.
FURTHER_SETS = ("presence", "cautious", "bold")


@dataclass(frozen=True, eq=False)
class ClassifierSet:
    """Linear classifiers of K classes over D features, mapped; safe to share between threads."""

    arrays: Arrays  # `NAMES`
    view: RowView  # how a row is seen
    _scratch: threading.local = field(default_factory=threading.local)

    def margins(self, batch: SparseBatch, ids_NC: NDArray[np.int64]) -> NDArray[np.float32]:
        """``w_k x_n + b_k`` of given classes, shape (N, C), 0 for -1; reads 3 bytes for each of their weights."""
        margins_NC = np.empty(ids_NC.shape, np.float32)
        x_D = getattr(self._scratch, "x_D", None)
        if x_D is None:
            x_D = self._scratch.x_D = np.zeros(self.view.n_columns + 1, np.float32)
        seen, classifiers = self.view.sparse(batch), tuple(self.arrays[name] for name in NAMES)
        margins((seen.indptr, seen.indices, seen.values), ids_NC, classifiers, x_D, margins_NC)
        return margins_NC

    def weights(self, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Features of class k, ascending, and their weights."""
        part = slice(*self.arrays["offsets"][k : k + 2])
        features, codes = np.cumsum(self.arrays["gaps"][part], dtype=np.int64), self.arrays["codes"][part]
        return features[codes != 0], codes[codes != 0] * self.arrays["scales"][k]


class Classifiers(BlendedSignal):
    """Margins of the class's linear classifier, and in runs of earlier versions those of further sets."""

    name = "classifiers"
    meaning = "The class's own linear classifier finds the query this far on its side of the border; below 0 beyond it."
    strength = "weight"

    sets: Mapping[str, ClassifierSet]
    loss: Loss

    @classmethod
    def of(cls, sets: Mapping[str, ClassifierSet], loss: Loss) -> Self:
        """By sets of classifiers, each with what the names of its arrays begin with; the run's own is first."""
        made = cls({begin + name: one.arrays[name] for begin, one in sets.items() for name in NAMES})
        made.sets, made.loss = sets, loss
        return made

    @classmethod
    def fit(cls, material: Material) -> Self:
        """Put the fitted classes together; large arrays are mapped."""
        settings = material.settings
        if not material.parts:
            return cls.of({}, settings.loss)
        arrays = _encoded(material.parts, material.store.n_classes, material.scratch)
        view = RowView(power=settings.power, pairs=settings.pairs, n_features=material.store.n_features)
        return cls.of({"": ClassifierSet(arrays, view)}, settings.loss)

    @classmethod
    def load(cls, file: SignalFile) -> Self:
        views = file.notes.get("views", "").split(",")
        loss: Any = file.notes.get("loss", "hinge")
        if loss not in get_args(Loss):
            raise StorageError(f"{file.where}: its metadata are damaged (loss {loss}): train it again")
        pairs, power = file.number("pairs", 0, 0, MAX_PAIRS), file.number("power", 1.0, 0.0, MOST_POWER)
        seen = {"": RowView(power=power, pairs=pairs, n_features=file.n_features)}
        length = max(file.number("row_features", 1.0), 1.0) ** -0.5
        for name in FURTHER_SETS:
            if name in views:
                presence = float(np.float32(length)) if name == "presence" else 0.0
                seen[f"{name}."] = RowView(presence=presence, n_features=file.n_features)
        if not any(name in file.arrays for name in NAMES):
            return cls.of({}, loss)
        return cls.of({begin: ClassifierSet(_set_arrays(file, begin), view) for begin, view in seen.items()}, loss)

    def and_also(self, more: Newcomers) -> Self:
        """No weights, and the bias that fitting gives a class without rows."""
        biases = np.full(len(more), UNSEEN if self.loss == "logistic" else -1, np.float32)
        sets = {}
        for begin, one in self.sets.items():
            added = {"offsets": np.full(len(more), one.arrays["offsets"][-1]), "scales": 0 * biases, "biases": biases}
            longer = {name: np.concatenate([one.arrays[name], array]) for name, array in added.items()}
            sets[begin] = replace(one, arrays={**one.arrays, **longer})
        return type(self).of(sets, self.loss)

    @property
    def own(self) -> ClassifierSet:
        return self.sets[""]

    @property
    def notes(self) -> dict[str, str]:
        if not self.sets:
            return {}
        return {"loss": self.loss, "pairs": str(self.own.view.pairs), "power": repr(self.own.view.power)}

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        n_paired = min(float(scale.pairs), scale.row_features)
        weights_a_row = WEIGHTS * scale.row_features + PAIR_WEIGHTS * n_paired * max(n_paired - 1, 0) / 2
        return scale.n_classes * CLASS_BYTES + 8 + round(scale.n_positives * weights_a_row) * WEIGHT_BYTES

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"margin {begin.rstrip('.')}".rstrip() for begin in self.sets)

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        columns_NCI = np.empty((*shortlist.ids_NC.shape, self.n_columns), np.float32)
        for i, one in enumerate(self.sets.values()):
            columns_NCI[:, :, i] = one.margins(shortlist.batch, shortlist.ids_NC)
        return columns_NCI

    def terms(self, columns_NCI: Floats, ids_NC: NDArray[np.int64], strength: float) -> Floats:
        """Minus strength times the classifier's own loss of a positive: a class that is certain keeps its aggregate."""
        margins_NC = np.fmax(columns_NCI[:, :, 0], LOWEST_MARGIN)
        if self.loss == "hinge":
            losses_NC = np.square(1 - np.fmin(margins_NC, np.float32(1)))
        else:
            losses_NC = np.logaddexp(np.float32(0), -margins_NC)
        return np.asarray(-(np.float32(strength) * losses_NC))

    def evidence(self, shortlist: Shortlist) -> list[Evidence] | None:
        """Weight times value of every feature, and of every product of two, that the class's classifier weighs."""
        k = int(shortlist.ids_NC[0, 0])
        if not self.sets or k < 0:
            return None
        (features, weights), view = self.own.weights(k), self.own.view
        weight_of = dict(zip(features.tolist(), weights.tolist(), strict=True))
        seen = view.sparse(shortlist.batch)
        entries = zip(view.members(shortlist.batch), seen.indices.tolist(), seen.values.tolist(), strict=True)
        return [Evidence(own, weight_of[i] * value) for own, i, value in entries if i in weight_of]


def _set_arrays(file: SignalFile, begin: str) -> dict[str, NDArray[Any]]:
    """Arrays of one set, whose names begin so in the file."""
    K, n = file.n_classes, file.size(f"{begin}codes")
    shapes = ((np.int64, K + 1), (np.int16, n), (np.int8, n), (np.float32, K), (np.float32, K))
    arrays = {name: file.array(begin + name, dtype, (n,)) for name, (dtype, n) in zip(NAMES, shapes, strict=True)}
    return arrays | {"offsets": file.offsets(f"{begin}offsets", K, n)}


def _encoded(parts: Sequence[Arrays], n_classes: int, scratch: Path) -> dict[str, NDArray[Any]]:
    """Fitted classes, part by part, as arrays of the file."""
    offsets, begin = np.zeros(n_classes + 1, np.int64), 0
    scales = []
    with (scratch / "gaps").open("wb") as gaps_, (scratch / "codes").open("wb") as codes_:
        for part in parts:
            ends, gaps, codes, scales_K = encode(part["offsets"], part["features"], part["weights"])
            offsets[begin + 1 : begin + len(ends)] = offsets[begin] + ends[1:]
            begin += len(ends) - 1
            scales.append(scales_K)
            gaps_.write(gaps.tobytes())
            codes_.write(codes.tobytes())
    mapped: dict[str, NDArray[Any]] = {
        name: np.asarray(np.memmap(scratch / name, dtype, "r")) if offsets[-1] else np.empty(0, dtype)
        for name, dtype in (("gaps", np.int16), ("codes", np.int8))
    }
    scales_K, biases_K = np.concatenate(scales), np.concatenate([part["biases"] for part in parts])
    return {**mapped, "offsets": offsets, "scales": scales_K, "biases": biases_K}


def encode(
    offsets: NDArray[np.int64], features: NDArray[np.int32], weights: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int16], NDArray[np.int8], NDArray[np.float32]]:
    """Offsets, gaps, codes and scales of classes whose weights are CSR, features ascending.

    A class's scale is its largest magnitude / 127.
    """
    counts_K = np.diff(offsets)
    begins = offsets[:-1][counts_K > 0]
    steps = np.diff(features, prepend=np.int32(0))
    steps[begins] = features[begins]
    n_cuts = np.maximum(steps - 1, 0) // GAP
    ends = np.concatenate([[0], np.cumsum(n_cuts + 1)])
    scales_K = np.zeros(len(counts_K), np.float32)
    scales_K[counts_K > 0] = np.maximum.reduceat(np.abs(weights), begins) / np.float32(127)
    gaps, codes = np.full(ends[-1], GAP, np.int16), np.zeros(ends[-1], np.int8)
    gaps[ends[1:] - 1] = steps - n_cuts * GAP
    codes[ends[1:] - 1] = np.rint(weights / np.repeat(scales_K, counts_K))
    return ends[offsets], gaps, codes, scales_K
