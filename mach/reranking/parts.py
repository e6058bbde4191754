"""The folder of a re-ranker that is being made: its plan, and the finished parts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mach.config import Section
from mach.errors import StorageError
from mach.files.caches import cache_folder
from mach.files.names import named
from mach.files.places import (
    Place,
    atomic_file,
    fetch,
    is_there,
    kept,
    names_in,
    remove,
    remove_folder,
)
from mach.files.records import read_json, write_json
from mach.files.tensors import map_tensors, write_tensors
from mach.reranking.settings import FitSettings

STAGES = CANDIDATES, CLASSIFIERS = "candidates", "classifiers"  # made in parts, one after the other
ROWS_A_PART = 2**16  # some seconds
MIN_ROW_PARTS = 8  # so that a few workers share a small set


class Plan(Section):
    """How classifiers are fitted, and how the work is cut: bounds among the training rows and among the classes.

    Plans of earlier versions have no settings; the classes are not cut at first.
    """

    fingerprint: str
    settings: FitSettings | None = None
    rows: list[int]
    classes: list[int] = Field(default=[])


def name_of(stage: str, part: int) -> str:
    """The file of a part."""
    return f"{'rows' if stage == CANDIDATES else 'classes'}{part:03d}.safetensors"


class Parts:
    """Files of the folder; those with another fingerprint than this are of other settings or weights."""

    def __init__(self, folder: Place, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    @property
    def plan(self) -> Plan:
        """The plan of these settings; a StorageError where there is none."""
        plan = self._plan()
        if plan is None:
            raise StorageError(f"{self.folder} holds no plan for these settings: run the same `mach train` again")
        return plan

    def begin(self, settings: FitSettings, n_rows: int, *, is_given: bool) -> None:
        """Write a plan unless there is one, whose settings are these where they are given, and remove what is old."""
        plan = self._plan()
        if plan is None or (is_given and plan.settings != settings):
            self._clear()
            n_parts = max(MIN_ROW_PARTS, -(-n_rows // ROWS_A_PART))
            bounds = np.unique(np.linspace(0, n_rows, n_parts + 1).astype(int))
            self._write_plan(Plan(fingerprint=self.fingerprint, settings=settings, rows=bounds.tolist()))

    def cut_classes(self, bounds: list[int]) -> None:
        """Cut the classes at these bounds."""
        self._write_plan(self.plan.model_copy(update={"classes": bounds}))

    def bounds(self, stage: str) -> list[int]:
        """Where the parts of a stage begin and end."""
        return self.plan.rows if stage == CANDIDATES else self.plan.classes

    def names(self, stage: str) -> list[str]:
        """The files of a stage."""
        return [name_of(stage, part) for part in range(len(self.bounds(stage)) - 1)]

    def write(self, name: str, arrays: Mapping[str, NDArray[Any]], notes: dict[str, str], started: float) -> None:
        """Write a part that took the time of this process since then."""
        notes = notes | {"fingerprint": self.fingerprint, "seconds": str(time.process_time() - started)}
        with atomic_file(self.folder / name) as file:
            write_tensors(file, arrays, notes)

    def map(self, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Arrays and notes of a part, mapped; a remote one is fetched first."""
        where: Place = self.folder / name
        if isinstance(where, Path):
            path = where
        else:
            path = kept(named(cache_folder() / "reranking", self.fingerprint) / name, partial(fetch, where))
        arrays, notes = map_tensors(path)
        if notes.get("fingerprint") != self.fingerprint:
            raise StorageError(f"{where} was made with other settings: remove it and run the same `mach train` again")
        return arrays, notes

    def tidy(self) -> None:
        """Remove all but lock and log; of a remote folder everything."""
        if isinstance(self.folder, Path):
            self._clear()
        else:
            remove_folder(self.folder, first="plan.json")

    def _plan(self) -> Plan | None:
        where = self.folder / "plan.json"
        plan = read_json(where, Plan) if is_there(where) else None
        return plan if plan and plan.settings and plan.fingerprint == self.fingerprint else None

    def _write_plan(self, plan: Plan) -> None:
        if isinstance(self.folder, Path):
            self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "plan.json", plan.model_dump())

    def _clear(self) -> None:
        for name in names_in(self.folder):
            if name.endswith((".safetensors", ".json")):
                remove(self.folder / name)
