"""Answer queries with repetitions that actors of a Ray cluster keep, each some of them; weights never travel.

A batch of queries goes to every actor once, and R' B bucket probabilities a query come back. Whoever is lost or late is
left out of the answer, which then is that of a model with the remaining repetitions, and is started again meanwhile.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mach.data.batch import Batch, DenseBatch, SparseBatch
from mach.errors import ConfigError, DegradedWarning, IncompleteRunError, MachError
from mach.networks.trunk import find_as, for_workers
from mach.runs.ray import Actor, ActorLostError, Call, Cluster, Resources, node_name
from mach.runs.run import Run
from mach.runs.scorer import LocalScorer

GRACE_SECONDS = 1.0  # for an answer that has arrived while another was waited for
LATE_TIMEOUTS = 3  # timeouts after which an actor that still has not answered is given up
OPENING_SECONDS = 1800.0  # the same for one that is being started: a node may have to fetch gigabytes
LONGEST_PAUSE_SECONDS = 60.0  # between attempts to start an actor that fails


def serve(
    run: Run,
    repetitions: list[int],
    *,
    address: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    resources: dict[str, float] | None = None,
    timeout_seconds: float = 10.0,
    start_seconds: float = 120.0,
) -> RemoteScorer:
    """Start actors that keep finished repetitions, each a stretch of them, on as many nodes as there are.

    All nodes see the run under the same path or URL. `mach.load` says what the arguments are.

    Raises
    ------
    ConfigError
        When ray is not installed, or the run has a trunk that was not passed.
    IncompleteRunError
        When the cluster cannot be reached, or no actor is ready in time.
    """
    for_workers(run.agreed_trunk())  # fails before a cluster is asked for anything
    cluster = Cluster(address)
    needs = Resources(cpus=threads, custom=resources or {})
    n_workers = min(workers or max(1, cluster.capacity(needs)), len(repetitions))
    scorer = RemoteScorer(cluster, run, repetitions, n_workers, needs, timeout_seconds)
    try:
        scorer.wait_for_start(start_seconds)
    except BaseException:
        scorer.close()
        raise
    return scorer


class ScoreServer:
    """The actor: maps the weights of some repetitions on its node, which sees the run under ``path``.

    The run must have these fingerprints (`fingerprints_of`); ``job`` is of `mach.networks.trunk.for_workers`.
    """

    def __init__(self, path: str, fingerprints: tuple[str, str], repetitions: list[int], job: dict[str, Any]) -> None:
        self._path, self._fingerprints, self._repetitions, self._job = path, fingerprints, repetitions, job
        self._scorer: LocalScorer | None = None

    def open(self) -> None:
        """Map the weights and answer a query, so that the first one of a user finds everything compiled."""
        try:
            find_as(self._job.get("path", []))
            run = Run.open(self._path, self._job.get("trunk"))
            if fingerprints_of(run) != self._fingerprints:
                raise ConfigError(f"{self._path} is another run there: give a path or URL that all nodes see alike")
            self._scorer = LocalScorer(run, self._repetitions)
            self.ask("probabilities", _smallest_batch(run))
        except MachError as error:
            raise type(error)(f"{error} (on node {node_name()})") from error

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of its `LocalScorer` returns."""
        return getattr(self._scorer, method)(*arguments)


@dataclass(eq=False)
class _Part:
    """A stretch of the repetitions, and the actor that keeps it, if one does."""

    columns: tuple[int, ...]
    actor: Actor | None = None
    pending: Call | None = None  # its opening or a late answer: before that has ended it is asked nothing
    deadline: float = 0.0  # of what is pending
    has_answered: bool = False
    n_failures: int = 0  # without an answer in between
    start_at: float = 0.0  # when there is no actor
    cause: str = "its actor is not ready yet"  # of not answering


class RemoteScorer:
    """Asks the actors that keep the weights; a `mach.runs.scorer.Scorer`, made by `serve`, with its arguments.

    The cluster is closed together with the scorer. There is at most one worker a repetition; ``resources`` are those of
    an actor, and ``clock`` gives seconds that only grow.
    """

    def __init__(
        self,
        cluster: Cluster,
        run: Run,
        repetitions: list[int],
        n_workers: int,
        resources: Resources,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._repetitions, self._resources = cluster, repetitions, resources
        self._path = str(run.path.absolute() if isinstance(run.path, Path) else run.path)
        self._fingerprints, self._job = fingerprints_of(run), for_workers(run.agreed_trunk())
        self._timeout_seconds, self._clock = timeout_seconds, clock
        self._lock = Lock()  # of the parts; never held while an answer is waited for
        self._is_closed = False
        self._parts = [_Part(tuple(part.tolist())) for part in np.array_split(np.arange(len(repetitions)), n_workers)]
        self._start_due()

    def probabilities(
        self, batch: Batch, n_repetitions: int | None = None
    ) -> tuple[NDArray[np.float32], tuple[int, ...]]:
        answers = self._ask(self._timeout_seconds, "probabilities", batch)
        columns = tuple(c for part, _ in answers for c in part.columns)
        probs_NRB = np.concatenate([probs for _, (probs, _) in answers], axis=1)
        if n_repetitions is None:
            return probs_NRB, columns
        n_heads = probs_NRB.shape[1] // len(columns)
        columns = tuple(c for c in columns if c < n_repetitions)
        if not columns:
            raise IncompleteRunError(
                f"{self._path}: none of the first {n_repetitions} repetitions answers now: ask again in a while, or "
                "ask for more of them"
            )
        return np.ascontiguousarray(probs_NRB[:, : len(columns) * n_heads]), columns

    def sizes(self) -> dict[str, int]:
        parts = [sizes for _, sizes in self._ask(self._timeout_seconds, "sizes")]
        return {name: sum(sizes[name] for sizes in parts) for name in parts[0]}

    def verify(self) -> None:
        self._ask(None, "verify")  # it takes as long as reading all files

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for part in self._parts:
                if part.actor is not None:
                    part.actor.kill()
        self._cluster.close()

    def wait_for_start(self, seconds: float) -> None:
        """Wait until every actor is ready or has failed, or time is over; IncompleteRunError when none is ready."""
        deadline = self._clock() + seconds
        while (pending := [part.pending for part in self._parts if part.pending]) and self._clock() < deadline:
            self._cluster.wait(pending, deadline - self._clock())
            with self._lock:
                self._hear()
        for part in self._parts:
            if part.pending:
                part.cause = f"its actor was not ready within {seconds:g} s; it reads its weights or waits for a place"
        if silent := [part for part in self._parts if part.pending or not part.actor]:
            self._warn(silent)

    def _ask(self, timeout_seconds: float | None, method: str, *arguments: Any) -> list[tuple[_Part, Any]]:
        """What a method returned of all actors that are ready, and did so in time; IncompleteRunError for none."""
        with self._lock:
            if self._is_closed:
                raise ConfigError(f"the model of {self._path} is closed: load it again")
            self._hear()
            self._start_due()
            ready = [(part, part.actor) for part in self._parts if part.actor and not part.pending]
            calls = [(part, actor, actor.call("ask", method, *arguments)) for part, actor in ready]
        deadline = None if timeout_seconds is None else self._clock() + timeout_seconds
        answers = []
        for part, actor, call in calls:
            try:
                answer = call.result(None if deadline is None else max(deadline - self._clock(), GRACE_SECONDS))
            except TimeoutError:
                self._late(part, actor, call)
            except ActorLostError as error:
                with self._lock:
                    self._lost(part, actor, str(error))
            else:
                part.has_answered = True
                answers.append((part, answer))
        if len(answers) < len(self._parts):
            with self._lock:
                self._start_due()
            self._warn([part for part in self._parts if part not in [answering for answering, _ in answers]])
        return answers

    def _warn(self, silent: list[_Part]) -> None:
        """Tell which repetitions do not answer; an error if none does."""
        causes = "; ".join(dict.fromkeys(part.cause for part in silent))
        if len(silent) == len(self._parts):
            raise IncompleteRunError(f"{self._path}: no repetition answers now ({causes}): ask again in a while")
        missing = [self._repetitions[column] for part in silent for column in part.columns]
        n_all = len(self._repetitions)
        warnings.warn(
            f"{self._path}: {n_all - len(missing)} of {n_all} repetitions answer, without {missing} ({causes}): "
            "their actors are started again meanwhile",
            DegradedWarning,
            stacklevel=2,
        )

    def _hear(self) -> None:
        """Take note of what was pending and has ended, or should have."""
        pending = {part.pending: part for part in self._parts if part.pending}
        for call in self._cluster.wait(pending, 0.0):
            part = pending[call]
            try:
                call.result(GRACE_SECONDS)
            except Exception as error:  # whatever it was, this actor will not do
                self._lost(part, part.actor, str(error))
            else:
                part.pending = None
        for part in self._parts:
            if part.pending and self._clock() > part.deadline:
                self._lost(part, part.actor, part.cause)

    def _start_due(self) -> None:
        """Start the actors that are missing, but not those that have just failed; none of it takes time."""
        for part in self._parts:
            if part.actor is None and not self._is_closed and self._clock() >= part.start_at:
                repetitions = [self._repetitions[column] for column in part.columns]
                arguments = (self._path, self._fingerprints, repetitions, self._job)
                part.actor = self._cluster.start(ScoreServer, *arguments, resources=self._resources, spread=True)
                part.pending, part.deadline = part.actor.call("open"), self._clock() + OPENING_SECONDS
                part.has_answered = False

    def _late(self, part: _Part, actor: Actor, call: Call) -> None:
        with self._lock:
            if part.actor is actor and part.pending is None:
                part.pending = call
                part.deadline = self._clock() + LATE_TIMEOUTS * self._timeout_seconds
                part.cause = f"no answer within {self._timeout_seconds:g} s"

    def _lost(self, part: _Part, actor: Actor | None, cause: str) -> None:
        """Give an actor up; one that has answered is replaced at once, one that never did after a growing pause."""
        if part.actor is not actor or actor is None:
            return  # another thread has been faster
        actor.kill()
        part.actor = part.pending = None
        part.cause = cause
        part.n_failures = 0 if part.has_answered else part.n_failures + 1
        pause = min(2.0 ** (part.n_failures - 1), LONGEST_PAUSE_SECONDS) if part.n_failures else 0.0
        part.start_at = self._clock() + pause


def fingerprints_of(run: Run) -> tuple[str, str]:
    """What tells runs apart: digests of the data and of the configuration."""
    return run.manifest.data_fingerprint, run.manifest.config_fingerprint


def _smallest_batch(run: Run) -> Batch:
    """A row as actors receive them: kernels are compiled for arrays that cannot be written to."""
    if run.manifest.dense_input:
        values_ND = np.zeros((1, run.manifest.n_features), np.float32)
        values_ND.flags.writeable = False
        return DenseBatch(values_ND)
    arrays = np.array([0, 1], np.int64), np.zeros(1, np.int32), np.ones(1, np.float32)
    for array in arrays:
        array.flags.writeable = False
    return SparseBatch(*arrays)
