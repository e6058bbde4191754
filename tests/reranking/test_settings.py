"""How classifiers are fitted follows from the rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mach.config import RerankingConfig
from mach.reranking.settings import FitSettings, fit_settings


def settings_of(
    row_classes: list[int], retired: dict[str, Any] | None = None, row_features: int = 6, **keys: Any
) -> FitSettings:
    N = len(row_classes)
    store = SimpleNamespace(class_indptr=np.cumsum([0, *row_classes]), n_rows=N, n_nonzeros=row_features * N)
    return fit_settings(RerankingConfig(**keys), cast(Any, store), retired)


def test_rows_of_many_classes_take_the_logistic_loss():
    assert settings_of([9, 10, 10]).loss == "hinge"
    many = settings_of([9, 11, 10], pairs=12)
    assert many == FitSettings(loss="logistic", cost=4.0, threshold=0.1, pairs=12)


@pytest.mark.parametrize(("row_classes", "is_exclusive"), [([1, 1, 1], True), ([1, 2, 1], False), ([1, 0, 1], False)])
def test_pairs_take_small_weights_and_flat_values_where_rows_have_several_classes(row_classes, is_exclusive: bool):
    found = settings_of(row_classes, pairs=4)
    assert (found.threshold, found.class_weights) == (0.08, 2048)
    assert (found.cost, found.power) == ((1.0, 1.0) if is_exclusive else (0.5, 0.5))
    assert settings_of(row_classes) == FitSettings()


def test_classes_of_long_rows_keep_their_largest_weights():
    assert settings_of([1, 2], row_features=30) == FitSettings(class_weights=512)
    assert settings_of([1, 2], row_features=29) == FitSettings()
    assert settings_of([1, 2], row_features=30, pairs=4).class_weights == 2048


def test_an_order_is_learned_from_inputs_that_are_kept():
    assert settings_of([1], pilots=1).keeps_inputs
    assert not settings_of([1]).keeps_inputs


def test_a_run_of_an_earlier_version_keeps_the_values_that_it_had():
    retired = {"reranking.cost": 2.0, "reranking.iterations": 4, "reranking.views": [], "hashing.seed": 3}
    assert settings_of([12], retired, pairs=3) == FitSettings(cost=2.0, iterations=4, pairs=3)
    assert settings_of([12], {"hashing.seed": 3}).loss == "logistic"
