"""Bodies of requests: read within limits of size and time, and checked; a RequestError says what is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect, Request

from mach.data.names import shown
from mach.files.records import first_of
from mach.serving.edition import Question
from mach.serving.problems import RequestError

MOST_BYTES = 2**23  # of a body
HELD_BYTES = 2**28  # of all bodies that are being read
SMALL_BYTES = 2**16  # of a body that is read even so; a longer form is parsed beside other requests
BODY_SECONDS = 30.0
MOST_DOCUMENTS = 32  # of a batch, as in Annif
MOST_RESULTS = 1000
MOST_ALLOWED = 100_000
MOST_EXPLAINED_CHARACTERS = 20_000  # characters of a text that is explained: some seconds, of one thread
FORM, JSON = "application/x-www-form-urlencoded", "application/json"
Content = TypeVar("Content")


class Body(BaseModel):
    """Whatever else a body holds is not looked at, as in Annif."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Document(Body):
    """A document to be answered."""

    text: str
    document_id: str | None = None
    metadata: dict[str, str] | None = None


class Documents(Body):
    """Up to 32 documents, and which classes they may get."""

    documents: list[Document] = Field(max_length=MOST_DOCUMENTS)
    allowed: list[int | str] | None = Field(default=None, max_length=MOST_ALLOWED)
    subset: str | None = None


class Subject(Body):
    """A class: by its uri as Annif does, by its label, or by its id."""

    uri: str | None = None
    label: str | None = None
    id: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class IndexedDocument(Body):
    """A document and its right classes."""

    text: str | None = None
    subjects: list[Subject] | None = Field(default=None, max_length=MOST_RESULTS)
    metadata: dict[str, str] | None = None


INDEXED = TypeAdapter(Annotated[list[IndexedDocument], Field(max_length=MOST_RESULTS)])


class NewClass(Body):
    """A class to add: what it is called, and rows or texts that it is known by."""

    name: str = Field(min_length=1, max_length=4096)
    examples: list[str] = Field(default=[], max_length=MOST_DOCUMENTS)
    texts: list[str] = Field(default=[], max_length=MOST_DOCUMENTS)


DOCUMENTS, NEW_CLASS = TypeAdapter(Documents), TypeAdapter(NewClass)


class Reader:
    """Reads bodies, all of which together hold bounded memory."""

    def __init__(self) -> None:
        self._held = 0

    async def read(self, request: Request, kind: str) -> bytes:
        """The body, which must be of a kind: 415 where it is not, 413 where it is large, 408 where it is late."""
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != kind:
            raise RequestError(415, f"the body is {given[:60] or 'of no kind'}: send {kind}")
        too_large = RequestError(
            413, f"the body has more than {MOST_BYTES:,} bytes: send less", {"Connection": "close"}
        )
        declared = request.headers.get("content-length", "0")
        if len(declared) > 18 or int(declared) > MOST_BYTES:
            raise too_large
        parts, n_bytes = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    n_bytes += len(part)
                    self._held += len(part)
                    if n_bytes > MOST_BYTES:
                        raise too_large
                    if self._held > HELD_BYTES and n_bytes > SMALL_BYTES:
                        raise RequestError(503, "too many bodies at once: try again", {"Retry-After": "1"})
                    parts.append(part)
        except TimeoutError:
            told = f"the body did not arrive within {BODY_SECONDS:g} seconds: send it faster"
            raise RequestError(408, told, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise RequestError(400, "the connection was closed before the body was there: send it whole") from None
        finally:
            self._held -= n_bytes
        return b"".join(parts)

    async def form(self, request: Request) -> dict[str, list[str]]:
        """Fields of a form."""
        content = await self.read(request, FORM)
        return await asyncio.to_thread(fields_of, content) if len(content) > SMALL_BYTES else fields_of(content)

    async def json(self, request: Request, kind: TypeAdapter[Content]) -> Content:
        """A body of JSON."""
        content = await self.read(request, JSON)
        try:
            return kind.validate_json(content, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            told = first["msg"] if first["type"] == "json_invalid" else first_of(error)
            raise RequestError(400, f"the body is not as it should be: {told}: see /openapi.json") from None


def fields_of(form: bytes) -> dict[str, list[str]]:
    """Fields of a form; 8 MB of escapes take a second.

    >>> fields_of(b"text=a+whale&allowed=fish&allowed=birds")
    {'text': ['a whale'], 'allowed': ['fish', 'birds']}
    """
    try:
        pairs = parse_qsl(form.decode(), keep_blank_values=True, errors="strict", max_num_fields=MOST_ALLOWED)
    except ValueError as error:
        raise RequestError(400, f"the form is damaged: {error!s:.80}: send fields as UTF-8") from None
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        fields.setdefault(name, []).append(value)
    return fields


def whole(fields: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    """A field that is a whole number."""
    text = fields.get(name)
    if text is None:
        return default
    number = text.removeprefix("-")
    if not (number.isascii() and number.isdigit() and len(number) < 19 and least <= int(text) <= most):
        raise RequestError(400, f"{name} {text!r:.40}: need a whole number from {least} to {most}")
    return int(text)


def share(fields: Mapping[str, Any], name: str) -> float:
    """A field that is a number from 0 to 1; by default 0."""
    try:
        value = float(fields.get(name, "0"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RequestError(400, f"{name} {fields[name]!r:.40}: need a number from 0 to 1")
    return value


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; by default false."""
    text = fields.get(name, "false")
    if text not in ("true", "false"):
        raise RequestError(400, f"{name} {text!r:.40}: need true or false")
    return bool(text == "true")


def question(k: int, allowed: list[Any] | None, subset: str | None) -> Question:
    """What is asked, of classes in a list or in a stored subset."""
    if allowed is not None and subset is not None:
        raise RequestError(400, "allowed and subset: give one of both")
    if allowed is None:
        return Question(k, subset if subset is None else shown(subset))
    return Question(k, tuple(shown(one) if isinstance(one, str) else one for one in allowed))
