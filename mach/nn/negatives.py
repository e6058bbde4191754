"""Which classes a step of a `SampledHead` computes beside its targets, and how much each of them stands for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Candidates(NamedTuple):
    """Classes that a step computes.

    Attributes
    ----------
    classes : int64 Tensor of shape (C,)
        Ascending, each once.
    corrections : float32 Tensor of shape (C,)
        What is added to their logits: the log of how often each was drawn over how often it was expected to be, and 0
        for those that are there in any case. So sums of exponentials over the candidates are right on average.
    """

    classes: Tensor
    corrections: Tensor


class Draw(nn.Module):
    """Draws ``n_drawn`` classes, by given weights or all alike, near to without replacement.

    The classes lie side by side on a line, each as long as it is expected to be drawn, which is once at most. The line
    is cut into ``n_drawn`` stretches, and one point is drawn in each (stratified sampling, Cochran 1977, chapter 5).
    A class that lies across a cut may be drawn twice. Those of length 1 are drawn for certain.

    Parameters
    ----------
    n_classes, n_drawn : int
    weights : float Tensor of shape (K,), optional
        At least 0, some of them above. The expected count is proportional to them, but for the bound of 1. By default
        all are alike, and nothing of K entries is kept; otherwise 16 bytes a class.

    Notes
    -----
    A draw takes O(n_drawn log K), without a pass over the classes.
    """

    ids: Tensor | None
    ends: Tensor | None
    certain: Tensor

    def __init__(
        self,
        n_classes: int,
        n_drawn: int,
        weights: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.n_classes, n_drawn = n_classes, min(n_drawn, n_classes)
        certain = torch.arange(n_classes if n_drawn == n_classes else 0)
        ids = ends = None
        if weights is not None and len(certain) < n_classes:
            chance_K = chances(weights.double().cpu(), n_drawn)
            is_certain = chance_K >= 1
            certain = is_certain.nonzero()[:, 0]
            ids = ((chance_K > 0) & ~is_certain).nonzero()[:, 0]
            ends = chance_K[ids].cumsum(0)
        self.n_points = n_drawn - len(certain) if ids is None or len(ids) else 0
        for name, tensor in (("certain", certain), ("ids", ids), ("ends", ends)):  # they follow from the arguments
            self.register_buffer(name, None if tensor is None else tensor.to(device), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Classes drawn, ascending, and the log of their count over the expected one."""
        device = self.certain.device
        points = torch.rand(self.n_points, device=device, dtype=torch.float64)
        points += torch.arange(self.n_points, device=device)
        if self.ids is None or self.ends is None:
            places = (points * (self.n_classes / max(self.n_points, 1))).long().clamp_max_(self.n_classes - 1)
            drawn, counts = torch.unique_consecutive(places, return_counts=True)
            corrections = (counts * (self.n_classes / max(self.n_points, 1))).log()
        else:
            points *= self.ends[-1:] / max(self.n_points, 1)  # the sum of all lengths, but for rounding
            places = torch.searchsorted(self.ends, points, right=True).clamp_max_(max(len(self.ids) - 1, 0))
            places, counts = torch.unique_consecutive(places, return_counts=True)
            lengths = self.ends[places] - torch.where(places > 0, self.ends[places - 1], 0)
            drawn, corrections = self.ids[places], (counts / lengths).log()
        if len(self.certain):
            drawn, order = torch.cat([drawn, self.certain]).sort()
            corrections = torch.cat([corrections, corrections.new_zeros(len(self.certain))])[order]
        return drawn, corrections.float()


def chances(weights_K: Tensor, n_drawn: int) -> Tensor:
    """Expected counts in proportion to weights, each at most 1, with the sum ``n_drawn``; fewer where weights are 0.

    Examples
    --------
    >>> chances(torch.tensor([8.0, 1.0, 1.0, 0.0]), 2)
    tensor([1.0000, 0.5000, 0.5000, 0.0000])
    """
    is_certain_K = torch.zeros(len(weights_K), dtype=torch.bool)
    while True:
        rest = weights_K[~is_certain_K].sum()
        scale = (n_drawn - is_certain_K.sum()) / rest if rest > 0 else torch.zeros(())
        chance_K = torch.where(is_certain_K, 1.0, weights_K * scale)
        beyond_K = (chance_K >= 1) & ~is_certain_K
        if not beyond_K.any():
            return chance_K
        is_certain_K |= beyond_K


def joined(sure: Tensor, drawn: tuple[Tensor, Tensor]) -> Candidates:
    """Classes that a step has in any case, in any order and number, and those drawn beside them."""
    sure = torch.unique(sure)
    classes, corrections = drawn
    places = torch.searchsorted(sure, classes).clamp_max_(max(len(sure) - 1, 0))
    is_new = sure[places] != classes if len(sure) else torch.ones_like(classes, dtype=torch.bool)
    joint, order = torch.cat([sure, classes[is_new]]).sort()
    return Candidates(joint, torch.cat([corrections.new_zeros(len(sure)), corrections[is_new]])[order])
