"""Rules: what single features of a query say of a class (`mach.reranking.kernels.associations`)."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from mach.reranking.kernels.associations import CODES, MOST_CONFIDENCE, count_rules
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
        n_rules = file.arrays["rules.classes"].size if "rules.classes" in file else 0
        n_features = file.n_features
        shapes = ((np.int64, n_features + 1), (np.int32, n_rules), (np.uint8, n_rules), (np.int32, n_features))
        names = [f"rules.{name}" for name in NAMES]
        return cls({name: file.array(name, dtype, (n,)) for name, (dtype, n) in zip(names, shapes, strict=True)})

    def kept(self, strength: float, *, in_order: bool) -> dict[str, NDArray[np.float32]]:
        return self.arrays if in_order else {}

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        if not scale.is_learned:
            return 0
        return scale.n_features * 12 + round(scale.n_positives * scale.row_features * RULES) * RULE_BYTES

    @property
    def has_columns(self) -> bool:
        return bool(self.arrays)

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        from mach.reranking.kernels.associations import rules_for

        found_NC5 = np.zeros((*shortlist.ids_NC.shape, len(self.labels)), np.float32)
        if self.arrays:
            offsets, classes, confidences, supports = (self.arrays[f"rules.{name}"] for name in NAMES)
            rules_for(offsets, classes, confidences, supports, shortlist.rows, shortlist.ids_NC, found_NC5)
        return _logs(found_NC5)

    def oracle(self, shortlist: Shortlist) -> NDArray[np.floating]:
        found_NC5 = np.zeros((*shortlist.ids_NC.shape, len(self.labels)))
        if not self.arrays:
            return _logs(found_NC5)
        offsets, classes, confidences, supports = (self.arrays[f"rules.{name}"].tolist() for name in NAMES)
        indptr, indices, values = shortlist.rows
        for n, ids in enumerate(shortlist.ids_NC.tolist()):
            span = slice(indptr[n], indptr[n + 1])
            weights = {f: abs(x) for f, x in zip(indices[span].tolist(), values[span].tolist(), strict=True) if x}
            for c, k in enumerate(ids):
                said = [
                    (confidences[rule] / CODES, supports[f], weight)
                    for f, weight in weights.items()
                    for rule in range(offsets[f], offsets[f + 1])
                    if classes[rule] == k
                ]
                if said:
                    ranked = sorted((share for share, _, _ in said), reverse=True)
                    support = next(support for share, support, _ in said if share == ranked[0])
                    noisy_or = -sum(np.log1p(-min(share, MOST_CONFIDENCE)) for share in ranked)
                    mean = sum(share * weight for share, _, weight in said) / sum(weights.values())
                    second = ranked[1] if len(ranked) > 1 else 0.0
                    found_NC5[n, c] = np.array([ranked[0], support, second, noisy_or, mean])
        return _logs(found_NC5)


def _logs(found_NC5: NDArray[np.floating]) -> NDArray[np.float32]:
    logs_NC5 = np.empty(found_NC5.shape, np.float32)
    for i in range(len(Rules.labels)):
        numbers_NC = found_NC5[:, :, i]
        logs_NC5[:, :, i] = np.log1p(numbers_NC) if i == SUPPORT else np.log(np.maximum(numbers_NC, LEAST_SHARES[i]))
    return logs_NC5
