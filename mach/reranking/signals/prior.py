"""The prior: how many training rows have a class."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from mach.reranking.signals.contract import BlendedSignal, Floats, Material, Newcomers, Scale, Shortlist, SignalFile
from mach.sketch.terms import prior_terms

NO_ROWS = np.float32(-4)  # apart from one row: nothing but texts tells of such a class, so orders weigh it otherwise


class Prior(BlendedSignal):
    """The training rows of a class.

    A file holds ``priors`` (float32, K), the terms of the strength that was chosen, and for a learned order
    ``log_rows`` (float32, K), ``log(1 + rows)`` of the rows that were learned from, `NO_ROWS` of none. A held-out row
    that is counted with the rest makes its own classes more frequent than they were to the networks, so strengths are
    tried on counts without held-out rows.
    """

    name = "prior"
    meaning = "So many training rows have the class, as the logarithm of one more; -4 where none has it."
    strength = "prior"
    labels = ("log rows",)

    counts_K: NDArray[np.int64] | None = None
    learned_K: NDArray[np.int64] | None = None

    @classmethod
    def fit(cls, material: Material) -> Self:
        counts_K = np.bincount(material.classes.indices, minlength=material.store.n_classes)
        made = cls({"log_rows": np.where(counts_K > 0, np.log1p(counts_K, dtype=np.float32), NO_ROWS)})
        made.counts_K, made.learned_K = material.counts_K, material.learned_K
        return made

    @classmethod
    def load(cls, file: SignalFile) -> Self:
        names = [name for name in ("log_rows", "priors") if name in file.arrays]
        return cls({name: file.array(name, np.float32, (file.n_classes,)) for name in names})

    def arrays_for(self, strength: float, *, in_order: bool) -> dict[str, NDArray[np.float32]]:
        arrays = {name: array for name, array in self.arrays.items() if in_order or name != "log_rows"}
        if self.counts_K is not None:
            arrays["priors"] = prior_terms(self.counts_K, strength)
        return arrays

    @classmethod
    def expected_bytes(cls, scale: Scale) -> int:
        return (8 if scale.is_learned else 4) * scale.n_classes

    def and_also(self, more: Newcomers) -> Self:
        """As classes without rows; to orders of earlier versions these have a ``log_rows`` of 0."""
        last = {name: a.min(initial=0) if name == "log_rows" else a[more.rarest] for name, a in self.arrays.items()}
        return type(self)(
            {name: np.append(a, np.full(len(more), last[name], np.float32)) for name, a in self.arrays.items()}
        )

    @property
    def has_columns(self) -> bool:
        return "log_rows" in self.arrays

    @property
    def has_terms(self) -> bool:
        return "priors" in self.arrays or self.learned_K is not None

    def columns(self, shortlist: Shortlist) -> NDArray[np.float32]:
        if not self.has_columns:
            return np.zeros((*shortlist.ids_NC.shape, 1), np.float32)
        return np.asarray(self.arrays["log_rows"][np.maximum(shortlist.ids_NC, 0)][:, :, None])

    def terms(self, columns_NCI: Floats, ids_NC: NDArray[np.int64], strength: float) -> Floats:
        """``strength * log(1 + rows)``, less its largest value (`mach.sketch.terms.prior_terms`)."""
        terms_K = self.arrays["priors"] if self.learned_K is None else prior_terms(self.learned_K, strength)
        return np.asarray(terms_K[np.maximum(ids_NC, 0)])
