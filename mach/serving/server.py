"""The processes that serve: what they are started with, their socket, their end."""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from mach.errors import ConfigError, MachError, counted, one_line
from mach.files.visible import visible
from mach.serving.app import make_app
from mach.serving.batcher import QUEUE_ROWS
from mach.serving.connection import Connection
from mach.serving.projects import Project, project_names
from mach.serving.tokens import Guard, Tokens, is_loopback

CONNECTIONS = 1000  # of a process; one more is told 503
KEPT_SECONDS = 75  # an idle connection: longer than proxies keep theirs, or they would send into a closed one
STOP_SECONDS = 30  # requests that were taken are answered within them


@dataclass(frozen=True)
class Settings:
    """What a server is started with; see ``mach serve --help``."""

    runs: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 8000
    learn: bool = False
    token_file: Path | None = None
    no_auth: bool = False
    workers: int = 1
    queue_rows: int = QUEUE_ROWS
    language: str = "und"
    launcher: str = "local"
    address: str | None = None

    def guard(self) -> Guard:
        """Who may do what; ConfigError where everyone on the network could, and nobody said so."""
        if self.token_file is None and not self.no_auth and not is_loopback(self.host):
            raise ConfigError(f"--host {self.host} is reached by others: give --token-file FILE, or --no-auth")
        if self.token_file is not None and self.no_auth:
            raise ConfigError("--token-file and --no-auth: give one of both")
        tokens = None if self.token_file is None else Tokens.of_file(self.token_file)
        return Guard(tokens, may_learn=self.learn, is_open=self.no_auth)

    def projects(self) -> dict[str, Project]:
        """Its projects, opened."""
        if self.launcher != "local" and self.workers > 1:
            raise ConfigError(f"--workers {self.workers}: with --launcher {self.launcher} one process serves: give 1")
        return {
            name: Project(name, path, self.language, say, self.launcher, self.address)
            for name, path in project_names(self.runs).items()
        }

    def app(self, folder: Path | None = None, projects: dict[str, Project] | None = None) -> Starlette:
        """The application of one process, whose counts are kept in a folder; it opens projects where none are."""
        return make_app(self.projects() if projects is None else projects, self.queue_rows, self.guard(), folder)


def say(line: str) -> None:
    """A line of the log."""
    print(f"mach: {visible(line)}", file=sys.stderr, flush=True)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then requests that were taken are answered, and it returns."""
    settings.guard()
    opened = settings.projects()  # what cannot be served is told before anything listens
    for name, project in opened.items():
        say(f"{name}: {counted(project.edition.model.n_classes, 'class')}, version {project.edition.version}")
        if settings.workers > 1:
            project.close()
    projects = opened if settings.workers == 1 else None  # several processes open theirs
    with tempfile.TemporaryDirectory(prefix="mach-serve-") as folder:
        config = uvicorn.Config(
            partial(_worker, settings, Path(folder), projects),
            factory=True,
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            http=Connection,
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEPT_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        log = logging.getLogger("uvicorn.error")
        try:
            log.disabled = True  # it would tell a failure too
            socket = config.bind_socket()
        except SystemExit as failed:
            cause = one_line(failed.__context__ or failed)
            where = f"{settings.host} port {settings.port}"
            raise ConfigError(f"cannot listen at {where} ({cause}): choose another --port or --host") from None
        finally:
            log.disabled = False
        socket.listen(config.backlog)  # who comes before a process is ready waits
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"serving at http://{host}:{socket.getsockname()[1]}; Ctrl-C ends it")
        try:
            if settings.workers > 1:
                Multiprocess(config, sockets=[socket]).run()
            else:
                uvicorn.Server(config).run(sockets=[socket])
        except KeyboardInterrupt:
            pass  # uvicorn raises the signal again once all is answered


def _worker(settings: Settings, folder: Path, projects: dict[str, Project] | None) -> Starlette:
    sys.setswitchinterval(0.001)  # the thread that answers gives way to the one that takes requests
    try:
        app = settings.app(folder, projects)
        gc.freeze()  # what is loaded stays: looking through it for garbage would hold up requests
        return app
    except MachError as error:
        say(str(error))
        sys.exit(STARTUP_FAILURE)  # whoever watches this process does not start it again
