"""Locality-sensitive hash tables over classes: which have weights that point where a hidden state does.

A table sorts the classes by a code, so that those of one code lie side by side: 4 bytes a class and table, 4 a code.
Two families of codes:

- ``simhash``: a bit is the side of a random plane. Two vectors at an angle of t share it with probability 1 - t / pi
  (Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002).
- ``dwta``: three bits say which of eight random coordinates is largest, whatever the others are (Yagnik et al., "The
  power of comparative reasoning", ICCV 2011). Where all eight are 0, as of hidden states behind a ReLU, the next place
  that knows better lends its bits (Chen and Shrivastava, "Densified winner take all hashing", UAI 2018).

Of L tables of codes whose bits are shared with probability p, at least one has two vectors side by side with
probability 1 - (1 - p**bits)**L.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from mach.errors import ConfigError
from mach.nn.answers import check_known

Family = Literal["simhash", "dwta"]
GROUP, GROUP_BITS = 8, 3  # coordinates of which the largest is told, and bits that tell it
CHUNK = 2**22  # numbers held at once while codes are computed


class HashTables(nn.Module):
    """L sorted tables over vectors.

    Parameters
    ----------
    in_features : int
    n_tables, n_bits : int
        L, and the bits of a code, 1 to 24; for ``dwta`` a multiple of 3.
    family : {"simhash", "dwta"}
    seed : int
        Of the codes.

    Examples
    --------
    >>> vectors = torch.eye(16)
    >>> tables = HashTables(16, n_tables=4, n_bits=6).build([vectors])
    >>> rows, ids = tables.met(vectors[3:5])
    >>> (ids[rows == 0] == 3).sum(), (ids[rows == 1] == 4).sum()
    (tensor(4), tensor(4))
    """

    plan: Tensor
    order_LK: Tensor
    starts_L: Tensor

    def __init__(
        self,
        in_features: int,
        n_tables: int = 8,
        n_bits: int = 12,
        *,
        family: Family = "simhash",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_known("family", family, Family)
        if not (1 <= n_bits <= 24 and n_tables >= 1) or (family == "dwta" and n_bits % GROUP_BITS):
            raise ConfigError(
                f"n_tables={n_tables}, n_bits={n_bits}: need at least 1 and 1 to 24, for dwta 3, 6, .. 24"
            )
        self.in_features = in_features
        self.family, self.n_tables, self.n_bits = family, n_tables, n_bits
        generator = torch.Generator().manual_seed(seed)
        if family == "simhash":
            plan = torch.randn(in_features, n_tables * n_bits, generator=generator)
        else:
            n_groups = n_tables * n_bits // GROUP_BITS
            plan = torch.randint(in_features, (n_groups, GROUP), generator=generator)
        for name, tensor in (("plan", plan), ("order_LK", torch.empty(n_tables, 0, dtype=torch.int32))):
            self.register_buffer(name, tensor.to(device), persistent=False)  # they follow from the seed and the vectors
        self.register_buffer("starts_L", torch.zeros(n_tables, 2**n_bits + 1, dtype=torch.int32, device=device), False)

    @property
    def n_vectors(self) -> int:
        """How many are in the tables."""
        return self.order_LK.shape[1]

    @property
    def n_bytes(self) -> int:
        """What the tables hold."""
        return 4 * (self.order_LK.numel() + self.starts_L.numel())

    def codes(self, vectors: Tensor) -> Tensor:
        """Codes of vectors of shape (N, in_features), int64 of shape (N, L)."""
        N, device = len(vectors), vectors.device
        if self.family == "simhash":
            bits = (vectors @ self.plan.float() > 0).view(N, self.n_tables, self.n_bits).long()
            return (bits << torch.arange(self.n_bits, device=device)).sum(2)
        groups = vectors[:, self.plan]  # of shape (N, groups, 8)
        winners, is_empty = groups.argmax(2), (groups == 0).all(2)
        for _ in range(winners.shape[1] - 1):  # each a place further on, until all are lent
            if not bool(is_empty.any()):
                break
            winners = torch.where(is_empty, winners.roll(-1, 1), winners)
            is_empty = is_empty & is_empty.roll(-1, 1)
        n_groups = self.n_bits // GROUP_BITS
        shifts = GROUP_BITS * torch.arange(n_groups, device=device)
        return (winners.view(N, self.n_tables, n_groups) << shifts).sum(2)

    @torch.no_grad()
    def build(self, parts: Iterable[Tensor]) -> HashTables:
        """Sort the tables anew, by vectors that come in parts, each of shape (any number, in_features)."""
        size = max(1, CHUNK // (self.plan.numel() if self.family == "dwta" else self.plan.shape[1]))
        kind = torch.int16 if self.n_bits <= 15 else torch.int32  # narrow ones are sorted faster
        parts = [self.codes(some.float()).to(kind) for part in parts for some in torch.split(part, size)]
        codes_LK = torch.cat(parts).T.contiguous()
        self.order_LK = torch.empty(codes_LK.shape, dtype=torch.int32, device=codes_LK.device)
        for table, codes_K in enumerate(codes_LK):
            self.order_LK[table] = codes_K.argsort(stable=True)
            counts = torch.bincount(codes_K.int(), minlength=2**self.n_bits)
            self.starts_L[table, 1:] = counts.cumsum(0)
        return self

    @torch.no_grad()
    def met(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the queries and the vectors that share a code with them, one entry a table where they do."""
        N, device = len(queries), queries.device
        codes_NL, tables_L = self.codes(queries.float()), torch.arange(self.n_tables, device=device)
        begins = self.starts_L[tables_L, codes_NL].long().flatten()
        counts = self.starts_L[tables_L, codes_NL + 1].long().flatten() - begins
        firsts = counts.cumsum(0) - counts
        begins = begins + tables_L.repeat(N) * self.n_vectors
        places = torch.arange(int(counts.sum()), device=device) + (begins - firsts).repeat_interleave(counts)
        rows = torch.arange(N, device=device).repeat_interleave(counts.view(N, -1).sum(1))
        return rows, self.order_LK.flatten()[places].long()

    def hardest(self, queries: Tensor, n: int) -> Tensor:
        """The n vectors that share most codes with all queries together, or fewer where fewer share any."""
        ids, counts = torch.unique(self.met(queries)[1], return_counts=True)
        return ids if len(ids) <= n else ids[counts.topk(n).indices]
