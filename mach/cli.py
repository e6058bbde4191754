"""The command line: one thin function a verb. Results go to standard output, talk to standard error.

Exit codes: 0 done, 2 wrong usage or data, 3 a run that is not complete yet. Heavy modules are imported by the
verbs that need them, so that help answers at once.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mach import __version__
from mach.classes import classes
from mach.errors import ConfigError, IncompleteRunError, MachError, StorageError
from mach.places import Place, is_there
from mach.shell import (
    PLACE,
    parse_bytes,
    parse_integer,
    parse_numbers,
    print_rows,
    print_table,
    print_values,
    progress,
    read_lines,
    trunk_option,
    warnings_as_lines,
)
from mach.trunk import agreed

if TYPE_CHECKING:
    from mach.calibration import Calibration
    from mach.config import Config
    from mach.data.store import Store
    from mach.model import MachModel
    from mach.sketch.answers import TopK


class _Group(click.Group):
    """Prints errors raised on purpose as one line, and leaves with their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MachError as error:
            click.echo(f"mach: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("mach: stopped; nothing is half-written: run the same command again", err=True)
            ctx.exit(IncompleteRunError.exit_code)
        except BrokenPipeError:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except OSError as error:  # files that mach opens have messages of their own: this is standard output, mostly
            click.echo(f"mach: {error.filename or 'standard output'}: {error.strerror or error}", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(ConfigError.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Extreme classification by hashed, independent repetitions."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does


main.add_command(classes)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
_set = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override the configuration."
)
_workers = click.option(
    "--workers", type=click.IntRange(1), help="Most workers at a time; by default one a core, or one a shard."
)
_launcher = click.option("--launcher", type=click.Choice(["local", "ray"]), help="This machine, or a Ray cluster.")
_address = click.option("--address", metavar="HOST:PORT", help="Head of the Ray cluster; by default as Ray finds it.")
_rerank = click.option("--rerank/--no-rerank", default=True, help="Order the best classes anew, where RUN can.")
_tail = click.option(
    "--tail",
    type=float,
    default=0.0,
    show_default=True,
    help="Favour rare classes by this times -log(propensity); 0.5 to 1 suit PSP@k.",
)
_probabilities = click.option(
    "--probabilities", is_flag=True, help="Calibrated probabilities that classes are right in place of scores."
)
_allowed = click.option("--allowed", metavar="SUBSET", help="Classes of a stored subset only, see `mach classes`.")
_k = click.option("-k", "k", type=click.IntRange(1), default=10, show_default=True, help="Classes a query.")
_some = click.option("--repetitions", metavar="0-3,5", help="Use these only; all by default.")
_run = click.argument("run", type=PLACE)
_actors = click.option("--workers", type=click.IntRange(1), help="Actors on the cluster; by default one a repetition.")


def _asks(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that asks a model: says which repetitions answer and who keeps them, and gets the opened model."""

    @_run
    @_some
    @_launcher
    @_address
    @_actors
    @trunk_option
    @functools.wraps(verb)
    def opened(
        run: Place,
        repetitions: str | None,
        launcher: str | None,
        address: str | None,
        workers: int | None,
        trunk: str | None,
        **options: Any,
    ) -> None:
        from mach.loading import load

        chosen = parse_numbers(repetitions, None) if repetitions else None
        where: dict[str, Any] = {"launcher": launcher or "local", "address": address, "workers": workers}
        with warnings_as_lines(), load(run, repetitions=chosen, trunk=trunk, **where) as model:
            verb(model, **options)

    return opened


@main.command()
@click.argument("source")
@click.argument("store", type=PLACE)
@click.option("--config", type=PLACE, help="Take [data] and [text] options from this file.")
@click.option("--like", type=PLACE, help="Run or training store whose features and classes apply.")
@_set
@_json
def prepare(
    source: str, store: Place, config: Place | None, like: Place | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Turn SOURCE (a file, its URL, or builtin:characters) into a memory-mapped STORE, a folder or URL."""
    from mach.config import load_config, parse_config
    from mach.data.prepare import prepare as prepare_data
    from mach.recipe import before_reading

    defaults = [*overrides, f"data.train={json.dumps(source)}"]
    options = before_reading(load_config(config, defaults) if config else parse_config({}, "--set", defaults))
    with progress() as report:
        reference = _reference(like) if like else None
        prepared = prepare_data(options.data, options.text, source, store, like=reference, report=report)
    print_values(prepared.describe() | {"path": str(store)}, as_json)


@main.command()
@click.option("--classes", "n_classes", type=click.IntRange(2), required=True, help="K.")
@click.option("--features", "n_features", type=click.IntRange(1), required=True, help="D.")
@click.option("--memory", help="Budget for the stored model, such as 200MB or 4GB.")
@click.option("--parameters", type=click.IntRange(1), help="Budget of parameters.")
@click.option(
    "--hidden", type=click.IntRange(0), multiple=True, default=[512], show_default=True, help="Widths; 0: none."
)
@click.option("-B", "--buckets", type=click.IntRange(2), help="Fix B.")
@click.option("-R", "--repetitions", "n_repetitions", type=click.IntRange(1), help="Fix R.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Parallel workers.")
@click.option("--device-memory", help="Memory of a GPU, such as 80GB: how many repetitions train together in it.")
@_json
def plan(
    n_classes: int,
    n_features: int,
    memory: str | None,
    parameters: int | None,
    hidden: tuple[int, ...],
    buckets: int | None,
    n_repetitions: int | None,
    workers: int,
    device_memory: str | None,
    as_json: bool,
) -> None:
    """Choose B and R for K classes within a budget, and print the ledger."""
    from mach.sketch.bounds import plan as plan_sketch

    chosen = plan_sketch(
        n_classes,
        n_features,
        memory_bytes=parse_bytes(memory, "--memory") if memory else None,
        n_parameters=parameters,
        n_workers=workers,
        hidden=tuple(width for width in hidden if width),
        n_repetitions=n_repetitions,
        n_buckets=buckets,
    )
    rows = chosen.rows()
    if device_memory:
        rows.append(
            (
                "repetitions a device",
                chosen.ledger.repetitions_within(parse_bytes(device_memory, "--device-memory")),
                "at a time",
            )
        )
    print_rows(rows, as_json)


@main.command()
@click.argument("config", type=PLACE)
@click.argument("run", type=PLACE, required=False)
@_set
@_workers
@_launcher
@_address
@click.option("--repetitions", metavar="0-3,5", help="Train these only; others may be trained elsewhere.")
@click.option("--from", "start", metavar="RUN", help="Fine-tune: start from the weights of this finished run.")
@trunk_option
@click.option("--dry-run", is_flag=True, help="Read the data and print the ledger; train nothing.")
def train(
    config: Place,
    run: Place | None,
    overrides: tuple[str, ...],
    workers: int | None,
    launcher: str | None,
    address: str | None,
    repetitions: str | None,
    start: str | None,
    trunk: str | None,
    dry_run: bool,
) -> None:
    """Train the repetitions of CONFIG into RUN, a folder or URL (runs/NAME by default), or go on where it stopped.

    A run in place of CONFIG, and no RUN, goes on with that run and its own configuration. With --from, CONFIG names the
    new rows, and all that it leaves open is as in the run to start from; its own rows are replayed beside them.
    --trunk sets network.trunk, and must be given wherever a configuration or run names one.
    """
    from mach.config import load_config, load_run_config
    from mach.storage import Run

    for key, value in {"workers": workers, "launcher": launcher, "address": address}.items():
        if value is not None:
            overrides = (*overrides, f"launch.{key}={json.dumps(value)}")
    if start is not None:
        overrides = (*overrides, f"training.start={json.dumps(start)}")
    if run is None and Run.is_at(config):
        config, run = config / "config.toml", config
        options = load_run_config(config, list(overrides))[0]
    else:
        run = Path("runs") / config.stem if run is None else run
        options = load_config(config, list(overrides))
    if options.network.trunk is not None:
        agreed(options.network.trunk, trunk, config)
    if dry_run:
        _print_ledger(options, trunk)
        return
    from mach.calibration import calibrate_when_due
    from mach.launch.launchers import train as train_run
    from mach.launch.reranker import train_reranker
    from mach.launch.setup import drop_store, set_up

    is_stated = "repetitions" in options.hashing.model_fields_set
    if repetitions:  # before a run is made, as far as can be
        parse_numbers(repetitions, options.hashing.repetitions if is_stated else None)
    with progress() as report:
        opened, store = set_up(options, run, report=report, trunk=trunk)
    n_repetitions = opened.config.hashing.repetitions
    chosen = parse_numbers(repetitions, n_repetitions) if repetitions else None
    train_run(opened, store, options.launch, repetitions=chosen)
    train_reranker(opened, store, options.launch)
    calibrated = calibrate_when_due(opened, store)
    drop_store(opened)
    if calibrated is not None:
        click.echo(_calibrated(calibrated), err=True)
    click.echo(f"{run}: {len(opened.finished())} of {n_repetitions} repetitions finished", err=True)


@main.command()
@_run
@_json
def status(run: Place, as_json: bool) -> None:
    """Show how far every repetition of RUN is, from its files alone."""
    from mach.runs.status import outlook
    from mach.runs.status import status as status_of
    from mach.storage import Run

    opened = Run.open(run)
    rows = [status_of(opened, r) for r in range(opened.config.hashing.repetitions)]
    print_table(rows, as_json)
    if not as_json:
        click.echo(outlook(rows))
        if opened.config.reranking.candidates:
            n_pilots = opened.config.reranking.pilots
            taught = f", {opened.n_pilots_taught} of {n_pilots} pilots have taught" if n_pilots else ""
            click.echo(f"re-ranker {'finished' if is_there(opened.reranked) else 'not trained yet' + taught}")


@main.command()
@_asks
@click.argument("data", required=False)
@click.option("--at", "ks", default="1,3,5", show_default=True, help="Cut-offs k.")
@click.option("--curve/--no-curve", default=True, help="Also for the first 1, 2, ... repetitions.")
@_rerank
@_tail
@click.option(
    "--reliability", is_flag=True, help="Also expected calibration errors of probabilities, before and after."
)
@_json
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
    from mach.ask import Ask
    from mach.evaluation import evaluate as evaluate_model

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


@main.command()
@_asks
@click.argument("data", required=False)
@_json
def calibrate(model: MachModel, data: str | None, as_json: bool) -> None:
    """Fit probabilities to rows that RUN was not trained on: DATA, or the training rows it held out."""
    from mach.calibration import held_out

    if data is not None:
        found = model.calibrate(_prepared(model, data))
    else:
        from mach.launch.start import training_store

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
        click.echo(_calibrated(found))


@main.command()
@_asks
@click.argument("data")
@click.option("-o", "--output", default="-", show_default=True, help=".jsonl, .csv, .parquet or .npz; - is JSONL.")
@_k
@_allowed
@_rerank
@_tail
@_probabilities
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
    from mach.ask import Ask
    from mach.predictions import write_predictions

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


@main.command()
@_asks
@click.argument("queries", nargs=-1)
@_k
@_allowed
@_rerank
@_tail
@_probabilities
@_json
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


@main.command("report")
@_run
@click.argument("data", required=False)
@click.option("-o", "--output", type=PLACE, help="The HTML file; report.html in RUN by default.")
@click.option("--images", type=PLACE, help="Folder for the plots as PNG files, too.")
@trunk_option
def write_report(run: Place, data: str | None, output: Place | None, images: Place | None, trunk: str | None) -> None:
    """Write one HTML page about RUN, finished or not: curves, accuracy on DATA (data.test by default), costs."""
    from mach.report.sections import write_report as write

    with warnings_as_lines(), progress() as report:
        where = write(run, data, output=output, images=images, trunk=trunk, report=report)
    click.echo(where)


@main.command()
@_run
@click.option("--verify", is_flag=True, help="Also compare all weights with the digests that training recorded.")
@trunk_option
@_json
def info(run: Place, verify: bool, trunk: str | None, as_json: bool) -> None:
    """Show what the model in RUN is: counts, bytes, training cost, and bytes exchanged between repetitions (0)."""
    from mach.loading import load

    model = load(run, trunk=trunk)
    if verify:
        model.verify()
    print_values(model.info(), as_json)


def _calibrated(found: Calibration) -> str:
    curves = {"plain": found.plain, "re-ranked": found.reranked}
    parts = [
        f"{name} scores {curve.method}, expected calibration error {100 * curve.ece_before:.1f} % before and "
        f"{100 * curve.ece_after:.1f} % after"
        for name, curve in curves.items()
        if curve is not None
    ]
    return f"calibration by {found.n_rows:,} rows, prior {found.prior:g}: {'; '.join(parts)}"


def _keep_curve(model: MachModel, store: Store, measured: list[dict[str, Any]]) -> None:
    """Store the accuracy by repetitions in the run, where it can be written."""
    from mach.accuracy import AccuracyCurve

    kept = [{name: value for name, value in row.items() if value is not None} for row in measured]
    with suppress(StorageError):
        found = AccuracyCurve(
            fingerprint=store.fingerprint, n_rows=store.n_rows, version=model.classes.version, rows=kept
        )
        found.save(model.run)


def _reported(parts: Iterable[TopK], n_rows: int, report: Callable[[str, float], None]) -> Iterator[TopK]:
    n_done = 0
    for part in parts:
        yield part
        n_done += len(part.ids_Nk)
        report("predicting", n_done / n_rows)


def _reference(path: Place) -> Any:
    from mach.data.transfer import fetch_store
    from mach.living.versions import Versions
    from mach.storage import Run

    if not Run.is_at(path):
        return fetch_store(path)
    versions = Versions(Run.open(path))
    return versions.reference(versions.load())


def _prepared(model: MachModel, source: str) -> Store:
    from mach.data.prepare import prepare as prepare_data

    config = model.run.config
    with progress() as report:
        store = prepare_data(config.data, config.text, source, like=model.reference(), report=report)
    if unknown := store.meta["n_unknown_classes"]:
        click.echo(f"mach: {source}: {unknown:,} classes of its rows are unknown to the run and left out", err=True)
    return store


def _print_ledger(config: Config, trunk: str | None) -> None:
    """What `train` would build, from the prepared data."""
    from mach.launch.launchers import n_workers
    from mach.launch.setup import plan_of, resolve, with_trunk
    from mach.launch.start import Start, training_data
    from mach.recipe import before_reading

    config = with_trunk(config, trunk)
    start = Start.of(config)
    config = before_reading(config if start is None else start.complete(config))
    with progress() as report:
        store = training_data(config, None, report)
    known = None if start is None else start.assignment(start.counts_K(store))
    resolved, _, _ = resolve(config, store, known, trunk)
    chosen = plan_of(resolved, store, n_workers=n_workers(config.launch, resolved.hashing.repetitions))
    print_rows(chosen.rows(), as_json=False)


if __name__ == "__main__":
    main()
