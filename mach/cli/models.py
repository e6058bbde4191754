"""The verbs that ask a trained run: evaluate, calibrate, predict, query, report, info."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from mach.cli.options import JSON, NUMBERS, PLACE, RERANK, RUN, TAIL, TRUNK, Wish, answers, asks
from mach.cli.serving import PROJECT, TOKEN_FILE, URL, AtUrl
from mach.cli.shell import Printer, print_table, print_values, progress, read_lines, say
from mach.errors import ConfigError, StorageError
from mach.files.places import Place, place

if TYPE_CHECKING:
    from mach.data.store import Store
    from mach.model.ask import Ask
    from mach.model.model import MachModel


@click.command()
@asks
@click.argument("data", required=False)
@click.option("--at", "ks", type=NUMBERS, default="1,3,5", show_default=True, help="Cut-offs k.")
@click.option("--curve/--no-curve", default=True, help="Also for the first 1, 2, ... repetitions.")
@RERANK
@TAIL
@click.option(
    "--reliability", is_flag=True, help="Also expected calibration errors of probabilities, before and after."
)
@JSON
def evaluate(
    model: MachModel, data: str | None, ks: list[int], curve: bool, ask: Ask, reliability: bool, as_json: bool
) -> None:
    """Measure RUN on DATA, in percent; re-ranked in the last row. DATA is the configuration's data.test by default."""
    from mach.files.records import write_json
    from mach.model.accuracy import evaluate as measure
    from mach.model.accuracy import measures, test_rows
    from mach.runs.manifest import AccuracyCurve

    source = data or test_rows(model.run)
    if source is None:
        raise ConfigError(f"{model.run.path} names no data.test: give DATA")
    store = _prepared(model, source, measures=True)
    if data is None:  # an error names it as well
        say(f"mach: measured on {source}, which {model.run.path} names as data.test", err=True)
    with progress() as report:
        shares = measure(model, store, ks=tuple(ks), curve=curve, ask=ask, reliability=reliability, report=report)
    if curve and not ask.tail and model.repetitions == model.run.finished():
        known = [{name: v for name, v in row.items() if v is not None} for row in shares]
        curve_of_now = AccuracyCurve(
            fingerprint=store.fingerprint, n_rows=store.n_rows, version=model.classes.version, rows=known
        )
        with suppress(StorageError):  # a run that cannot be written has no curve
            write_json(model.run.curve_file, curve_of_now.model_dump())
    rows = [{name: 100 * v if isinstance(v, float) else v for name, v in row.items()} for row in shares]
    if not as_json:
        columns = ["n_repetitions", *(["reranked"] if rows[-1]["reranked"] else []), *measures(ks)]
        columns += ["ECE uncalibrated", "ECE"] if reliability else []
        rows = [{name: row.get(name) for name in columns} for row in rows]
    print_table(rows, as_json)


@click.command()
@asks
@click.argument("data", required=False)
@JSON
def calibrate(model: MachModel, data: str | None, as_json: bool) -> None:
    """Fit probabilities to rows that RUN was not trained on. They are DATA, or the training rows that it held out."""
    from mach.model.calibration import described, held_out
    from mach.training.finetuning import training_store

    if data is not None:
        calibration = model.calibrate(_prepared(model, data, measures=True))
    else:
        try:
            with progress() as report:
                store = training_store(model.run, report)
        except StorageError as error:
            raise ConfigError(f"{error}: bring those rows back, or give DATA") from error
        calibration = model.calibrate(store, held_out(model.run, store))
    knots = {"scores", "probabilities"}
    as_text = calibration.model_dump_json(exclude={"plain": knots, "reranked": knots})
    say(as_text if as_json else described(calibration))


@click.command()
@asks
@click.argument("data")
@click.option("-o", "--output", default="-", show_default=True, help=".jsonl, .csv, .parquet or .npz; - is JSONL.")
@click.option("--id", "id_column", metavar="COLUMN", help="Column of DATA that names a row, in place of its number.")
@answers
def predict(model: MachModel, data: str, output: str, id_column: str | None, wish: Wish) -> None:
    """Write the top k classes of every row of DATA."""
    from mach.data.prepare import column_of
    from mach.model.predictions import write_predictions, writer_of

    writer_of(output)
    row_ids = column_of(model.run.reading, data, id_column) if id_column else None
    store = _prepared(model, data)
    n_unknown = 0

    def reported() -> Iterator[tuple[Any, Any, Any]]:
        nonlocal n_unknown
        n_done = 0
        for part in wish.answers(model, store):
            yield part
            n_done += len(part[0])
            n_unknown += int((~part[2]).sum())
            report("predicting", n_done / store.n_rows)

    with progress() as report:
        write_predictions(output, reported(), model.name_function(), wish.kind, row_ids, model.uri_function())
    if n_unknown > store.meta["n_rows_without_features"]:  # that number was told
        told = f"{n_unknown:,} of {store.n_rows:,} rows have no feature that the run knows"
        say(f"mach: {store.meta['source']}: {told}: their answers say nothing of them", err=True)


@click.command(cls=AtUrl, no_args_is_help=True)
@asks
@click.argument("queries", nargs=-1)
@answers
@click.option("--explain", is_flag=True, help="Say why: the words that each class rests on, what adds to its score.")
@JSON
@URL
@PROJECT
@TOKEN_FILE
def query(model: MachModel, queries: tuple[str, ...], wish: Wish, explain: bool, as_json: bool, **at: Any) -> None:
    """Answer QUERIES by RUN: texts, or rows as `index:value ...` where it takes numbers; - reads lines from stdin.

    With --url a server that `mach serve` started answers in place of RUN, always with probabilities.
    """
    names_of, uris_of = model.name_function(), model.uri_function()
    printer = Printer(wish.kind, wish.threshold, as_json)
    for line in read_lines(queries):
        asked = model.parse(line)
        [(ids_1k, values_1k, [is_known])] = wish.answers(model, asked)
        ids, values = ids_1k[ids_1k >= 0].tolist(), values_1k[ids_1k >= 0].tolist()
        why = model.explain(asked, ids, rerank=wish.ask.rerank, tail=wish.ask.tail) if explain else None
        told = {"names": names_of(ids) if names_of else None, "uris": uris_of(ids) if uris_of else None}
        printer.answer(line, ids, values, told, why, is_known=bool(is_known))


@click.command("report")
@RUN
@click.argument("others", metavar="[OTHER_RUN]... [DATA]", nargs=-1)
@click.option("-o", "--output", type=PLACE, help="The HTML file; report.html or comparison.html in RUN by default.")
@click.option("--images", type=PLACE, help="Folder for the plots as PNG files, too.")
@TRUNK
def write_report(
    run: Place, others: tuple[str, ...], output: Place | None, images: Place | None, trunk: str | None
) -> None:
    """Write one HTML page about RUN, finished or not. It has curves, accuracy on DATA (data.test by default), costs.

    With OTHER_RUNs the page compares them with RUN, on the same rows.
    """
    from mach.cli.report.comparison import write_comparison
    from mach.cli.report.sections import write_report as write
    from mach.model.accuracy import trained_on
    from mach.runs.run import Run

    runs = [place(other) for other in others if Run.is_at(other)]
    data = [other for other in others if not Run.is_at(other)]
    if len(data) > 1:
        raise ConfigError(f"{data[0]} and {data[1]} are no runs, and only one may be DATA: correct their names")
    source = data[0] if data else None
    if source and (told := trained_on(Run.open(run), source)):
        say(f"mach: {told}", err=True)
    with progress() as report:
        if runs:
            where = write_comparison([run, *runs], source, output=output, trunk=trunk, report=report)
        else:
            where = write(run, source, output=output, images=images, trunk=trunk, report=report)
    say(where)


@click.command()
@RUN
@click.option("--verify", is_flag=True, help="Also compare all weights with the digests that training recorded.")
@TRUNK
@JSON
def info(run: Place, verify: bool, trunk: str | None, as_json: bool) -> None:
    """Show what the model in RUN is. Counts, bytes, training cost, and bytes exchanged between repetitions (0)."""
    from mach.model.loading import load

    model = load(run, trunk=trunk)
    if verify:
        model.verify()
    print_values(model.info(), as_json)


def _prepared(model: MachModel, source: str, *, measures: bool = False) -> Store:
    """Rows to ask, or to measure something on, which those of training should not be."""
    from mach.data.omissions import warn
    from mach.data.prepare import prepare
    from mach.model.accuracy import trained_on

    with progress() as report:
        store = prepare(model.run.reading, model.run.config.text, source, like=model.reference(), report=report)
    warn(store, is_query=True, measures=measures)
    if measures and (told := trained_on(model.run, source, store)):
        say(f"mach: {told}", err=True)
    return store
