"""MACHClassifier: scikit-learn's own checks first, then what they do not ask."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")

from sklearn.utils.estimator_checks import parametrize_with_checks

from mach import MACHClassifier

SMALL = {"hidden": 16, "epochs": 12, "batch": 16, "rate": 0.02, "random_state": 0}


@parametrize_with_checks([MACHClassifier(**SMALL)])
def test_scikit_learn(estimator, check):
    check(estimator)
