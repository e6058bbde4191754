"""The one rule for labels that are missing: they mean no class, in every way in."""

from __future__ import annotations

from typing import Any


def is_missing(label: Any) -> bool:
    """Whether a label says that there is no class: None, NaN, NaT, NA of pandas, an empty or blank string.

    >>> [is_missing(label) for label in (None, float("nan"), " ", 0, "nan", False)]
    [True, True, True, False, False, False]
    """
    if label is None or isinstance(label, str):
        return not (label and label.strip())
    if isinstance(label, int | bytes | tuple | frozenset):
        return False
    try:
        return bool(label != label)  # noqa: PLR0124 - what is not equal to itself is no value
    except (TypeError, ValueError, ArithmeticError):  # NA is not even that, and a signalling NaN cannot be asked
        return type(label).__name__ in {"NAType", "Decimal"}
