"""The process that serves: what it is started with, its socket, its end."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette

from mach.errors import ConfigError
from mach.serving.app import make_app
from mach.serving.batcher import QUEUE_ROWS, Batcher
from mach.serving.bodies import Reader
from mach.serving.connection import Connection
from mach.serving.projects import Project, project_names

CONNECTIONS = 1000
STOP_SECONDS = 30  # requests that were taken are answered within them


@dataclass(frozen=True)
class Settings:
    """What a server is started with; see ``mach serve --help``."""

    runs: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 8000
    language: str = "und"
    queue_rows: int = QUEUE_ROWS

    def projects(self, say: Callable[[str], None]) -> dict[str, Project]:
        """Its projects, opened."""
        named = project_names(self.runs)
        return {name: Project(name, path, self.language, say) for name, path in named.items()}


@dataclass
class Service:
    """An application over opened projects, for a process that serves."""

    settings: Settings
    projects: dict[str, Project] = field(default_factory=dict)

    def app(self) -> Starlette:
        """The application."""
        return make_app(self.projects, Batcher(self.settings.queue_rows), Reader())


def say(line: str) -> None:
    """A line of the log."""
    from mach.files.visible import visible

    print(f"mach: {visible(line)}", file=sys.stderr, flush=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then requests that were taken are answered, and it returns."""
    projects = settings.projects(say)
    service = Service(settings, projects)
    config = uvicorn.Config(
        service.app(),
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise ConfigError(f"cannot listen at {settings.host} port {settings.port}: choose another --port") from None
    for project in projects.values():
        edition = project.edition
        say(f"{project.name}: {edition.model.n_classes:,} classes, version {edition.version}")
    where = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(f"serving at http://{where}:{socket.getsockname()[1]}; Ctrl-C ends it")
    sys.setswitchinterval(0.001)  # the thread that answers gives way to the one that takes requests
    try:
        uvicorn.Server(config).run(sockets=[socket])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again once all is answered
    finally:
        for project in projects.values():
            project.close()
