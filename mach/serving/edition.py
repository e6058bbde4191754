"""A model that never changes as the server asks it: what a question and an answer hold, and classes by their names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mach.errors import DataError
from mach.model.calibration import fingerprint
from mach.model.classes.versions import Versions
from mach.model.model import MachModel
from mach.serving.search import NameIndex


class Question(NamedTuple):
    """What is asked about rows; those with equal questions are answered together.

    ``allowed`` are ids or names, or the name of a stored subset; None allows all.
    """

    k: int
    allowed: tuple[int | str, ...] | str | None = None


class Named(NamedTuple):
    """A class as a request names it: by its id, else by its uri, else by its label."""

    id: int | None = None
    uri: str | None = None
    label: str | None = None

    @property
    def shown(self) -> str:
        """For a message."""
        return str(next((one for one in self if one is not None), ""))


class RowAnswer(NamedTuple):
    """The best classes of one row, which version of which run answered, and whether it knows a feature of the row.

    It is degraded where repetitions are kept by actors, and some of these did not answer.
    """

    version: str
    results: list[dict[str, Any]]
    known: bool
    degraded: bool = False


class Edition:
    """A model that never changes, and the name of its version."""

    def __init__(self, model: MachModel) -> None:
        self.model, self.answerer = model, model.answerer
        self.version = version_of(model)

    @cached_property
    def index(self) -> NameIndex:
        """Names to search in."""
        catalogue = self.answerer.catalogue
        removed = set(self.answerer.edits.removed.tolist())
        return NameIndex((k, catalogue.name(k)) for k in range(self.model.n_classes) if k not in removed)

    @cached_property
    def ids_by_uri(self) -> dict[str, int]:
        """Classes by their uris; empty where the run has none."""
        catalogue = self.answerer.catalogue
        uris = catalogue.uris(np.arange(self.model.n_classes)) if catalogue.has_uris else []
        return {uri: k for k, uri in enumerate(uris) if uri}

    def entries(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """What an answer tells of classes."""
        catalogue = self.answerer.catalogue
        return [
            {"id": k, "uri": uri or None, "label": catalogue.name(k), "notation": None}
            for k, uri in zip(ids, catalogue.uris(ids), strict=True)
        ]

    def allowed(self, given: tuple[int | str, ...] | str | None) -> list[int] | str | None:
        """Names of classes as ids; DataError when one is not there.

        The model would do so too, but look for what a mistyped name was to be, while all others wait, and hold names
        in an array, where each takes the memory of the longest.
        """
        if not isinstance(given, tuple):
            return given
        ids = []
        for one in given:
            k = self.answerer.catalogue.id_of(one) if isinstance(one, str) else one
            if k is None:
                raise DataError(f"there is no class named {one!r:.80}: search with /v1/projects/ID/classes?query=")
            ids.append(k)
        return ids

    def id_of(self, named: Named) -> int | None:
        """The class of a subject; None where it is not there."""
        edits, k = self.answerer.edits, named.id
        if k is None and named.uri:
            k = self.ids_by_uri.get(named.uri)
        if k is None and named.label is not None:
            k = self.answerer.catalogue.id_of(named.label)
        is_there = k is not None and k < edits.n_classes and not edits.is_removed(k)
        return k if is_there else None

    def queries(self, rows: Sequence[str]) -> Any:
        """Rows as the model takes them."""
        if self.model.run.text_features is not None:
            return rows
        parsed = [self.model.parse(row) for row in rows]
        if self.model.run.manifest.dense_input:
            return np.stack(parsed)
        from scipy.sparse import csr_array, vstack

        return vstack([csr_array(row[None]) for row in parsed], format="csr")


def version_of(model: MachModel) -> str:
    """What a model's answers are named by: digits of a digest of its weights, the number of its version of classes.

    Beside the number stand digits of that version's own digest: two copies of a run may be edited apart.
    """
    name = f"{fingerprint(model.run, model.repetitions)[:8]}.{model.classes.version}"
    step = Versions(model.run).current().step(model.classes.version)
    return name if step is None else f"{name}-{step.digest[:8]}"
