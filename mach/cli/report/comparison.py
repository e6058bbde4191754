"""One page that sets runs beside each other, on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mach.cli.report import plots
from mach.cli.report.diagnosis import SHOWN, Diagnosis, diagnose
from mach.cli.report.headline import CUTS, figures, spelt
from mach.cli.report.legends import legend, legend_of
from mach.cli.report.page import Block, Code, Number, Plot, Section, Table, clean, percent, render, template
from mach.cli.report.sections import Report
from mach.config import differing_keys
from mach.data.omissions import warn
from mach.data.prepare import prepare
from mach.errors import ConfigError, IncompleteRunError
from mach.files.places import Place, atomic_file
from mach.model.accuracy import measures, test_rows
from mach.model.loading import load
from mach.model.model import MachModel
from mach.networks.trunk import Trunk
from mach.runs.run import Run

DATA_KEYS = ("data.cache", "launch.")  # which say nothing of a model


def write_comparison(
    paths: Sequence[Place],
    data: str | None = None,
    *,
    output: Place | None = None,
    trunk: Trunk | None = None,
    report: Report = lambda stage, fraction: None,
) -> Place:
    """Write a page about two or more runs, and return where it is: ``comparison.html`` in the first, unless given.

    They are measured on ``data``, by default the ``data.test`` of the first. ConfigError when there is neither,
    IncompleteRunError when a run has no finished repetition, others as of a page about one run.
    """
    template()  # missing, it is missed before the work
    runs = [Run.open(path, trunk) for path in paths]
    labels = [run.path.name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [str(run.path) for run in runs]
    source = data or test_rows(runs[0])
    if source is None:
        raise ConfigError(f"{runs[0].path} names no data.test: give DATA, rows to compare the runs on")
    if unfinished := [run.path for run in runs if not run.finished()]:
        raise IncompleteRunError(f"{unfinished[0]} has no finished repetition to measure: train it, or leave it out")
    models, found = [], []
    with plots.style():
        for run in runs:
            run.agreed_trunk()
            model = load(run.path, repetitions=run.finished(), trunk=run.trunk)
            store = prepare(run.reading, run.config.text, source, like=model.reference(), report=report)
            warn(store, is_query=True)
            models.append(model)
            found.append(diagnose(model, store, report))
        parts = [
            _headlines(models, found, labels, source),
            _accuracy(found, labels),
            _classes(models, found, labels),
            _configuration(runs, labels),
        ]
        content = render(parts, " · ".join(labels), ", ".join(str(run.path) for run in runs))
    where = runs[0].path / "comparison.html" if output is None else output
    with atomic_file(where) as file:
        file.write(content)
    return where


def difference(mine: Diagnosis, theirs: Diagnosis) -> tuple[float, float]:
    """P@1 of theirs above mine, as a share, and its standard error: of the differences of the same rows."""
    gain_N = theirs.right_Nk[:, 0].astype(float) - mine.right_Nk[:, 0]
    return float(gain_N.mean()), float(gain_N.std(ddof=1) / np.sqrt(len(gain_N))) if len(gain_N) > 1 else 0.0


def _headlines(models: list[MachModel], found: list[Diagnosis], labels: list[str], source: str) -> Section:
    columns = [figures(model, diagnosis) for model, diagnosis in zip(models, found, strict=True)]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [
        [name, *(Number(spelt(name, column[name]) if name in column else "") for column in columns)] for name in names
    ]
    lines: list[Block] = [Table(["", *labels], rows)]
    for label, diagnosis in zip(labels[1:], found[1:], strict=True):
        gain, error = difference(found[0], diagnosis)
        verdict = "more than chance explains" if abs(gain) > 2 * error else "no more than chance explains"
        lines.append(
            f"{label} has {100 * gain:+.1f} points of P@1 beside {labels[0]}, ± {200 * error:.1f} (two standard errors "
            f"of the same rows' differences): {verdict}."
        )
    n_rows = len(found[0].right_Nk)
    what = legend("P@k", "calibration error (ECE)", "size", "time")
    return Section("headline", "The figures", [f"{n_rows:,} rows of {source}.", *lines, what])


def _accuracy(found: list[Diagnosis], labels: list[str]) -> Section:
    names = measures(CUTS)
    rows = []
    for label, diagnosis in zip(labels, found, strict=True):
        last = diagnosis.curve[-1]
        kind = "re-ranked" if last["reranked"] else ""
        rows.append([label, last["n_repetitions"], kind, *(percent(last[name]) for name in names)])
    curves = {label: diagnosis.curve for label, diagnosis in zip(labels, found, strict=True)}
    plot = Plot("compared", plots.compared(curves, CUTS), "Accuracy by repetitions; stars: re-ranked.")
    return Section("accuracy", "Accuracy", [plot, Table(["run", "R", "", *names], rows), legend_of(names)])


def _classes(models: list[MachModel], found: list[Diagnosis], labels: list[str]) -> Section:
    groups: dict[str, list[dict[str, Any]]] = {}
    for label, model, diagnosis in zip(labels, models, found, strict=True):
        known_K, n_classes = model.run.class_counts_K(), len(diagnosis.recall.n_rows_K)
        counts_K = np.pad(known_K[:n_classes], (0, max(0, n_classes - len(known_K))))
        groups[label] = diagnosis.recall.by_training_rows(counts_K)
    spans = sorted({(group["least"], group["most"]) for found_ in groups.values() for group in found_})
    recalls = [{(g["least"], g["most"]): g["recall"] for g in found_} for found_ in groups.values()]
    rows = [
        [
            Number(f"{least:,}" if least == most else f"{least:,}–{most:,}"),
            *(percent(r.get((least, most))) for r in recalls),
        ]
        for least, most in spans
    ]
    plot = Plot("recalls", plots.recalls(groups, SHOWN), "Classes by their training rows.")
    table = Table(["training rows", *(f"{label}, %" for label in labels)], rows)
    return Section("classes", f"Recall@{SHOWN} of classes", [plot, table, legend("recall@k", "training rows")])


def _configuration(runs: list[Run], labels: list[str]) -> Section:
    lines = [line for run in runs[1:] for line in differing_keys(runs[0].config, run.config, ignore=DATA_KEYS)]
    keys = list(dict.fromkeys(line.partition(":")[0] for line in lines))
    rows = []
    for key in keys:
        section, _, name = key.partition(".")
        values = [getattr(getattr(run.config, section), name.partition(".")[0], None) for run in runs]
        rows.append([Code(key), *(Code("" if value is None else clean(str(value), 60)) for value in values)])
    text = "Keys that differ." if rows else "All keys that make a model are equal."
    facts = [
        [name, *(getattr(run.manifest, f"n_{name}") for run in runs)]
        for name in ("rows", "classes", "features", "buckets")
    ]
    blocks: list[Block] = [Table(["", *labels], facts), text]
    return Section("configuration", "What differs", [*blocks, *([Table(["key", *labels], rows)] if rows else [])])
