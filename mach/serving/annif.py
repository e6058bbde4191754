"""A backend ``mach`` for Annif (https://annif.org), the tool of libraries that index subjects.

Annif has no plug-in points, but imports the configuration that ``ANNIF_CONFIG`` names. Naming one of this module's puts
the backend among Annif's own:

    ANNIF_CONFIG=mach.serving.annif.ProductionConfig annif train my-mach corpus.tsv

The vocabulary of the project is the list of classes. The run is the folder `RUN` of the project's data.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import annif.backend
import annif.default_config
import numpy as np
from annif.backend.backend import AnnifBackend, AnnifLearningBackend
from annif.exception import (
    ConfigurationException,
    NotInitializedException,
    NotSupportedException,
    OperationFailedException,
)
from annif.suggestion import SubjectSuggestion, SuggestionBatch
from numpy.typing import NDArray
from rich.console import Console

from mach.config import Config as RunConfig
from mach.config import parse_config
from mach.data.names import class_name, shown
from mach.data.skos import Skos
from mach.errors import MachError
from mach.model.ask import Answer
from mach.model.loading import load
from mach.model.model import MachModel
from mach.runs.run import Run
from mach.sketch.aggregates import naive
from mach.sketch.answers import Subset
from mach.training.conductor import train

NAME = "mach"
RUN = "mach-run"
ROWS, CLASSES, PART = "mach-train.jsonl", "mach-train-classes.jsonl", "tmp-mach-run"  # no model by Annif's patterns
WORDS_OF_SKOS = re.compile(rb"altLabel|hiddenLabel|definition|broader|narrower")
LEAST_SCORE = np.float32(1e-6)  # Annif drops suggestions of 0


class Opened(NamedTuple):
    """A model by one version of its classes, and what the vocabulary has of these."""

    model: MachModel
    subjects_K: NDArray[np.int64]  # of every class its number in the vocabulary, -1 where it is not there
    allowed: Subset | None


class MachBackend(AnnifLearningBackend):
    """What Annif asks of a backend, by a run.

    Parameters of a project are ``limit`` (suggestions of a document, 100), ``effort`` (fast, balanced or best), and all
    keys of a run as ``section.key``, such as ``training.epochs = 8``.
    """

    name = NAME
    DEFAULT_PARAMETERS = {"limit": 100}  # noqa: RUF012 (Annif's own is a plain dictionary)
    _opened: Opened | None = None  # replaced as a whole: threads of a server suggest while another one learns

    def initialize(self, parallel: bool = False) -> None:
        """Open the run."""
        if self._opened is not None:
            return
        if not Run.is_at(self._path):
            raise NotInitializedException(f"{self._path} has no run: train the project", backend_id=self.backend_id)
        with self._errors():
            self._opened = self._agreed(load(self._path))

    @property
    def _path(self) -> Path:
        return Path(self.datadir, RUN)

    @property
    def _model_file_paths(self) -> list[str]:
        """Files of the finished run: what is left of an interrupted training is no model."""
        return [path for path in super()._model_file_paths if Path(path).is_relative_to(self._path)]

    def _train(self, corpus: Any, params: dict[str, Any], jobs: int = 0) -> None:
        folder = Path(self.datadir)
        if corpus != "cached":
            self._write_classes(folder / CLASSES)
            self._write_rows(corpus, folder / ROWS)
        elif not (folder / ROWS).exists():
            raise NotSupportedException("no cached training data: train with documents first", backend_id=NAME)
        part = folder / PART
        shutil.rmtree(part, ignore_errors=True)
        console = Console(stderr=True, quiet=not annif.logger.isEnabledFor(logging.INFO))
        with self._errors():
            train(self._config(params), part, workers=jobs or None, console=console)
        self._opened = None
        shutil.rmtree(self._path, ignore_errors=True)
        part.rename(self._path)

    def _suggest_batch(self, documents: list[Any], params: dict[str, Any]) -> Any:
        assert self._opened is not None
        model, subjects_K, allowed = self._opened
        k = min(int(params["limit"]), model.n_classes)
        if k < 1 or not documents:
            return SuggestionBatch.from_sequence([[] for _ in documents], self.project.subjects)
        with self._errors():
            found = model.search([shown(document.text) for document in documents], k, allowed=allowed)
        values_Nk, is_answer_Nk = descending(_probabilities(model, found)), (found.ids_Nk >= 0) & found.known_N[:, None]
        answers = [
            [SubjectSuggestion(*pair) for pair in zip(subjects_K[ids_k], values_k, strict=True)]
            for ids_k, values_k in ((found.ids_Nk[n, is_k], values_Nk[n, is_k]) for n, is_k in enumerate(is_answer_Nk))
        ]
        return SuggestionBatch.from_sequence(answers, self.project.subjects)

    def _learn(self, corpus: Any, params: dict[str, Any]) -> None:
        """Teach documents their subjects. A subject that the vocabulary has got since training becomes a class."""
        self.initialize()
        assert self._opened is not None
        model = self._opened.model.with_edits(self._opened.model.classes.edits)
        classes = {subject: k for k, subject in enumerate(self._opened.subjects_K.tolist()) if subject >= 0}
        texts: list[str] = []
        ids: list[int] = []
        examples: defaultdict[int, list[str]] = defaultdict(list)  # of subjects that are no class yet
        for document in corpus.documents:
            for subject in document.subject_set:
                if subject in classes:
                    texts.append(shown(document.text))
                    ids.append(classes[subject])
                else:
                    examples[subject].append(shown(document.text))
        with self._errors():
            if examples:
                uris = [self.project.subjects[subject].uri for subject in examples]
                names = [self._free_name(model, subject) for subject in examples]
                model.classes.add(names, list(examples.values()), uris=uris)
            if texts:
                model.classes.upvote(texts, np.array(ids))
            self._opened = self._agreed(model)

    def _agreed(self, model: MachModel) -> Opened:
        """A model as far as its classes are in the vocabulary."""
        subjects = {class_name(subject.uri): number for number, subject in self.project.subjects.active}
        uris = model.answerer.catalogue.uris(np.arange(model.n_classes))
        subjects_K = np.array([subjects.get(uri, -1) for uri in uris], np.int64)
        subjects_K[model.classes.edits.removed] = -1
        is_there_K = subjects_K >= 0
        return Opened(model, subjects_K, None if is_there_K.all() else model.classes.subset(is_there_K))

    def _config(self, params: dict[str, Any]) -> RunConfig:
        """What a run is trained with: a parameter with a dot in its name is a key."""
        folder = Path(self.datadir)
        data = {
            "train": str(folder / ROWS),
            "classes": str(folder / CLASSES),
            "text_columns": ["text"],
            "class_column": "subjects",
        }
        effort = {"effort": params["effort"]} if params.get("effort") else {}
        given = {key: value for key, value in params.items() if "." in key}
        overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
        with self._errors():
            return parse_config({"data": data, "training": effort}, f"[{self.project.project_id}]", overrides)

    def _write_classes(self, path: Path) -> None:
        said = self._said()
        with path.open("w", encoding="utf-8") as file:
            for number, subject in self.project.subjects.active:
                row = {"id": subject.uri, "name": self._label(number), "uri": subject.uri}
                file.write(json.dumps(row | said.get(subject.uri, {})) + "\n")

    def _said(self) -> dict[str, dict[str, Any]]:
        """What a SKOS vocabulary says of its subjects beside their labels, by their addresses."""
        vocabulary = self.project.vocab
        path = Path(vocabulary.datadir, vocabulary.INDEX_FILENAME_TTL)
        if not (path.exists() and WORDS_OF_SKOS.search(path.read_bytes())):
            return {}  # Annif keeps tables of labels as SKOS too
        try:
            uris, texts = Skos(str(path), "turtle", self.project.vocab_lang.lower()).read(path)
        except MachError as error:
            self.warning(f"learning goes on without alternative labels and definitions: {error}")
            return {}
        return {
            uri: {
                "alternatives": list(texts.alternatives[k]),
                "text": texts.texts[k],
                "parents": [uris[above] for above in texts.parents[k]],
            }
            for k, uri in enumerate(uris)
        }

    def _write_rows(self, corpus: Any, path: Path) -> None:
        """Documents that have a subject of the vocabulary, a line each."""
        n_rows = 0
        with path.open("w", encoding="utf-8") as file:
            for document in corpus.documents:
                subjects = [self.project.subjects[number].uri for number in document.subject_set]
                if subjects:
                    file.write(json.dumps({"text": shown(document.text), "subjects": subjects}) + "\n")
                    n_rows += 1
        if not n_rows:
            path.unlink()
            raise NotSupportedException("Cannot train mach project with no documents")

    def _label(self, number: int) -> str:
        """The label of a subject in the project's language, else in any, else its address."""
        subject = self.project.subjects[number]
        labels = subject.labels
        return labels.get(self.project.vocab_lang) or next(filter(None, labels.values()), subject.uri)

    def _free_name(self, model: MachModel, number: int) -> str:
        """A name for a new class: its label, or its address where another class is called so."""
        label = self._label(number)
        return label if model.answerer.catalogue.id_of(label) is None else self.project.subjects[number].uri

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors raised on purpose as Annif tells its own, one line without a trace."""
        try:
            yield
        except MachError as error:
            raise OperationFailedException(str(error), backend_id=self.backend_id) from error


def descending(values_Nk: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scores above 0 that fall from column to column by at least the last bit, so that sorting keeps their order.

    >>> bool((np.diff(descending(np.float32([[0.5, 0.5, 0.0, 0.0]]))) < 0).all())
    True
    """
    values_Nk = np.maximum(values_Nk, LEAST_SCORE)
    for j in range(1, values_Nk.shape[1]):
        below_N = np.nextafter(values_Nk[:, j - 1], np.float32(0))
        values_Nk[:, j] = np.minimum(values_Nk[:, j], below_N)
    return values_Nk


def _probabilities(model: MachModel, found: Answer) -> NDArray[np.float32]:
    """Calibrated where the run is: it is not where rows were too few to hold some out."""
    if model.calibration is not None:
        return model.probabilities(found.ids_Nk, found.scores_Nk, known=found.known_N)
    return naive(found.scores_Nk, model.aggregate).astype(np.float32)


def register() -> None:
    """Put the backend among Annif's; ConfigurationException where this release keeps them elsewhere."""
    backends = getattr(annif.backend, "_backend_fns", None)
    if not isinstance(backends, dict) or not issubclass(backends.get("tfidf", object)(), AnnifBackend):
        raise ConfigurationException(
            f"annif {version('annif')} keeps its backends elsewhere than 1.4 did, in annif.backend._backend_fns: "
            "install annif 1.4, and report it to mach",
            backend_id=NAME,
        )
    backends[NAME] = lambda: MachBackend


class Config(annif.default_config.Config):
    """As Annif's of this name."""


class ProductionConfig(annif.default_config.ProductionConfig):
    """As Annif's of this name."""


class DevelopmentConfig(annif.default_config.DevelopmentConfig):
    """As Annif's of this name."""


register()
