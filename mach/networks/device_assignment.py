"""Buckets of classes, computed or looked up on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mach.errors import ConfigError
from mach.sketch.hashing import Assignment, UniversalAssignment
from mach.sketch.tables import TableAssignment


class DeviceAssignment:
    """The buckets of classes by the functions of one or more assignments, computed or looked up on a device.

    Parameters
    ----------
    assignments : sequence of Assignment
        Of the same K and B; all universal, or all tables.
    device : torch.device
        Tables take 4 bytes a class and function there.
    """

    def __init__(self, assignments: Sequence[Assignment], device: torch.device) -> None:
        first = assignments[0]
        self.n_classes, self.n_buckets = first.n_classes, first.n_buckets
        self._table_FK: Tensor | None = None
        if isinstance(first, UniversalAssignment):
            self._prime = first.prime
            universal = [each for each in assignments if isinstance(each, UniversalAssignment)]
            self._multipliers_F1, self._offsets_F1 = (
                torch.from_numpy(np.concatenate(parts)).to(device)[:, None]
                for parts in ([u.multipliers_R for u in universal], [u.offsets_R for u in universal])
            )
        elif isinstance(first, TableAssignment):
            tables = [each.table_RK for each in assignments if isinstance(each, TableAssignment)]
            self._table_FK = torch.from_numpy(np.concatenate(tables).astype(np.int32)).to(device)
        else:
            raise ConfigError(f"a {type(first).__name__} has no place on a device: need universal or table assignments")

    def buckets(self, classes_M: Tensor) -> Tensor:
        """Buckets of classes, shape (F, M), int32."""
        if self._table_FK is not None:
            return self._table_FK[:, classes_M.long()]
        images_FM = self._multipliers_F1 * classes_M.long()[None, :] + self._offsets_F1  # < 2**62: exact
        return (images_FM % self._prime % self.n_buckets).int()
