"""Buckets on a device are those of the assignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mach.networks.device_assignment import DeviceAssignment
from mach.sketch.hashing import Assignment, UniversalAssignment
from mach.sketch.tables import TableAssignment

K, B, R = 700, 16, 5
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")])
UNIVERSAL = UniversalAssignment.draw(n_classes=K, n_buckets=B, n_repetitions=R, seed=3)
TABLE = TableAssignment.from_table(np.random.default_rng(5).integers(0, B, (R, K)), B)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("assignment", [UNIVERSAL, TABLE], ids=["universal", "table"])
def test_buckets_are_those_of_the_assignment(device: str, assignment: Assignment) -> None:
    classes = np.array([3, 699, 0, 3])
    parts = [assignment.select([0, 1]), assignment.select([4, 2])]
    found = DeviceAssignment(parts, torch.device(device)).buckets(torch.from_numpy(classes).to(device))
    np.testing.assert_array_equal(found.cpu().numpy(), assignment.select([0, 1, 4, 2]).buckets(classes))
