"""One page about a run: what it is and costs, how it was trained, where it is right and wrong.

`write_report` gathers sections of text, plots (`mach.cli.report.plots`) and tables
(`mach.cli.report.page`). matplotlib and Jinja are optional: ``pip install 'mach-classifier[report]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mach.cli.report import plots
from mach.cli.report.classes import classes, examples
from mach.cli.report.diagnosis import Diagnosis, bucket_load, diagnose
from mach.cli.report.headline import headline
from mach.cli.report.legends import legend, legend_of
from mach.cli.report.numbers import shown
from mach.cli.report.page import (
    Block,
    Code,
    Number,
    Plot,
    Section,
    Table,
    clean,
    decimals,
    percent,
    plain,
    quantity,
    render,
    template,
)
from mach.config import Config
from mach.data.omissions import warn
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import MachError, StorageError, counted
from mach.files.places import Place, atomic_file
from mach.model.accuracy import measures, test_rows
from mach.model.calibration import Calibration
from mach.model.loading import load
from mach.networks.trunk import Trunk
from mach.runs.run import Run
from mach.runs.status import outlook, spell_seconds, status
from mach.training.launch.capacity import plan_by_counts

if TYPE_CHECKING:
    from mach.model.model import MachModel

NAME_CHARACTERS = 120  # most that is shown of a name
ASSUMED_FEATURES = 100.0  # of a row, as `mach plan` takes it, where nothing tells
DESCRIBED = ("n_rows", "n_classes", "n_features", "loss", "precision", "mach_version", "data_fingerprint")
MEASURED = {
    "aggregate": "aggregate",
    "prior": "prior",
    "n_parameters": "stored parameters",
    "weight_bytes": "weights on disk",
    "reranker_bytes": "re-ranker on disk",
    "worker_seconds": "seconds of training, all workers",
    "peak_worker_bytes": "memory of a worker, at most",
    "peer_bytes": "sent between repetitions",
}
MOST_LINES = 12  # of a table that is not folded
Report = Callable[[str, float], None]


def write_report(
    path: str | Place,
    data: str | None = None,
    *,
    output: Place | None = None,
    images: Place | None = None,
    trunk: Trunk | None = None,
    report: Report = lambda stage, fraction: None,
) -> Place:
    """Write a page about a run, finished or not, and return where it is.

    Parameters
    ----------
    path : str or Place
        The run.
    data : str, optional
        Rows with their classes, as of `mach.data.prepare.prepare`; by default the run's ``data.test``. Without either,
        or without a finished repetition, the page holds what needs no rows. Cost: two to three passes of the model over
        the rows, one over the K classes.
    output : Place, optional
        The HTML file; by default ``report.html`` in the run.
    images : Place, optional
        A folder for the plots as PNG files.
    trunk, report
        As of `mach.train`.

    Raises
    ------
    ConfigError, StorageError, DataError
        When matplotlib or Jinja are not installed, or the run's trunk was not passed; when the run or the given data
        cannot be read, or the page cannot be written.
    """
    template()  # missing, it is missed before the work
    with plots.style():
        run = Run.open(path, trunk)
        run.agreed_trunk()
        sections = _sections(run, data, report)
        content = render(sections, run.path.name, str(run.path))
        if images is not None:
            _write_images(sections, images)
    where = run.path / "report.html" if output is None else output
    with atomic_file(where) as file:
        file.write(content)
    return where


def _write_images(sections: list[Section], folder: Place) -> None:
    if isinstance(folder, Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the folder {folder}: {error.strerror}") from error
    for block in (block for section in sections for block in section.blocks if isinstance(block, Plot)):
        with atomic_file(folder / f"{block.name}.png") as file:
            file.write(plots.png(block.figure))


def _sections(run: Run, data: str | None, report: Report) -> list[Section]:
    model = load(run.path, repetitions=run.finished(), trunk=run.trunk) if run.finished() else None
    rows = _test_rows(run, model, data, report)
    source = data or run.config.data.test
    diagnosis = None
    measured = [Section("accuracy", "Accuracy", [rows])] if isinstance(rows, str) else []
    if model and source and isinstance(rows, Store):
        diagnosis, names_of = diagnose(model, rows, report), model.name_function()

        def names(k: int) -> str:
            return f"class {k}" if names_of is None else clean(str(names_of(k)), NAME_CHARACTERS)

        measured = [
            _accuracy(diagnosis, rows, source),
            classes(run, diagnosis, rows, names),
            examples(model, diagnosis, rows, source, names),
        ]
    nonzeros = None if isinstance(rows, str) else rows.n_nonzeros / rows.n_rows
    first = [Section("headline", "The figures", [headline(model, diagnosis)])] if model else []
    return [
        *first,
        _about(run, model, diagnosis),
        _training(run),
        measured[0],
        _reliability(run, diagnosis),
        _bucket_load(run),
        *measured[1:],
        _ledger(run, nonzeros),
        _configuration(run.config),
    ]


def _test_rows(run: Run, model: MachModel | None, data: str | None, report: Report) -> Store | str:
    """The rows to measure on; or why there are none."""
    if data is None and run.config.data.test is None:
        return "No rows to measure on: give DATA, or data.test in the configuration."
    if model is None:
        return "No repetition is finished yet, so nothing can be measured."
    try:
        source = data or test_rows(run)
        assert source is not None, "one of both is there"
        store = prepare(run.reading, run.config.text, source, like=model.reference(), report=report)
        warn(store, is_query=True)
        return store
    except MachError as error:
        if data is not None:
            raise
        return f"Not measured, as the configuration's data.test cannot be read: {error}"


def _about(run: Run, model: MachModel | None, diagnosis: Diagnosis | None) -> Section:
    manifest, hashing = run.manifest, run.config.hashing
    facts: dict[str, Any] = {"repetitions": f"{len(run.finished())} of {hashing.repetitions} finished"}
    facts |= {name: getattr(manifest, name) for name in DESCRIBED}
    facts |= {"hash functions of a repetition": hashing.heads, "buckets": manifest.n_buckets}
    facts |= {"assignment": run.assignment_kind}
    if model is not None:
        info = model.info()
        facts |= {meaning: _value(name, info[name]) for name, meaning in MEASURED.items() if name in info}
    if diagnosis is not None:
        last = diagnosis.curve[-1]
        facts |= {f"P@{k}, %": percent(last[f"P@{k}"]) for k in (1, 3, 5)}
        facts |= {"measured": f"{'re-ranked, ' if last['reranked'] else ''}{len(diagnosis.right_Nk):,} rows"}
    rows = [[name.replace("_", " ").removeprefix("n "), _value(name, value)] for name, value in facts.items()]
    return Section("about", "The run", [Table(["", ""], rows)])


def _training(run: Run) -> Section:
    states = [status(run, r) for r in range(run.config.hashing.repetitions)]
    metrics_R = [run.repetition(r).read_metrics() for r in range(len(states))]
    blocks: list[Block] = [f"{outlook(states)}."]
    if any(metrics_R):
        is_validated = any("validation_loss" in row for rows in metrics_R for row in rows)
        caption = "A line a repetition" + ("; dashed: of validation rows." if is_validated else ".")
        caption += " Bucket precision: rows whose best bucket holds one of their classes."
        blocks.append(Plot("training", plots.training(metrics_R), caption))
    rows = []
    for state, metrics in zip(states, metrics_R, strict=True):
        last = metrics[-1] if metrics else {}
        row = [state["repetition"], state["state"], Number(f"{state['epoch'] or 0} of {state['n_epochs']}")]
        row += [decimals(state["loss"], 4), percent(state["bucket_precision"])]
        row += [decimals(last.get("validation_loss"), 4), percent(last.get("validation_bucket_precision"))]
        row += [decimals(state["rows_per_second"], 0)]
        row += [Number(spell_seconds(state["seconds_left"]) if state["seconds_left"] else "")]
        rows.append(row)
    headings = ["repetition", "state", "epoch", "loss", "bucket precision, %", "validation loss"]
    headings += ["validation bucket precision, %", "rows a second", "left"]
    kept = [n for n in range(len(headings)) if any(str(row[n]) for row in rows)]
    headings, rows = [headings[n] for n in kept], [[row[n] for n in kept] for row in rows]
    table = Table(headings, rows, f"{counted(len(rows), 'repetition')}, a line each", folded=len(rows) > MOST_LINES)
    words = [
        "loss",
        "bucket precision",
        *(["validation"] if "validation loss" in headings else []),
        *(["rows a second"] if "rows a second" in headings else []),
        *(["left"] if "left" in headings else []),
    ]
    return Section("training", "Training", [*blocks, table, legend(*words)])


def _accuracy(diagnosis: Diagnosis, store: Store, source: str) -> Section:
    curve = diagnosis.curve
    names = measures([int(name[2:]) for name in curve[0] if name.startswith("P@")])
    rows = [
        [row["n_repetitions"], "re-ranked" if row["reranked"] else "", *(percent(row[name]) for name in names)]
        for row in curve
    ]
    text = f"{counted(store.n_rows, 'row')} of {source}, by the first 1, 2, … repetitions; percent."
    if unknown := store.meta["n_unknown_classes"]:
        text += f" {counted(unknown, 'class name')} of these rows, unknown to the model, not counted."
    plot = Plot("repetitions", plots.repetitions(curve), "Accuracy by repetitions; stars: re-ranked.")
    return Section("accuracy", "Accuracy", [text, plot, Table(["R", "", *names], rows), legend_of(names)])


def _reliability(run: Run, diagnosis: Diagnosis | None) -> Section:
    calibration = Calibration.load(run)
    blocks: list[Block] = []
    if calibration is None:
        blocks.append(f"The run has no calibration. Make one: mach calibrate {run.path} DATA")
    if diagnosis is not None:
        caption = "The best 10 classes of each row, in bins of equally many pairs of row and class. "
        caption += "Before: what scores look like; after: calibrated. ECE: expected calibration error."
        blocks.append(Plot("reliability", plots.reliability(diagnosis.reliability), caption))
    if calibration is not None:
        rows = [
            [name, curve.method, curve.n_pairs, percent(curve.ece_before), percent(curve.ece_after)]
            for name, curve in (("plain", calibration.plain), ("re-ranked", calibration.reranked))
            if curve is not None
        ]
        caption = f"Fitted to {calibration.n_rows:,} rows that were not trained on; errors cross-validated on them."
        blocks.append(Table(["scores", "curve", "pairs", "ECE before, %", "ECE after, %"], rows, caption))
    blocks.append(legend("calibration error (ECE)", "before, after", "pairs"))
    return Section("reliability", "Reliability of probabilities", blocks)


def _bucket_load(run: Run) -> Section:
    buckets = bucket_load(run)
    if not buckets.functions:
        return Section("load", "Bucket load", ["The assignment is learned, and no repetition is finished yet."])
    headings, columns = ["hash function"], [buckets.functions]
    for what, counts_RB in (("classes", buckets.classes_RB), ("rows", buckets.rows_RB)):
        for name, value in (("least", np.min), ("median", np.median), ("most", np.max)):
            headings.append(f"{what}, {name}")
            columns.append(value(counts_RB, axis=1).astype(int).tolist())
    text = "A line a hash function. A row counts once for each of its classes."
    rows = list(zip(*columns, strict=True))
    table = Table(headings, rows, f"Least, median and most of {len(rows):,} hash functions", folded=True)
    blocks: list[Block] = [Plot("load", plots.load(buckets), text), table, legend("bucket", "rows of a bucket")]
    return Section("load", "Bucket load", blocks)


def _ledger(run: Run, nonzeros: float | None) -> Section:
    manifest = run.manifest
    assumed = float(manifest.row_features or ASSUMED_FEATURES)
    chosen = plan_by_counts(
        run.config,
        n_classes=manifest.n_classes,
        n_features=manifest.n_features,
        n_rows=manifest.n_rows,
        n_positives=int(run.class_counts_K().sum()),
        nonzeros_per_row=manifest.n_features if manifest.dense_input else nonzeros or assumed,
        dense_input=manifest.dense_input,
        has_names=run.class_names is not None and run.text_features is not None,
    )
    rows = [[name, *quantity(value, unit)] for name, value, unit in chosen.rows()]
    text = "What this configuration costs, counted from its shape alone (mach plan)"
    if not manifest.dense_input:
        text += ", with as many features in a row as the test rows have" if nonzeros else f", at {assumed:.0f} in a row"
    return Section("ledger", "The ledger", [f"{text}.", Table(["", "", "unit"], rows)])


def _configuration(config: Config) -> Section:
    usual = Config.model_validate({"data": {"train": config.data.train}})
    rows = []
    for section in Config.model_fields:
        mine, theirs = getattr(config, section), getattr(usual, section)
        for key, field in type(mine).model_fields.items():
            value, default = getattr(mine, key), getattr(theirs, key)
            if value != default or (section, key) == ("data", "train"):
                cells = [f"{section}.{key}", plain(value), "" if value == default else plain(default)]
                rows.append([*map(Code, cells), field.description or ""])
    text = "Keys that differ from the defaults, given or chosen by the data (mach.training.recipe)."
    return Section("configuration", "Configuration", [text, Table(["key", "value", "default", ""], rows)])


def _value(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return Number(" ".join(quantity(value, "bytes")))
    if isinstance(value, Number):
        return value
    return Number(shown(value)) if isinstance(value, int | float) else plain(value)
