"""Records of a run: its manifest, and the curve of its accuracy."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mach.config import Section
from mach.files.records import Digest, shortened, whole
from mach.networks.kernels.losses import LOSSES
from mach.sketch.hashing import MAX_CAPACITY

FORMAT: Literal[1] = 1


class Manifest(Section):
    """What a run is, beside its configuration: all that a model needs to answer."""

    format: Literal[1] = FORMAT
    mach_version: str
    n_classes: int = Field(ge=1, lt=2**31)
    n_features: int = Field(ge=1, lt=2**31)
    n_rows: int = Field(ge=1, lt=2**48)
    dense_input: bool
    row_features: int = Field(default=0, ge=0)
    loss: str
    precision: Literal["float32", "bfloat16"]
    light: bool | None = None  # whether a processor trains without torch; runs of before do not say
    data_fingerprint: Digest
    config_fingerprint: Digest
    assignment: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.assignment.get("family") not in ("universal", "table"):
            raise ValueError(
                f"assignment.family is {shortened(self.assignment.get('family'))}: need universal or table"
            )
        if (found := self.assignment.get("n_classes")) != self.n_classes or type(found) is not int:
            raise ValueError(f"assignment.n_classes is {shortened(found)}, n_classes is {self.n_classes}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r:.60}: need one of {', '.join(LOSSES)}")
        whole(self.assignment, "assignment.n_buckets", 2, MAX_CAPACITY)
        return self

    @property
    def n_buckets(self) -> int:
        """B."""
        return int(self.assignment["n_buckets"])


class AccuracyCurve(Section):
    """The content of curve.json: how accurate a run is with fewer repetitions, as it was last measured.

    ``rows`` are those of `mach.model.accuracy.evaluate`: one a number of repetitions, then all of them re-ranked;
    metrics are shares. ``fingerprint`` is of the rows they were measured on, ``version`` that of the classes.
    """

    format: Literal[1] = 1
    fingerprint: str
    n_rows: int
    version: int
    rows: list[dict[str, Any]]
