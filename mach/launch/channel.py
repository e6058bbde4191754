"""JSON messages over a socket: the only thing that passes between driver and worker."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from typing import Any


class Channel:
    """One end of a driver-worker connection; a message is one JSON object a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; a peer that is gone is found out by `receive`."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Wait for a message; None when the other end is gone."""
        while b"\n" not in self._buffer:
            try:
                data = self._connection.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def has_message(self) -> bool:
        """Whether `receive` would return at once, be it with None."""
        return b"\n" in self._buffer or bool(select.select([self._connection], [], [], 0)[0])

    def close(self) -> None:
        self._connection.close()
