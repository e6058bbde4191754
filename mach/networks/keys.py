"""Keys of a step's random numbers, for many repetitions and steps at once: those that numpy would give one by one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POOL, SHIFT = 4, np.uint32(16)


def step_keys(seeds_R: NDArray[np.uint32], steps_T: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """``SeedSequence([seed, step]).generate_state(1)[0]`` of every pair, shape (T, R).

    The hash of M. E. O'Neill, "Developing a seed_seq alternative" (2015), as numpy has it and promises to keep it;
    thousands of `numpy.random.SeedSequence` objects would take longer than the steps themselves.

    Examples
    --------
    >>> keys = step_keys(np.array([7, 8], np.uint32), np.array([3], np.uint32))
    >>> bool(keys[0, 1] == np.random.SeedSequence([8, 3]).generate_state(1)[0])
    True
    """
    shape = (len(steps_T), len(seeds_R))
    seeds_TR, steps_TR = np.broadcast_to(seeds_R, shape), np.broadcast_to(steps_T[:, None], shape)
    constant = 0x43B0D7E5

    def hashed(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * 0x931E8875 & 0xFFFFFFFF
        value = value * np.uint32(constant)
        return value ^ value >> SHIFT

    none_TR = np.zeros(shape, np.uint32)
    pool = [hashed(value) for value in (seeds_TR, steps_TR, none_TR, none_TR)]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                mixed = pool[target] * np.uint32(0xCA01F9DD) - hashed(pool[source]) * np.uint32(0x4973F715)
                pool[target] = mixed ^ mixed >> SHIFT
    key = pool[0] ^ np.uint32(0x8B51F9DD)
    key *= np.uint32(0x8B51F9DD * 0x58F38DED & 0xFFFFFFFF)
    keys_TR: NDArray[np.uint32] = key ^ key >> SHIFT
    return keys_TR
