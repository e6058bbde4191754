"""Buckets of classes, and the best classes of queries, on a device: for GPUs and the scores that are there already.

All classes are scored, a stretch at a time: on a GPU a pass over K classes costs what the threshold algorithm costs on
a processor, and its time does not depend on how sharp the scores are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mach.decoding import TopK, affine, limits, transform
from mach.errors import ConfigError, DataError
from mach.hashing import Assignment, TableAssignment, UniversalAssignment

CHUNK_VALUES = 2**25  # scores at once, of 8 bytes


class DeviceAssignment:
    """The buckets of classes by the functions of one or more assignments, computed or looked up on a device.

    Parameters
    ----------
    assignments : sequence of Assignment
        Of the same K and B; all universal, or all tables.
    device : torch.device
        Tables take 4 bytes a class and function there.
    """

    def __init__(self, assignments: Sequence[Assignment], device: torch.device) -> None:
        first = assignments[0]
        self.n_classes, self.n_buckets = first.n_classes, first.n_buckets
        self._table_FK: Tensor | None = None
        if isinstance(first, UniversalAssignment):
            self._prime = first.prime
            universal = [each for each in assignments if isinstance(each, UniversalAssignment)]
            self._multipliers_F1, self._offsets_F1 = (
                torch.from_numpy(np.concatenate(parts)).to(device)[:, None]
                for parts in ([u.multipliers_R for u in universal], [u.offsets_R for u in universal])
            )
        elif isinstance(first, TableAssignment):
            tables = [each.table_RK for each in assignments if isinstance(each, TableAssignment)]
            self._table_FK = torch.from_numpy(np.concatenate(tables).astype(np.int32)).to(device)
        else:
            raise ConfigError(f"a {type(first).__name__} has no place on a device: need universal or table assignments")

    def buckets(self, classes_M: Tensor) -> Tensor:
        """Buckets of classes, shape (F, M), int32."""
        if self._table_FK is not None:
            return self._table_FK[:, classes_M.long()]
        images_FM = self._multipliers_F1 * classes_M.long()[None, :] + self._offsets_F1  # < 2**62: exact
        return (images_FM % self._prime % self.n_buckets).int()


class DeviceDecoder:
    """Exact best classes on a device; `mach.decoding.Decoder.topk` with the same answers.

    Parameters
    ----------
    assignment : Assignment
    aggregate : str
        One of `mach.decoding.AGGREGATES`.
    device : str
    chunk_values : int
        Scores held at once, 8 bytes each and as much again for their order.

    Examples
    --------
    >>> assignment = UniversalAssignment.draw(n_classes=1000, n_buckets=16, n_repetitions=4, seed=0)
    >>> probs_NRB = np.full((1, 4, 16), 0.01, dtype=np.float32)
    >>> probs_NRB[0, np.arange(4), assignment.buckets([42])[:, 0]] = 0.9
    >>> int(DeviceDecoder(assignment).topk(probs_NRB, k=3).ids_Nk[0, 0])
    42
    """

    def __init__(
        self,
        assignment: Assignment,
        aggregate: str = "log-mean",
        device: str = "cpu",
        chunk_values: int = CHUNK_VALUES,
    ) -> None:
        transform([], aggregate)  # an unknown aggregate fails here
        self.assignment, self.aggregate, self.device = assignment, aggregate, torch.device(device)
        self.chunk_values = chunk_values
        self._buckets = DeviceAssignment([assignment], self.device)

    @torch.no_grad()
    def topk(
        self, probs_NRB: NDArray[np.float32] | Tensor, k: int = 10, *, allowed_K: NDArray[np.bool_] | None = None
    ) -> TopK:
        """Exact best k classes of each query, equal scores by ascending class.

        Parameters
        ----------
        probs_NRB : float32 array or tensor of shape (N, R, B)
            Arrays are transformed on the processor, so that scores are those of `mach.decoding` to the last bit;
            tensors where they are, whose logarithms may differ in the last bit.
        k : int
            1 to K.
        allowed_K : bool array of shape (K,), optional
            Classes that may be returned.

        Raises
        ------
        ConfigError, DataError
            When an argument or a shape does not fit.
        """
        n_functions, B, K = self.assignment.n_repetitions, self._buckets.n_buckets, self._buckets.n_classes
        if probs_NRB.ndim != 3 or tuple(probs_NRB.shape[1:]) != (n_functions, B):
            raise DataError(f"bucket scores have shape {tuple(probs_NRB.shape)}: need (N, {n_functions}, {B})")
        if not 1 <= k <= K:
            raise ConfigError(f"k {k} must be at least 1 and at most {K}: there are K = {K} classes")
        if isinstance(probs_NRB, Tensor):
            values_NRB = _transformed(probs_NRB.to(self.device), self.aggregate)
        else:
            values_NRB = torch.from_numpy(transform(probs_NRB, self.aggregate)).to(self.device)
        mask_K = None if allowed_K is None else torch.from_numpy(np.ascontiguousarray(allowed_K)).to(self.device)
        N = len(values_NRB)
        best_Nk = torch.full((N, 0), 0, dtype=torch.int64, device=self.device)
        n_chunk = max(k, self.chunk_values // max(1, N))
        for begin in range(0, K, n_chunk):
            classes_C = torch.arange(begin, min(begin + n_chunk, K), device=self.device)
            scores_NC = self._scores(values_NRB, self._buckets.buckets(classes_C))
            keys_NC = _keys(scores_NC, classes_C)
            if mask_K is not None:
                keys_NC.masked_fill_(~mask_K[classes_C], torch.iinfo(torch.int64).min)
            chunk_Nk = keys_NC.topk(min(k, keys_NC.shape[1]), dim=1).values
            both = torch.cat([best_Nk, chunk_Nk], 1)
            best_Nk = both.topk(min(k, both.shape[1]), dim=1).values
        ids_Nk, scores_Nk = _unpacked(best_Nk)
        top = TopK.empty(N, k)
        top.ids_Nk[:], top.scores_Nk[:] = ids_Nk.cpu().numpy(), scores_Nk.cpu().numpy()
        top.exact_N[:], top.n_scored_N[:], top.n_opened_N[:] = True, K, 0
        top.bound_N[:] = top.scores_Nk[:, -1]
        return top

    def _scores(self, values_NRB: Tensor, buckets_RC: Tensor) -> Tensor:
        """`mach.decoding.reduce`: float64 in the order of r, rounded once."""
        n = len(buckets_RC)
        if self.aggregate == "median":
            of_rows = [values_NRB[:, r, row.long()] for r, row in enumerate(buckets_RC)]
            ordered = torch.stack(of_rows).sort(0).values.double()
            return ((ordered[(n - 1) // 2] + ordered[n // 2]) / 2).float()
        total = torch.zeros(len(values_NRB), buckets_RC.shape[1], dtype=torch.float64, device=self.device)
        if self.aggregate == "min":
            total += torch.inf
        for r, row in enumerate(buckets_RC):
            values_NC = values_NRB[:, r, row.long()]
            total = torch.minimum(total, values_NC.double()) if self.aggregate == "min" else total.add_(values_NC)
        if self.aggregate == "min":
            return total.float()
        gain, shift = affine(self.aggregate, self._buckets.n_buckets)
        return total.div_(n).mul_(gain).add_(shift).float()


def _transformed(probs_NRB: Tensor, aggregate: str) -> Tensor:
    """`mach.decoding.transform` of a tensor."""
    low, high = map(float, limits(aggregate))
    values = probs_NRB.float().nan_to_num(low, 1.0, low).clamp(low, high)
    if aggregate == "logit-mean":
        values = values / (1 - values)
    return values.log() if low > 0 else values


def _keys(scores_NC: Tensor, classes_C: Tensor) -> Tensor:
    """Integers in the order of scores, and where these are equal in the reverse order of classes."""
    bits = (scores_NC + 0.0).view(torch.int32)  # no -0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - classes_C)


def _unpacked(keys_Nk: Tensor) -> tuple[Tensor, Tensor]:
    """Classes and scores of `_keys`; -1 and -inf of what is masked."""
    is_none = keys_Nk == torch.iinfo(torch.int64).min
    ordered = (keys_Nk >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    ids = 0xFFFFFFFF - (keys_Nk & 0xFFFFFFFF)
    return ids.masked_fill(is_none, -1), scores.masked_fill(is_none, -torch.inf)
