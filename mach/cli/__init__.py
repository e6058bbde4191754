"""The command line: one thin function a verb. Results go to standard output, talk to standard error.

Exit codes: 0 done, 2 wrong usage or data, 3 a run that is not complete yet. Heavy modules are imported by the
verbs that need them, so that help answers at once. A further verb is a function of its own and a word in `VERBS`.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from mach import __version__
from mach.cli.classes import classes
from mach.cli.models import calibrate, evaluate, info, predict, query, write_report
from mach.cli.runs import plan, prepare, status, train, warm_up
from mach.cli.serving import serve
from mach.cli.shell import end_politely, say, warnings_as_lines
from mach.errors import ConfigError, IncompleteRunError, MachError, did_you_mean, is_out_of_memory, out_of_memory
from mach.files.compiled import hear
from mach.files.visible import visible

VERBS = (prepare, plan, train, status, evaluate, calibrate, predict, query, write_report, info, classes, serve, warm_up)


class _Group(click.Group):
    """Prints errors raised on purpose as one line, and leaves with their exit code."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            ctx.fail(f"no such command {visible(args[0])!r:.60}{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings_as_lines():
                return super().invoke(ctx)
        except MachError as error:
            say(f"mach: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            say("mach: stopped; nothing is half-written: run the same command again", err=True)
            ctx.exit(IncompleteRunError.exit_code)
        except BrokenPipeError:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            say(f"mach: {out_of_memory(error)}", err=True)
            ctx.exit(ConfigError.exit_code)
        except OSError as error:  # files that mach opens have messages of their own: this is standard output, mostly
            say(f"mach: {error.filename or 'standard output'}: {error.strerror or error}", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(ConfigError.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Extreme classification by hashed, independent repetitions."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    end_politely()
    hear(lambda text: say(f"mach: {text}", err=True))


for verb in VERBS:
    main.add_command(verb)
