"""Print docs/commands.md, the page of all commands, from the command line's own source.

.venv/bin/python scripts/commands.py > docs/commands.md
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from mach.cli import main

HEAD = """# Every command

`mach COMMAND --help` says the same. Results go to standard output, all else to standard error.
The exit code is 0 where all is done, 2 where usage or data are wrong, and 3 where a run is not complete yet.

This page is made from `mach/cli/` by `scripts/commands.py`.
"""


def page() -> str:
    return "\n".join([HEAD, *(part for verb in main.commands.values() for part in parts(verb, f"mach {verb.name}"))])


def parts(command: click.Command, name: str) -> Iterator[str]:
    """A command's section, and those of the commands below it."""
    yield f"## `{name}`\n\n{inspect.cleandoc(command.help or '')}\n"
    if isinstance(command, click.Group):
        for verb in command.commands.values():
            yield from parts(verb, f"{name} {verb.name}")
        return
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    yield f"```text\nUsage: {usage}\n```\n"
    rows = [
        found
        for option in command.params
        if isinstance(option, click.Option) and (found := option.get_help_record(context))
    ]
    if rows:
        lines = [f"| `{cell(names)}` | {cell(does)} |" for names, does in rows]
        yield "\n".join(["| option | what it does |", "|---|---|", *lines, ""])


def cell(text: str) -> str:
    """Text within a table."""
    return text.replace("|", "\\|").strip()


if __name__ == "__main__":
    print(page(), end="")
