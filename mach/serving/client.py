"""Clients of a server of runs: `mach.Client`, and `mach.AsyncClient` with the same verbs to await.

They need httpx: ``pip install 'mach-classifier[serve]'``. What a server sends is checked before it is used.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from mach.errors import ConfigError, DataError, DegradedWarning, MachError, StorageError, one_line
from mach.model.ask import whole

try:
    import httpx
except ModuleNotFoundError as error:
    raise ConfigError(f"a client needs {error.name}: pip install 'mach-classifier[serve]'") from error

BATCH, BATCH_CHARACTERS = 32, 2**20  # documents of a request, as many as the server takes, and their length
Arrays = tuple[NDArray[np.int64], NDArray[np.float32]]


class Suggestion(BaseModel):
    """A class that a server suggests, and the probability that it is right."""

    id: int = Field(ge=0, lt=2**31)
    label: str
    score: float = Field(ge=-1, le=1)
    uri: str | None = None
    notation: str | None = None


class Suggestions(BaseModel):
    """What a server says of a text, and the version of the run that said it; degraded where actors of it are lost."""

    results: list[Suggestion]
    version: str
    known: bool
    degraded: bool = False


_BATCH = TypeAdapter(list[Suggestions])
_PROJECTS = TypeAdapter(dict[str, list[dict[str, Any]]])
Allowed = Sequence[int | str] | str | None
Result = TypeVar("Result")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
Work = Generator[tuple[float, dict[str, Any]], httpx.Response | None, Result]  # seconds to wait, and then what to send


class _Requests(Generic[Http]):
    """What both clients send, and what they make of answers; they themselves wait and send."""

    _kind: type[Http]

    def __init__(
        self, url: str, project: str | None = None, *, token: str | None = None, timeout_seconds: float = 30.0
    ) -> None:
        self.url, self.project, self.timeout_seconds = url.rstrip("/"), project, timeout_seconds
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url {url!r:.80}: need http:// or https://, a host and a port")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._client: Http = self._kind(base_url=self.url, timeout=timeout_seconds, headers=headers)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"url {url!r:.80}: {one_line(error)}") from None

    def _suggesting(self, queries: str | Sequence[str], k: int | None, allowed: Allowed) -> Work[list[Suggestions]]:
        found: list[Suggestions] = []
        for body in self._batches(queries, k, allowed):
            response = yield from self._posting("suggest-batch", **body)
            found += self._answers(response, body)
        if any(one.degraded for one in found):
            told = f"{self.url}: not all repetitions of the run answer now: its log says why"
            warnings.warn(told, DegradedWarning, stacklevel=3)
        return found

    def _learning(self, texts: Sequence[str], labels: Sequence[str]) -> Work[None]:
        self._refuse((yield from self._posting("learn", json=pairs(texts, labels))))

    def _posting(self, verb: str, **how: Any) -> Work[httpx.Response]:
        if self.project is None:
            self.project = self._first_project((yield from self._asking("GET", "/v1/projects")))
        return (yield from self._asking("POST", f"/v1/projects/{self.project}/{verb}", **how))

    def _asking(self, method: str, url: str, **how: Any) -> Work[httpx.Response]:
        end, seconds = time.monotonic() + self.timeout_seconds, 0.0
        while True:
            response = yield seconds, {"method": method, "url": url, **how}
            assert response is not None
            if (pause := self._pause(response, end)) is None:
                return response
            seconds = pause

    def _batches(self, queries: str | Sequence[str], k: int | None, allowed: Allowed) -> Iterator[dict[str, Any]]:
        texts = [queries] if isinstance(queries, str) else list(queries)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError("queries: a server takes texts, at least one, or rows as `index:value ...`")
        limit = 10 if k is None else whole("k", k, 1, 1000, ", the most a server answers")
        given: dict[str, Any] = {}
        if isinstance(allowed, str):
            given["subset"] = allowed
        elif allowed is not None:
            given["allowed"] = [one if isinstance(one, str) else int(one) for one in allowed]
        while texts:
            n, length = 0, 0
            while n < min(BATCH, len(texts)) and (not n or length + len(texts[n]) <= BATCH_CHARACTERS):
                length += len(texts[n])
                n += 1
            documents, texts = [{"text": text} for text in texts[:n]], texts[n:]
            yield {"params": {"limit": limit}, "json": {"documents": documents, **given}}

    def _first_project(self, response: httpx.Response) -> str:
        names = [one.get("project_id") for one in self._checked(response, _PROJECTS).get("projects", [])]
        if len(names) != 1 or not isinstance(names[0], str):
            raise ConfigError(f"{self.url} has the projects {', '.join(map(str, names)) or 'none'}: name one")
        return names[0]

    def _pause(self, response: httpx.Response, end: float) -> float | None:
        """Seconds to wait before a request is sent again; None where it was answered, or there is no time left."""
        if response.status_code != 429:
            return None
        try:
            seconds = min(max(float(response.headers.get("retry-after", "1")), 0.05), 60.0)
        except ValueError:
            seconds = 1.0
        return seconds if time.monotonic() + seconds < end else None

    def _checked(self, response: httpx.Response, kind: TypeAdapter[Any]) -> Any:
        self._refuse(response)
        try:
            return kind.validate_json(response.content)
        except ValidationError as error:
            told = error.errors()[0]["msg"]
            raise StorageError(f"{self.url} does not answer as mach serve does ({told:.80}): check the url") from None

    def _answers(self, response: httpx.Response, body: dict[str, Any]) -> list[Suggestions]:
        found: list[Suggestions] = self._checked(response, _BATCH)
        n = len(body["json"]["documents"])
        if len(found) != n:
            raise StorageError(f"{self.url} does not answer as mach serve does ({len(found)} of {n}): check the url")
        return found

    def _refuse(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        try:
            detail = str(response.json()["detail"])[:500]
        except (ValueError, LookupError, TypeError):
            detail = response.reason_phrase
        kind: type[MachError] = (
            DataError if response.status_code < 500 and response.status_code != 429 else StorageError
        )
        raise kind(f"{self.url} refuses ({response.status_code}): {detail}")

    def _unreachable(self, error: Exception) -> StorageError:
        return StorageError(f"{self.url} does not answer ({one_line(error)}): is `mach serve` running there?")


class Client(_Requests[httpx.Client]):
    """Asks a server that ``mach serve`` started; a context manager that closes its connections.

    Parameters
    ----------
    url : str
        Such as ``http://127.0.0.1:8000``.
    project : str, optional
        Name of one of its runs; needed where it serves several.
    token : str, optional
        Where the server asks for one.
    timeout_seconds : float
        For a request, waits for a busy server among it.

    Examples
    --------
    >>> import mach
    >>> with mach.Client("http://127.0.0.1:8000", "books") as client:  # doctest: +SKIP
    ...     ids, probabilities = client.topk(["a voyage to hunt whales", "kings of Norway"], k=5)
    """

    _kind = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def topk(self, queries: str | Sequence[str], k: int | None = None, *, allowed: Allowed = None) -> Arrays:
        """Ids and probabilities of the best k classes, as `MachModel.topk` returns them.

        ``allowed`` are ids or names, or the name of a stored subset. Raises DataError when the server refuses,
        StorageError when it does not answer.
        """
        return arrays(self.suggest(queries, k, allowed=allowed), k, is_single=isinstance(queries, str))

    def suggest(
        self, queries: str | Sequence[str], k: int | None = None, *, allowed: Allowed = None
    ) -> list[Suggestions]:
        """The same with labels, and for every query the version that answered; 32 queries a request."""
        return self._do(self._suggesting(queries, k, allowed))

    def learn(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Teach that every text is of the class of that name, as ``model.classes.upvote`` does."""
        self._do(self._learning(texts, labels))

    def _do(self, work: Work[Result]) -> Result:
        response = None
        while True:
            try:
                seconds, request = work.send(response)
            except StopIteration as done:
                result: Result = done.value
                return result
            time.sleep(seconds)
            try:
                response = self._client.request(**request)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._unreachable(error) from None


class AsyncClient(_Requests[httpx.AsyncClient]):
    """As `Client`, for programs of many tasks: its verbs are awaited.

    Examples
    --------
    >>> async def ask() -> None:
    ...     async with mach.AsyncClient("http://127.0.0.1:8000") as client:
    ...         print(await client.topk("a voyage to hunt whales", k=5))
    """

    _kind = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def topk(self, queries: str | Sequence[str], k: int | None = None, *, allowed: Allowed = None) -> Arrays:
        """As `Client.topk`."""
        return arrays(await self.suggest(queries, k, allowed=allowed), k, is_single=isinstance(queries, str))

    async def suggest(
        self, queries: str | Sequence[str], k: int | None = None, *, allowed: Allowed = None
    ) -> list[Suggestions]:
        """As `Client.suggest`."""
        return await self._do(self._suggesting(queries, k, allowed))

    async def learn(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """As `Client.learn`."""
        await self._do(self._learning(texts, labels))

    async def _do(self, work: Work[Result]) -> Result:
        response = None
        while True:
            try:
                seconds, request = work.send(response)
            except StopIteration as done:
                result: Result = done.value
                return result
            await asyncio.sleep(seconds)
            try:
                response = await self._client.request(**request)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._unreachable(error) from None


def arrays(found: Sequence[Suggestions], k: int | None, *, is_single: bool) -> Arrays:
    """Ids and scores of shape (N, k), -1 and -inf beyond what was found; of shape (k,) for one query.

    >>> arrays([Suggestions(results=[], version="", known=True)], 2, is_single=True)
    (array([-1, -1]), array([-inf, -inf], dtype=float32))
    """
    width = max((len(one.results) for one in found), default=0) if k is None else k
    ids_Nk, scores_Nk = np.full((len(found), width), -1), np.full((len(found), width), -np.inf, np.float32)
    for n, one in enumerate(found):
        results = one.results[:width]
        ids_Nk[n, : len(results)] = [result.id for result in results]
        scores_Nk[n, : len(results)] = [result.score for result in results]
    return (ids_Nk[0], scores_Nk[0]) if is_single else (ids_Nk, scores_Nk)


def pairs(texts: Sequence[str], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Documents of one class each; DataError where there are not as many texts as labels.

    >>> pairs(["a whale"], ["whales"])
    [{'text': 'a whale', 'subjects': [{'label': 'whales'}]}]
    """
    if len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts and {len(labels)} labels: give one label a text")
    return [{"text": text, "subjects": [{"label": label}]} for text, label in zip(texts, labels, strict=True)]
