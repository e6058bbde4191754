"""The proof that repetitions never talk: counts what a worker's process exchanges over sockets while it trains.

Python reports every socket it creates to audit hooks (PEP 578). While a `PeerTraffic` is entered, sockets of any
family are noted, except while it is paused; the bytes of those that live on are asked from the kernel (``TCP_INFO``).
The channel to the driver exists before and carries commands and progress alone, so what is counted here is peers.
"""

from __future__ import annotations

import socket
import struct
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_TCP_INFO_BYTES_ACKED, _TCP_INFO_BYTES_RECEIVED = 120, 128  # offsets in Linux's struct tcp_info
_listeners: list[PeerTraffic] = []


class PeerTraffic:
    """Counter of sockets opened and bytes moved; a context manager around training.

    Attributes
    ----------
    n_sockets : int
        Sockets created meanwhile, closed ones included.
    """

    def __init__(self) -> None:
        self.n_sockets = self._n_pauses = 0
        self._alive: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def __enter__(self) -> PeerTraffic:
        _listen()
        _listeners.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _listeners.remove(self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away: what remote storage opens meanwhile is no talk between repetitions."""
        self._n_pauses += 1
        try:
            yield
        finally:
            self._n_pauses -= 1

    @property
    def n_bytes(self) -> int:
        """Bytes sent and received so far over the noted sockets that are still open."""
        return sum(_tcp_bytes(peer) for peer in self._alive)


@cache
def _listen() -> None:
    sys.addaudithook(_notice)  # it can never be removed, so there is one a process


def _notice(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.__new__":
        for listener in _listeners:
            if not listener._n_pauses:
                listener.n_sockets += 1
                listener._alive.add(arguments[0])


def _tcp_bytes(peer: socket.socket) -> int:
    try:
        info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:  # closed, or not TCP
        return 0
    return sum(
        struct.unpack_from("=Q", info, offset)[0] for offset in (_TCP_INFO_BYTES_ACKED, _TCP_INFO_BYTES_RECEIVED)
    )
