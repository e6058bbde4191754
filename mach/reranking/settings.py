"""How the classifiers of a re-ranker are fitted: what was found once for all data sets, and what the rows decide.

Nothing here is a key of the configuration but the pairs. The plan of a fitting holds the settings, so that workers, a
fitting that goes on, and pilots use the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mach.config import Config, RerankingConfig, Section
from mach.data.store import Store

Loss = Literal["hinge", "logistic"]
MANY_CLASSES = 10  # of a row, on average: then many classes are likely at once
LONG_ROW = 30  # features, on average


class FitSettings(Section):
    """The settings of a fitting; the defaults are those of rows with few classes and no pairs."""

    loss: Loss = "hinge"  # of a row's margin: squared hinge, or logistic
    cost: float = 1.0  # what a row's loss weighs beside half the squared length of the weights
    pairs: int = 0  # largest features of a row whose products are features as well (``reranking.pairs``)
    power: float = 1.0  # what a row's values are raised to, signs kept; the row stays as long as it was
    threshold: float = 0.05  # smaller weights are dropped
    class_weights: int | None = None  # most weights of a class, the largest; None: all above the threshold
    negatives: int = 16  # most rows that a class is told apart from: so many for each of its own, and as many more
    iterations: int = 6  # most passes over the rows of a class: beyond 6 a query's order no longer changes
    tolerance: float = 0.1  # violation of the optimality conditions at which a class is done
    keeps_inputs: bool = False  # whether the file keeps all that a learned order weighs: for pilots, or to learn one


def likens(config: Config, store: Store) -> bool:
    """Whether likeness alone orders the candidates: rows are phrases of the texts that queries are likened to."""
    return config.data.has_documents and store.text_features is not None and store.class_texts is not None


def fit_settings(config: RerankingConfig, store: Store, retired: Mapping[str, Any] | None = None) -> FitSettings:
    """The settings for some training rows.

    - Rows of 10 classes and more on average: many classes are likely at once, so the loss is logistic. It takes a cost
      of 4, and its weights below 0.1 say little.
    - Pairs: many small weights share what one large weight said before. Those below 0.08 go, and of a class the 2,048
      largest stay. Where rows have more than one class, values are raised to 0.5, and the cost is 0.5.
    - Others of `LONG_ROW` features and more: of a class the 512 largest weights stay. They answer as well as all, in
      half of the bytes, of which a query reads a quarter.

    The store has all training rows, also those held out. Values of retired keys that the run was made with stay.
    """
    given = {name: value for name in FitSettings.model_fields if (value := (retired or {}).get(f"reranking.{name}"))}
    chosen: dict[str, Any] = {"pairs": config.pairs, "keeps_inputs": config.pilots > 0}
    n_classes_N = np.diff(store.class_indptr)
    if given:
        chosen |= given
    elif n_classes_N.sum() / max(store.n_rows, 1) >= MANY_CLASSES:
        chosen |= {"loss": "logistic", "cost": 4.0, "threshold": 0.1}
    elif config.pairs:
        chosen |= {"threshold": 0.08, "class_weights": 2048}
        if not (n_classes_N == 1).all():
            chosen |= {"cost": 0.5, "power": 0.5}
    elif store.n_nonzeros >= LONG_ROW * store.n_rows:
        chosen["class_weights"] = 512
    return FitSettings(**chosen)
