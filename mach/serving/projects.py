"""A run as a project of the server: it answers by one version of its classes at a time, and follows its files.

A run's folder is opened once and read through its descriptor. So an opened run stays one run, whatever is renamed to
its place. All that changes what answers (edits, new versions, another run) happens in one thread of the project.
Actors of a cluster open a run by its name instead: it is followed in versions of its classes alone.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.errors import ConfigError, DataError, MachError, StorageError
from mach.files.places import Place, place
from mach.files.visible import visible
from mach.model.ask import by_chance
from mach.model.classes.versions import Versions
from mach.model.loading import load
from mach.model.model import MachModel
from mach.serving.edition import Edition, Named, Question, RowAnswer
from mach.serving.problems import RequestError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
REMOTE_SECONDS = 10.0  # a run behind a URL is looked at so often
PATIENCE_SECONDS = 0.5  # rows wait so long for a new version of the classes
MOST_EDITS = 16
MOST_EXPLAINED_CLASSES = 20  # classes of an answer
RETRY_SECONDS = 1.0  # after a run in its place that could not be opened
REPLACED = "another run is in its place, or a calibration: start the server anew for it"
WARM = "warm up"
_HEARS = threading.Lock()  # one at a time hears warnings: Python has one place for who does, of all threads
State = tuple[Any, ...]


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
    launcher, address : str, optional
        Who keeps the weights, as of `mach.load`.
    """

    def __init__(
        self,
        name: str,
        path: str | Place,
        language: str,
        say: Callable[[str], None],
        launcher: str = "local",
        address: str | None = None,
    ) -> None:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"project {visible(name)!r:.60}: a name has letters, digits, _, . and - alone, at most 100: "
                "give NAME=RUN"
            )
        self.name, self.path, self.language, self._say = name, place(path), language, say
        self._where: dict[str, Any] = {"launcher": launcher, "address": address}
        self._is_remote = launcher != "local"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"edit {name}")
        self._n_edits = 0  # that wait or are made
        self._seen, self._not_before, self._following = self._look(), 0.0, Future[None]()
        self._following.set_result(None)
        self.edition = self._open()
        self.modified = datetime.now(UTC)

    def close(self) -> None:
        """Wait for what is being changed, and end the actors that keep the weights, where such do."""
        self._thread.shutdown()
        self.edition.model.close()

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
            RowAnswer(edition.version, _entries(edition, ids_k, values_k), bool(is_known), found.is_degraded)
            for ids_k, values_k, is_known in zip(ids_Nk, chances_Nk, found.known_N, strict=True)
        ]

    def similar(self, k: int, limit: int) -> RowAnswer:
        """The classes most similar to one, by cosine; DataError when it is not there."""
        if self._is_remote:
            raise DataError(
                "similar classes are read from the weights, which are on a cluster: a server of them cannot tell"
            )
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
                search = f"/v1/projects/{self.name}/classes?query="
                raise DataError(
                    f"there is no class {pairs[0][1].shown!r:.80}, nor any other of these: search with {search}"
                )

        return self._change(taught)

    def add(self, name: str, examples: Sequence[str], texts: Sequence[str]) -> Future[str]:
        """Add a class by rows or texts; the version that knows it."""

        def added(edition: Edition, model: MachModel) -> None:
            rows = [edition.queries(examples)] if examples else None
            try:
                model.classes.add([name], rows, [list(texts)] if texts else None)
            except DataError as error:  # a class that nothing is known of is placed in Python alone
                raise DataError(str(error).partition(" (--example")[0]) from error

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
        if self._is_remote and state[:-1] != self._seen[:-1]:
            self._not_before = math.inf
            self._say(f"{self.name}: version {self.edition.version} goes on answering: {self.path}: {REPLACED}")
            return
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
                if self._not_before == math.inf:
                    raise StorageError(f"{self.path}: {REPLACED}")
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
        if self._look() != self._seen and self._not_before < math.inf:
            self._take_over()

    def _look(self) -> State:
        """Which run is in its place, and last, which version of its classes."""
        if not isinstance(self.path, Path):
            return (int(time.monotonic() / REMOTE_SECONDS),)
        names = ("", "manifest.json", "RERANKED", "calibration.json", "classes/CURRENT")
        return tuple(_mark(self.path / name, is_folder=not name) for name in names)

    def _open(self) -> Edition:
        if isinstance(self.path, Path) and not self._is_remote:
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise ConfigError(f"{self.path}: {error.strerror}: give a run made by `mach train`") from error
            pinned = f"/proc/self/fd/{descriptor}"
            try:
                with _HEARS, warnings.catch_warnings(record=True) as heard:
                    model = load(pinned, **self._where)
                weakref.finalize(model.run, os.close, descriptor)
            except MachError as error:
                os.close(descriptor)
                raise type(error)(str(error).replace(pinned, str(self.path))) from error
            for one in heard:
                warnings.warn(str(one.message).replace(pinned, str(self.path)), one.category, stacklevel=2)
        else:
            model = load(self.path, **self._where)
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
