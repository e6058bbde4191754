"""Options and arguments that several verbs share, and the types of their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mach.cli.shell import say
from mach.errors import ConfigError, counted
from mach.files.places import Place, place

if TYPE_CHECKING:
    from mach.model.ask import Ask
    from mach.model.model import MachModel

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # no generic before click 8.4, and Annif pins an older one

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class _Value(_ParamType):
    """A value that a function makes of its text; the function is told the name of the option, for messages."""

    def __init__(self, name: str, read: Callable[[str, str], Any]) -> None:
        self.name, self._read = name, read

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return self._read(value, parameter.opts[0] if parameter else "") if isinstance(value, str) else value


def _bytes(text: str, option: str) -> int:
    number = text.rstrip("BKMGTbkmgt ")
    try:
        return int(float(number) * UNITS[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{option} {text}: write a number and B, KB, MB, GB or TB, such as 200MB") from None


def _numbers(text: str, option: str) -> list[int]:
    """Ascending."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        for number in (first, last) if dash else (first,):
            if not number.strip().isdecimal():
                raise ConfigError(f"{option}: {number!r} is no number: write numbers separated by commas")
        chosen |= set(range(int(first), int(last if dash else first) + 1))
    if not chosen:
        raise ConfigError(f"{option} {text}: no number in it: write them ascending, such as 0-3,5")
    return sorted(chosen)


class Whole(click.IntRange):
    """A whole number; click would call one that is mistyped no valid integer range."""

    name = "whole number"


class Number(click.FloatRange):
    """As `Whole`, of any number."""

    name = "number"


PLACE = _Value("path or url", lambda text, option: place(text))  # click takes s3://bucket for a path of three parts
BYTES = _Value("bytes", _bytes)
NUMBERS = _Value("numbers", _numbers)

RUN = click.argument("run", type=PLACE)
TRUNK = click.option(
    "--trunk",
    metavar="PACKAGE.MODULE:CLASS",
    help="The torch module that network.trunk names; it is code of its maker, so say that you trust it.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
SET = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override the configuration.")
ADDRESS = click.option("--address", metavar="HOST:PORT", help="Head of the Ray cluster; by default as Ray finds it.")
RERANK = click.option("--rerank/--no-rerank", default=True, help="Order the best classes anew, where RUN can.")
TAIL = click.option(
    "--tail",
    type=float,
    default=0.0,
    show_default=True,
    help="Favour rare classes by this times -log(propensity); 0.5 to 1 suit PSP@k.",
)


@dataclass(frozen=True)
class Wish:
    """What a user wants to be told of a query."""

    k: int | None
    ask: Ask
    probabilities: bool
    threshold: float | None

    @property
    def kind(self) -> tuple[str, str]:
        """What one value and many are called."""
        return ("probability", "probabilities") if self.probabilities else ("score", "scores")

    def answers(self, model: MachModel, queries: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Ids, scores or probabilities, and whether queries are known, some rows at a time; -1 is no class."""
        import numpy as np

        from mach.model.ask import by_chance

        for part in model.answerer.answers(queries, self.k, self.ask):
            ids_Nk, values_Nk = part.ids_Nk, part.scores_Nk
            if self.probabilities:
                options: dict[str, Any] = {"rerank": self.ask.rerank, "tail": self.ask.tail, "known": part.known_N}
                values_Nk = model.probabilities(ids_Nk, values_Nk, **options)
                ids_Nk, values_Nk = by_chance(ids_Nk, values_Nk, part.known_N | bool(self.ask.tail))
            if self.threshold is not None:
                ids_Nk = np.where(values_Nk >= self.threshold, ids_Nk, -1)
            yield ids_Nk, values_Nk, part.known_N


def expect_probability(threshold: float | None, repair: str) -> None:
    """Refuse a threshold that is no probability."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold:g}: a probability is 0 to 1: {repair}")


def answers(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that returns the best classes: how many, which of them, in which order, and what is told of each.

    It is below `asks`, and gets a ``wish`` in place of the options.
    """

    @functools.wraps(verb)
    def wished(model: MachModel, ask: Ask, **given: Any) -> None:
        k, probabilities, threshold = (given.pop(name) for name in ("k", "probabilities", "threshold"))
        if k is not None and k > model.n_classes:
            say(f"mach: -k {k}: the run has {counted(model.n_classes, 'class')}, so all are told", err=True)
        if probabilities is None and threshold is None:
            with suppress(ConfigError):
                model.curve(rerank=ask.rerank)
                probabilities = True
        elif probabilities is not False:
            model.curve(rerank=ask.rerank)  # missing, it is missed before the work
            probabilities = True
        if probabilities:
            expect_probability(threshold, "give one, or --scores to have scores")
        verb(model, wish=Wish(k, ask, bool(probabilities), threshold), **given)

    options = (
        click.option("-k", "k", type=Whole(1), help="Classes a query, 10 by default; all if there are fewer."),
        click.option("--allowed", metavar="SUBSET", help="Classes of a stored subset only, see `mach classes`."),
        RERANK,
        TAIL,
        click.option(
            "--probabilities/--scores",
            default=None,
            help="Calibrated probabilities that classes are right, as by default where RUN has them, or scores.",
        ),
        click.option(
            "--threshold", type=float, help="Leave out classes of a lower probability, or with --scores score."
        ),
    )
    for option in reversed(options):
        wished = option(wished)
    return wished


def asks(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that asks a model; options say which repetitions answer, and where they are kept.

    It gets the opened model, and what it has of ``--allowed``, ``--rerank`` and ``--tail`` as an ``Ask``.
    """

    @RUN
    @click.option("--repetitions", type=NUMBERS, metavar="0-3,5", help="Use these only; all by default.")
    @click.option(
        "--launcher", type=click.Choice(["local", "ray"]), default="local", help="This machine, or a Ray cluster."
    )
    @ADDRESS
    @click.option("--workers", type=Whole(1), help="Actors on the cluster; by default one a repetition.")
    @TRUNK
    @functools.wraps(verb)
    def opened(run: Place, trunk: str | None, **options: Any) -> None:
        from mach.model.ask import Ask
        from mach.model.loading import load

        asked = {name: options.pop(name) for name in ("allowed", "rerank", "tail") if name in options}
        if asked:
            options["ask"] = Ask(**asked)
        where = {name: options.pop(name) for name in ("repetitions", "launcher", "address", "workers")}
        with load(run, trunk=trunk, **where) as model:
            verb(model, **options)

    return opened
