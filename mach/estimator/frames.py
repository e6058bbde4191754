"""Answers as tables of other libraries."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mach.errors import ConfigError


def frame_of(classes_Nk: NDArray[Any], probs_Nk: NDArray[np.float32], kind: Literal["pandas", "pyarrow"]) -> Any:
    """A row for each pair of a query and a class, best first: query, rank, class, probability."""
    n, n_found = classes_Nk.shape
    columns = {
        "query": np.repeat(np.arange(n), n_found),
        "rank": np.tile(np.arange(1, n_found + 1), n),
        "class": classes_Nk.ravel(),
        "probability": probs_Nk.ravel(),
    }
    if kind == "pandas":
        try:
            import pandas as pd
        except ImportError as error:
            raise ConfigError("as_frame = 'pandas' needs pandas: pip install pandas, or take 'pyarrow'") from error
        return pd.DataFrame(columns)
    import pyarrow as pa

    return pa.table(columns | {"class": pa.array(columns["class"].tolist())})
