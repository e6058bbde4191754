"""What a checkpoint notes beside the arrays of a network's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mach.errors import StorageError
from mach.files.records import first_of
from mach.networks.figures import StepFigures


class Notes(BaseModel):
    """How far training is; losses may be infinite, and the best precision is before there is one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    metrics: list[dict[str, int | float | None]]
    worker_seconds: float
    figures: list[StepFigures]
    best_precision: float
    best_epoch: int
    order: int | None = Field(default=None, ge=0, lt=2**31)

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str], where: object) -> Notes:
        """The notes of a file whose step is seen to be one; a StorageError where they are damaged."""
        steps = arrays.get("n_steps")
        if steps is None or steps.shape != (1,) or steps.dtype.kind != "i" or not 0 <= steps[0] < 2**48:
            raise StorageError(f"{where}: n_steps is no number of steps: remove the file, and training begins anew")
        try:
            return cls.model_validate_json(metadata.get("notes", ""))
        except ValidationError as error:
            reason = first_of(error)
            raise StorageError(f"{where}: its notes are damaged ({reason}): remove the file") from error
