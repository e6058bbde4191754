"""Rules: what single features of a query say of a class (`mach.reranking.kernels.associations`)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import SparseBatch
from mach.errors import StorageError
from mach.reranking.kernels.associations import count_rules, most_ruled, rules_for, scratch_of
from mach.reranking.signals.contract import PROPOSED, Material, Scale, Shortlist, Signal, SignalFile

NAMES = ("offsets", "classes", "confidences", "supports")
PROPOSE = "propose"  # a note of the file; older ones have none, and propose nothing
FEW_FEATURES = 30  # of a row: then a rule may have a single row
SUPPORT = 1  # among the numbers
LEAST_SHARES = np.array([0.01, 1, 0.01, 0.01, 0.005], np.float32)  # that missing rules count as, and rows
RULES, SINGLE_RULES, RULE_BYTES = 0.2, 0.4, 5  # a feature of a row and class of it; where a single row makes one


class Rules(Signal):
    """Rules "a row with this feature has this class", by the share of training rows where that is so."""

    name = "rules"
    meaning = "Of training rows with one of the query's features such a share has the class (as logarithms)."
    lifts = False
    proposes = False
    labels = ("log confidence", "log support", "log second confidence", "log noisy or", "log mean confidence")

    @classmethod
    def fit(cls, material: Material) -> Self:
        if not (material.settings.keeps_inputs or material.teaches):
            return cls()
        n_least = 1 if material.features.nnz < FEW_FEATURES * len(material.rows) else 2
        found = count_rules(material.features, material.classes, n_least)
        arrays = {f"rules.{name}": array for name, array in zip(NAMES, found, strict=True)}
        rules = cls(arrays)
        rules.proposes = True
        return rules

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
        if n_rules and not arrays["rules.confidences"].all():
            raise StorageError(f"{file.where}: rules.confidences holds 0: train it again")
        classes, K = arrays["rules.classes"], file.n_classes
        if n_rules and not 0 <= classes.min() <= classes.max() < K:
            raise StorageError(f"{file.where}: rules.classes is not within 0..{K - 1}: train it again")
        rules = cls(arrays)
        rules.proposes = n_rules > 0 and file.notes.get(cls.name) == PROPOSE
        return rules

    def arrays_for(self, strength: float, *, in_order: bool) -> dict[str, NDArray[Any]]:
        return self.arrays if in_order or self.proposes else {}

    @property
    def notes(self) -> dict[str, str]:
        return {self.name: PROPOSE} if self.proposes else {}

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        if not scale.is_learned:
            return 0
        n_rules = (
            scale.n_positives * scale.row_features * (SINGLE_RULES if scale.row_features < FEW_FEATURES else RULES)
        )
        return scale.n_features * 12 + round(n_rules) * RULE_BYTES

    def candidates(self, batch: SparseBatch) -> NDArray[np.int64] | None:
        if not self.proposes or not self.arrays["rules.classes"].size:
            return None
        ids_NP = np.empty((len(batch), PROPOSED), np.int64)
        most_ruled(self._table, (batch.indptr, batch.indices, batch.values), self._scratch, ids_NP)
        return ids_NP

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        found_NC5 = np.zeros((*shortlist.ids_NC.shape, len(self.labels)), np.float32)
        if self.arrays:  # an order that held-out rows taught weighs none
            rules_for(self._table, shortlist.rows, self._scratch, shortlist.ids_NC, found_NC5)
        supports_NC = np.log1p(found_NC5[:, :, SUPPORT])
        logs_NC5 = np.log(np.maximum(found_NC5, LEAST_SHARES, out=found_NC5), out=found_NC5)
        logs_NC5[:, :, SUPPORT] = supports_NC
        return logs_NC5

    @property
    def _table(self) -> tuple[NDArray[Any], ...]:
        return tuple(self.arrays[f"rules.{name}"] for name in NAMES)

    @property
    def _scratch(self) -> Any:
        """Of each thread, made once."""
        if not hasattr(self._of_thread, "scratch"):
            classes = self.arrays["rules.classes"]
            self._of_thread.scratch = scratch_of(int(classes.max(initial=-1)) + 1)
        return self._of_thread.scratch
