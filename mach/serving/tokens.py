"""Who may ask and who may teach: tokens from a file, and what pages of other addresses may do without any."""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from starlette.requests import Request

from mach.errors import ConfigError
from mach.files.regular import read_regular
from mach.serving.problems import RequestError

Right = Literal["nothing", "read", "learn"]
LEAST_CHARACTERS, MOST_BYTES = 16, 2**16


class Tokens:
    """Tokens that may ask, and tokens that may teach as well.

    >>> Tokens([b"0123456789abcdef"], []).right_of("Bearer 0123456789abcdef")
    'read'
    """

    def __init__(self, read: list[bytes], learn: list[bytes]) -> None:
        self._read, self._learn = read, learn

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Those in a file with lines such as ``read TOKEN`` and ``learn TOKEN``; ConfigError of one line."""
        try:
            lines = read_regular(path, MOST_BYTES).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            told = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"{path}: {told}: give a file of lines `read TOKEN` or `learn TOKEN`") from None
        tokens: dict[str, list[bytes]] = {"read": [], "learn": []}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or words[0] not in tokens or len(words[1]) < LEAST_CHARACTERS or not words[1].isascii():
                raise ConfigError(
                    f"{path} line {number}: need `read TOKEN` or `learn TOKEN`, {LEAST_CHARACTERS} ASCII characters "
                    "or more (openssl rand -hex 32 makes one)"
                )
            tokens[words[0]].append(words[1].encode())
        if not any(tokens.values()):
            raise ConfigError(f"{path} holds no token: write a line `read TOKEN`")
        return cls(tokens["read"], tokens["learn"])

    def one(self) -> str:
        """One that may ask, for a client."""
        return [*self._read, *self._learn][0].decode()

    def right_of(self, header: str) -> Right | None:
        """What the bearer of a header may do; it takes as long whatever is wrong."""
        kind, _, given = header.partition(" ")
        token = given.strip().encode("utf-8", "replace")
        may_learn = [hmac.compare_digest(token, known) for known in self._learn]
        may_read = [hmac.compare_digest(token, known) for known in self._read]
        if kind.lower() != "bearer":
            return None
        return "learn" if any(may_learn) else "read" if any(may_read) else None


class Guard:
    """Lets a request through, or raises the RequestError that refuses it.

    Parameters
    ----------
    tokens : Tokens, optional
        None lets everyone ask.
    may_learn : bool
        Whether anyone may teach.
    is_open : bool
        Whether pages served under any name may teach without a token, rather than those of this machine alone.
    """

    def __init__(self, tokens: Tokens | None = None, *, may_learn: bool = False, is_open: bool = False) -> None:
        self.tokens, self.may_learn, self.is_open = tokens, may_learn, is_open

    def insist(self, request: Request, right: Right) -> None:
        """Raise 401 without a token that is known, 403 where its right or that of its page does not reach."""
        if right == "nothing":
            return
        if self.tokens is not None:
            held = self.tokens.right_of(request.headers.get("authorization", ""))
            if held is None:
                told = "send the header `Authorization: Bearer TOKEN` with a token that this server knows"
                raise RequestError(401, told, {"WWW-Authenticate": "Bearer"})
            if right == "learn" and held != "learn":
                raise RequestError(403, "this token may ask, not teach: use one of the lines `learn`")
        if right == "learn" and not self.may_learn:
            raise RequestError(403, "learning is off: start the server with --learn")
        if right == "learn" and self.tokens is None:
            self._insist_on_own_page(request)

    def _insist_on_own_page(self, request: Request) -> None:
        """A browser tells which page asks: one of another address must not teach in its reader's name."""
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if origin is None:
            return
        try:
            own = urlsplit(f"//{host}").hostname or ""
            is_own = urlsplit(origin).netloc == host and (self.is_open or is_loopback(own))
        except ValueError:  # such as an address that begins with [ and does not end
            is_own = False
        if not is_own:
            raise RequestError(403, f"pages of {origin!r:.80} may not teach: start the server with --token-file")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
