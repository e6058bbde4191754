"""The former home of `mach.data.batch`."""

from mach.data.batch import (
    Batch,
    DenseBatch,
    SparseBatch,
    Targets,
    concatenated,
    has_features,
    ranges,
    read_batch,
    read_classes,
    read_targets,
    right_of,
    rows_of,
    unit_rows,
)

__all__ = [
    "Batch",
    "DenseBatch",
    "SparseBatch",
    "Targets",
    "concatenated",
    "has_features",
    "ranges",
    "read_batch",
    "read_classes",
    "read_targets",
    "right_of",
    "rows_of",
    "unit_rows",
]
