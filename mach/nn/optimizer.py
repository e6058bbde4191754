"""An optimiser that touches only the rows of a matrix that a step has gradients for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mach.errors import ConfigError


class RowAdam(torch.optim.Optimizer):
    """Adam for gradients of rows: of `SampledHead`, and of ``torch.nn.Embedding(..., sparse=True)``.

    A row has one second moment, the running mean of its mean squared gradient, rather than one a weight, and no first
    moment. It moves when the row has a gradient, and is corrected for how often that was, not for how many steps there
    were. Nothing passes over all rows: a row takes 8 bytes beside its weights.

    Parameters
    ----------
    params : iterable
        Parameters, or groups of them as every optimiser of torch takes them. Those with dense gradients have all of
        their rows moved.
    lr : float
        A row's step, as its root mean square, once its gradients are of equal size.
    beta, eps : float
        Of the second moment.

    Notes
    -----
    bfloat16 parameters are rounded up or down at random, right on average, so that steps too small to show add up.

    Examples
    --------
    >>> words = torch.nn.Embedding(1_000_000, 4, sparse=True)
    >>> optimizer = RowAdam(words.parameters(), lr=0.1)
    >>> words(torch.tensor([7, 7])).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        beta: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        if not (lr >= 0 and eps > 0 and 0 <= beta < 1):
            raise ConfigError(f"lr={lr}, beta={beta}, eps={eps}: need lr >= 0, beta in [0, 1), eps > 0")
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser, but that moments stay float32: torch makes them as narrow as the weights."""
        super().load_state_dict(state_dict)
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        weights = (weight for group in self.param_groups for weight in group["params"])
        for i, weight in zip(saved, weights, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[weight][name] = value.to(weight.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the rows that have gradients, after ``closure()`` if there is one, whose value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)
        return loss

    def _move(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient, beta, state = weight.grad, group["beta"], self.state[weight]
        assert gradient is not None
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, values = gradient.indices()[0], gradient.values().float()
        else:
            rows, values = torch.arange(len(weight), device=weight.device), gradient.float()
        if not state:
            state["square"] = torch.zeros(len(weight), device=weight.device)
            state["n_steps"] = torch.zeros(len(weight), device=weight.device)
        n_steps = state["n_steps"][rows] + 1
        square = state["square"][rows] * beta
        square += (1 - beta) * (values.square() if values.ndim == 1 else values.flatten(1).square().mean(1))
        state["n_steps"].index_copy_(0, rows, n_steps)
        state["square"].index_copy_(0, rows, square)
        pace = group["lr"] / ((square / (1 - beta**n_steps)).sqrt() + group["eps"])
        moves = values * pace.view(-1, *[1] * (values.ndim - 1))
        if weight.dtype == torch.float32:
            weight.index_add_(0, rows, moves, alpha=-1)
        else:
            weight.index_copy_(0, rows, rounded_at_random(weight[rows].float() - moves, weight.dtype))


def rounded_at_random(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values in ``dtype``; bfloat16 is one of the two nearest, right on average."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.view(torch.int32)
    return ((bits + torch.randint_like(bits, 2**16)) & -(2**16)).view(torch.float32).bfloat16()
