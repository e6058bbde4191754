"""The parts of a page of HTML; ``page.html`` beside this file lays them out.

Jinja escapes all that comes from the data. The page needs no other file, no network and no script. Jinja is optional:
``pip install 'mach-classifier[report]'``.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mach import __version__
from mach.cli.report import plots
from mach.cli.report.numbers import shown
from mach.errors import ConfigError
from mach.files.visible import visible

if TYPE_CHECKING:
    import jinja2
    from matplotlib.figure import Figure

MOST_CHARACTERS = 400  # of a text that is shown


class Number(str):
    """A cell that stands to the right."""

    __slots__ = ()


class Code(str):
    """A cell of code."""

    __slots__ = ()


@dataclass
class Table:
    """Rows of cells under headings, or folded below the caption; columns of nothing but numbers are to the right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    folded: bool = False

    def __post_init__(self) -> None:
        self.rows = [[Number(f"{cell:,}") if isinstance(cell, int) else cell for cell in row] for row in self.rows]
        columns = zip(*self.rows, strict=True)
        self.to_the_right = [all(isinstance(cell, Number) or not cell for cell in column) for column in columns]


@dataclass
class Plot:
    """A figure, named like its PNG."""

    name: str
    figure: Figure
    caption: str

    @property
    def n_panels(self) -> int:
        """Parts that stand side by side, where there is room."""
        return len(self.figure.subfigs)

    @property
    def svg(self) -> str:
        return plots.svg(self.figure, self.name)


@dataclass
class Headline:
    """Figures that are seen first: of each its name, its value with a unit, and a few words."""

    figures: Sequence[tuple[str, str, str]]


@dataclass
class Legend:
    """Measures and their meanings."""

    rows: Sequence[tuple[str, str]]


@dataclass
class Examples:
    """Rows with the best classes that the model found, as ``page.html`` takes them; ``value`` says what scores are."""

    value: str
    rows: list[dict[str, Any]]


Block = str | Table | Plot | Headline | Legend | Examples  # a string is a paragraph


@dataclass
class Section:
    """A heading and what stands below it."""

    name: str
    title: str
    blocks: Sequence[Block]


def template() -> jinja2.Template:
    """The page, to be rendered with sections and facts; ConfigError when Jinja is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError(f"a report needs Jinja2 ({error}): pip install 'mach-classifier[report]'") from error
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.PackageLoader("mach.cli.report", ""),
    )
    for kind in (Code, Table, Plot, Headline, Legend):
        environment.tests[kind.__name__.lower()] = lambda value, kind=kind: isinstance(value, kind)
    return environment.get_template("page.html")


def render(sections: Sequence[Section], title: str, where: str) -> bytes:
    """The page of some sections, in UTF-8."""
    made = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    page = template().render(sections=sections, title=title, where=where, made=made, version=__version__)
    return page.encode("utf-8", "replace")


def clean(text: str, most: int = MOST_CHARACTERS) -> str:
    r"""Text as a page can hold it, in one line, cut, all of it `visible`.

    Examples
    --------
    >>> print(clean("a\tb", 9), clean("\x07 and \ud800", 9), clean("too long", 5))
    a b \u0007 and \ud800 too l…
    """
    cut = text if len(text) <= most else text[:most] + "…"
    return visible(" ".join(cut.split()))


def quantity(value: float, unit: str) -> tuple[Number, str]:
    """A value and unit as people read them."""
    if unit.startswith(("bytes", "FLOPs")):
        for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= scale:
                return Number(f"{value / scale:,.1f}"), letter + unit.replace("bytes", "B")
    return Number(shown(value)), unit


def plain(value: Any) -> str:
    """A value as text; nothing for none."""
    return "" if value is None else clean(str(value))


def percent(share: float | None) -> Number:
    """A share in percent; nothing for none."""
    return decimals(None if share is None else 100 * share, 1)


def decimals(value: float | None, digits: int) -> Number:
    """A number with so many decimals; nothing for none."""
    return Number("" if value is None else f"{value:,.{digits}f}")
