"""A page of HTML made of sections of text, plots and tables; ``page.html`` beside this file lays it out.

Jinja escapes all that comes from the data. The page needs no other file, no network and no script. Jinja is optional:
``pip install 'mach[report]'``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar

from mach.errors import ConfigError
from mach.evaluation.report import plots
from mach.evaluation.report.numbers import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CHARACTERS = 400  # of a text that is shown


class Number(str):
    """A cell that stands to the right."""

    __slots__ = ()


class Code(str):
    """A cell of code."""

    __slots__ = ()


@dataclass
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass
class Table:
    """Rows of cells under headings; columns are aligned by their cells, of which integers are numbers."""

    kind: ClassVar[str] = "table"
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        self.rows = [[Number(f"{cell:,}") if isinstance(cell, int) else cell for cell in row] for row in self.rows]


@dataclass
class Plot:
    """A figure, named like its PNG."""

    kind: ClassVar[str] = "plot"
    name: str
    figure: Figure
    caption: str

    @property
    def svg(self) -> str:
        return plots.svg(self.figure, self.name)


@dataclass
class Example:
    """A row, its classes, and the best classes that the model gave: name, value, whether it is right."""

    row: int
    text: str
    own: list[str]
    found: list[tuple[str, str, bool]]
    is_right: bool


@dataclass
class Examples:
    """Rows with their answers."""

    kind: ClassVar[str] = "examples"
    rows: list[Example]
    value: str


Block = Text | Table | Plot | Examples


@dataclass
class Section:
    """A heading and what stands below it."""

    name: str
    title: str
    blocks: list[Block] = field(default_factory=list)


class Page:
    """The template, read before any work is done; ConfigError when Jinja is not installed."""

    def __init__(self) -> None:
        try:
            import jinja2
        except ImportError as error:
            raise ConfigError(f"a report needs Jinja2 ({error}): pip install 'mach[report]'") from error
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.tests["number"] = lambda cell: isinstance(cell, Number)
        environment.tests["code"] = lambda cell: isinstance(cell, Code)
        text = resources.files("mach.evaluation.report").joinpath("page.html").read_text("utf-8")
        self._template = environment.from_string(text)

    def render(self, sections: Sequence[Section], **facts: str) -> bytes:
        """The page as UTF-8; ``facts`` are the title, where the run is, when it was written and by which version."""
        return self._template.render(sections=sections, **facts).encode("utf-8", "replace")


def clean(text: str, most: int = MOST_CHARACTERS) -> str:
    r"""Text as a page can hold it, cut: without control characters and lone surrogates.

    Examples
    --------
    >>> clean("a\tb", 9), clean("\x07 and \ud800", 9), clean("too long", 5)
    ('a b', '� and �', 'too l…')
    """
    cut = text if len(text) <= most else text[:most] + "…"
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in " ".join(cut.split()))


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
