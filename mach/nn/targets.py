"""Targets as people hold them (ids, lists, padded matrices, bags), checked, as pairs of row and class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mach.errors import DataError

Target: TypeAlias = Tensor | Sequence[Any] | tuple[Tensor, Tensor]


def in_range(classes: Tensor, n_classes: int, name: str, least: int = 0) -> Tensor:
    """The classes as int64, or a DataError where one is not ``least`` to K - 1; ``name`` is what it is called.

    Asks the device once, under `torch.compile` never.
    """
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise DataError(f"{name} is {classes.dtype}: need integers, 0..{n_classes - 1}")
    classes = classes.long()  # a narrower type cannot be compared with K
    if not torch.compiler.is_compiling():
        outside = (classes < least) | (classes >= n_classes)
        if outside.any():
            place = outside.nonzero()[0].tolist()
            raise DataError(f"{name}{place} is {int(classes[tuple(place)])}: classes are 0..{n_classes - 1}")
    return classes


def one_a_row(target: Target, n_rows: int, n_classes: int) -> Tensor:
    """The class of each row, shape (N,); a DataError where the target is anything else."""
    if not isinstance(target, Tensor) or target.ndim != 1 or len(target) != n_rows:
        raise DataError(
            f"target has {_shape(target)} for {n_rows} rows: loss 'softmax' takes one id a row, shape ({n_rows},); "
            "several classes a row need loss='binary'"
        )
    return in_range(target, n_classes, "target")


def pairs(target: Target, n_rows: int, n_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and class of every target, int64 of shape (M,), by ascending row and class, each once."""
    if isinstance(target, tuple) and len(target) == 2 and all(isinstance(part, Tensor) for part in target):
        rows_M, classes_M = _of_bag(target[0].to(device), target[1].to(device), n_rows, n_classes)
    else:
        rows_M, classes_M = _of_matrix(target if isinstance(target, Tensor) else _padded(target), n_rows, n_classes)
    pairs_M = torch.unique(rows_M.to(device) * n_classes + classes_M.to(device))
    return pairs_M // n_classes, pairs_M % n_classes


def _of_bag(ids_M: Tensor, offsets: Tensor, n_rows: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Of ids and where each row's begin, with or without the last end."""
    if len(offsets) == n_rows:
        offsets = torch.cat([offsets, offsets.new_tensor([len(ids_M)])])
    counts = offsets.diff()
    if len(counts) != n_rows or int(offsets[0]) != 0 or int(offsets[-1]) != len(ids_M) or bool((counts < 0).any()):
        raise DataError(
            f"offsets of length {len(offsets)} for {n_rows} rows and {len(ids_M)} ids: "
            f"need {n_rows} (or one more) that ascend from 0 to at most {len(ids_M)}"
        )
    rows_M = torch.arange(n_rows, device=ids_M.device).repeat_interleave(counts)
    return rows_M, in_range(ids_M, n_classes, "target ids")


def _of_matrix(target: Tensor, n_rows: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """Of one id a row, or of a matrix padded by -1."""
    if target.ndim not in {1, 2} or len(target) != n_rows:
        raise DataError(
            f"target has {_shape(target)} for {n_rows} rows: need ({n_rows},) or ({n_rows}, L) padded by -1"
        )
    if target.ndim == 1:
        return torch.arange(n_rows, device=target.device), in_range(target, n_classes, "target")
    rows_M, columns_M = (in_range(target, n_classes, "target", least=-1) >= 0).nonzero(as_tuple=True)
    return rows_M, target[rows_M, columns_M]


def _padded(rows: Sequence[Any]) -> Tensor:
    """Lists of ids as one matrix, -1 where a list is shorter."""
    try:
        ids = [torch.as_tensor(row) for row in rows]
        if not ids:
            return torch.empty(0, 0, dtype=torch.int64)
        if any(row.ndim != 1 or (len(row) and row.is_floating_point()) for row in ids):
            raise ValueError("a row is no list of integers")
        if any(len(row) and int(row.min()) < 0 for row in ids):
            raise ValueError("an id is negative")
        return nn.utils.rnn.pad_sequence([row.long() for row in ids], batch_first=True, padding_value=-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"target is a {type(rows).__name__} that holds no rows of ids: {error}") from error


def _shape(target: object) -> str:
    return f"shape {tuple(target.shape)}" if isinstance(target, Tensor) else f"type {type(target).__name__}"
