"""What a request is refused with: a status, and a line of what is wrong and how to repair it (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from mach.errors import ConfigError, DataError, MachError, is_out_of_memory, out_of_memory


class RequestError(MachError):
    """A request that is not answered.

    >>> RequestError(404, "there is no project 'x'").response().status_code
    404
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.headers = status, headers

    def response(self) -> JSONResponse:
        """As problem+json."""
        body: dict[str, Any] = {"type": "about:blank", "title": HTTPStatus(self.status).phrase}
        body |= {"status": self.status, "detail": str(self)}
        return JSONResponse(body, self.status, self.headers, media_type="application/problem+json")


def problem_of(error: Exception) -> RequestError:
    """What a caller is told of an error that mach raises on purpose, or of memory that is not there; others go on."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ConfigError | DataError):
        return RequestError(400, str(error))
    if isinstance(error, MachError):
        return RequestError(503, str(error), {"Retry-After": "1"})
    if is_out_of_memory(error):
        return RequestError(503, out_of_memory(error), {"Retry-After": "1"})
    raise error
