"""The only module that imports ray: actors on a cluster, calls to them, and what became of the calls.

Everything above it (`mach.training.launch.cluster`, `mach.runs.actors`) is plain Python and knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mach.errors import ConfigError, IncompleteRunError, MachError

CALLS_AT_ONCE = 4  # threads of an actor: one waits for messages while others take orders

_sharing: set[Cluster] = set()  # those that use the one connection of this process, if the first of them made it


class ActorLostError(MachError):
    """The process or the node of an actor is gone, or was never there."""


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for one actor; it places the actor where so much is free."""

    cpus: float = 1.0
    gpus: float = 0.0  # a fraction of one is shared with other actors
    memory_bytes: int = 0  # 0: not counted
    custom: dict[str, float] = field(default_factory=dict)  # what nodes announce, such as {"fast_disk": 1}


class Cluster:
    """A connection to a Ray cluster; a context manager that ends it, and with it all its actors.

    Parameters
    ----------
    address : str, optional
        ``host:port`` of the head node, or "auto"; by default the cluster of this machine or of ``RAY_ADDRESS``,
        else one is started here for as long as the connection lasts.

    Raises
    ------
    ConfigError
        When ray is not installed.
    IncompleteRunError
        When the cluster cannot be reached.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f"the launcher ray needs Ray ({error}): pip install 'mach-classifier[ray]'") from error
        self._ray = ray
        if not ray.is_initialized():
            _refuse_unreachable(address)
            _connect(ray, address)
            _sharing.clear()
            _sharing.add(self)
        elif _sharing:
            _sharing.add(self)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, unless it was there before; of several that share it, the last does."""
        if self in _sharing:
            _sharing.remove(self)
            if not _sharing:
                self._ray.shutdown()

    def start(
        self, kind: type, *arguments: Any, resources: Resources, here: bool = False, spread: bool = False
    ) -> Actor:
        """Ask for an actor of a plain class; it comes to life when and where its resources are free.

        Its methods run in threads, several at once. ``here`` is on the node of this process; ``spread`` over as many
        nodes as there are, where Ray fills one after the other by default.
        """
        options: dict[str, Any] = {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "resources": dict(resources.custom),
            "max_concurrency": CALLS_AT_ONCE,
            "max_restarts": 0,
        }
        if resources.memory_bytes:
            options["memory"] = resources.memory_bytes
        if spread:
            options["scheduling_strategy"] = "SPREAD"
        if here:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            node = self._ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        return Actor(self._ray.remote(**options)(kind).remote(*arguments))

    def wait(self, calls: Iterable[Call], timeout_seconds: float | None = None) -> list[Call]:
        """Those of the calls that have ended, as soon as one has; none after the timeout."""
        by_reference = {call.reference: call for call in calls}
        if not by_reference:
            return []
        references = list(by_reference)
        try:
            ready, _ = self._ray.wait(references, num_returns=1, timeout=timeout_seconds, fetch_local=False)
            if ready:  # all others that have ended meanwhile, without waiting
                ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        except self._ray.exceptions.RayError as error:
            raise IncompleteRunError(f"the Ray cluster is gone: {_line(error)}") from error
        return [by_reference[reference] for reference in ready]

    def capacity(self, resources: Resources) -> int:
        """How many such actors all present nodes together would hold."""
        nodes: list[dict[str, Any]] = self._ray.nodes()  # type: ignore[no-untyped-call]
        return sum(_fitting(node["Resources"], resources) for node in nodes if node["Alive"])


@dataclass(frozen=True)
class Call:
    """A running or ended call of an actor's method."""

    reference: Any

    def result(self, timeout_seconds: float | None = None) -> Any:
        """What the method returned; waits for it.

        Raises
        ------
        ActorLostError
            When the actor, its process or its node is gone.
        Exception
            What the method raised.
        TimeoutError
        """
        import ray
        from ray import exceptions as errors

        try:
            return ray.get(self.reference, timeout=timeout_seconds)
        except errors.GetTimeoutError as error:
            raise TimeoutError(f"no answer within {timeout_seconds} s") from error
        except errors.RayTaskError as error:
            raise error.cause if isinstance(getattr(error, "cause", None), Exception) else error from None
        except errors.RayError as error:
            raise ActorLostError(_line(error)) from error


class Actor:
    """A handle on an actor; other actors may hold it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *arguments: Any) -> Call:
        """Begin a call; returns at once."""
        return Call(getattr(self._handle, method).remote(*arguments))

    def kill(self) -> None:
        """End the actor's process, or withdraw the request for it."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._handle)


def node_name() -> str:
    """What people call the node that an actor runs on; call it there."""
    import ray

    context = ray.get_runtime_context()
    return f"{os.uname().nodename}/{context.get_node_id()[:4]}"


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one of this machine alone."""
    wanted = {"namespace": "mach", "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    at_sigterm = signal.getsignal(signal.SIGTERM)
    named = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        try:
            if named == "local":
                raise ConnectionError  # it is wanted that there is none
            ray.init(address=named, **wanted)
        except ConnectionError:
            if named not in ("auto", "local"):
                raise
            with _on_loopback():
                ray.init(address="local", **wanted)
    except Exception as error:  # of many classes, a plain Exception where a process does not start in time
        repair = "see that it runs (ray status) in the same version; where it asks for a token, set RAY_AUTH_MODE=token"
        if "timed out" in str(error):
            repair = "on a busy machine set RAY_raylet_start_wait_time_s=120 in the environment"
        where = "this machine" if named in ("auto", "local") else named
        raise IncompleteRunError(f"cannot connect to the Ray cluster at {where}: {_line(error)}: {repair}") from error
    if threading.current_thread() is threading.main_thread():  # Ray sets its own, which dumps the stack
        signal.signal(signal.SIGTERM, at_sigterm)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray that is started meanwhile listen on the loopback address only, by the switch it has for other systems."""
    from ray._private import ray_constants as constants

    variable, usual = constants.ENABLE_RAY_CLUSTERS_ENV_VAR, constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(variable)
    os.environ[variable], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:  # this process may connect to a cluster of several machines later
        constants.ENABLE_RAY_CLUSTER = usual
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def _refuse_unreachable(address: str | None) -> None:
    """Ray itself tries for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon:
        return
    if "://" in host or not port.isdecimal():
        raise ConfigError(
            f"the address {address!r} is none of a cluster's head: give host:port, and run on a node of it"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise IncompleteRunError(
            f"cannot connect to the Ray cluster at {address}: {error.strerror or error}: see that it runs (ray status) "
            "and that this machine is one of its nodes"
        ) from error


def _fitting(total: dict[str, float], wanted: Resources) -> int:
    needs = {"CPU": wanted.cpus, "GPU": wanted.gpus, "memory": wanted.memory_bytes, **wanted.custom}
    return min((int(total.get(name, 0) // need) for name, need in needs.items() if need), default=0)


def _line(error: BaseException) -> str:
    """The line of Ray's many that tells why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "because" in line or "died" in line]
    return (telling[-1] if telling else lines[0] if lines else type(error).__name__).rstrip(".")
