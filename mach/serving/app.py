"""The addresses of the server: Annif's REST API, what it lacks, and what operators ask."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mach import __version__
from mach.data.names import class_name, shown
from mach.serving.batcher import BATCH_ROWS, Batcher
from mach.serving.bodies import (
    DOCUMENTS,
    INDEXED,
    MOST_EXPLAINED_CHARACTERS,
    MOST_RESULTS,
    NEW_CLASS,
    Reader,
    flag,
    question,
    share,
    whole,
)
from mach.serving.edition import Named, Question, RowAnswer
from mach.serving.metrics import Metrics
from mach.serving.problems import RequestError, problem_of
from mach.serving.projects import Project
from mach.serving.tokens import Guard, Right

Handler = Callable[[Request], Awaitable[Response]]
FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/openapi.json": ("openapi.json", "application/json"),
}
SAFE = {  # of the page: it loads nothing from elsewhere, and no other page shows it inside
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MOST_ASIDE = 32  # searches that may wait
VERSION = "Mach-Version"  # the header that names the version of the answer
QUEUED = {"suggest": "suggest", "suggest-batch": "suggest_batch"}  # operations whose rows wait, by the end of a path


class Api:
    """What the addresses do, with what they share.

    Parameters
    ----------
    projects : mapping
        By name.
    """

    def __init__(
        self, projects: Mapping[str, Project], queue_rows: int, guard: Guard, folder: Path | None = None
    ) -> None:
        self.projects, self.guard, self.reader, self.is_ready = projects, guard, Reader(), False
        operations = dict.fromkeys(route.name for route in self.routes())
        self.metrics = Metrics(list(operations), list(projects), folder)
        self.batcher = Batcher(queue_rows, observe=self.metrics.batch)
        self._files = {
            path: ((Path(__file__).parent / name).read_bytes(), kind) for path, (name, kind) in FILES.items()
        }
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._n_aside = 0

    def routes(self) -> list[Route]:
        """All addresses."""
        project = "/v1/projects/{project_id}"
        return [
            self._route(f"{project}/suggest", self.suggest, method="POST"),  # what most ask is looked at first
            self._route(f"{project}/suggest-batch", self.suggest_batch, method="POST"),
            *(self._route(path, self.file, "nothing") for path in FILES),
            self._route("/health/live", self.live, "nothing"),
            self._route("/health/ready", self.ready, "nothing"),
            self._route("/metrics", self.tell_metrics),
            self._route("/v1/", self.about),
            self._route("/v1/vocabs", self.list_vocabs),
            self._route("/v1/projects", self.list_projects),
            self._route(project, self.show_project),
            self._route(f"{project}/learn", self.learn, "learn", "POST"),
            self._route(f"{project}/classes", self.search_classes),
            self._route(f"{project}/classes", self.add_class, "learn", "POST"),
            self._route(f"{project}/classes/{{class_id}}/similar", self.similar_classes),
        ]

    def _route(self, path: str, handler: Handler, right: Right = "read", method: str = "GET") -> Route:
        """An address whose requests are let in, counted, and told what is wrong with them."""
        name = handler.__name__

        async def handle(request: Request) -> Response:
            begin, status = time.perf_counter(), 500
            try:
                try:
                    self.guard.insist(request, right)
                    response = await handler(request)
                except Exception as error:
                    response = problem_of(error).response()
                status = response.status_code
            finally:
                self.metrics.count(name, status, time.perf_counter() - begin)
            return response

        return Route(path, handle, methods=[method], name=name)

    async def file(self, request: Request) -> Response:
        """The page, its script, and what describes this API."""
        content, kind = self._files[request.url.path]
        return Response(content, headers=SAFE, media_type=kind)

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

    async def list_vocabs(self, request: Request) -> Response:
        """The classes of every project, as vocabularies."""
        return JSONResponse({"vocabs": [project.described()["vocab"] for project in self.projects.values()]})

    async def list_projects(self, request: Request) -> Response:
        """All projects."""
        return JSONResponse({"projects": [self._described(project) for project in self.projects.values()]})

    async def tell_metrics(self, request: Request) -> Response:
        """Counts, for Prometheus."""
        versions = {name: project.edition.version for name, project in self.projects.items()}
        return PlainTextResponse(
            self.metrics.text(self.batcher.n_waiting, versions), media_type="text/plain; version=0.0.4"
        )

    async def show_project(self, request: Request) -> Response:
        """One project."""
        return JSONResponse(self._described(self._project(request)))

    async def suggest(self, request: Request) -> Response:
        """The best classes of a text."""
        project = self._project(request)
        form = await self.reader.form(request)
        first = {name: values[0] for name, values in form.items()}
        if "text" not in first:
            raise RequestError(400, "the form has no text: send the field text")
        limit, threshold = _limits(project, first)
        asked, text = question(limit, form.get("allowed"), first.get("subset")), first["text"]
        if flag(first, "explain"):
            if len(text) > MOST_EXPLAINED_CHARACTERS:
                most = f"{MOST_EXPLAINED_CHARACTERS:,} characters"
                raise RequestError(413, f"explain: the text has more than {most}: send less, or do not ask why")
            answer = await self._apart(project.explain, asked, text)
        else:
            [answer] = await self._ask(project, asked, [text])
        return _answered(_told(answer, threshold, needs_uris=_is_annif(request)), answer)

    async def suggest_batch(self, request: Request) -> Response:
        """The best classes of up to 32 documents."""
        project = self._project(request)
        limit, threshold = _limits(project, request.query_params)
        body = await self.reader.json(request, DOCUMENTS)
        asked = question(limit, body.allowed, body.subset)
        if not body.documents:
            return _answered([], None)
        answers = await self._ask(project, asked, [document.text for document in body.documents])
        told = [
            _told(answer, threshold, needs_uris=_is_annif(request)) | {"document_id": document.document_id}
            for document, answer in zip(body.documents, answers, strict=True)
        ]
        return _answered(told, answers[0])

    async def search_classes(self, request: Request) -> Response:
        """Classes by a part of their name."""
        project, fields = self._project(request), request.query_params
        limit = whole(fields, "limit", 10, 0, MOST_RESULTS)
        answer = await self._apart(project.search, fields.get("query", ""), limit)
        return _answered(_told(answer), answer)

    async def similar_classes(self, request: Request) -> Response:
        """The classes most similar to one."""
        project = self._project(request)
        k = whole(request.path_params, "class_id", 0, 0, 2**31 - 1)
        limit = whole(request.query_params, "limit", 10, 1, MOST_RESULTS)
        answer = await self._apart(project.similar, k, limit)
        return _answered(_told(answer), answer)

    async def learn(self, request: Request) -> Response:
        """Teach documents their classes."""
        project = self._project(request)
        documents = await self.reader.json(request, INDEXED)
        pairs = [
            (shown(document.text), Named(one.id, one.uri, one.label))
            for document in documents
            for one in document.subjects or []
            if document.text is not None
        ]
        if len(pairs) > MOST_RESULTS:
            raise RequestError(400, f"{len(pairs)} pairs of text and subject: send at most {MOST_RESULTS} at once")
        version = await asyncio.wrap_future(project.learn(pairs))
        return Response(status_code=204, headers={VERSION: version})

    async def add_class(self, request: Request) -> Response:
        """Add a class."""
        project = self._project(request)
        body = await self.reader.json(request, NEW_CLASS)
        examples, texts = ([shown(text) for text in given] for given in (body.examples, body.texts))
        version = await asyncio.wrap_future(project.add(body.name, examples, texts))
        k = project.edition.id_of(Named(label=body.name))
        return JSONResponse({"id": k, "label": class_name(body.name), "version": version}, 201, {VERSION: version})

    def _described(self, project: Project) -> dict[str, Any]:
        return project.described() | {"learning": self.guard.may_learn}

    def _project(self, request: Request) -> Project:
        name = request.path_params["project_id"]
        if name not in self.projects:
            raise RequestError(404, f"there is no project {name!r:.60}: see /v1/projects")
        return self.projects[name]

    async def _ask(self, project: Project, asked: Question, texts: Sequence[str]) -> list[RowAnswer]:
        answers = await self.batcher.ask(project, asked, [shown(text) for text in texts])
        self.metrics.rows(project.name, len(answers))
        return answers

    async def _apart(self, verb: Callable[..., RowAnswer], *arguments: Any) -> RowAnswer:
        """What is no row to answer goes to a thread of its own, one at a time."""
        if self._n_aside >= MOST_ASIDE:
            raise RequestError(429, f"{MOST_ASIDE} searches wait: try again in a second", {"Retry-After": "1"})
        self._n_aside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._aside, verb, *arguments)
        finally:
            self._n_aside -= 1


class Entrance:
    """Refuses rows while the queue is full, before an address is looked up or a body is read.

    Most requests are refused when a server gets several times what it can answer, and all others wait meanwhile.
    """

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin, served = time.perf_counter(), self._app
        operation = QUEUED.get(scope["path"].rpartition("/")[2]) if scope["type"] == "http" else None
        if operation is not None and scope["method"] == "POST":
            try:
                self._api.batcher.refuse()
            except RequestError as refused:
                served = refused.response()
                self._api.metrics.count(operation, refused.status, time.perf_counter() - begin)
        await served(scope, receive, send)


def make_app(projects: Mapping[str, Project], queue_rows: int, guard: Guard, folder: Path | None = None) -> Starlette:
    """The application; errors raised on purpose are problems, all others a status of 500 and a trace in the log."""
    api = Api(projects, queue_rows, guard, folder)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for project in projects.values():
            project.answer(Question(10), _some_rows(project))
        api.is_ready = True
        yield
        api.is_ready = False
        await api.batcher.close()
        for project in projects.values():
            project.close()

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = {404: "there is nothing at this address", 405: "the address has no such method"}
        detail = f"{told.get(error.status_code, error.detail)}: see /openapi.json"
        return RequestError(error.status_code, detail, dict(error.headers or {})).response()

    async def broken(request: Request, error: Exception) -> Response:
        return RequestError(500, "the server made a mistake, which its log tells: report it").response()

    handlers: Any = {HTTPException: unknown, Exception: broken}
    pages = Middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=[VERSION, "Retry-After"],
    )
    middleware = [pages, Middleware(Entrance, api=api)]
    return Starlette(routes=api.routes(), middleware=middleware, exception_handlers=handlers, lifespan=lifespan)


def _some_rows(project: Project) -> list[str]:
    """A whole batch, whose answer reads what one row did not need, before anybody waits for it."""
    model = project.edition.model
    if model.run.text_features is None:
        return ["0:1"] * BATCH_ROWS
    names = [one["label"] for one in project.edition.entries(range(min(BATCH_ROWS, model.n_classes)))]
    return (names * BATCH_ROWS)[:BATCH_ROWS]


def _limits(project: Project, fields: Mapping[str, str]) -> tuple[int, float]:
    language = fields.get("language")
    if language and project.language not in ("und", language):
        raise RequestError(
            400, f"language {language!r:.40} not supported by vocabulary: labels are {project.language!r}"
        )
    return whole(fields, "limit", 10, 0, MOST_RESULTS), share(fields, "threshold")


def _is_annif(request: Request) -> bool:
    """Whether Annif's own client asks, which cannot read a class without uri."""
    return request.headers.get("User-Agent", "").startswith("Annif/")


def _told(answer: RowAnswer, threshold: float = 0.0, *, needs_uris: bool = False) -> dict[str, Any]:
    results = [
        result
        for result in answer.results
        if result.get("score", 1.0) >= threshold and (not needs_uris or result["uri"])
    ]
    told = {"results": results, "known": answer.known, "version": answer.version}
    return told | {"degraded": True} if answer.degraded else told


def _answered(content: Any, answer: RowAnswer | None) -> Response:
    return Response(
        json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(),
        headers=None if answer is None else {VERSION: answer.version},
        media_type="application/json",
    )
