"""A run as a project of the server: it answers by one version of its classes at a time, and follows its files.

A run's folder is opened once and read through its descriptor. So an opened run stays one run, whatever is renamed to
its place. All that changes what answers (edits, new versions, another run) happens in one thread of the project.
"""

from __future__ import annotations

import os
import re
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mach.errors import ConfigError, DataError, MachError
from mach.files.places import Place, place
from mach.files.visible import visible
from mach.model.ask import by_chance
from mach.model.calibration import fingerprint
from mach.model.classes.versions import Versions
from mach.model.loading import load
from mach.model.model import MachModel
from mach.serving.problems import RequestError
from mach.serving.search import NameIndex

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
REMOTE_SECONDS = 10.0  # a run behind a URL is looked at so often
PATIENCE_SECONDS = 0.5  # rows wait so long for a new version of the classes
MOST_EDITS = 16
MOST_EXPLAINED_CLASSES = 20  # classes of an answer
RETRY_SECONDS = 1.0  # after a run in its place that could not be opened
WARM = "warm up"
State = tuple[Any, ...]


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
    """The best classes of one row, which version of which run answered, and whether it knows a feature of the row."""

    version: str
    results: list[dict[str, Any]]
    known: bool


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
                raise DataError(f"there is no class named {one!r:.80}: see /classes")
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


class Project:
    """A run that is served.

    Parameters
    ----------
    name : str
        Its part of an address.
    path : str or path
        Of the run.
    language : str
        Of its labels, as BCP 47 writes it; "und" where nobody said.
    say : callable
        Takes a line when something happens beside requests.
    """

    def __init__(self, name: str, path: str | Place, language: str, say: Callable[[str], None]) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"project {visible(name)!r:.60}: a name has letters, digits, _, . and - alone, at most 100: "
                "give NAME=RUN"
            )
        self.name, self.path, self.language, self._say = name, place(path), language, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"edit {name}")
        self._n_edits = 0  # that wait or are made
        self._seen, self._not_before, self._following = self._look(), 0.0, Future[None]()
        self._following.set_result(None)
        self.edition = self._open()
        self.modified = datetime.now(UTC)

    def close(self) -> None:
        """Wait for what is being changed."""
        self._thread.shutdown()

    def answer(self, question: Question, rows: Sequence[str]) -> list[RowAnswer]:
        """The best classes of every row, by the version that holds now; errors as of `MachModel.topk`."""
        self.follow()
        return self._answer(self.edition, question, rows)

    def explain(self, question: Question, row: str) -> RowAnswer:
        """`answer` of one row, where the first classes say why (`MachModel.explain`)."""
        self.follow()
        edition = self.edition
        [answer] = self._answer(edition, question, [row])
        explained = answer.results[:MOST_EXPLAINED_CLASSES]
        model = edition.model
        for result, why in zip(
            explained, model.explain(model.parse(row), [one["id"] for one in explained]), strict=True
        ):
            result["explanation"] = why.to_dict()
        return answer

    def _answer(self, edition: Edition, question: Question, rows: Sequence[str]) -> list[RowAnswer]:
        model, k = edition.model, min(question.k, edition.model.n_classes)
        if k == 0:
            return [RowAnswer(edition.version, [], True) for _ in rows]
        found = model.search(edition.queries(rows), k, allowed=edition.allowed(question.allowed))
        chances_Nk = model.probabilities(found.ids_Nk, found.scores_Nk, known=found.known_N)
        ids_Nk, chances_Nk = by_chance(found.ids_Nk, chances_Nk, found.known_N)
        return [
            RowAnswer(edition.version, _entries(edition, ids_k, values_k), bool(is_known))
            for ids_k, values_k, is_known in zip(ids_Nk, chances_Nk, found.known_N, strict=True)
        ]

    def similar(self, k: int, limit: int) -> RowAnswer:
        """The classes most similar to one, by cosine; DataError when it is not there."""
        edition = self.edition
        ids_k, cosines_k = edition.model.classes.similar(k, min(limit, edition.model.n_classes))
        return RowAnswer(edition.version, _entries(edition, ids_k, cosines_k), True)

    def search(self, text: str, limit: int) -> RowAnswer:
        """Classes whose name holds a text, whatever the case; those that begin with it first."""
        edition = self.edition
        return RowAnswer(edition.version, edition.entries(edition.index.find(text, limit)), True)

    def learn(self, pairs: Sequence[tuple[str, Named]]) -> Future[str]:
        """Teach rows their classes; the version that knows them.

        Classes that are not there are left out, as Annif does; DataError where none is.
        """

        def taught(edition: Edition, model: MachModel) -> None:
            ids = [edition.id_of(named) for _, named in pairs]
            known = [(row, k) for (row, _), k in zip(pairs, ids, strict=True) if k is not None]
            if known:
                model.classes.upvote(edition.queries([row for row, _ in known]), np.array([k for _, k in known]))
            elif pairs:
                raise DataError(f"there is no class {pairs[0][1].shown!r:.80}, nor any other of these: see /classes")

        return self._change(taught)

    def add(self, name: str, examples: Sequence[str], texts: Sequence[str]) -> Future[str]:
        """Add a class by rows or texts; the version that knows it."""

        def added(edition: Edition, model: MachModel) -> None:
            rows = [edition.queries(examples)] if examples else None
            model.classes.add([name], rows, [list(texts)] if texts else None)

        return self._change(added)

    def described(self) -> dict[str, Any]:
        """As Annif describes a project."""
        edition = self.edition
        return {
            "project_id": self.name,
            "name": self.name,
            "language": self.language,
            "backend": {"backend_id": "mach"},
            "vocab": {
                "vocab_id": self.name,
                "languages": [self.language],
                "size": edition.model.n_classes - len(edition.answerer.edits.removed),
                "loaded": True,
            },
            "vocab_language": self.language,
            "is_trained": True,
            "modification_time": self.modified.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "version": edition.version,
            "subsets": sorted(edition.answerer.edits.subsets),
        }

    def follow(self) -> None:
        """Take over what others did to the run's files: at once a new version of the classes, soon another run."""
        state = self._look()
        if state == self._seen or not self._following.done() or time.monotonic() < self._not_before:
            return
        self._following = self._thread.submit(self._take_over)
        if isinstance(self.path, Path) and state[:-1] == self._seen[:-1]:
            with suppress(Late):  # another edit is at work: the old version answers
                self._following.result(PATIENCE_SECONDS)

    def _take_over(self) -> None:
        state, model = self._look(), self.edition.model
        try:
            if isinstance(self.path, Path) and state[:-1] != self._seen[:-1]:
                self.edition = self._open()
            else:
                edits = Versions(model.run).load()
                if edits.version == model.classes.version:
                    self._seen = state
                    return
                self.edition = Edition(model.with_edits(edits))
        except (MachError, OSError) as error:
            self._not_before = time.monotonic() + RETRY_SECONDS
            self._say(f"{self.name}: version {self.edition.version} goes on answering: {error}")
            return
        self._seen, self.modified = state, datetime.now(UTC)
        self._say(f"{self.name}: version {self.edition.version} answers")

    def _change(self, verb: Callable[[Edition, MachModel], None]) -> Future[str]:
        def changed() -> str:
            try:
                self._take_over_if_changed()
                edition = self.edition
                model = edition.model.with_edits(edition.answerer.edits)
                verb(edition, model)
                if model.classes.version != edition.model.classes.version:
                    self.edition, self.modified = Edition(model), datetime.now(UTC)
                return self.edition.version
            finally:
                self._n_edits -= 1

        if self._n_edits >= MOST_EDITS:
            told = f"{MOST_EDITS} edits of {self.name} wait: try again in a second"
            raise RequestError(429, told, {"Retry-After": "1"})
        self._n_edits += 1
        return self._thread.submit(changed)

    def _take_over_if_changed(self) -> None:
        if self._look() != self._seen:
            self._take_over()

    def _look(self) -> State:
        """Which run is in its place, and last, which version of its classes."""
        if not isinstance(self.path, Path):
            return (int(time.monotonic() / REMOTE_SECONDS),)
        names = ("", "manifest.json", "RERANKED", "calibration.json", "classes/CURRENT")
        return tuple(_mark(self.path / name, is_folder=not name) for name in names)

    def _open(self) -> Edition:
        if isinstance(self.path, Path):
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise ConfigError(f"{self.path}: {error.strerror}: give a run made by `mach train`") from error
            pinned = f"/proc/self/fd/{descriptor}"
            try:
                model = load(pinned)
                weakref.finalize(model.run, os.close, descriptor)
            except MachError as error:
                os.close(descriptor)
                raise type(error)(str(error).replace(pinned, str(self.path))) from error
        else:
            model = load(self.path)
        try:
            model.curve()
            edition = Edition(model)
            self._warm(edition)
        except MachError as error:
            told = str(error).replace(str(model.run.path), str(self.path))
            raise type(error)(told) from error
        return edition

    def _warm(self, edition: Edition) -> None:
        """Read what is read on first use, so that a project that is ready answers fast."""
        model = edition.model
        row: Any = WARM
        if model.run.text_features is None:
            row = np.zeros(model.n_features, np.float32)
        ids_k, scores_k = model.topk(row, min(10, model.n_classes), probabilities=True)
        _entries(edition, ids_k, scores_k)


def _entries(edition: Edition, ids_k: NDArray[np.int64], values_k: NDArray[np.float32]) -> list[dict[str, Any]]:
    is_found = ids_k >= 0
    entries = edition.entries(ids_k[is_found].tolist())
    return [entry | {"score": value} for entry, value in zip(entries, values_k[is_found].tolist(), strict=True)]


def _mark(path: Path, *, is_folder: bool) -> tuple[int, ...] | None:
    """What changes when a file is replaced, or a folder is renamed away."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if is_folder else (found.st_ino, found.st_mtime_ns, found.st_size)


def project_names(runs: Sequence[str]) -> dict[str, str]:
    """Names of projects and their runs, given as RUN or NAME=RUN; ConfigError when two are called the same.

    >>> project_names(["runs/books", "old=runs/books-2025"])
    {'books': 'runs/books', 'old': 'runs/books-2025'}
    """
    named: dict[str, str] = {}
    for given in runs:
        name, equals, path = given.partition("=")
        if not equals or not NAME.fullmatch(name):
            path, name = given, re.sub(r"[^A-Za-z0-9_.-]", "-", Path(given.rstrip("/")).absolute().name)
        if name in named:
            raise ConfigError(f"two runs are called {name!r}, {named[name]} and {path}: give one as NAME=RUN")
        named[name] = path
    if not named:
        raise DataError("there is no run to serve: give one")
    return named
