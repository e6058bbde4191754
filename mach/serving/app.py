"""The addresses of the server: Annif's REST API, what it lacks, and what operators ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mach import __version__
from mach.data.names import shown
from mach.serving.batcher import Batcher
from mach.serving.bodies import MOST_RESULTS, Documents, Reader, question, share, whole
from mach.serving.problems import RequestError, problem_of
from mach.serving.projects import Project, RowAnswer

Handler = Callable[[Request], Awaitable[Response]]
VERSION = "Mach-Version"  # the header that names the version of the answer


class Api:
    """What the addresses do, with what they share.

    Parameters
    ----------
    projects : mapping
        By name.
    """

    def __init__(self, projects: Mapping[str, Project], batcher: Batcher, reader: Reader) -> None:
        self.projects, self.batcher, self.reader = projects, batcher, reader
        self.is_ready = False
        self._asides = ThreadPoolExecutor(1, thread_name_prefix="aside")

    def routes(self) -> list[Route]:
        """All addresses."""
        project = "/v1/projects/{project_id}"
        return [
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route("/v1/", self.about),
            Route("/v1/projects", self.list_projects),
            Route(project, self.show),
            Route(f"{project}/suggest", self.suggest, methods=["POST"]),
            Route(f"{project}/suggest-batch", self.suggest_batch, methods=["POST"]),
            Route(f"{project}/classes", self.search),
            Route(f"{project}/classes/{{class_id}}/similar", self.similar),
        ]

    async def live(self, request: Request) -> Response:
        """The process runs."""
        return JSONResponse({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """Projects answer: not before all are loaded, and no longer once the server is stopping."""
        if not self.is_ready:
            raise RequestError(503, "the server is starting or stopping: ask again", {"Retry-After": "1"})
        return JSONResponse({"status": "ready"})

    async def about(self, request: Request) -> Response:
        """What answers."""
        return JSONResponse({"title": "mach REST API", "version": __version__})

    async def list_projects(self, request: Request) -> Response:
        """All projects."""
        return JSONResponse({"projects": [project.described() for project in self.projects.values()]})

    async def show(self, request: Request) -> Response:
        """One project."""
        return JSONResponse(self._project(request).described())

    async def suggest(self, request: Request) -> Response:
        """The best classes of a text."""
        project = self._project(request)
        self.batcher.refuse()
        form = await self.reader.form(request)
        first = {name: values[0] for name, values in form.items()}
        if "text" not in first:
            raise RequestError(400, "the form has no text: send the field text")
        limit, threshold = _limits(project, first)
        asked = question(limit, form.get("allowed"), first.get("subset"))
        [answer] = await self.batcher.ask(project, asked, [shown(first["text"])])
        return _answered(_told(answer, threshold), answer)

    async def suggest_batch(self, request: Request) -> Response:
        """The best classes of up to 32 documents."""
        project = self._project(request)
        self.batcher.refuse()
        limit, threshold = _limits(project, request.query_params)
        body = await self.reader.json(request, Documents)
        asked = question(limit, body.allowed, body.subset)
        if not body.documents:
            return _answered([], None)
        answers = await self.batcher.ask(project, asked, [shown(document.text) for document in body.documents])
        told = [
            _told(answer, threshold) | {"document_id": document.document_id}
            for document, answer in zip(body.documents, answers, strict=True)
        ]
        return _answered(told, answers[0])

    async def search(self, request: Request) -> Response:
        """Classes by a part of their name."""
        project, fields = self._project(request), request.query_params
        limit = whole(fields, "limit", 10, 0, MOST_RESULTS)
        answer = await self._aside(project.search, fields.get("query", ""), limit)
        return _answered(_told(answer), answer)

    async def similar(self, request: Request) -> Response:
        """The classes most similar to one."""
        project = self._project(request)
        k = whole(request.path_params, "class_id", 0, 0, 2**31 - 1)
        limit = whole(request.query_params, "limit", 10, 1, MOST_RESULTS)
        answer = await self._aside(project.similar, k, limit)
        return _answered(_told(answer), answer)

    def _project(self, request: Request) -> Project:
        name = request.path_params["project_id"]
        if name not in self.projects:
            raise RequestError(404, f"there is no project {name!r:.60}: see /v1/projects")
        return self.projects[name]

    async def _aside(self, verb: Callable[..., Any], *arguments: Any) -> Any:
        """What is no row to answer goes to a thread of its own, one at a time."""
        if self._asides._work_queue.qsize() > 32:
            raise RequestError(429, "32 searches wait: try again in a second", {"Retry-After": "1"})
        return await asyncio.get_running_loop().run_in_executor(self._asides, verb, *arguments)


def make_app(projects: Mapping[str, Project], batcher: Batcher, reader: Reader) -> Starlette:
    """The application; errors raised on purpose are problems, all others a status of 500 and a trace in the log."""
    api = Api(projects, batcher, reader)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        api.is_ready = True
        yield
        api.is_ready = False
        await batcher.close()

    async def refused(request: Request, error: Exception) -> Response:
        return problem_of(error).response()

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = {404: "there is nothing at this address", 405: "the address has no such method"}
        return RequestError(
            error.status_code,
            f"{told.get(error.status_code, error.detail)}: see /openapi.json",
            dict(error.headers or {}),
        ).response()

    from mach.errors import MachError

    handlers: Any = {MachError: refused, MemoryError: refused, HTTPException: unknown}
    return Starlette(routes=api.routes(), exception_handlers=handlers, lifespan=lifespan)


def _limits(project: Project, fields: Mapping[str, str]) -> tuple[int, float]:
    language = fields.get("language")
    if language and project.language not in ("und", language):
        raise RequestError(
            400, f"language {language!r:.40} not supported by vocabulary: labels are {project.language!r}"
        )
    return whole(fields, "limit", 10, 0, MOST_RESULTS), share(fields, "threshold")


def _told(answer: RowAnswer, threshold: float = 0.0) -> dict[str, Any]:
    results = [result for result in answer.results if result.get("score", 1.0) >= threshold]
    return {"results": results, "known": answer.known, "version": answer.version}


def _answered(content: Any, answer: RowAnswer | None) -> Response:
    return Response(
        json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(),
        headers=None if answer is None else {VERSION: answer.version},
        media_type="application/json",
    )
