"""MACH as the output layer of a PyTorch model of your own: loss, exact top-k and log-probabilities for any K.

`MACHHead` has the shape of `torch.nn.AdaptiveLogSoftmaxWithLoss`. In place of K outputs it has R groups of B; class k
stands for output ``h_r(k)`` of group r (`mach.hashing`), and each group is a small classifier of its own over hidden
states that all share. Weights, gradients and moments take O(R B H), whatever K is.

Three estimates of a class's probability come of its R bucket probabilities ``P_r``:

==============  =======================================================================================================
``log-mean``    ``mean_r log P_r``: what is trained and what ranks. An upper estimate, for a bucket holds other classes
                too: over all classes the exponentials sum to more than 1
``unbiased``    ``log((mean_r P_r - c) / (1 - c))``, c the chance that two classes share a bucket: exact on average over
                the hash functions, but noisy (`mach.theory.estimator_variance`), and -87.3 where noise leaves nothing.
                With c = 1 / B it is theorem 1 of Medini et al., "Extreme Classification in Log Memory", NeurIPS 2019;
                with the c of this family the estimates of all classes sum to 1 on average, as they should
``normalized``  ``sum_r log P_r`` less its log-sum-exp over all classes, the R groups as a product of experts (Hinton,
                Neural Computation 14, 2002): a distribution over the K classes, whose time grows with K
==============  =======================================================================================================

Importing this module imports torch; `import mach` does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mach.decoding import Decoder
from mach.errors import ConfigError, DataError
from mach.hashing import UniversalAssignment
from mach.theory import plan

Loss = Literal["softmax", "binary"]
Estimate = Literal["log-mean", "unbiased", "normalized"]
Target: TypeAlias = Tensor | Sequence[Any] | tuple[Tensor, Tensor]

CHUNK_SCORES = 2**23  # scores held at once where answers come in parts: 32 MB
LIMIT_BYTES = 2**30  # of a matrix over all classes
_TINY = torch.finfo(torch.float32).tiny


class Output(NamedTuple):
    """What a training step needs.

    Attributes
    ----------
    output : Tensor of shape (N,)
        Log-probability of each row's target, as ``log-mean``; for several targets their mean, for none 0.
    loss : Tensor, scalar
        What to minimise.
    """

    output: Tensor
    loss: Tensor


class Top(NamedTuple):
    """The k best classes of every row, on the device of the input.

    Attributes
    ----------
    ids : int64 Tensor of shape (N, k)
        Best first, equal scores by ascending id; -1 where there are fewer than k.
    scores : float32 Tensor of shape (N, k)
        Their ``log-mean``; -inf beside -1.
    exact : bool Tensor of shape (N,)
        Whether these are certainly the best of all K; only a budget can make it False.
    bound : float32 Tensor of shape (N,)
        The certificate: no other class scores above it.
    """

    ids: Tensor
    scores: Tensor
    exact: Tensor
    bound: Tensor


class MACHHead(nn.Module):
    """An output layer over K classes in R groups of B buckets.

    Parameters
    ----------
    in_features, n_classes : int
        H and K.
    n_buckets, n_repetitions : int, optional
        B and R. By default those of `mach.theory.plan` without a budget: B the power of two nearest K / 16, 64 to
        16,384; R at least 4, and so many that all pairs of classes can be told apart with probability 0.99.
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
        super().__init__()
        if loss not in get_args(Loss):
            raise ConfigError(f"unknown loss {loss!r}: choose one of {', '.join(get_args(Loss))}")
        B, R = _sizes(in_features, n_classes, n_buckets, n_repetitions)
        drawn = UniversalAssignment.draw(n_classes=n_classes, n_buckets=B, n_repetitions=R, seed=seed)
        self.in_features, self.n_classes, self.n_buckets, self.n_repetitions = in_features, n_classes, B, R
        self.loss = loss
        self.prime = drawn.prime
        self.weight = nn.Parameter(torch.empty(R * B, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(R * B, device=device, dtype=dtype)) if bias else None
        self.register_buffer("multipliers_R", torch.tensor(drawn.multipliers_R, device=device))
        self.register_buffer("offsets_R", torch.tensor(drawn.offsets_R, device=device))
        self.register_buffer("sizes", torch.tensor([n_classes, B, drawn.prime], device=device))
        self._assignment = drawn
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as `torch.nn.Linear` does; biases give every bucket its share, 1 / B."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.constant_(self.bias, -math.log(self.n_buckets - 1) if self.loss == "binary" else 0.0)

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
        """``h_r(k)`` of classes of shape (n,), int64 of shape (R, n), on their device; equal to `mach.hashing`."""
        images_RN = self.multipliers_R[:, None] * classes.long() + self.offsets_R[:, None]  # < 2**62: exact
        return images_RN.remainder_(self.prime).remainder_(self.n_buckets)

    def forward(self, input: Tensor, target: Target) -> Output:
        """Log-probability of the target and the loss.

        Parameters
        ----------
        input : float Tensor of shape (N, H), or (H,)
        target : int Tensor of shape (N,), or () beside an input of shape (H,)
            The class of each row. With the binary loss also a list of N lists of ids, an int Tensor of shape (N, L)
            where -1 pads, or a pair of Tensors (ids, offsets) as `torch.nn.EmbeddingBag` takes them; a class that a row
            names twice counts once.

        Raises
        ------
        DataError
            When a shape does not fit or a target is no class.
        """
        hidden_NH, is_single = self._rows(input)
        if is_single:
            target = torch.as_tensor(target, device=hidden_NH.device)[None]
        if self.loss == "binary":
            output_N, loss = self._binary(hidden_NH, target)
        else:
            output_N = self._softmax(hidden_NH, target)
            loss = -output_N.mean()
        return Output(output_N[0] if is_single else output_N, loss)

    def log_prob(
        self,
        input: Tensor,
        classes: Tensor | None = None,
        *,
        estimate: Estimate = "log-mean",
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
        if estimate not in get_args(Estimate):
            raise ConfigError(f"unknown estimate {estimate!r}: choose one of {', '.join(get_args(Estimate))}")
        if self.loss == "binary" and estimate != "log-mean":
            raise ConfigError(f"estimate {estimate!r} is for classes that exclude each other, the loss is 'binary'")
        hidden_NH, is_single = self._rows(input)
        N, K = len(hidden_NH), self.n_classes
        n_bytes = N * K * 4
        holds_all = classes is None or (estimate == "normalized" and torch.is_grad_enabled())
        if holds_all and n_bytes > limit_bytes:
            raise DataError(
                f"{N} rows of all {K} classes take {n_bytes} bytes, the limit is {limit_bytes}: give classes, use topk, "
                f"take fewer rows{'' if classes is None else ', or torch.no_grad()'}"
            )
        values_NRB = self._log_probs(hidden_NH)
        wanted = torch.arange(K, device=values_NRB.device) if classes is None else self._checked(classes, N)
        if estimate == "unbiased":
            chance = _meeting_chance(self.prime, self.n_buckets)
            mean_NC = self._mean(values_NRB.exp(), wanted)
            found_NC = ((mean_NC - chance) / (1 - chance)).clamp_min(_TINY).log()
        else:
            found_NC = self._mean(values_NRB, wanted)
            if estimate == "normalized":
                found_NC = self.n_repetitions * found_NC - self._normalizer(values_NRB)
        return found_NC[0] if is_single else found_NC

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
        The search runs on the processor (`mach.decoding.Decoder`), on rows by the 32 MB of scores.
        """
        hidden_NH, is_single = self._rows(input)
        mask_K = allowed.cpu().numpy() if isinstance(allowed, Tensor) else allowed
        decoder = Decoder(self.assignment)
        n_rows = max(1, CHUNK_SCORES // (self.n_repetitions * self.n_buckets))
        parts = []
        for hidden in hidden_NH.split(n_rows):
            probs_NRB = self._log_probs(hidden).float().exp_().cpu().numpy()
            top = decoder.topk(probs_NRB, k, allowed_K=mask_K, budget=budget)
            parts.append((top.ids_Nk, top.scores_Nk, top.exact_N, top.bound_N))
        columns = [torch.from_numpy(np.concatenate(part)).to(input.device) for part in zip(*parts, strict=True)]
        return Top(*(column[0] for column in columns)) if is_single else Top(*columns)

    def predict(self, input: Tensor) -> Tensor:
        """The best class of every row, int64 of shape (N,), or () for an input of shape (H,)."""
        return self.topk(input, 1).ids[..., 0]

    def ledger(self, n_rows: int, *, n_moments: int = 2) -> HeadLedger:
        """What a training step of ``n_rows`` takes; see `HeadLedger`."""
        return HeadLedger(
            self.in_features,
            self.n_classes,
            self.n_buckets,
            self.n_repetitions,
            n_rows,
            self.bias is not None,
            n_moments,
        )

    def _softmax(self, hidden_NH: Tensor, target: Target) -> Tensor:
        """``log-mean`` of each row's class, shape (N,)."""
        if not isinstance(target, Tensor) or target.ndim != 1 or len(target) != len(hidden_NH):
            raise DataError(
                f"target has {_shape(target)} for {len(hidden_NH)} rows: loss 'softmax' takes one id a row, shape "
                f"({len(hidden_NH)},); several classes a row need loss='binary'"
            )
        buckets_RN = self.buckets(self._in_range(target, "target"))
        return self._log_probs(hidden_NH).gather(2, buckets_RN.T[:, :, None]).mean((1, 2))

    def _binary(self, hidden_NH: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """``log-mean`` of each row's classes, mean over them, shape (N,); and the loss."""
        N = len(hidden_NH)
        rows_M, classes_M = self._pairs(target, N, hidden_NH.device)
        pairs_M = (rows_M * self.n_classes + classes_M).unique()
        rows_M, classes_M = pairs_M // self.n_classes, pairs_M % self.n_classes
        scores_NRB = self._scores(hidden_NH)
        starts_R1 = torch.arange(self.n_repetitions, device=rows_M.device)[:, None] * self.n_buckets
        at_RM = rows_M * self.n_repetitions * self.n_buckets + starts_R1 + self.buckets(classes_M)
        scores = scores_NRB.flatten()
        total = functional.softplus(scores).sum() - scores[at_RM.unique()].sum()
        log_probs_M = functional.logsigmoid(scores[at_RM]).mean(0)
        sums_N = torch.zeros(N, device=rows_M.device, dtype=log_probs_M.dtype).index_add(0, rows_M, log_probs_M)
        output_N = sums_N / rows_M.bincount(minlength=N).clamp_min(1)
        return output_N, total / (N * self.n_repetitions)

    def _scores(self, hidden_NH: Tensor) -> Tensor:
        """Logits of shape (N, R, B), at least float32."""
        scores = functional.linear(hidden_NH, self.weight, self.bias)
        scores = scores.float() if scores.dtype in {torch.bfloat16, torch.float16} else scores
        return scores.view(len(hidden_NH), self.n_repetitions, self.n_buckets)

    def _log_probs(self, hidden_NH: Tensor) -> Tensor:
        """Log-probabilities of buckets, shape (N, R, B)."""
        if self.loss == "binary":
            return functional.logsigmoid(self._scores(hidden_NH))
        return self._scores(hidden_NH).log_softmax(2)

    def _mean(self, values_NRB: Tensor, classes: Tensor) -> Tensor:
        """Mean over the repetitions of what stands in the buckets of classes (C,) or (N, C), shape (N, C)."""
        buckets = self.buckets(classes.flatten()).view(self.n_repetitions, *classes.shape)
        total: Tensor | None = None
        for values_NB, bucket in zip(values_NRB.unbind(1), buckets, strict=True):
            part_NC = values_NB.gather(1, bucket) if classes.ndim == 2 else values_NB.index_select(1, bucket)
            total = part_NC if total is None else total + part_NC
        assert total is not None
        return total / self.n_repetitions

    def _normalizer(self, values_NRB: Tensor) -> Tensor:
        """``log sum_k exp(sum_r log P_r)``, shape (N, 1), over the classes in parts."""
        n_classes = max(1, CHUNK_SCORES // max(1, len(values_NRB)))
        parts = [
            (self.n_repetitions * self._mean(values_NRB, classes)).logsumexp(1)
            for classes in torch.arange(self.n_classes, device=values_NRB.device).split(n_classes)
        ]
        return torch.stack(parts, 1).logsumexp(1, keepdim=True)

    def _rows(self, input: Tensor) -> tuple[Tensor, bool]:
        """Hidden states of shape (N, H), and whether they were one row."""
        if input.ndim not in {1, 2} or input.shape[-1] != self.in_features:
            raise DataError(f"input has shape {tuple(input.shape)}: need (N, {self.in_features}), flatten other axes")
        return (input[None], True) if input.ndim == 1 else (input, False)

    def _checked(self, classes: Tensor, n_rows: int) -> Tensor:
        classes = torch.as_tensor(classes, device=self.weight.device)
        if classes.ndim not in {1, 2} or (classes.ndim == 2 and len(classes) != n_rows):
            raise DataError(f"classes have shape {tuple(classes.shape)} for {n_rows} rows: need (C,) or ({n_rows}, C)")
        return self._in_range(classes, "classes")

    def _in_range(self, classes: Tensor, name: str, least: int = 0) -> Tensor:
        """Integer ids, every one a class; asks the device once."""
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise DataError(f"{name} is {classes.dtype}: need integers, 0..{self.n_classes - 1}")
        if not torch.compiler.is_compiling():
            outside = (classes < least) | (classes >= self.n_classes)
            if outside.any():
                place = tuple(outside.nonzero()[0].tolist())
                found = f"{name}[{', '.join(map(str, place))}] is {int(classes[place])}"
                raise DataError(f"{found}: classes are 0..{self.n_classes - 1}")
        return classes

    def _pairs(self, target: Target, n_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and class of every target, int64 of shape (M,)."""
        if isinstance(target, tuple) and len(target) == 2 and all(isinstance(part, Tensor) for part in target):
            classes_M, offsets = target[0].to(device), target[1].to(device)
            ends = (
                torch.cat([offsets[1:], offsets.new_tensor([len(classes_M)])])
                if len(offsets) == n_rows
                else offsets[1:]
            )
            counts = ends - offsets[: len(ends)]
            is_whole = len(ends) == n_rows and (
                n_rows == 0 or (int(offsets[0]) == 0 and int(ends[-1]) == len(classes_M))
            )
            if not is_whole or bool((counts < 0).any()):
                raise DataError(
                    f"offsets of length {len(offsets)} for {n_rows} rows and {len(classes_M)} ids: "
                    f"need {n_rows} (or one more) that ascend from 0"
                )
            classes_M = self._in_range(classes_M, "target ids")
            return torch.arange(n_rows, device=device).repeat_interleave(counts), classes_M
        if not isinstance(target, Tensor):
            target = _padded(target)
        target = target.to(device)
        if target.ndim not in {1, 2} or len(target) != n_rows:
            raise DataError(
                f"target has {_shape(target)} for {n_rows} rows: need ({n_rows},) or ({n_rows}, L) padded by -1"
            )
        if target.ndim == 1:
            return torch.arange(n_rows, device=device), self._in_range(target, "target")
        rows_M, columns_M = (self._in_range(target, "target", least=-1) >= 0).nonzero(as_tuple=True)
        return rows_M, target[rows_M, columns_M]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """As every module; but weights of other sizes mean other classes, even where their shapes agree."""
        stored = state_dict.get(f"{prefix}sizes")
        here = [self.n_classes, self.n_buckets, self.prime]
        if stored is not None and stored.tolist() != here:
            errors.append(
                f"{prefix}sizes: K, B, p are {stored.tolist()} in the state and {here} here; make a head alike"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


@dataclass(frozen=True)
class HeadLedger:
    """Bytes of one training step of a `MACHHead` in float32, the encoder apart.

    Gradients are freed before each step (``zero_grad()``, as torch does by default) and the optimiser makes no copies
    (``fused=True``; otherwise it takes up to two more of the weights while it steps).

    Attributes
    ----------
    in_features, n_classes, n_buckets, n_repetitions, n_rows : int
        H, K, B, R and the rows of a batch, N.
    has_bias : bool
    n_moments : int
        Of the optimiser, a weight: 2 for Adam, 1 for momentum, 0 for plain descent.

    Examples
    --------
    >>> ledger = HeadLedger(256, 1_000_000, 16384, 4, n_rows=256)
    >>> ledger.peak_bytes, ledger.full_peak_bytes
    (403963904, 6156524288)
    """

    in_features: int
    n_classes: int
    n_buckets: int
    n_repetitions: int
    n_rows: int
    has_bias: bool = True
    n_moments: int = 2

    @property
    def n_parameters(self) -> int:
        return self.n_repetitions * self.n_buckets * (self.in_features + self.has_bias)

    @property
    def weight_bytes(self) -> int:
        return 4 * self.n_parameters

    @property
    def moment_bytes(self) -> int:
        return self.n_moments * self.weight_bytes

    @property
    def score_bytes(self) -> int:
        """Scores of a batch, (N, R B); a backward pass holds them three times, and once when weights get gradients."""
        return 4 * self.n_rows * self.n_repetitions * self.n_buckets

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once: in the backward pass, or when the weights' gradients are made."""
        return self._peak(self.weight_bytes, self.score_bytes)

    @property
    def full_peak_bytes(self) -> int:
        """The same of a softmax over all K classes, ``Linear(H, K)`` and cross-entropy."""
        return self._peak(4 * self.n_classes * (self.in_features + self.has_bias), 4 * self.n_rows * self.n_classes)

    def rows(self) -> list[tuple[str, float, str]]:
        """Lines to print: (name, value, unit)."""
        return [
            ("parameters", self.n_parameters, ""),
            ("weights", self.weight_bytes, "bytes"),
            ("gradients", self.weight_bytes, "bytes"),
            ("moments", self.moment_bytes, "bytes"),
            ("scores of a batch", self.score_bytes, "bytes"),
            ("peak of a step", self.peak_bytes, "bytes"),
            ("peak of a step, full softmax", self.full_peak_bytes, "bytes"),
        ]

    def _peak(self, weight_bytes: int, score_bytes: int) -> int:
        hidden_bytes = 2 * 4 * self.n_rows * self.in_features  # the batch and its gradient
        resting = (1 + self.n_moments) * weight_bytes + hidden_bytes
        return resting + max(3 * score_bytes, score_bytes + weight_bytes)


def _sizes(in_features: int, n_classes: int, n_buckets: int | None, n_repetitions: int | None) -> tuple[int, int]:
    """B and R, those left open by the planner's rule for a linear network."""
    chosen = plan(n_classes, in_features, hidden=(), n_buckets=n_buckets, n_repetitions=n_repetitions).ledger
    return chosen.n_buckets, chosen.n_repetitions


def _meeting_chance(prime: int, n_buckets: int) -> float:
    """Probability over the draw of ``h`` that two given classes share a bucket.

    Their images are any two different residues of p with equal chance (Carter & Wegman 1979), and the first ``p mod B``
    of the B buckets hold one residue more.
    """
    size, n_larger = divmod(prime, n_buckets)
    pairs = n_larger * (size + 1) * size + (n_buckets - n_larger) * size * (size - 1)
    return pairs / (prime * (prime - 1))


def _padded(rows: Sequence[Any]) -> Tensor:
    """Lists of ids as one matrix, -1 where a list is shorter."""
    try:
        ids = [torch.as_tensor(row) for row in rows]
        if not ids:
            return torch.empty(0, 0, dtype=torch.int64)
        if any(row.ndim != 1 or (len(row) and row.is_floating_point()) for row in ids):
            raise ValueError("a row is no list of integers")
        if any(len(row) and int(row.min()) < 0 for row in ids):
            raise ValueError("an id is negative")
        return nn.utils.rnn.pad_sequence([row.long() for row in ids], batch_first=True, padding_value=-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"target is a {type(rows).__name__} that holds no rows of ids: {error}") from error


def _shape(target: object) -> str:
    return f"shape {tuple(target.shape)}" if isinstance(target, Tensor) else f"type {type(target).__name__}"
