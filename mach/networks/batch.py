"""A batch of queries: rows of a CSR matrix, or a dense block, whichever the data set holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SparseBatch:
    """N rows as a CSR triple: indptr (N+1,) int64, indices (nnz,) int32, values (nnz,) float32."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.indptr) - 1


@dataclass(frozen=True, eq=False)
class DenseBatch:
    """N rows as one float32 array of shape (N, D)."""

    values_ND: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.values_ND)


Batch = SparseBatch | DenseBatch
