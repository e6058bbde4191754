"""A shard's repetitions on a device: their batched network, and the rows that it is fed with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mach.config import HostMemory, NetworkConfig
from mach.data.store import Store
from mach.networks.batched import BatchedNetwork, Member
from mach.networks.feed import Feed, has_room
from mach.networks.network import Network
from mach.networks.output import StepFigures
from mach.sketch.hashing import Assignment


class BatchedShard:
    """Networks of the same shape and step, trained together on the rows of a store.

    Parameters
    ----------
    like : Network
        On the processor, of the shape and step of all; it and the others are to be adopted.
    n_repetitions : int
    config : NetworkConfig
        Of all of them.
    store : Store
        Of sparse rows, kept on the device where they leave half of its memory free.
    device : str
    host_memory : {"none", "input", "all"}
        What stays in main memory.
    """

    def __init__(
        self,
        like: Network,
        n_repetitions: int,
        config: NetworkConfig,
        store: Store,
        device: str,
        host_memory: HostMemory,
    ) -> None:
        self.network = BatchedNetwork(like, config, n_repetitions=n_repetitions, device=device, host_memory=host_memory)
        self.feed = Feed(
            store,
            self.network.device,
            is_resident=has_room(store, self.network.device),
            host=None if host_memory == "none" else self.network.rows,
            view=self.network.view,
        )

    def adopt(self, network: Network) -> Member:
        """Copy a repetition's state; its own network is needed no more."""
        return self.network.adopt(network)

    def step(
        self,
        rows: NDArray[np.int64],
        ahead: NDArray[np.int64],
        assignments: Sequence[Assignment],
        rate: float,
        *,
        measured: bool = False,
    ) -> list[StepFigures] | None:
        """One step of all repetitions on some rows, while those of the next step begin to come."""
        batch = self.feed.batch(rows, ahead)
        return self.network.step(batch, assignments, rate, measured=measured)

    def close(self) -> None:
        """End the thread that brings rows."""
        self.feed.close()
