"""The verbs ``mach classes ...``: add, remove, rename and teach the classes of a run without training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mach.cli.options import JSON, RUN, TRUNK
from mach.cli.shell import print_table, read_lines, say
from mach.data.names import class_name
from mach.errors import DataError, counted
from mach.files.places import Place, place, read_bytes

if TYPE_CHECKING:
    from mach.model.model import MachModel

CLASS = click.argument("chosen", metavar="CLASS")


@click.group()
def classes() -> None:
    """Change the classes of a trained RUN. No weight is touched, and every change can be undone.

    A CLASS is a name, or the number of a class that has no such name.
    """


def changes(verb: Callable[..., str]) -> Callable[..., None]:
    """A verb that changes the classes of a model: it gets the opened model, and returns what it did to them."""

    @classes.command()
    @RUN
    @TRUNK
    @functools.wraps(verb)
    def changed(run: Place, trunk: str | None, **options: Any) -> None:
        from mach.model.loading import load

        model = load(run, trunk=trunk)
        done = verb(model, **options)
        say(f"{model.run.path}: {done}; version {model.classes.version} holds", err=True)

    return changed


@changes
@click.argument("name", required=False)
@click.option("--example", "examples", multiple=True, help="A query of the class, as `mach query` takes it.")
@click.option("--text", "texts", multiple=True, help="A text that describes it.")
@click.option(
    "--from", "source", metavar="FILE", help='Lines such as {"name": "x", "examples": [...], "texts": [...]}.'
)
@click.option(
    "--by", type=click.Choice(["networks", "hash"]), default="networks", show_default=True, help="Who chooses buckets."
)
def add(
    model: MachModel,
    name: str | None,
    examples: tuple[str, ...],
    texts: tuple[str, ...],
    source: str | None,
    **options: Any,
) -> str:
    """Add a class NAME, or those of a FILE.

    It is known by a few examples or descriptive texts, among classes that have names by its name alone.
    """
    import numpy as np

    if (name is None) == (source is None):
        raise DataError("give the NAME of one class, or --from FILE")
    entries = _entries(source) if source else [(str(name), list(examples), list(texts), [], "")]
    names, examples_K, texts_K, alternatives_K, uris_K = (list(column) for column in zip(*entries, strict=True))
    more = {"texts": texts_K, "alternatives": alternatives_K, "uris": uris_K}
    options |= {what: given for what, given in more.items() if any(given)}
    rows: list[Any] | None = None
    if any(examples_K):
        rows = [[model.parse(line) for line in lines] for lines in examples_K]
        if model.run.text_features is None:
            rows = [np.reshape(row, (-1, model.n_features)) for row in rows]
    ids = model.classes.add(names, rows, **options)
    return f"added class {ids[0]}" if len(ids) == 1 else f"added {len(ids)} classes, ids {ids[0]} to {ids[-1]}"


@changes
@click.argument("chosen", metavar="CLASS...", nargs=-1, required=True)
def remove(model: MachModel, chosen: tuple[str, ...]) -> str:
    """Remove classes: they are never returned again."""
    model.classes.remove([_class_of(model, text) for text in chosen])
    return f"removed {chosen[0]}" if len(chosen) == 1 else f"removed {len(chosen)} classes"


@changes
@CLASS
@click.argument("name")
def rename(model: MachModel, chosen: str, name: str) -> str:
    """Give a CLASS another NAME."""
    model.classes.rename(_class_of(model, chosen), name)
    return f"renamed {chosen} to {name}"


@changes
@click.argument("query")
@CLASS
def upvote(model: MachModel, query: str, chosen: str) -> str:
    """Teach that QUERY is of a CLASS."""
    import numpy as np

    parsed = model.parse(query)
    model.classes.upvote([parsed] if isinstance(parsed, str) else np.atleast_2d(parsed), [_class_of(model, chosen)])
    return f"upvoted {chosen}"


@changes
@click.argument("source")
@click.argument("target")
def associate(model: MachModel, source: str, target: str) -> str:
    """Teach that the text SOURCE means what the text TARGET means."""
    model.classes.associate([source], [target])
    return f"associated {source!r} with {target!r}"


@changes
@click.argument("name")
@click.argument("chosen", metavar="[CLASS...]", nargs=-1)
def subset(model: MachModel, name: str, chosen: tuple[str, ...]) -> str:
    """Store classes as a subset NAME for --allowed. Without any, forget it; - reads a class a line from stdin."""
    lines = list(read_lines(chosen)) if chosen else []
    model.classes.name_subset(name, [_class_of(model, line) for line in lines] if chosen else None)
    return f"subset {name} has {counted(len(lines), 'class')}" if chosen else f"forgot subset {name}"


@changes
def undo(model: MachModel) -> str:
    """Go back to the version before; undoing again goes further back."""
    step = model.classes.undo()
    return f"undone: {step.verb} {step.what}"


@classes.command("list")
@RUN
@TRUNK
@click.option("--all", "everything", is_flag=True, help="Also the classes that are as trained.")
@click.option("--history", is_flag=True, help="The changes that were made, in place of classes.")
@JSON
def list_(run: Place, trunk: str | None, everything: bool, history: bool, as_json: bool) -> None:
    """Show what was changed: added, renamed and removed classes."""
    from mach.model.classes.edits import TEXT
    from mach.model.classes.versions import Versions
    from mach.model.loading import load
    from mach.runs.run import Run

    if history:
        current = Versions(Run.open(run)).current()
        rows = [{"version": s.version, "of": s.parent, "verb": s.verb, "what": s.what} for s in current.steps]
        summary = f"the version that holds is {current.version}"
    else:
        editor = load(run, trunk=trunk).classes
        edits = editor.edits
        rows = [row if as_json else row | {"id": str(row["id"])} for row in editor.changes(everything=everything)]
        subsets = "".join(f", subset {name} of {len(members):,}" for name, members in edits.subsets.items())
        n_taught = int((edits.exemplars.kinds_M > TEXT).sum())
        summary = (
            f"version {edits.version}: {counted(edits.n_trained, 'class')} trained, {edits.n_added:,} added, "
            f"{len(edits.removed):,} removed, {counted(n_taught, 'pair')} of feedback{subsets}"
            f"{'' if everything else '; --all lists every class'}"
        )
    if rows or as_json:
        print_table(rows, as_json)
    if not as_json:
        say(summary)


def _class_of(model: MachModel, text: str) -> Any:
    """A name, or a number where there is no such name."""
    text = class_name(text)
    is_number = text.isdecimal() and model.answerer.catalogue.id_of(text) is None
    return int(text) if is_number else text


def _entries(source: str) -> list[tuple[str, list[str], list[str], list[str], str]]:
    """Names, examples, texts, other names and addresses of classes in a file or behind a URL: a JSON object a line."""
    from pydantic import ValidationError, create_model

    from mach.config import Section

    many: Any = (list[str], [])
    more: dict[str, Any] = {"examples": many, "texts": many, "alternatives": many, "uri": (str, "")}
    kind: Any = create_model("Entry", __base__=Section, name=(str, ...), **more)
    try:
        lines = read_bytes(place(source)).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = kind.model_validate_json(line)
            except ValidationError as error:
                need = '{"name": "...", "examples": ["..."], "texts": ["..."]}'
                raise DataError(f"{source} line {number}: need {need}, got {line:.60}") from error
            entries.append((entry.name, entry.examples, entry.texts, entry.alternatives, entry.uri))
    if not entries:
        raise DataError(f"{source} has no line: write one JSON object a class")
    return entries
