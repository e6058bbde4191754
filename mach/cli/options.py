"""Options and arguments that several verbs share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from mach.cli.shell import PLACE, parse_numbers, trunk_option, warnings_as_lines
from mach.files.places import Place

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
SET = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override the configuration.")
WORKERS = click.option(
    "--workers", type=click.IntRange(1), help="Most workers at a time; by default one a core, or one a shard."
)
LAUNCHER = click.option("--launcher", type=click.Choice(["local", "ray"]), help="This machine, or a Ray cluster.")
ADDRESS = click.option("--address", metavar="HOST:PORT", help="Head of the Ray cluster; by default as Ray finds it.")
RERANK = click.option("--rerank/--no-rerank", default=True, help="Order the best classes anew, where RUN can.")
TAIL = click.option(
    "--tail",
    type=float,
    default=0.0,
    show_default=True,
    help="Favour rare classes by this times -log(propensity); 0.5 to 1 suit PSP@k.",
)
PROBABILITIES = click.option(
    "--probabilities", is_flag=True, help="Calibrated probabilities that classes are right in place of scores."
)
ALLOWED = click.option("--allowed", metavar="SUBSET", help="Classes of a stored subset only, see `mach classes`.")
K = click.option("-k", "k", type=click.IntRange(1), default=10, show_default=True, help="Classes a query.")
SOME = click.option("--repetitions", metavar="0-3,5", help="Use these only; all by default.")
RUN = click.argument("run", type=PLACE)
ACTORS = click.option("--workers", type=click.IntRange(1), help="Actors on the cluster; by default one a repetition.")


def asks(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that asks a model: says which repetitions answer and who keeps them, and gets the opened model."""

    @RUN
    @SOME
    @LAUNCHER
    @ADDRESS
    @ACTORS
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
        from mach.model.loading import load

        chosen = parse_numbers(repetitions) if repetitions else None
        where: dict[str, Any] = {"launcher": launcher or "local", "address": address, "workers": workers}
        with warnings_as_lines(), load(run, repetitions=chosen, trunk=trunk, **where) as model:
            verb(model, **options)

    return opened
