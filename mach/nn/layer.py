"""What output layers share: weights, the loss of targets in any form, limits."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mach.errors import DataError
from mach.nn.answers import Output, Top, check_known, rows_of
from mach.nn.targets import Target

Loss = Literal["softmax", "binary"]

CHUNK_SCORES = 2**23  # scores held at once where answers come in parts: 32 MB
LIMIT_BYTES = 2**30  # of a matrix over all classes


class Head(nn.Module):
    """Weights of groups of outputs, each a classifier, and what all such layers do with them."""

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_groups: int,
        n_outputs: int,
        *,
        loss: Loss,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_known("loss", loss, Loss)
        self.in_features, self.n_classes, self.loss = in_features, n_classes, loss
        self._n_outputs = n_outputs
        given: Any = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(n_groups * n_outputs, in_features, **given))
        self.bias = nn.Parameter(torch.empty(n_groups * n_outputs, **given)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `torch.nn.Linear` does; biases give every output of a group the same share."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.constant_(self.bias, -math.log(max(self._n_outputs - 1, 1)) if self.loss == "binary" else 0.0)

    def forward(self, input: Tensor, target: Target) -> Output:
        """Log-probability of the target and the loss, of a `SampledHead` estimated by a draw of classes.

        Parameters
        ----------
        input : float Tensor of shape (N, H), or (H,)
        target : int Tensor of shape (N,), or () beside an input of shape (H,)
            The class of each row; or, but for a `MACHHead` with the softmax loss, any number of them: a list of N lists
            of ids, an int Tensor of shape (N, L) where -1 pads, or a pair of Tensors (ids, offsets) as
            `torch.nn.EmbeddingBag` takes them and CSR matrices have them. A class that a row names twice counts once.

        Raises
        ------
        DataError
            When a shape does not fit or a target is no class.
        """
        hidden_NH, is_single = rows_of(input, self.in_features)
        if is_single:
            target = torch.as_tensor(target, device=hidden_NH.device)[None]
        output_N, loss = self._loss(hidden_NH, target)
        return Output(output_N[0] if is_single else output_N, loss)

    def predict(self, input: Tensor) -> Tensor:
        """The best class of every row, int64 of shape (N,), or () for an input of shape (H,)."""
        return self.topk(input, 1).ids[..., 0]

    def topk(self, input: Tensor, k: int = 10, *, allowed: Tensor | NDArray[np.bool_] | None = None) -> Top:
        """The k best classes of every row."""
        raise NotImplementedError

    def _loss(self, hidden_NH: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the rows' targets, shape (N,), and the loss."""
        raise NotImplementedError

    def _linear(self, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits, at least float32."""
        scores = functional.linear(hidden_NH.to(weight.dtype), weight, bias)
        return scores.float() if scores.dtype in {torch.bfloat16, torch.float16} else scores

    def _check_size(self, n_rows: int, classes: Tensor | None, limit_bytes: int) -> None:
        """Refuse scores of all classes that take more than the limit."""
        n_bytes = n_rows * self.n_classes * 4
        if n_bytes > limit_bytes:
            raise DataError(
                f"{n_rows} rows of all {self.n_classes} classes take {n_bytes} bytes, the limit is {limit_bytes}: give "
                f"classes, use topk, take fewer rows{'' if classes is None else ', or torch.no_grad()'}"
            )


def row_means(values_M: Tensor, rows_M: Tensor, n_rows: int) -> Tensor:
    """Mean of the values of each row, 0 where it has none, shape (N,)."""
    sums_N = values_M.new_zeros(n_rows).index_add(0, rows_M, values_M)
    return sums_N / rows_M.bincount(minlength=n_rows).clamp_min(1)
