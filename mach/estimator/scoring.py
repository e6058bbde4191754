"""Scorers for ``GridSearchCV`` and others: P@k and PSP@k of a classifier or of a pipeline that ends in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mach.errors import ConfigError
from mach.estimator.rows import features_of
from mach.estimator.targets import Targets, ids_of
from mach.sketch.metrics import evaluate, propensities


@dataclass(frozen=True)
class TopkScorer:
    """A share in 0..1, called as ``scorer(classifier, X, y)``."""

    measure: Literal["P", "nDCG", "PSP", "recall"]
    k: int

    def __call__(self, estimator: Any, X: Any, y: Any) -> float:
        """Measure a fitted classifier on rows."""
        if hasattr(estimator, "steps"):
            X, estimator = estimator[:-1].transform(X) if len(estimator) > 1 else X, estimator[-1]
        if not hasattr(estimator, "predict_topk"):
            raise ConfigError(f"{type(estimator).__name__} has no predict_topk: score a MACHClassifier, or a pipeline")
        engine, n_classes = estimator._engine, len(estimator.classes_)
        k = min(self.k, n_classes)
        ids_Nk, _ = engine.topk(features_of(estimator, X), k)
        truth = ids_of(estimator.classes_, Targets.read(y))[:, :n_classes]
        run = engine.model.run
        weights_K = propensities(run.class_counts_K()[:n_classes], run.manifest.n_rows)
        return float(evaluate(ids_Nk, truth, ks=(k,), propensities=weights_K)[f"{self.measure}@{k}"])


def precision_at(k: int) -> TopkScorer:
    """P@k, the share of the k best classes that are right.

    Examples
    --------
    >>> from sklearn.model_selection import GridSearchCV
    >>> from mach import MACHClassifier
    >>> search = GridSearchCV(MACHClassifier(), {"dropout": [0.1, 0.3]}, scoring=precision_at(3))
    """
    return TopkScorer("P", k)


def psp_at(k: int) -> TopkScorer:
    """PSP@k, in which rare classes count more, by the frequencies in the training rows."""
    return TopkScorer("PSP", k)
