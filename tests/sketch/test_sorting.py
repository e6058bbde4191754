import numpy as np
import pytest

from mach.sketch.kernels.sorting import sort


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_any_order_are_sorted_as_numpy_sorts_them(dtype):
    rng = np.random.default_rng(0)
    for n in [*range(9), 100, 1000]:
        for values in (rng.integers(0, 5, n), rng.integers(-(2**30), 2**30, n), np.arange(n), -np.arange(n)):
            given = values.astype(dtype)
            mine = given.copy()
            sort(mine)
            np.testing.assert_array_equal(mine, np.sort(given))
