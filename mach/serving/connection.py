"""One connection: uvicorn's, with an end to waiting for heads to arrive and for answers to be read, and small heads."""

from __future__ import annotations

import socket
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS, HEAD_BYTES = 10.0, 2**16
READ_SECONDS = 60.0  # whoever does not read an answer for so long is left


class Connection(HttpToolsProtocol):
    """Closes itself when the head of a request is not there in ten seconds, or has more than 64 KB.

    The same where answers are not read in a minute. Uvicorn has no such limit: each connection that sends a byte a
    minute, or never reads, would be kept forever, with the answers that wait for it.
    """

    _deadline: TimerHandle | None = None
    _unread: TimerHandle | None = None
    _is_in_head, _head_bytes = False, 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (stream := transport.get_extra_info("socket")) is not None:  # asyncio does so where it made the socket alone
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(0)  # so that `pause_writing` tells of every byte that is not taken
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        self._end_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        is_between = self.cycle is None or self.cycle.response_complete
        if is_between and self._deadline is None:
            self._await_head()
        if self._is_in_head or self._deadline is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES and not self._has_head(data):
                return
        super().data_received(data)

    def on_message_begin(self) -> None:  # maybe before the last request is answered
        self._is_in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end_wait()
        self._is_in_head, self._head_bytes = False, 0
        super().on_headers_complete()

    def pause_writing(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._end_unread()
        super().resume_writing()

    def _has_head(self, data: bytes) -> bool:
        """Whether a large piece of data ends the head; the connection is closed where it does not."""
        if b"\r\n\r\n" in data[:HEAD_BYTES]:
            return True
        self.transport.close()
        return False

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _end_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self) -> Any:
        self._deadline = None
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
