"""X and y as scikit-learn hands them over, with its own refusals and warnings; the rows and classes in them.

The only module that imports scikit-learn.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mach.data.queries import canonical
from mach.errors import ConfigError, DataError
from mach.estimator.frames import is_table, texts_of, values_of
from mach.estimator.rows import Features
from mach.estimator.vocabulary import Targets

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        assert_all_finite,
        check_consistent_length,
        check_is_fitted,
        check_random_state,
        column_or_1d,
        validate_data,
    )
except ImportError as error:
    raise ConfigError(
        f"mach.MACHClassifier needs scikit-learn 1.6 or newer ({error}): pip install 'mach[sklearn]'"
    ) from error


__all__ = [
    "BaseEstimator",
    "ClassifierMixin",
    "check_consistent_length",
    "check_is_fitted",
    "check_random_state",
    "features_of",
    "targets_of",
]


def features_of(estimator: Any, X: Any, y: Any = "predict", *, reset: bool = False) -> Features:
    """Rows as networks read them; at prediction of the kind that was fitted."""
    if not reset:
        check_is_fitted(estimator)
    texts = None if X is None else texts_of(X)
    if y is None:
        raise ValueError("MACHClassifier requires y to be passed, but the target y is None")
    if reset and texts is not None:
        for name in ("n_features_in_", "feature_names_in_"):
            estimator.__dict__.pop(name, None)
    if not reset and (texts is None) != hasattr(estimator, "n_features_in_"):
        is_text = texts is not None
        raise DataError(
            f"X holds {'texts' if is_text else 'numbers'}, the classifier was fitted to "
            f"{'numbers' if is_text else 'texts'}: give the same kind"
        )
    if texts is not None:
        if not texts and reset:
            raise ValueError("Found array with 0 sample(s): give at least one text")
        return texts
    values = validate_data(estimator, X, accept_sparse="csr", dtype=np.float32, reset=reset)
    if not hasattr(values, "tocsr"):
        return np.ascontiguousarray(values)
    from scipy.sparse import csr_array

    return canonical(csr_array(values))


def targets_of(y: Any) -> Targets:
    """Read y in whatever form, with scikit-learn's own refusals and warnings."""
    if is_table(y) or (isinstance(y, np.ndarray) and y.ndim == 2):
        y = values_of(y)
        if y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        else:
            check_classification_targets(y)
    targets = Targets.read(y)
    if targets.form == "classes":
        if targets.values.dtype.kind in "fcO":
            assert_all_finite(targets.values, input_name="y")
        if targets.values.dtype.kind != "O":
            check_classification_targets(targets.values)
    return targets
