"""How accurate a run is with fewer repetitions, as it was last measured: curve.json."""

from __future__ import annotations

from typing import Any, Literal, Self

from mach.config import Section
from mach.files.places import is_there
from mach.files.records import read_json, write_json
from mach.runs.run import Run


class AccuracyCurve(Section):
    """The content of curve.json.

    ``rows`` are those of `mach.evaluation.accuracy.evaluate`: one a number of repetitions, then all of them re-ranked;
    metrics are shares. ``fingerprint`` is of the rows they were measured on, ``version`` that of the classes.
    """

    format: Literal[1] = 1
    fingerprint: str
    n_rows: int
    version: int
    rows: list[dict[str, Any]]

    @classmethod
    def load(cls, run: Run) -> Self | None:
        """That of a run; None where it has none."""
        where = run.path / "curve.json"
        return read_json(where, cls) if is_there(where) else None

    def save(self, run: Run) -> None:
        """Keep it in a run."""
        write_json(run.path / "curve.json", self.model_dump())
