"""Rules: what single features of a query say of a class (`mach.reranking.kernels.associations`)."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from mach.errors import StorageError
from mach.reranking.kernels.associations import count_rules, rules_for
from mach.reranking.signals.contract import Material, Scale, Shortlist, Signal, SignalFile

NAMES = ("offsets", "classes", "confidences", "supports")
SUPPORT = 1  # among the numbers
LEAST_SHARES = np.array([0.01, 0, 0.01, 0.01, 0.005], np.float32)  # that missing rules count as
RULES, RULE_BYTES = 0.2, 5  # a feature of a row and class of it, at most on go-gene2pubmed and tate-leaf


class Rules(Signal):
    """Rules "a row with this feature has this class", by the share of training rows where that is so."""

    name = "rules"
    meaning = "Of training rows with one of the query's features such a share has the class (as logarithms)."
    labels = ("log confidence", "log support", "log second confidence", "log noisy or", "log mean confidence")

    @classmethod
    def fit(cls, material: Material) -> Self:
        if not material.settings.keeps_inputs:
            return cls()
        found = count_rules(material.features, material.classes)
        return cls({f"rules.{name}": array for name, array in zip(NAMES, found, strict=True)})

    @classmethod
    def load(cls, file: SignalFile) -> Self:
        if not any(name.startswith("rules.") for name in file.arrays):
            return cls()
        n_features, n_rules = file.n_features, file.size("rules.classes")
        shapes = ((np.int64, n_features + 1), (np.int32, n_rules), (np.uint8, n_rules), (np.int32, n_features))
        names = [f"rules.{name}" for name in NAMES]
        arrays = {name: file.array(name, dtype, (n,)) for name, (dtype, n) in zip(names, shapes, strict=True)}
        file.offsets("rules.offsets", n_features, n_rules)
        if arrays["rules.supports"].min() < 0:
            raise StorageError(f"{file.where}: rules.supports holds {arrays['rules.supports'].min()}: train it again")
        return cls(arrays)

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        if not scale.is_learned:
            return 0
        return scale.n_features * 12 + round(scale.n_positives * scale.row_features * RULES) * RULE_BYTES

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        found_NC5 = np.zeros((*shortlist.ids_NC.shape, len(self.labels)), np.float32)
        if not self.arrays:  # an order that held-out rows taught weighs none
            found_NC5[:] = np.log(np.where(LEAST_SHARES > 0, LEAST_SHARES, np.float32(1)))
            return found_NC5
        rules = tuple(self.arrays[f"rules.{name}"] for name in NAMES)
        rules_for(rules, shortlist.rows, shortlist.ids_NC, found_NC5)
        logs_NC5 = np.empty_like(found_NC5)
        for i, least in enumerate(LEAST_SHARES):
            numbers_NC = found_NC5[:, :, i]
            logs_NC5[:, :, i] = np.log1p(numbers_NC) if i == SUPPORT else np.log(np.maximum(numbers_NC, least))
        return logs_NC5
