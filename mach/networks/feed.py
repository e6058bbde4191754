"""Batches of a store's rows on a device: gathered there, or read on the processor while the step before runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mach.data.batch import SparseBatch, read_batch, read_classes
from mach.data.rows import RowView
from mach.data.store import Store
from mach.networks.kernels.batched import Columns, columns_of, gather_rows
from mach.networks.offload import HostRows, Pack, new_event, new_stream, to_device


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """N rows on a device, for a training step; CSR, of int32 and float32."""

    indptr_N1: Tensor
    slots: Tensor  # rows of the weights: features, or where they are in `fetched`
    values: Tensor
    columns: Columns  # the same by feature
    offsets_N1: Tensor  # where the classes of each row begin
    classes_M: Tensor
    fetched: Pack | None = None  # rows of weights on their way from main memory

    def __len__(self) -> int:
        return len(self.indptr_N1) - 1


class Feed:
    """Batches of a store on a device.

    Parameters
    ----------
    store : Store
        Of sparse rows, which networks see through the ``view``.
    device : torch.device
    host : HostRows, optional
        Where weights are, if not on the device: rows of a batch's features are asked for with it.
    is_resident : bool, optional
        Whether all rows are copied to the device once; else every batch travels. By default where they leave half of
        its free memory, and weights are there as well.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        view: RowView,
        host: HostRows | None = None,
        *,
        is_resident: bool | None = None,
    ) -> None:
        self.store, self.device, self.host, self.view = store, device, host, view
        if is_resident is None:
            n_bytes = 8 * store.n_nonzeros + 4 * len(store.class_ids) + 16 * (store.n_rows + 1)
            has_room = device.type != "cuda" or 2 * n_bytes <= torch.cuda.mem_get_info(device)[0]
            is_resident = host is None and has_room
        self.is_resident = is_resident
        self._worker = ThreadPoolExecutor(1, "mach-feed")
        self._stream = new_stream(device)
        self._begun: tuple[NDArray[np.int64], Future[tuple[DeviceBatch, Any]]] | None = None
        if self.is_resident:
            all_rows = view.sparse(SparseBatch(store.feature_indptr, store.feature_indices, store.feature_values))
            arrays = (all_rows.indptr, all_rows.indices, all_rows.values)
            classes = (store.class_indptr, store.class_ids)
            self._rows, self._classes = (
                [torch.from_numpy(np.array(array)).to(device) for array in group] for group in (arrays, classes)
            )

    def batch(self, rows_N: NDArray[np.int64], ahead_N: NDArray[np.int64] | None = None) -> DeviceBatch:
        """Rows in the given order; those of the next step begin to come."""
        if self.is_resident:
            return self._gather(rows_N)
        coming = self._begun[1] if self._begun and np.array_equal(self._begun[0], rows_N) else None
        self._begun = None
        batch, arrived = (coming or self._worker.submit(self._read, rows_N)).result()
        if arrived is not None:
            self._wait_for(batch, arrived)
        if ahead_N is not None and len(ahead_N):
            self._begun = (ahead_N, self._worker.submit(self._read, ahead_N))
        return batch

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(cancel_futures=True)

    def _gather(self, rows_N: NDArray[np.int64]) -> DeviceBatch:
        at = to_device(torch.from_numpy(rows_N), self.device)
        n_entries, n_classes = (
            int((indptr[rows_N + 1] - indptr[rows_N]).sum())
            for indptr in (self.store.feature_indptr, self.store.class_indptr)
        )
        indptr_N1, indices, values = gather_rows(self._rows[0], at, n_entries, *self._rows[1:])
        offsets_N1, classes_M = gather_rows(self._classes[0], at, n_classes, self._classes[1])
        columns = columns_of(indptr_N1, indices, values)
        return DeviceBatch(indptr_N1, indices, values, columns, offsets_N1, classes_M)

    def _read(self, rows_N: NDArray[np.int64]) -> tuple[DeviceBatch, Any]:
        batch = self.view.batch(read_batch(self.store, rows_N))
        assert isinstance(batch, SparseBatch), "dense rows are not trained together"
        classes, counts = read_classes(self.store, rows_N)
        arrays: list[NDArray[Any]] = [batch.indptr, batch.indices, np.concatenate([[0], np.cumsum(counts)]), classes]
        with torch.cuda.stream(self._stream):
            sent = self._sent(arrays, batch.values)
            return sent, None if self._stream is None else new_event(self._stream)

    def _sent(self, arrays: list[NDArray[Any]], values: NDArray[np.float32]) -> DeviceBatch:
        indptr_N1, indices, offsets_N1, classes_M = (
            to_device(torch.from_numpy(array.astype(np.int32)), self.device) for array in arrays
        )
        sent = to_device(torch.from_numpy(values), self.device)
        columns, slots, fetched = columns_of(indptr_N1, indices, sent), indices, None
        if self.host is not None:
            features_U = columns.features_U[: int(columns.n_unique)].long()  # waits for this stream alone
            fetched = self.host.fetch(features_U)
            slots = torch.searchsorted(features_U, indices.long()).int()
            columns = replace(columns, slots_U=torch.arange(len(indices), dtype=torch.int32, device=self.device))
        return DeviceBatch(indptr_N1, slots, sent, columns, offsets_N1, classes_M, fetched)

    def _wait_for(self, batch: DeviceBatch, arrived: Any) -> None:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        for tensor in [*vars(batch).values(), *vars(batch.columns).values(), *(batch.fetched or ())]:
            if isinstance(tensor, Tensor):
                tensor.record_stream(stream)
