"""The verb that serves runs over HTTP."""

from __future__ import annotations

from typing import Any

import click

from mach.errors import ConfigError


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--language", default="und", show_default=True, help="Of the labels, such as de.")
@click.option(
    "--queue", "queue_rows", type=click.IntRange(1), default=256, show_default=True, help="Rows that may wait."
)
def serve(runs: tuple[str, ...], **options: Any) -> None:
    """Serve each RUN over HTTP, as Annif's REST API does. NAME=RUN names the project, by default as its folder."""
    try:
        from mach.serving.server import Settings
        from mach.serving.server import serve as serve_runs
    except ModuleNotFoundError as error:
        raise ConfigError(f"a server needs {error.name}: pip install 'mach-classifier[serve]'") from error
    serve_runs(Settings(runs, **options))
