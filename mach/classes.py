"""The verbs ``mach classes ...``: add, remove, rename and teach the classes of a run without training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from mach.errors import DataError
from mach.places import Place, place, read_bytes
from mach.shell import PLACE, print_table, read_lines

if TYPE_CHECKING:
    from mach.model import MachModel

_run = click.argument("run", type=PLACE)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


@click.group()
def classes() -> None:
    """Change the classes of a trained RUN: no weight is touched, and every change can be undone.

    A CLASS is a name, or the number of a class that has no such name.
    """


@classes.command()
@_run
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
    name: str | None,
    examples: tuple[str, ...],
    texts: tuple[str, ...],
    source: str | None,
    by: str,
    random: float,
) -> None:
    """Add a class NAME, or those of a FILE, by a few examples or descriptive texts."""
    if (name is None) == (source is None):
        raise DataError("give the NAME of one class, or --from FILE")
    given: list[tuple[str, list[str], list[str]]]
    given = _read_classes(source) if source else [(str(name), list(examples), list(texts))]
    model = _opened(run)
    names = [entry[0] for entry in given]
    rows = [[model.parse(line) for line in entry[1]] for entry in given]
    has_examples, has_texts = any(rows), any(entry[2] for entry in given)
    if has_examples and model.run.text_features is None:
        rows = [_stacked(model, lines) for lines in rows]
    ids = model.add_classes(
        names,
        rows if has_examples else None,
        [entry[2] for entry in given] if has_texts else None,
        by=by,
        random=random,
    )
    _said(model, f"added {len(ids)} classes, ids {ids[0]} to {ids[-1]}")


@classes.command()
@_run
@click.argument("chosen", metavar="CLASS...", nargs=-1, required=True)
def remove(run: Place, chosen: tuple[str, ...]) -> None:
    """Remove classes: they are never returned again."""
    model = _opened(run)
    model.remove_classes([_class_of(model, text) for text in chosen])
    _said(model, f"removed {len(chosen)} classes")


@classes.command()
@_run
@click.argument("chosen", metavar="CLASS")
@click.argument("name")
def rename(run: Place, chosen: str, name: str) -> None:
    """Give a CLASS another NAME."""
    model = _opened(run)
    model.rename_class(_class_of(model, chosen), name)
    _said(model, f"renamed {chosen} to {name}")


@classes.command()
@_run
@click.argument("query")
@click.argument("chosen", metavar="CLASS")
def upvote(run: Place, query: str, chosen: str) -> None:
    """Teach that QUERY is of a CLASS."""
    import numpy as np

    model = _opened(run)
    parsed = model.parse(query)
    model.upvote([parsed] if isinstance(parsed, str) else np.atleast_2d(parsed), [_class_of(model, chosen)])
    _said(model, f"upvoted {chosen}")


@classes.command()
@_run
@click.argument("source")
@click.argument("target")
def associate(run: Place, source: str, target: str) -> None:
    """Teach that the text SOURCE means what the text TARGET means."""
    model = _opened(run)
    model.associate([source], [target])
    _said(model, f"associated {source!r} with {target!r}")


@classes.command()
@_run
@click.argument("name")
@click.argument("chosen", metavar="[CLASS...]", nargs=-1)
def subset(run: Place, name: str, chosen: tuple[str, ...]) -> None:
    """Store classes as a subset NAME for --allowed; without any, forget it. - reads a class a line from stdin."""
    model = _opened(run)
    lines = list(read_lines(chosen)) if chosen else []
    model.name_subset(name, [_class_of(model, line) for line in lines] if chosen else None)
    _said(model, f"subset {name} has {len(lines)} classes" if chosen else f"forgot subset {name}")


@classes.command("list")
@_run
@click.option("--all", "everything", is_flag=True, help="Also the classes that are as trained.")
@click.option("--history", is_flag=True, help="The changes that were made, in place of classes.")
@_json
def list_(run: Place, everything: bool, history: bool, as_json: bool) -> None:
    """Show what was changed: added, renamed and removed classes."""
    if history:
        from mach.living.versions import Versions
        from mach.storage import Run

        current = Versions(Run.open(run)).current()
        rows = [
            {"version": step.version, "of": step.parent, "verb": step.verb, "what": step.what} for step in current.steps
        ]
        if rows or as_json:
            print_table(rows, as_json)
        if not as_json:
            click.echo(f"the version that holds is {current.version}")
        return
    model = _opened(run)
    edits = model.edits
    removed = set(edits.removed.tolist())
    changed = sorted({*edits.renamed, *removed, *range(edits.n_trained, edits.n_classes)})
    rows = []
    for k in range(edits.n_classes) if everything else changed:
        state = "added" if k >= edits.n_trained else "renamed" if k in edits.renamed else "trained"
        n_examples = int(edits.counts_A[k - edits.n_trained]) if k >= edits.n_trained else None
        rows.append(
            {
                "id": str(k) if not as_json else k,
                "name": model._live.name(k),
                "state": "removed" if k in removed else state,
                "examples": n_examples,
            }
        )
    if rows or as_json:
        print_table(rows, as_json)
    if not as_json:
        subsets = "".join(f", subset {name} of {len(members):,}" for name, members in edits.subsets.items())
        n_taught = 0 if edits.exemplars is None else int((edits.exemplars.kinds_M > 1).sum())
        click.echo(
            f"version {edits.version}: {edits.n_trained:,} classes trained, {edits.n_added:,} added, "
            f"{len(removed):,} removed, {n_taught:,} pairs of feedback{subsets}"
        )


@classes.command()
@_run
def undo(run: Place) -> None:
    """Go back to the version before; undoing again goes further back."""
    from mach.living.versions import Versions
    from mach.storage import Run

    with Versions(Run.open(run)).turn() as turn:
        edits, step = turn.undo()
    click.echo(f"{run}: undone: {step.verb} {step.what}; version {edits.version} holds", err=True)


def _opened(run: Place) -> MachModel:
    from mach.loading import load

    return load(run)


def _said(model: MachModel, what: str) -> None:
    click.echo(f"{model.run.path}: {what}; version {model.version} holds", err=True)


def _class_of(model: MachModel, text: str) -> Any:
    """A name, or a number where there is no such name."""
    is_number = text.isdecimal() and model._live.id_of(text) is None
    return int(text) if is_number else text


def _stacked(model: MachModel, rows: list[Any]) -> Any:
    import numpy as np

    return np.stack(rows) if rows else np.empty((0, model.n_features), np.float32)


def _read_classes(source: str) -> list[tuple[str, list[str], list[str]]]:
    """Names, examples and texts of JSON lines."""
    try:
        lines = read_bytes(place(source)).decode().splitlines()
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            lists = [entry.get(key, []) for key in ("examples", "texts")]
            is_right = isinstance(entry.get("name"), str) and not entry.keys() - {"name", "examples", "texts"}
            is_right &= all(isinstance(texts, list) and all(isinstance(t, str) for t in texts) for texts in lists)
        except (ValueError, AttributeError):
            is_right = False
        if not is_right:
            raise DataError(
                f'{source} line {number}: need {{"name": "...", "examples": ["..."], "texts": ["..."]}}, got {line:.60}'
            )
        found.append((entry["name"], *lists))
    if not found:
        raise DataError(f"{source} has no line: write one JSON object a class")
    return found
