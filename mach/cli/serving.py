"""The verb that serves runs over HTTP, and ``mach query --url``, which asks such a server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mach.cli.options import ADDRESS, JSON, Whole, expect_probability
from mach.cli.shell import Printer, read_batches
from mach.errors import ConfigError, DataError

TOKEN_FILE = click.option(
    "--token-file", type=click.Path(path_type=Path), help="Lines `read TOKEN` and `learn TOKEN`: who may do what."
)
URL = click.option(
    "--url", metavar="ADDRESS", help="Ask a server, such as http://127.0.0.1:8000; there is no RUN then."
)
PROJECT = click.option("--project", metavar="NAME", help="With --url, where the server has several.")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=Whole(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--learn", is_flag=True, help="Let callers teach and add classes.")
@TOKEN_FILE
@click.option("--no-auth", is_flag=True, help="Let everyone who reaches the address ask, without tokens.")
@click.option("--workers", type=Whole(1), default=1, show_default=True, help="Processes.")
@click.option("--queue", "queue_rows", type=Whole(1), default=64, show_default=True, help="Rows that may wait.")
@click.option("--language", default="und", show_default=True, help="Of the labels, such as de.")
@click.option(
    "--launcher", type=click.Choice(["local", "ray"]), default="local", help="Weights in this process, or on Ray."
)
@ADDRESS
def serve(runs: tuple[str, ...], **options: Any) -> None:
    """Serve each RUN over HTTP, as Annif's REST API does. NAME=RUN names the project, by default as its folder."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is loaded; few rows: threads wait, not work
    try:
        from mach.serving.server import Settings
        from mach.serving.server import serve as serve_runs
    except ModuleNotFoundError as error:
        raise ConfigError(f"a server needs {error.name}: pip install 'mach-classifier[serve]'") from error
    serve_runs(Settings(runs, **options))


@click.command()
@click.argument("queries", nargs=-1)
@URL
@PROJECT
@TOKEN_FILE
@click.option("-k", "k", type=Whole(1), help="Classes a query; 10 by default.")
@click.option("--allowed", metavar="SUBSET", help="Classes of a stored subset only.")
@click.option("--threshold", type=float, help="Leave out classes of a lower probability.")
@click.option("--probabilities", is_flag=True, help="As it does anyway.")
@JSON
def query_at_url(
    queries: tuple[str, ...],
    url: str,
    project: str | None,
    token_file: Path | None,
    k: int | None,
    allowed: str | None,
    threshold: float | None,
    probabilities: bool,
    as_json: bool,
) -> None:
    """Answer QUERIES by a server: all that `mach query` takes and a server knows."""
    from mach.serving.client import BATCH, Client, Suggestions

    expect_probability(threshold, "give one")
    token = None
    if token_file is not None:
        from mach.serving.tokens import Tokens

        token = Tokens.of_file(token_file).one()
    printer = Printer(("probability", "probabilities"), threshold, as_json)

    def say(line: str, found: Suggestions) -> None:
        results = [one for one in found.results if threshold is None or one.score >= threshold]
        ids, values = [one.id for one in results], [one.score for one in results]
        uris = [one.uri or "" for one in results]
        told = {"names": [one.label for one in results], "uris": uris if any(uris) else None}
        printer.answer(line, ids, values, told, is_known=found.known)

    with Client(url, project, token=token) as client:
        for lines in read_batches(queries, BATCH):
            try:
                answers = iter(client.suggest(lines, k, allowed=allowed))
            except DataError:  # one of them is at fault: those before it are answered
                answers = (client.suggest(line, k, allowed=allowed)[0] for line in lines)
            for line, found in zip(lines, answers, strict=True):
                say(line, found)


class AtUrl(click.Command):
    """A verb that asks a run, or where an option says so, a server."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        options = args[: args.index("--")] if "--" in args else args
        if any(one.partition("=")[0] == "--url" for one in options):
            return query_at_url.make_context(info_name, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)
