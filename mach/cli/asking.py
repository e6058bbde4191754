"""The verbs that ask a run: evaluate, calibrate, predict, query, report, info."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from mach.cli.options import ALLOWED, JSON, PROBABILITIES, RERANK, RUN, TAIL, K, asks
from mach.cli.shell import (
    PLACE,
    parse_integer,
    print_table,
    print_values,
    progress,
    read_lines,
    trunk_option,
    warnings_as_lines,
)
from mach.errors import ConfigError, StorageError
from mach.files.places import Place

if TYPE_CHECKING:
    from mach.data.store import Store
    from mach.model.model import MachModel
    from mach.sketch.answers import TopK


@click.command()
@asks
@click.argument("data", required=False)
@click.option("--at", "ks", default="1,3,5", show_default=True, help="Cut-offs k.")
@click.option("--curve/--no-curve", default=True, help="Also for the first 1, 2, ... repetitions.")
@RERANK
@TAIL
@click.option(
    "--reliability", is_flag=True, help="Also expected calibration errors of probabilities, before and after."
)
@JSON
def evaluate(
    model: MachModel,
    data: str | None,
    ks: str,
    curve: bool,
    rerank: bool,
    tail: float,
    reliability: bool,
    as_json: bool,
) -> None:
    """Measure RUN on DATA (the configuration's data.test by default), in percent; re-ranked in the last row."""
    from mach.evaluation.accuracy import evaluate as evaluate_model
    from mach.model.ask import Ask

    source = data or model.run.config.data.test
    if source is None:
        raise ConfigError(f"{model.run.path} names no data.test: give DATA")
    store = _prepared(model, source)
    cuts = tuple(sorted({parse_integer(k, "--at") for k in ks.split(",")}))
    with progress() as report:
        measured = evaluate_model(
            model,
            store,
            ks=cuts,
            curve=curve,
            ask=Ask(rerank=rerank, tail=tail),
            reliability=reliability,
            report=report,
        )
    if curve and not tail and model.repetitions == model.run.finished():
        _keep_curve(model, store, measured)
    rows = [
        {name: 100 * value if isinstance(value, float) else value for name, value in row.items()} for row in measured
    ]
    names = [f"{name}@{k}" for name in ("P", "nDCG", "PSP", "recall", "hit") for k in cuts]
    shown = [
        "n_repetitions",
        *(["reranked"] if rows[-1]["reranked"] else []),
        *(name for name in names if name not in ("nDCG@1", "hit@1")),  # those equal P@1
        *(["ECE uncalibrated", "ECE"] if reliability else []),
    ]
    print_table(rows if as_json else [{name: row.get(name) for name in shown} for row in rows], as_json)


@click.command()
@asks
@click.argument("data", required=False)
@JSON
def calibrate(model: MachModel, data: str | None, as_json: bool) -> None:
    """Fit probabilities to rows that RUN was not trained on: DATA, or the training rows it held out."""
    from mach.model.calibration import described, held_out

    if data is not None:
        found = model.calibrate(_prepared(model, data))
    else:
        from mach.training.finetuning import training_store

        try:
            with progress() as report:
                store = training_store(model.run, report)
        except StorageError as error:
            raise ConfigError(f"{error}: bring those rows back, or give DATA") from error
        found = model.calibrate(store, held_out(model.run, store))
    if as_json:
        knots = {"scores", "probabilities"}
        click.echo(found.model_dump_json(exclude={"plain": knots, "reranked": knots}))
    else:
        click.echo(described(found))


@click.command()
@asks
@click.argument("data")
@click.option("-o", "--output", default="-", show_default=True, help=".jsonl, .csv, .parquet or .npz; - is JSONL.")
@K
@ALLOWED
@RERANK
@TAIL
@PROBABILITIES
def predict(
    model: MachModel,
    data: str,
    output: str,
    k: int,
    allowed: str | None,
    rerank: bool,
    tail: float,
    probabilities: bool,
) -> None:
    """Write the top k classes of every row of DATA."""
    from mach.evaluation.predictions import write_predictions
    from mach.model.ask import Ask

    def values(part: TopK) -> Any:
        if not probabilities:
            return part.scores_Nk
        return model.probabilities(part.ids_Nk, part.scores_Nk, rerank=rerank, tail=tail)

    ask = Ask(allowed, rerank=rerank, tail=tail)
    if probabilities:
        model.curve(rerank=rerank)  # missing, it is missed before the work
    store = _prepared(model, data)
    kind = ("probability", "probabilities") if probabilities else ("score", "scores")
    with progress() as report:
        parts = _reported(model.search_in_parts(store, k, ask), store.n_rows, report)
        write_predictions(output, ((part.ids_Nk, values(part)) for part in parts), model.name_function(), kind)


@click.command()
@asks
@click.argument("queries", nargs=-1)
@K
@ALLOWED
@RERANK
@TAIL
@PROBABILITIES
@JSON
def query(
    model: MachModel,
    queries: tuple[str, ...],
    k: int,
    allowed: str | None,
    rerank: bool,
    tail: float,
    probabilities: bool,
    as_json: bool,
) -> None:
    """Answer QUERIES: texts, or rows as `index:value ...` where the model takes numbers; - reads lines from stdin."""
    for line in read_lines(queries):
        parsed = model.parse(line)
        ids, scores = model.topk(parsed, k, allowed=allowed, rerank=rerank, tail=tail, probabilities=probabilities)
        found = ids[ids >= 0].tolist()
        names = model.names(found) if model.name_function() else None
        if as_json:
            kind = "probabilities" if probabilities else "scores"
            answer = {"query": line, "ids": found, kind: [round(float(s), 6) for s in scores[: len(found)]]}
            click.echo(json.dumps(answer | ({"names": names} if names else {}), ensure_ascii=False))
        else:
            click.echo(line)
            for k_, score, name in zip(found, scores, names or [""] * len(found), strict=False):
                click.echo(f"  {score:9.4f}  {k_:>9}  {name}".rstrip())


@click.command("report")
@RUN
@click.argument("data", required=False)
@click.option("-o", "--output", type=PLACE, help="The HTML file; report.html in RUN by default.")
@click.option("--images", type=PLACE, help="Folder for the plots as PNG files, too.")
@trunk_option
def write_report(run: Place, data: str | None, output: Place | None, images: Place | None, trunk: str | None) -> None:
    """Write one HTML page about RUN, finished or not: curves, accuracy on DATA (data.test by default), costs."""
    from mach.evaluation.report.sections import write_report as write

    with warnings_as_lines(), progress() as report:
        where = write(run, data, output=output, images=images, trunk=trunk, report=report)
    click.echo(where)


@click.command()
@RUN
@click.option("--verify", is_flag=True, help="Also compare all weights with the digests that training recorded.")
@trunk_option
@JSON
def info(run: Place, verify: bool, trunk: str | None, as_json: bool) -> None:
    """Show what the model in RUN is: counts, bytes, training cost, and bytes exchanged between repetitions (0)."""
    from mach.model.loading import load

    model = load(run, trunk=trunk)
    if verify:
        model.verify()
    print_values(model.info(), as_json)


def _keep_curve(model: MachModel, store: Store, measured: list[dict[str, Any]]) -> None:
    """Store the accuracy by repetitions in the run, where it can be written."""
    from mach.files.records import write_json
    from mach.runs.run import AccuracyCurve

    rows = [{name: value for name, value in row.items() if value is not None} for row in measured]
    with suppress(StorageError):
        curve = AccuracyCurve(
            fingerprint=store.fingerprint, n_rows=store.n_rows, version=model.classes.version, rows=rows
        )
        write_json(model.run.curve_file, curve.model_dump())


def _reported(parts: Iterable[TopK], n_rows: int, report: Callable[[str, float], None]) -> Iterator[TopK]:
    n_done = 0
    for part in parts:
        yield part
        n_done += len(part.ids_Nk)
        report("predicting", n_done / n_rows)


def _prepared(model: MachModel, source: str) -> Store:
    from mach.data.prepare import prepare as prepare_data

    config = model.run.config
    with progress() as report:
        store = prepare_data(config.data, config.text, source, like=model.reference(), report=report)
    if unknown := store.meta["n_unknown_classes"]:
        click.echo(f"mach: {source}: {unknown:,} classes of its rows are unknown to the run and left out", err=True)
    return store
