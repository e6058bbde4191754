"""The ledger of a head: bytes of a training step."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
        hidden_bytes = 2 * 4 * self.n_rows * self.in_features  # the batch and its gradient
        resting = self.weight_bytes + self.moment_bytes + hidden_bytes
        return resting + max(3 * self.score_bytes, self.score_bytes + self.weight_bytes)

    @property
    def full_peak_bytes(self) -> int:
        """The same of a softmax over all K classes, ``Linear(H, K)`` and cross-entropy."""
        return replace(self, n_buckets=self.n_classes, n_repetitions=1).peak_bytes

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


@dataclass(frozen=True)
class SampledLedger:
    """Bytes of one training step of a `SampledHead` with `RowAdam`, the encoder apart.

    Class counts take 16 more a class where they are drawn by, hash tables `HashTables.n_bytes`.

    Attributes
    ----------
    in_features, n_classes, n_candidates, n_rows : int
        H, K, the classes that a step computes, C, and the rows of a batch, N.
    bytes_each : int
        Of a weight: 4, or 2 for bfloat16.
    has_bias : bool

    Examples
    --------
    >>> ledger = SampledLedger(256, 1_000_000, 8192 + 256, n_rows=256)
    >>> ledger.peak_bytes, ledger.multiply_adds, ledger.full_multiply_adds
    (1096428800, 6488064, 768000000)
    """

    in_features: int
    n_classes: int
    n_candidates: int
    n_rows: int
    bytes_each: int = 4
    has_bias: bool = True

    @property
    def n_parameters(self) -> int:
        return self.n_classes * (self.in_features + self.has_bias)

    @property
    def weight_bytes(self) -> int:
        return self.bytes_each * self.n_parameters

    @property
    def moment_bytes(self) -> int:
        """A second moment and a count a row, of weights and of biases."""
        return 8 * self.n_classes * (1 + self.has_bias)

    @property
    def score_bytes(self) -> int:
        """Scores of a batch, (N, C)."""
        return 4 * self.n_rows * self.n_candidates

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once: in the backward pass, or when the rows are moved."""
        row_bytes = self.n_candidates * self.in_features
        hidden_bytes = 2 * 4 * self.n_rows * self.in_features  # the batch and its gradient
        resting = self.weight_bytes + self.moment_bytes + hidden_bytes
        n_scores = 4 if self.bytes_each == 4 else 5  # those of bfloat16 are made float32
        backward = n_scores * self.score_bytes + 2 * self.bytes_each * row_bytes
        return resting + max(backward, self.bytes_each * row_bytes + 3 * 4 * row_bytes)

    @property
    def multiply_adds(self) -> int:
        """Of a step, a row."""
        return 3 * self.in_features * self.n_candidates

    @property
    def full_multiply_adds(self) -> int:
        """The same of a softmax over all K classes."""
        return 3 * self.in_features * self.n_classes

    def rows(self) -> list[tuple[str, float, str]]:
        """Lines to print: (name, value, unit)."""
        return [
            ("parameters", self.n_parameters, ""),
            ("weights", self.weight_bytes, "bytes"),
            ("moments", self.moment_bytes, "bytes"),
            ("scores of a batch", self.score_bytes, "bytes"),
            ("peak of a step", self.peak_bytes, "bytes"),
            ("multiply-adds a row", self.multiply_adds, ""),
            ("multiply-adds a row, all classes", self.full_multiply_adds, ""),
        ]
