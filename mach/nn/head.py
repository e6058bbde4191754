"""The output layer itself: loss, log-probabilities, exact top-k."""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mach.errors import ConfigError
from mach.nn.answers import Top, check_finite, check_known, checked_classes, rows_of
from mach.nn.layer import CHUNK_SCORES, LIMIT_BYTES, Head, Loss, row_means
from mach.nn.ledger import HeadLedger
from mach.nn.targets import Target, one_a_row, pairs
from mach.sketch.bounds import plan
from mach.sketch.decoder import Decoder
from mach.sketch.hashing import UniversalAssignment

Estimate = Literal["log-mean", "unbiased", "normalized"]

POWER = 2.0  # best of 0.5 to 8 by likelihood on gnd-core, R = 8
_TINY = torch.finfo(torch.float32).tiny


class MACHHead(Head):
    """An output layer over K classes in R groups of B buckets.

    Parameters
    ----------
    in_features, n_classes : int
        H and K.
    n_buckets, n_repetitions : int, optional
        B and R. By default those of `mach.sketch.bounds.plan` without a budget: B the power of two nearest K / 16,
        64 to 16,384; R at least 4, and so many that all pairs of classes can be told apart with probability 0.99.
    seed : int
        Of the hash functions; weights are drawn by torch's own generator.
    loss : {"softmax", "binary"}
        ``softmax``: one class a row; cross-entropy over the B buckets, mean over rows and repetitions. ``binary``: any
        number of classes a row; binary cross-entropy, summed over the buckets, mean over rows and repetitions, where
        the target is the union of its classes' buckets.
    bias : bool
    device, dtype : optional
        Of weights and bias, as for `torch.nn.Linear`.

    Attributes
    ----------
    weight, bias : Parameter of shape (R B, H) and (R B,)
    n_classes, n_buckets, n_repetitions, in_features : int
    multipliers_R, offsets_R, sizes : int64 buffers
        The hash functions, and (K, B, p): a saved state holds all that its weights mean, and needs no pickle.

    Notes
    -----
    A step multiplies three times, 6 N H R B FLOPs. Buckets are computed on the device. Targets are checked first, which
    waits for the device once a step (not within `torch.compile`).

    Examples
    --------
    >>> head = MACHHead(16, 1_000_000, n_buckets=512, n_repetitions=4)
    >>> hidden = torch.randn(8, 16)
    >>> out = head(hidden, torch.arange(8))
    >>> out.loss.backward()
    >>> head.topk(hidden, k=3).ids.shape
    torch.Size([8, 3])
    """

    multipliers_R: Tensor
    offsets_R: Tensor
    sizes: Tensor

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_buckets: int | None = None,
        n_repetitions: int | None = None,
        *,
        seed: int = 0,
        loss: Loss = "softmax",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = plan(n_classes, in_features, hidden=(), n_buckets=n_buckets, n_repetitions=n_repetitions)
        B, R = sizes.n_buckets, sizes.n_repetitions
        drawn = UniversalAssignment.draw(n_classes=n_classes, n_buckets=B, n_repetitions=R, seed=seed)
        super().__init__(in_features, n_classes, R, B, loss=loss, bias=bias, device=device, dtype=dtype)
        self.n_buckets, self.n_repetitions, self.prime = B, R, drawn.prime
        self.register_buffer("multipliers_R", torch.tensor(drawn.multipliers_R, device=device))
        self.register_buffer("offsets_R", torch.tensor(drawn.offsets_R, device=device))
        self.register_buffer("sizes", torch.tensor([n_classes, B, drawn.prime], device=device))
        self._assignment = drawn

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, n_classes={self.n_classes}, n_buckets={self.n_buckets}, "
            f"n_repetitions={self.n_repetitions}, loss={self.loss!r}, bias={self.bias is not None}"
        )

    @property
    def assignment(self) -> UniversalAssignment:
        """The hash functions, as the rest of mach takes them."""
        a_R, b_R = self.multipliers_R.cpu().numpy(), self.offsets_R.cpu().numpy()
        held = self._assignment  # kept while it lasts: decoders share what they prepare for it
        if not (np.array_equal(held.multipliers_R, a_R) and np.array_equal(held.offsets_R, b_R)):
            self._assignment = UniversalAssignment(self.n_classes, self.n_buckets, self.prime, a_R.copy(), b_R.copy())
        return self._assignment

    def buckets(self, classes: Tensor) -> Tensor:
        """``h_r(k)`` of classes of shape (n,), int64 of shape (R, n), on their device; as `mach.sketch.hashing`."""
        images_RN = self.multipliers_R[:, None] * classes + self.offsets_R[:, None]  # < 2**62: exact
        return images_RN.remainder_(self.prime).remainder_(self.n_buckets)

    def log_prob(
        self,
        input: Tensor,
        classes: Tensor | None = None,
        *,
        estimate: Estimate = "log-mean",
        power: float = POWER,
        limit_bytes: int = LIMIT_BYTES,
    ) -> Tensor:
        """Log-probabilities of given classes, or of all; autograd follows.

        Parameters
        ----------
        input : float Tensor of shape (N, H), or (H,)
        classes : int Tensor of shape (C,) for all rows alike, or (N, C), optional
            All K by default.
        estimate : {"log-mean", "unbiased", "normalized"}
            See the module. Only ``log-mean`` holds for the binary loss, whose classes do not exclude each other.
        power : float
            Of ``normalized``: the larger, the surer; choose it by the likelihood of held-out rows.
        limit_bytes : int
            Largest answer over all classes, (N, K).

        Returns
        -------
        Tensor of shape (N, C), without its first axis for an input of shape (H,)

        Raises
        ------
        ConfigError
            When an estimate does not fit the loss.
        DataError
            When a shape does not fit, a class is out of range, or the answer exceeds the limit.
        """
        check_known("estimate", estimate, Estimate)
        if self.loss == "binary" and estimate != "log-mean":
            raise ConfigError(f"estimate {estimate!r} is for classes that exclude each other, the loss is 'binary'")
        hidden_NH, is_single = rows_of(input, self.in_features)
        N, K = len(hidden_NH), self.n_classes
        if classes is None or (estimate == "normalized" and torch.is_grad_enabled()):
            self._check_size(N, classes, limit_bytes)
        values_NRB = self._log_probs(hidden_NH)
        asked = (
            torch.arange(K, device=values_NRB.device)
            if classes is None
            else checked_classes(classes, N, K, self.weight.device)
        )
        if estimate == "unbiased":
            chance = _meeting_chance(self.prime, self.n_buckets)
            log_probs_NC = ((self._mean(values_NRB.exp(), asked) - chance) / (1 - chance)).clamp_min(_TINY).log()
        else:
            log_probs_NC = self._mean(values_NRB, asked)
        if estimate == "normalized":
            log_probs_NC = power * log_probs_NC - self._normalizer(values_NRB, power)
        return log_probs_NC[0] if is_single else log_probs_NC

    @torch.no_grad()
    def topk(
        self,
        input: Tensor,
        k: int = 10,
        *,
        allowed: Tensor | NDArray[np.bool_] | None = None,
        budget: int | None = None,
    ) -> Top:
        """Exact k best classes of every row, by the threshold algorithm: a few buckets of each repetition are opened.

        Parameters
        ----------
        input : float Tensor of shape (N, H), or (H,)
        k : int
        allowed : bool Tensor of shape (K,), optional
            Classes that may be returned.
        budget : int, optional
            Most classes to score a row; then an answer may be approximate, and says so.

        Raises
        ------
        ConfigError, DataError
            When an argument or a shape does not fit.

        Notes
        -----
        The search runs on the processor (`mach.sketch.decoder.Decoder`), on rows by the 32 MB of scores.
        """
        hidden_NH, is_single = rows_of(input, self.in_features)
        mask_K = allowed.cpu().numpy() if isinstance(allowed, Tensor) else allowed
        decoder = Decoder(self.assignment)
        n_rows = max(1, CHUNK_SCORES // (self.n_repetitions * self.n_buckets))
        parts = []
        for hidden in torch.split(hidden_NH, n_rows):
            probs_NRB = self._log_probs(hidden).float().exp_()
            check_finite(probs_NRB)
            top = decoder.topk(probs_NRB.cpu().numpy(), k, allowed_K=mask_K, budget=budget)
            parts.append((top.ids_Nk, top.scores_Nk, top.exact_N, top.bound_N))
        columns = [torch.from_numpy(np.concatenate(part)).to(input.device) for part in zip(*parts, strict=True)]
        return Top(*(column[0] for column in columns)) if is_single else Top(*columns)

    def ledger(self, n_rows: int, *, n_moments: int = 2) -> HeadLedger:
        """What a training step of ``n_rows`` takes; see `HeadLedger`."""
        sizes = self.in_features, self.n_classes, self.n_buckets, self.n_repetitions, n_rows
        return HeadLedger(*sizes, has_bias=self.bias is not None, n_moments=n_moments)

    def _loss(self, hidden_NH: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """``log-mean`` of each row's classes, mean over them; and the loss."""
        if self.loss == "softmax":
            buckets_RN = self.buckets(one_a_row(target, len(hidden_NH), self.n_classes))
            output_N = self._log_probs(hidden_NH).gather(2, buckets_RN.T[:, :, None]).mean((1, 2))
            return output_N, -output_N.mean()
        N = len(hidden_NH)
        rows_M, classes_M = pairs(target, N, self.n_classes, hidden_NH.device)
        scores_NRB = self._scores(hidden_NH)
        starts_R1 = torch.arange(self.n_repetitions, device=rows_M.device)[:, None] * self.n_buckets
        at_RM = rows_M * self.n_repetitions * self.n_buckets + starts_R1 + self.buckets(classes_M)
        scores = scores_NRB.flatten()
        total = functional.softplus(scores).sum() - scores[torch.unique(at_RM)].sum()
        log_probs_M = functional.logsigmoid(scores[at_RM]).mean(0)
        return row_means(log_probs_M, rows_M, N), total / (N * self.n_repetitions)

    def _scores(self, hidden_NH: Tensor) -> Tensor:
        """Logits of shape (N, R, B), at least float32."""
        scores = self._linear(hidden_NH, self.weight, self.bias)
        return scores.view(len(hidden_NH), self.n_repetitions, self.n_buckets)

    def _log_probs(self, hidden_NH: Tensor) -> Tensor:
        """Log-probabilities of buckets, shape (N, R, B)."""
        scores_NRB = self._scores(hidden_NH)
        return functional.logsigmoid(scores_NRB) if self.loss == "binary" else scores_NRB.log_softmax(2)

    def _mean(self, values_NRB: Tensor, classes: Tensor) -> Tensor:
        """Mean over the repetitions of what stands in the buckets of classes (C,) or (N, C), shape (N, C)."""
        buckets = self.buckets(classes.flatten()).view(self.n_repetitions, *classes.shape)
        parts = (
            values_NB.gather(1, bucket) if classes.ndim == 2 else values_NB.index_select(1, bucket)
            for values_NB, bucket in zip(values_NRB.unbind(1), buckets, strict=True)
        )  # one at a time: all of them may not fit
        return functools.reduce(torch.add, parts) / self.n_repetitions

    def _normalizer(self, values_NRB: Tensor, power: float) -> Tensor:
        """``log sum_k exp(power * mean_r log P_r)``, shape (N, 1), over the classes in parts."""
        n_classes = max(1, CHUNK_SCORES // max(1, len(values_NRB)))
        parts = [
            (power * self._mean(values_NRB, classes)).logsumexp(1)
            for classes in torch.split(torch.arange(self.n_classes, device=values_NRB.device), n_classes)
        ]
        return torch.stack(parts, 1).logsumexp(1, keepdim=True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """As every module; but weights of other sizes mean other classes, even where their shapes agree."""
        stored, here = state_dict.get(f"{prefix}sizes"), [self.n_classes, self.n_buckets, self.prime]
        if stored is None or stored.tolist() == here:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        else:
            lists[-1].append(  # of errors
                f"{prefix}sizes: K, B, p are {stored.tolist()} in the state and {here} here; make a head alike"
            )


def _meeting_chance(prime: int, n_buckets: int) -> float:
    """Probability over the draw of ``h`` that two given classes share a bucket.

    Their images are any two different residues of p with equal chance (Carter & Wegman 1979), and the first ``p mod B``
    of the B buckets hold one residue more.
    """
    size, n_larger = divmod(prime, n_buckets)
    pairs = n_larger * (size + 1) * size + (n_buckets - n_larger) * size * (size - 1)
    return pairs / (prime * (prime - 1))
