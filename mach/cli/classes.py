"""The verbs ``mach classes ...``: add, remove, rename and teach the classes of a run without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mach.cli.shell import PLACE, print_table, read_lines, trunk_option
from mach.errors import DataError
from mach.files.places import Place

if TYPE_CHECKING:
    from mach.model.model import MachModel

_run = click.argument("run", type=PLACE)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@click.group()
def classes() -> None:
    """Change the classes of a trained RUN: no weight is touched, and every change can be undone.

    A CLASS is a name, or the number of a class that has no such name.
    """


@classes.command()
@_run
@trunk_option
@click.argument("name", required=False)
@click.option("--example", "examples", multiple=True, help="A query of the class, as `mach query` takes it.")
@click.option("--text", "texts", multiple=True, help="A text that describes it.")
@click.option(
    "--from", "source", metavar="FILE", help='Lines such as {"name": "x", "examples": [...], "texts": [...]}.'
)
@click.option(
    "--by", type=click.Choice(["networks", "hash"]), default="networks", show_default=True, help="Who places."
)
@click.option("--random", type=float, default=0.0, show_default=True, help="Share of buckets that are hashed anyway.")
def add(
    run: Place,
    trunk: str | None,
    name: str | None,
    examples: tuple[str, ...],
    texts: tuple[str, ...],
    source: str | None,
    by: str,
    random: float,
) -> None:
    """Add a class NAME, or those of a FILE, by a few examples or descriptive texts."""
    import numpy as np

    from mach.cli.entries import Entry, read_entries

    if (name is None) == (source is None):
        raise DataError("give the NAME of one class, or --from FILE")
    given = read_entries(source) if source else [Entry(name=str(name), examples=list(examples), texts=list(texts))]
    model = _opened(run, trunk)
    rows: list[Any] = [[model.parse(line) for line in entry.examples] for entry in given]
    has_examples, has_texts = any(rows), any(entry.texts for entry in given)
    if has_examples and model.run.text_features is None:
        rows = [np.reshape(lines, (-1, model.n_features)) for lines in rows]
    ids = model.classes.add(
        [entry.name for entry in given],
        rows if has_examples else None,
        [entry.texts for entry in given] if has_texts else None,
        by=by,
        random=random,
    )
    _said(model, f"added {len(ids)} classes, ids {ids[0]} to {ids[-1]}")


@classes.command()
@_run
@trunk_option
@click.argument("chosen", metavar="CLASS...", nargs=-1, required=True)
def remove(run: Place, trunk: str | None, chosen: tuple[str, ...]) -> None:
    """Remove classes: they are never returned again."""
    model = _opened(run, trunk)
    model.classes.remove([_class_of(model, text) for text in chosen])
    _said(model, f"removed {len(chosen)} classes")


@classes.command()
@_run
@trunk_option
@click.argument("chosen", metavar="CLASS")
@click.argument("name")
def rename(run: Place, trunk: str | None, chosen: str, name: str) -> None:
    """Give a CLASS another NAME."""
    model = _opened(run, trunk)
    model.classes.rename(_class_of(model, chosen), name)
    _said(model, f"renamed {chosen} to {name}")


@classes.command()
@_run
@trunk_option
@click.argument("query")
@click.argument("chosen", metavar="CLASS")
def upvote(run: Place, trunk: str | None, query: str, chosen: str) -> None:
    """Teach that QUERY is of a CLASS."""
    import numpy as np

    model = _opened(run, trunk)
    parsed = model.parse(query)
    model.classes.upvote([parsed] if isinstance(parsed, str) else np.atleast_2d(parsed), [_class_of(model, chosen)])
    _said(model, f"upvoted {chosen}")


@classes.command()
@_run
@trunk_option
@click.argument("source")
@click.argument("target")
def associate(run: Place, trunk: str | None, source: str, target: str) -> None:
    """Teach that the text SOURCE means what the text TARGET means."""
    model = _opened(run, trunk)
    model.classes.associate([source], [target])
    _said(model, f"associated {source!r} with {target!r}")


@classes.command()
@_run
@trunk_option
@click.argument("name")
@click.argument("chosen", metavar="[CLASS...]", nargs=-1)
def subset(run: Place, trunk: str | None, name: str, chosen: tuple[str, ...]) -> None:
    """Store classes as a subset NAME for --allowed; without any, forget it. - reads a class a line from stdin."""
    model = _opened(run, trunk)
    lines = list(read_lines(chosen)) if chosen else []
    model.classes.name_subset(name, [_class_of(model, line) for line in lines] if chosen else None)
    _said(model, f"subset {name} has {len(lines)} classes" if chosen else f"forgot subset {name}")


@classes.command("list")
@_run
@trunk_option
@click.option("--all", "everything", is_flag=True, help="Also the classes that are as trained.")
@click.option("--history", is_flag=True, help="The changes that were made, in place of classes.")
@_json
def list_(run: Place, trunk: str | None, everything: bool, history: bool, as_json: bool) -> None:
    """Show what was changed: added, renamed and removed classes."""
    from mach.model.classes.edits import TEXT
    from mach.model.classes.versions import Versions
    from mach.runs.run import Run

    if history:  # files alone tell it: no weights are opened, and no trunk is asked for
        current = Versions(Run.open(run)).current()
        rows = [{"version": s.version, "of": s.parent, "verb": s.verb, "what": s.what} for s in current.steps]
        summary = f"the version that holds is {current.version}"
    else:
        editor = _opened(run, trunk).classes
        edits = editor.edits
        rows = [row if as_json else row | {"id": str(row["id"])} for row in editor.changes(everything=everything)]
        subsets = "".join(f", subset {name} of {len(members):,}" for name, members in edits.subsets.items())
        n_taught = int((edits.exemplars.kinds_M > TEXT).sum())
        summary = (
            f"version {edits.version}: {edits.n_trained:,} classes trained, {edits.n_added:,} added, "
            f"{len(edits.removed):,} removed, {n_taught:,} pairs of feedback{subsets}"
        )
    if rows or as_json:
        print_table(rows, as_json)
    if not as_json:
        click.echo(summary)


@classes.command()
@_run
@trunk_option
def undo(run: Place, trunk: str | None) -> None:
    """Go back to the version before; undoing again goes further back."""
    model = _opened(run, trunk)
    step = model.classes.undo()
    _said(model, f"undone: {step.verb} {step.what}")


def _opened(run: Place, trunk: str | None) -> MachModel:
    from mach.model.loading import load

    return load(run, trunk=trunk)


def _said(model: MachModel, what: str) -> None:
    click.echo(f"{model.run.path}: {what}; version {model.classes.version} holds", err=True)


def _class_of(model: MachModel, text: str) -> Any:
    """A name, or a number where there is no such name."""
    is_number = text.isdecimal() and model.answerer.catalogue.id_of(text) is None
    return int(text) if is_number else text
