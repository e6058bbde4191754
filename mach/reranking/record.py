"""What a finished re-ranker tells about itself, and whether a run is due one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, model_validator

from mach.config import Section
from mach.config.keys import MAX_CANDIDATES
from mach.files.places import is_there
from mach.files.records import Digest, read_json, whole
from mach.files.tensors import expect_digest, local_tensors, map_tensors
from mach.reranking.signals.classifiers import FORMULAS

if TYPE_CHECKING:
    from mach.runs.run import Run

FORMAT: Literal[1] = 1
# Keys that runs of earlier versions had in their configuration, in its order and with its defaults.
RETIRED_KEYS: dict[str, Any] = {
    "candidates": 0,
    "loss": "hinge",
    "cost": 1.0,
    "negatives": 100_000,
    "pairs": 0,
    "power": 1.0,
    "iterations": 6,
    "tolerance": 0.1,
    "threshold": 0.05,
    "class_weights": None,
    "bytes": None,
    "weight": None,
    "prior": None,
    "repeats": None,
    "pilots": 0,
    "views": [],
    "inputs": False,
}
YOUNG_KEYS = ("pairs", "class_weights", "repeats", "power", "pilots", "views", "inputs")  # left out at their defaults


class Record(Section):
    """The content of RERANKED."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    format: Literal[1] = FORMAT
    fingerprint: Digest  # of what the re-ranker was made from and with
    repetitions: list[int]  # those that the candidates come from
    settings: dict[str, Any]  # candidates, repeats and pilots of the configuration, and those of the fitting
    weight: float  # this and the next four are the blend, which is without effect where an order is learned
    prior: float = 0.0
    repeats: float = 0.0
    mention: float = 0.0
    likeness: float = 0.0
    validated: bool  # whether held-out rows chose the blend
    learned: bool = False  # whether the order is a learned one
    n_weights: int  # stored weights of classifiers
    n_bytes: int  # of all arrays
    n_pairs: int  # pairs of row and class that the classifiers were fitted to
    cpu_seconds: float  # without those of pilots
    digest: Digest  # of the arrays

    @model_validator(mode="after")
    def _check(self) -> Self:
        whole(self.settings, "settings.candidates", 1, MAX_CANDIDATES)
        return self

    @property
    def candidates(self) -> int:
        """C."""
        return int(self.settings["candidates"])

    @property
    def formula(self) -> str:
        """How a score is made, in a line."""
        if self.learned:
            return "order learned by a network over aggregate, margins and counts"
        loss = FORMULAS["logistic" if self.settings.get("loss") == "logistic" else "hinge"]
        formula = f"score = aggregate - {self.weight:g} {loss} {self.prior:+g} log(1 + rows)"
        if self.repeats:
            what = "share of equal rows)" if self.repeats > 0 else "1 + equal rows of the class)"
            formula += f" {self.repeats:+g} log({what}"
        if self.mention:
            formula += f" {self.mention:+g} log(share of rows that mention its name)"
        if self.likeness:
            formula += f" {self.likeness:+g} (share of what the query shares with any class - 1)"
        return formula


def fingerprint(run: Run) -> str:
    """Digest of all that decides the classifiers: settings, data, and the weights of all repetitions."""
    config = run.config
    digests = [run.repetition(r).summary().weights_digest for r in range(config.hashing.repetitions)]
    settings = config.reranking.model_dump()
    retired = {key.partition(".")[2]: value for key, value in run.retired.items() if key.startswith("reranking.")}
    if retired:  # as the version that made the run wrote it
        settings = RETIRED_KEYS | retired | settings
        settings = {k: v for k, v in settings.items() if k not in YOUNG_KEYS or v != RETIRED_KEYS[k]}
    parts = (FORMAT, settings, config.decoding.aggregate, run.manifest.data_fingerprint, digests)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def is_due(run: Run) -> bool:
    """Whether a re-ranker is wanted, all repetitions are finished, and none is there of these settings and weights."""
    if run.config.reranking.candidates == 0 or len(run.finished()) < run.config.hashing.repetitions:
        return False
    return not is_there(run.reranked) or read_json(run.reranked, Record).fingerprint != fingerprint(run)


def local_file(run: Run) -> Path:
    """The file on this machine; a remote one is fetched once a machine and compared with what RERANKED says."""
    return local_tensors(run.reranker_file, read_json(run.reranked, Record).digest)


def verify(run: Run) -> None:
    """Compare the arrays, if there are any, with the digest of their training; a StorageError if they differ."""
    if is_there(run.reranked):
        expect_digest(run.reranker_file, map_tensors(local_file(run))[0], read_json(run.reranked, Record).digest)
