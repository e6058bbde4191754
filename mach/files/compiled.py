"""Kernels: functions that numba compiles once a machine, whoever needs them first; the others wait and load them."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

LONG_SECONDS = 1.0  # what loading a kernel never takes, so that it was waited for

_hearers: list[Callable[[str], None]] = []
_clocks: list[Callable[[int, float], None]] = []
_depth = threading.local()
_said: set[str] = set()
_compiled: list[str] = []  # names of functions


def hear(hearer: Callable[[str], None]) -> None:
    """Have this process tell of kernels that it compiles, or waits for: one line of each kind, as they take seconds."""
    _hearers[:] = [hearer]


@contextmanager
def timed(clock: Callable[[int, float], None]) -> Iterator[None]:
    """Meanwhile, tell it after each call that compiled kernels, or waited for them: how many, and in what seconds."""
    _clocks.append(clock)
    try:
        yield
    finally:
        _clocks.remove(clock)


def n_compiled() -> int:
    """How many functions this process has compiled, each kind of arguments counted."""
    return len(_compiled)


def kernel(**options: Any) -> Callable[[Function], Function]:
    """Compile a function without Python and its lock when it is first called, for each kind of arguments.

    What is compiled is kept on disk (`mach.files.caches.keep_compiled`). Of several processes that lack a function one
    compiles it. Options are those of `numba.njit`; with ``inline="always"`` the function becomes part of its callers.
    """

    def compiled(function: Function) -> Function:
        from numba import njit
        from numba.core.compiler_lock import global_compiler_lock

        dispatcher: Any = njit(nogil=True, **options)(function)
        kept = _cache_class()(function)
        dispatcher._cache = kept
        compile_or_load = dispatcher.compile

        def compile_once(signature: Any) -> Any:
            with _counted(), global_compiler_lock:  # of the threads of a process one compiles it, too
                try:
                    return compile_or_load(signature)
                finally:
                    kept.unlock()

        dispatcher.compile = compile_once
        result: Function = dispatcher
        return result

    return compiled


@cache
def _cache_class() -> Any:
    from numba.core.caching import FunctionCache
    from numba.core.runtime.nrt import rtsys

    base: Any = FunctionCache  # which has no types

    class Cache(base):  # type: ignore[misc]
        """numba's cache of a function, which is locked from where something lacks until that was compiled."""

        def __init__(self, function: Callable[..., Any]) -> None:
            super().__init__(function)
            self._name = f"{function.__module__}.{function.__name__}"
            self._lock: int | None = None

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            # Not the base's own, which first imports all that lowering knows, scipy.linalg among it: the compiler does.
            rtsys.initialize(target_context)
            found = self._load_overload(sig, target_context)
            if found is not None or self._lock is not None:
                return found
            self._wait_for_lock()
            found = self._load_overload(sig, target_context)  # another process may have compiled it meanwhile
            if found is None:
                _compiled.append(self._name)
                _say("compiling kernels for this processor, once: up to half a minute")
            else:
                self.unlock()
            return found

        def unlock(self) -> None:
            """Let others compile it, or load it."""
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

        def _wait_for_lock(self) -> None:
            try:
                self._impl.locator.ensure_cache_path()
                name = os.path.join(self.cache_path, f"{self._impl.filename_base}.lock")
                self._lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    _say("waiting for another process that compiles kernels")
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
            except OSError:  # it cannot be written there, so nothing will be kept either
                self.unlock()

    return Cache


@contextmanager
def _counted() -> Iterator[None]:
    """Tell what all that is compiled within took, once: a function compiles those that it calls."""
    if getattr(_depth, "is_inner", False):
        yield
        return
    _depth.is_inner = True
    n_before, started = len(_compiled), time.monotonic()
    try:
        yield
    finally:
        _depth.is_inner = False
        n, seconds = len(_compiled) - n_before, time.monotonic() - started
        if n or seconds >= LONG_SECONDS:
            for clock in _clocks:
                clock(n, seconds)


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        for hearer in _hearers:
            hearer(text)
