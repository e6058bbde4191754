"""Opening a trained run as a model: in this process, or with its repetitions kept by the actors of a cluster."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from mach.errors import ConfigError, DegradedWarning, IncompleteRunError
from mach.files.places import Place
from mach.model import hub
from mach.model.ask import whole
from mach.model.classes.versions import Versions
from mach.model.model import MachModel
from mach.networks.trunk import Trunk
from mach.runs.run import Run
from mach.runs.scorer import LocalScorer


def load(
    path: str | Place,
    *,
    repetitions: Sequence[int] | None = None,
    version: int | None = None,
    trunk: Trunk | None = None,
    launcher: str = "local",
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    resources: dict[str, float] | None = None,
    timeout_seconds: float | None = None,
    start_seconds: float | None = None,
) -> MachModel:
    """Open a trained run as a model; weights are mapped, so it takes milliseconds and no memory of its own.

    Parameters
    ----------
    path : str, Path or UPath
        Run directory made by ``mach train``, here or below a URL; unfinished repetitions are left out. Weights behind
        a URL are fetched into the cache, once a machine. ``hf://user/model`` is a model of the Hugging Face hub, whose
        weights are compared with the digests of training.
    repetitions : sequence of int, optional
        Use these only.
    version : int, optional
        Of the run's classes, where they were changed since it was trained; 0 as trained, by default as they are now.
    trunk : class or str, optional
        Where the run's networks have a trunk of its maker's own (``network.trunk``): that class, or its name
        "package.module:Class". It is code, so a run never imports it by itself.
    launcher : {"local", "ray"}
        With "ray", actors on a Ray cluster map the weights, each those of some repetitions, and answer the same. All
        further arguments are for this launcher alone, as of `mach.runs.actors.serve`, which has their defaults.
    address : str, optional
        Head of the Ray cluster, ``host:port``; by default as Ray finds it.
    workers, threads : int, optional
        Actors, by default as many as find a place, at most one a repetition; threads (and processors) of an actor.
    resources : dict, optional
        Custom Ray resources of an actor.
    timeout_seconds, start_seconds : float, optional
        After so long a batch is answered without actors that have not answered; how long to wait for all to be ready.

    Raises
    ------
    StorageError
        When the folder is no run or is damaged.
    IncompleteRunError
        When a wanted repetition, or every one, is not finished; when no actor of the cluster is ready in time.
    ConfigError
        When the launcher is unknown, lacks ray or does not take an argument; when the run's trunk was not passed.

    Examples
    --------
    >>> import mach
    >>> model = mach.load("runs/characters")  # doctest: +SKIP
    >>> ids, scores = model.topk("black chess queen", k=5)  # doctest: +SKIP
    >>> model.names(ids)[0]  # doctest: +SKIP
    'BLACK CHESS QUEEN'
    """
    options: dict[str, Any] = {
        "address": address,
        "workers": workers,
        "threads": threads,
        "resources": resources,
        "timeout_seconds": timeout_seconds,
        "start_seconds": start_seconds,
    }
    asked = {name: value for name, value in options.items() if value is not None}
    if launcher not in ("local", "ray"):
        raise ConfigError(f"launcher {launcher!r} is unknown: choose local or ray")
    if launcher == "local" and asked:
        raise ConfigError(f"{', '.join(asked)}: the launcher local takes no such argument: choose the launcher ray")
    is_of_hub = isinstance(path, str) and path.startswith(hub.PREFIX)
    run = Run.open(hub.fetch(str(path)) if is_of_hub else path, trunk)
    finished, n_repetitions = run.finished(), run.config.hashing.repetitions
    if repetitions is None:
        chosen = finished
    else:
        given = [repetitions] if isinstance(repetitions, str) or not isinstance(repetitions, Iterable) else repetitions
        chosen = list(dict.fromkeys(whole("repetition", r, 0) for r in given))
    missing = sorted(set(chosen) - set(finished))
    if missing:
        raise IncompleteRunError(
            f"{run.path}: repetitions {missing} are not finished, {finished} are: train on, or name those"
        )
    if not chosen:
        raise IncompleteRunError(f"{run.path}: no repetition is finished yet: train on with the same command")
    run.check()
    if repetitions is None and len(chosen) < n_repetitions:
        warnings.warn(
            f"{run.path}: {len(chosen)} of {n_repetitions} repetitions answer: the others are not finished, or their "
            "folders are gone; train on with the same command",
            DegradedWarning,
            stacklevel=2,
        )
    edits = Versions(run).load(version)
    if launcher == "local":
        model = MachModel(run, chosen, LocalScorer(run, chosen), edits)
        if is_of_hub:
            model.verify()
        return model
    from mach.runs.actors import serve

    return MachModel(run, chosen, serve(run, chosen, **asked), edits)
