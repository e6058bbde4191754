"""The verbs that make a run: prepare, plan, train, status."""

from __future__ import annotations

import json
import shlex
from functools import partial
from typing import Any

import click

from mach.cli.options import ADDRESS, BYTES, JSON, NUMBERS, PLACE, RUN, SET, TRUNK, Number, Whole
from mach.cli.shell import end_politely, print_rows, print_table, print_values, progress, say
from mach.errors import counted
from mach.files.places import Place, is_there, names_in


@click.command()
@click.argument("source")
@click.argument("store", type=PLACE)
@click.option("--config", type=PLACE, help="Take [data] and [text] options from this file.")
@click.option("--like", type=PLACE, help="Run or training store whose features and classes apply.")
@SET
@JSON
def prepare(
    source: str, store: Place, config: Place | None, like: Place | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Turn SOURCE, a file, its URL or builtin:characters, into a STORE.

    That is a memory-mapped folder, here or behind a URL.
    """
    from mach.config import load_config, parse_config
    from mach.data.omissions import refuse, warn
    from mach.data.prepare import prepare as prepare_data
    from mach.training.recipe import before_reading

    defaults = [*overrides, f"data.train={json.dumps(source)}"]
    options = before_reading(load_config(config, defaults) if config else parse_config({}, "--set", defaults))
    with progress() as report:
        reference = _reference(like) if like else None
        told: dict[str, Any] = {"report": report} | ({} if like else {"check": refuse})
        prepared = prepare_data(options.data, options.text, source, store, like=reference, **told)
    warn(prepared, is_query=like is not None)
    print_values(prepared.describe() | {"path": str(store)}, as_json)


@click.command()
@click.option("--classes", "n_classes", type=Whole(2), required=True, help="K, how many there are.")
@click.option("--features", "n_features", type=Whole(1), required=True, help="D, how many there are.")
@click.option("--memory", "memory_bytes", type=BYTES, help="Budget for the stored model, such as 200MB or 4GB.")
@click.option("--parameters", "n_parameters", type=Whole(1), help="Budget of parameters.")
@click.option(
    "--hidden",
    type=Whole(0),
    multiple=True,
    default=[512],
    show_default=True,
    help="Widths of hidden layers; 0: none.",
)
@click.option("-B", "--buckets", "n_buckets", type=Whole(2), help="Fix B, the buckets of a repetition.")
@click.option("-R", "--repetitions", "n_repetitions", type=Whole(1), help="Fix R, how many networks there are.")
@click.option("--workers", "n_workers", type=Whole(1), default=1, show_default=True, help="Parallel workers.")
@click.option(
    "--device-memory", type=BYTES, help="Memory of a GPU, such as 80GB: how many repetitions train together in it."
)
@JSON
def plan(
    n_classes: int, n_features: int, hidden: tuple[int, ...], device_memory: int | None, as_json: bool, **options: Any
) -> None:
    """Choose B and R for K classes, and print what they cost."""
    from mach.sketch.bounds import plan as choose

    chosen = choose(n_classes, n_features, hidden=tuple(width for width in hidden if width), **options)
    rows = chosen.rows()
    if device_memory is not None:
        rows.append(("repetitions a device", chosen.repetitions_within(device_memory), "at a time"))
    print_rows(rows, as_json)


@click.command(no_args_is_help=True)
@click.argument("config")
@click.argument("run", type=PLACE, required=False)
@click.option("--text", metavar="COLUMN,...", help="Columns of the table that hold text; text by default.")
@click.option("--classes", metavar="COLUMN", help="Column of the table that holds a row's classes; classes by default.")
@click.option("--separator", metavar="TEXT", help="What stands between the classes of a cell, such as |.")
@click.option(
    "--class-table",
    "is_table",
    is_flag=True,
    help="CONFIG is a table of classes, whose names and texts are all there is.",
)
@click.option(
    "--effort",
    type=click.Choice(["fast", "balanced", "best"]),
    help="What to spend on accuracy; by default balanced, best below 5,000 rows.",
)
@click.option(
    "--minutes",
    type=Number(min=0.0, min_open=True),
    help="Choose the most that is planned to end within so many minutes here.",
)
@SET
@click.option("--workers", type=Whole(1), help="Most workers at a time; by default one a core, or one a shard.")
@click.option("--launcher", type=click.Choice(["here", "local", "ray"]), help="In this process, this machine or Ray.")
@ADDRESS
@click.option("--repetitions", type=NUMBERS, metavar="0-3,5", help="Train these only; others may be trained elsewhere.")
@click.option("--from", "start", metavar="RUN", help="Fine-tune: start from the weights of this finished run.")
@TRUNK
@click.option("--dry-run", is_flag=True, help="Print the TOML that says the same, and what it costs; train nothing.")
def train(
    config: str,
    run: Place | None,
    text: str | None,
    classes: str | None,
    separator: str | None,
    is_table: bool,
    effort: str | None,
    minutes: float | None,
    overrides: tuple[str, ...],
    workers: int | None,
    launcher: str | None,
    address: str | None,
    repetitions: list[int] | None,
    start: str | None,
    trunk: str | None,
    dry_run: bool,
) -> None:
    """Train CONFIG into RUN, or go on where it stopped.

    RUN is a folder or URL, runs/NAME by default. CONFIG is a TOML file, or a file with the training rows alone; the
    recipe chooses what is left open. A run in place of CONFIG, and no RUN, goes on with that run and its own
    configuration. With --from, CONFIG names the new rows, and all that it leaves open is as in the run to start from;
    its own rows are replayed beside them. With --class-table, CONFIG has no rows but classes, a line each: columns id
    or name, and alternatives and text where there are some. --trunk sets network.trunk, and must be given wherever a
    configuration or run names one.
    """
    from rich.console import Console

    from mach.config import to_toml
    from mach.data.class_table import of_classes_alone
    from mach.training import conductor
    from mach.training.launch.capacity import refuse_too_large
    from mach.training.recipe import effort_rows

    given = {
        "data.text_columns": text and [column.strip() for column in text.split(",")],
        "data.class_column": classes,
        "data.class_separator": separator,
        "launch.launcher": launcher,
        "launch.workers": workers,
        "launch.address": address,
        "training.effort": effort,
        "training.start": start,
    }
    table = of_classes_alone(config) if is_table else {}
    set_first, set_here = (
        [f"{k}={json.dumps(v)}" for k, v in keys.items() if v is not None] for keys in (table, given)
    )
    options, where = conductor.configuration(config, run, [*set_first, *overrides, *set_here], trunk)
    if dry_run:
        choose = conductor.chooser(minutes, options, where, partial(say, err=True), trunk)
        with progress() as report:
            resolved, ledger = conductor.plan_of_run(options, report, trunk, choose)
        also = f" and --minutes {minutes:g}" if choose else ""
        for line in (
            f"# mach train with this file{also} does the same:",
            *to_toml(options, brief=True).splitlines(),
            "",
        ):
            say(line)
        print_rows([*effort_rows(resolved), *ledger.rows()], as_json=False, before="# ")
        refuse_too_large(ledger, options.launch)
        return
    end_politely("stopping, what is begun is saved; once more: at once")
    told: dict[str, Any] = {"minutes": minutes, "trunk": trunk, "console": Console(stderr=True)}
    model = conductor.train(options, where, repetitions=repetitions, **told)
    n_repetitions = model.run.config.hashing.repetitions
    finished = f"{len(model.run.finished())} of {counted(n_repetitions, 'repetition')} finished"
    say(f"{where}: {finished}", err=True)
    query = '"a text"' if is_there(model.run.text_folder) else '"index:value ..."'
    path = shlex.quote(str(where))
    say(f"next: mach query {path} {query}, or mach evaluate {path} ROWS", err=True)


@click.command("warm-up")
def warm_up() -> None:
    """Compile what this processor needs, once, so that no later command waits for it.

    It is kept where MACH_CACHE says, or beside the package. In an image of a container, run it when that is built.
    """
    from mach.training.warmup import warm_up as compile_all

    n_compiled = compile_all()
    say(f"{counted(n_compiled, 'kernel')} compiled" if n_compiled else "all kernels are compiled", err=True)


@click.command()
@RUN
@JSON
def status(run: Place, as_json: bool) -> None:
    """Show how far every repetition of RUN is, from its files alone."""
    from mach.runs.run import Run
    from mach.runs.status import outlook
    from mach.runs.status import status as status_of

    opened = Run.open(run)
    rows = [status_of(opened, r) for r in range(opened.config.hashing.repetitions)]
    print_table(rows, as_json)
    if not as_json:
        say(outlook(rows))
        if opened.config.reranking.candidates:
            n_pilots = opened.config.reranking.pilots
            n_taught = sum(name.startswith("examples") for name in names_in(opened.reranking_folder))
            taught = f", {n_taught} of {n_pilots} pilots have taught" if n_pilots else ""
            say(f"re-ranker {'finished' if is_there(opened.reranked) else 'not trained yet' + taught}")


def _reference(path: Place) -> Any:
    """What a run, or a store, asks of further rows."""
    from mach.data.transfer import fetch_store
    from mach.model.classes.versions import Versions
    from mach.runs.run import Run

    if not Run.is_at(path):
        return fetch_store(path)
    versions = Versions(Run.open(path))
    return versions.reference(versions.load())
