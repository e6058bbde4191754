"""An output layer with one output a class, of which a training step computes a few."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mach.errors import ConfigError, DataError
from mach.nn.answers import Top, best, best_of_pairs, check_known, checked_classes, pair_scores, rows_of
from mach.nn.layer import CHUNK_SCORES, LIMIT_BYTES, Head, Loss, row_means
from mach.nn.ledger import SampledLedger
from mach.nn.negatives import Candidates, Draw, joined
from mach.nn.rounded import MOST_BEST, RoundedRows
from mach.nn.tables import HashTables
from mach.nn.targets import Target, pairs

Negatives = Literal["uniform", "frequency", "lsh"]

POWER = 0.5  # of class counts


class SampledHead(Head):
    """An output layer over K classes, one output each, that computes a few of them in a training step.

    Parameters
    ----------
    in_features, n_classes : int
        H and K.
    n_sampled : int, optional
        Classes that a step draws beside the targets of its rows; all rows share them. By default K / 20, 256 to 8,192.
    negatives : {"uniform", "frequency", "lsh"}, optional
        What they are drawn by: all alike, or by ``class_counts``, which is the default where these are given. With
        ``lsh`` half of them are not drawn but found in ``tables``, as those that share most codes with the rows' hidden
        states, and the other half is drawn by the counts, or else all alike.
    class_counts : int or float Tensor of shape (K,), optional
        Training rows of every class: it is drawn in proportion to (count + 1)**0.5.
    loss : {"softmax", "binary"}
        ``softmax``: cross-entropy, a row's classes share its mass equally. ``binary``: binary cross-entropy summed over
        the classes. Both are means over the rows, of any number of classes each; a row without one adds 0 to the first.
    tables : HashTables, optional
        Over H + 1 features, for ``negatives="lsh"``. By default 8 of SimHash, with codes of as many bits as leave some
        16 classes a code; they take memory when they are first used. A step builds them anew after 16 steps, and then
        whenever half as many again were made.
    bias : bool
    device, dtype : optional
        Of weights and bias, as for `torch.nn.Linear`. bfloat16 halves their memory; scores are float32.

    Attributes
    ----------
    weight, bias : Parameter of shape (K, H) and (K,)
        Their gradients are sparse, rows of the candidates alone: use `RowAdam`, or another optimiser for such.
    n_classes, n_sampled, in_features : int

    Notes
    -----
    A step multiplies three times, 6 N H C FLOPs for C candidates, and touches no other class. The logits of drawn ones
    are raised by the log of how many classes each stands for, so that the sum over all classes is estimated without
    bias (Bengio and Senecal, "Adaptive importance sampling to accelerate training of a neural probabilistic language
    model", 2008), and so are the binary loss and its gradients; the softmax's logarithm of the sum is not. Targets are
    there in any case, as negatives of the other rows too, and stand for themselves. Drawing follows torch's generator.

    Examples
    --------
    >>> from mach.nn import RowAdam
    >>> head = SampledHead(16, 100_000, n_sampled=500)
    >>> optimizer = RowAdam(head.parameters(), lr=0.01)
    >>> hidden = torch.randn(8, 16)
    >>> head(hidden, torch.arange(8)).loss.backward()
    >>> optimizer.step()
    >>> head.topk(hidden, k=3).ids.shape
    torch.Size([8, 3])
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_sampled: int | None = None,
        *,
        negatives: Negatives | None = None,
        class_counts: Tensor | None = None,
        tables: HashTables | None = None,
        loss: Loss = "softmax",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if negatives is None:
            negatives = "uniform" if class_counts is None else "frequency"
        check_known("negatives", negatives, Negatives)
        n_sampled = min(max(n_classes // 20, 256), 8192, n_classes) if n_sampled is None else n_sampled
        if min(in_features, n_classes) < 1 or not 0 <= n_sampled <= n_classes:
            raise ConfigError(
                f"in_features={in_features}, n_classes={n_classes}, n_sampled={n_sampled}: need at least 1, at least 1 "
                "and 0 to n_classes"
            )
        if tables is not None and tables.in_features != in_features + 1:
            raise ConfigError(f"tables are over {tables.in_features} features: need {in_features + 1}, H and the bias")
        if negatives == "frequency" and class_counts is None:
            raise ConfigError("negatives='frequency' needs class_counts, the training rows of every class")
        is_uniform = negatives == "uniform" or class_counts is None
        weights = None if is_uniform else _draw_weights(class_counts, n_classes)
        n_bits = min(max(n_classes // 16, 2).bit_length() - 1, 20)
        super().__init__(in_features, n_classes, 1, n_classes, loss=loss, bias=bias, device=device, dtype=dtype)
        self.n_sampled, self.negatives = n_sampled, negatives
        self.draw = Draw(n_classes, n_sampled - self._n_hardest, weights, device=device)
        self.tables = HashTables(in_features + 1, n_bits=n_bits, device=device) if tables is None else tables
        self._n_steps, self._next_build = 0, 0
        self._rounded: tuple[tuple[int, int, int], RoundedRows] | None = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, n_classes={self.n_classes}, n_sampled={self.n_sampled}, "
            f"negatives={self.negatives!r}, loss={self.loss!r}, bias={self.bias is not None}"
        )

    @property
    def _n_hardest(self) -> int:
        """Negatives of a step that are found rather than drawn."""
        return self.n_sampled // 2 if self.negatives == "lsh" and self.n_sampled < self.n_classes else 0

    def candidates(self, targets: Tensor, hidden_NH: Tensor) -> Candidates:
        """What a step computes whose rows have these classes, in any order and number, and these hidden states."""
        if self._n_hardest:
            if self._n_steps >= self._next_build:
                self.build_tables()
                self._next_build = max(16, self._n_steps * 3 // 2)
            self._n_steps += 1
            targets = torch.cat([targets, self.tables.hardest(_with_one(hidden_NH), self._n_hardest)])
        return joined(targets, self.draw())

    @torch.no_grad()
    def build_tables(self) -> None:
        """Build the tables by the weights and biases as they are, less their means, which raise all classes alike."""
        mean_H = torch.stack([self.weight[part].float().sum(0) for part in self._parts(1024)]).sum(0) / self.n_classes
        bias_K = self.weight.new_zeros(self.n_classes) if self.bias is None else self.bias
        bias_K = bias_K.float() - bias_K.float().mean()
        parts = (torch.cat([self.weight[part] - mean_H, bias_K[part, None]], 1) for part in self._parts(1024))
        self.tables.build(parts)

    def log_prob(self, input: Tensor, classes: Tensor | None = None, *, limit_bytes: int = LIMIT_BYTES) -> Tensor:
        """Exact log-probabilities of given classes, or of all; autograd follows.

        Parameters
        ----------
        input : float Tensor of shape (N, H), or (H,)
        classes : int Tensor of shape (C,) for all rows alike, or (N, C), optional
            All K by default.
        limit_bytes : int
            Largest answer over all classes, (N, K).

        Returns
        -------
        Tensor of shape (N, C), without its first axis for an input of shape (H,)

        Raises
        ------
        DataError
            When a shape does not fit, a class is out of range, or the answer exceeds the limit.

        Notes
        -----
        With the softmax loss it costs 2 N H K FLOPs, whatever the classes.
        """
        hidden_NH, is_single = rows_of(input, self.in_features)
        N = len(hidden_NH)
        if classes is None or (self.loss == "softmax" and torch.is_grad_enabled()):
            self._check_size(N, classes, limit_bytes)
        if classes is None:
            scores_NC = self._scores(hidden_NH)
        else:
            classes = checked_classes(classes, N, self.n_classes, self.weight.device)
            if classes.ndim == 1:
                scores_NC = self._scores(hidden_NH, classes)
            else:
                weight_NCH, bias_NC = self._rows_of_weight(classes.flatten())
                scores_NC = (weight_NCH.view(*classes.shape, -1).float() @ hidden_NH.float()[:, :, None])[:, :, 0]
                scores_NC = scores_NC if bias_NC is None else scores_NC + bias_NC.view(classes.shape)
        if self.loss == "binary":
            log_probs_NC = functional.logsigmoid(scores_NC)
        elif classes is None:
            log_probs_NC = scores_NC.log_softmax(1)
        else:
            sums = [self._scores(hidden_NH, part).logsumexp(1) for part in self._parts(N)]
            log_probs_NC = scores_NC - torch.stack(sums, 1).logsumexp(1, keepdim=True)
        return log_probs_NC[0] if is_single else log_probs_NC

    @torch.no_grad()
    def topk(
        self,
        input: Tensor,
        k: int = 10,
        *,
        allowed: Tensor | NDArray[np.bool_] | None = None,
        rounded: bool = False,
    ) -> Top:
        """The k best classes of every row, with their logits: exact, by the full product of 2 N H K FLOPs.

        Parameters
        ----------
        input : float Tensor of shape (N, H), or (H,)
        k : int
        allowed : bool Tensor of shape (K,), optional
            Classes that may be returned.
        rounded : bool
            Scan a copy of the weights in a byte each, and compute the logits of those classes alone that may be among
            the best: as exact, and several times as fast where classes are many. The copy is made when it is first
            asked, and anew when weights have moved (changes of ``weight.data`` are not seen). Only for a processor.

        Raises
        ------
        ConfigError, DataError
            When an argument or a shape does not fit.
        """
        hidden_NH, is_single = rows_of(input, self.in_features)
        if k < 1:
            raise ConfigError(f"k is {k}: need at least 1")
        mask_K = None if allowed is None else self._allowed(allowed)
        top = self._found(hidden_NH, k, mask_K) if rounded and k <= MOST_BEST else self._best(hidden_NH, k, mask_K)
        return Top(*(column[0] for column in top)) if is_single else top

    def ledger(self, n_rows: int, *, n_targets: int | None = None) -> SampledLedger:
        """What a training step of ``n_rows`` takes with `RowAdam`; see `SampledLedger`."""
        n_candidates = min(self.n_classes, self.n_sampled + (n_rows if n_targets is None else n_targets))
        sizes = self.in_features, self.n_classes, n_candidates, n_rows
        return SampledLedger(*sizes, self.weight.element_size(), self.bias is not None)

    def _loss(self, hidden_NH: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        N = len(hidden_NH)
        rows_M, classes_M = pairs(target, N, self.n_classes, hidden_NH.device)
        classes_C, corrections_C = self.candidates(classes_M, hidden_NH)
        scores_NC = self._scores(hidden_NH, classes_C)
        scores_M = scores_NC[rows_M, torch.searchsorted(classes_C, classes_M)]
        if self.loss == "binary":
            loss = (functional.softplus(scores_NC).sum(0) @ corrections_C.exp() - scores_M.sum()) / N
            return row_means(functional.logsigmoid(scores_M), rows_M, N), loss
        log_probs_M = scores_M - (scores_NC + corrections_C).logsumexp(1)[rows_M]
        output_N = row_means(log_probs_M, rows_M, N)
        return output_N, -output_N.sum() / N

    def _rows_of_weight(self, classes: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Weights and biases of classes, with gradients of these rows alone where they are a Tensor."""
        if isinstance(classes, slice):
            return self.weight[classes], None if self.bias is None else self.bias[classes]
        weight_CH = functional.embedding(classes, self.weight, sparse=True)
        return weight_CH, None if self.bias is None else self.bias.gather(0, classes, sparse_grad=True)

    def _scores(self, hidden_NH: Tensor, classes: Tensor | slice = slice(None)) -> Tensor:
        """Logits of shape (N, C), at least float32."""
        return self._linear(hidden_NH, *self._rows_of_weight(classes))

    def _part_size(self, n_rows: int) -> int:
        return max(1, CHUNK_SCORES // max(1, n_rows))

    def _parts(self, n_rows: int) -> list[slice]:
        """All classes, so many at a time that scores of these rows fit."""
        size = self._part_size(n_rows)
        return [slice(begin, min(begin + size, self.n_classes)) for begin in range(0, self.n_classes, size)]

    def _allowed(self, allowed: Tensor | NDArray[np.bool_]) -> Tensor:
        mask_K = torch.as_tensor(allowed, device=self.weight.device)
        if mask_K.dtype != torch.bool or mask_K.shape != (self.n_classes,):
            raise DataError(
                f"allowed has {mask_K.dtype} and shape {tuple(mask_K.shape)}: need bool of shape ({self.n_classes},)"
            )
        return mask_K

    def _best(self, hidden_NH: Tensor, k: int, mask_K: Tensor | None) -> Top:
        """The k best by the full product."""
        size = self._part_size(len(hidden_NH))
        parts = self._parts(len(hidden_NH)) if mask_K is None else torch.split(mask_K.nonzero()[:, 0], size)
        return best(((self._scores(hidden_NH, part), part) for part in parts), hidden_NH, k)

    def _found(self, hidden_NH: Tensor, k: int, mask_K: Tensor | None) -> Top:
        """The k best by rounded weights."""
        if self.weight.device.type != "cpu":
            raise ConfigError(f"rounded=True on {self.weight.device}: need weights on the processor, or rounded=False")
        state = self.weight.data_ptr(), self.weight._version, 0 if self.bias is None else self.bias._version
        if self._rounded is None or self._rounded[0] != state:
            self._rounded = state, RoundedRows(self.weight, self.bias)
        rows_M, classes_M, is_open_N = self._rounded[1].possible(hidden_NH, k, mask_K)
        scores_M = pair_scores(hidden_NH, self.weight, self.bias, rows_M, classes_M)
        top = best_of_pairs(rows_M, classes_M, scores_M, len(hidden_NH), k)
        if bool(is_open_N.any()):  # so many score alike that a product is as fast
            for column, exact in zip(top, self._best(hidden_NH[is_open_N], k, mask_K), strict=True):
                column[is_open_N] = exact
        return top


def _with_one(hidden_NH: Tensor) -> Tensor:
    """Hidden states as the tables take them, with a 1 that the bias is multiplied by."""
    return functional.pad(hidden_NH.detach().float(), (0, 1), value=1.0)


def _draw_weights(class_counts: Any, n_classes: int) -> Tensor:
    """What classes are drawn in proportion to; all of them may be drawn."""
    counts_K = torch.as_tensor(class_counts).double()
    if counts_K.shape != (n_classes,) or not bool((counts_K >= 0).all() & counts_K.isfinite().all()):
        raise ConfigError(
            f"class_counts has shape {tuple(counts_K.shape)}: need ({n_classes},) finite numbers of at least 0"
        )
    return (counts_K + 1) ** POWER
