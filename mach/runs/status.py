"""How far the repetitions of a run are, from its files alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mach.errors import counted
from mach.runs.run import Run


def status(run: Run, repetition: int) -> dict[str, Any]:
    """How far a repetition is; ``heard_seconds_ago`` says how long ago its trainer said so."""
    files, n_epochs = run.repetition(repetition), run.config.training.epochs
    if files.is_done:
        done = files.summary()
        told = (files.read_metrics() or [{}])[-1]
        row = {"state": "finished", "host": done.host, "step": done.steps, "n_steps": done.steps, "seconds_left": 0.0}
        row |= {"heard_seconds_ago": None, "epoch": done.epochs}
    else:
        sign = files.progress()
        told = sign.model_dump() if sign else (files.read_metrics() or [{}])[-1]
        is_begun = bool(told) or files.is_begun
        row = {"state": "training" if files.is_trained_now else "stopped" if is_begun else "waiting"}
        row |= {name: told.get(name) for name in ("host", "step", "n_steps", "seconds_left")}
        row |= {"heard_seconds_ago": sign and sign.age_seconds, "epoch": told.get("epoch", 0)}
    figures = {name: told.get(name) for name in ("loss", "bucket_precision", "rows_per_second")}
    return {"repetition": repetition} | row | {"n_epochs": n_epochs} | figures


def outlook(rows: Sequence[dict[str, Any]]) -> str:
    """One line about the whole run, from the `status` of all repetitions: how much is finished, and what is left."""
    n_finished = sum(row["state"] == "finished" for row in rows)
    training = [row for row in rows if row["state"] == "training" and row["seconds_left"] is not None]
    line = f"{n_finished} of {counted(len(rows), 'repetition')} finished"
    if n_finished == len(rows):
        return line
    if not training and any(row["state"] == "training" for row in rows):
        return f"{line}, others have just begun"
    if not training:
        return f"{line}, nobody trains the others: run the same `mach train` again to go on"
    speed = sum((row["n_steps"] - row["step"]) / max(row["seconds_left"], 1e-3) for row in training)
    n_steps = max(row["n_steps"] or 0 for row in rows)
    n_left = sum(n_steps - (row["step"] or 0) for row in rows if row["state"] != "finished")
    seconds = max(n_left / max(speed, 1e-9), *(row["seconds_left"] for row in training))
    return f"{line}, {len(training)} trained now: about {spell_seconds(seconds)} left"


def spell_seconds(seconds: float) -> str:
    """A duration as people say it.

    Examples
    --------
    >>> spell_seconds(48.2), spell_seconds(600), spell_seconds(9000)
    ('48 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
