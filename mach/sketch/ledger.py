"""What a configuration costs: parameters, bytes and FLOPs, by counting.

Pure functions of integers. Every parameter and byte is counted, the R input layers included: in published
MACH they hold 90 to 99 % of all parameters.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np

from mach.errors import ConfigError
from mach.sketch.hashing import MAX_CAPACITY

HostMemory: TypeAlias = Literal["none", "input", "all"]  # what of a network on a GPU stays in main memory
# A parameter while training, at most: of the sparse input layer a float32 weight, or bfloat16 where products are (its
# moments are one a row); of others a float32 weight, Adam's two float32 moments and a bfloat16 copy.
INPUT_TRAINING_BYTES, TRAINING_BYTES = 4, 14
PROCESS_BYTES = 400_000_000  # Python, torch, compiled kernels and a batch, as measured
DEVICE_PROCESS_BYTES = 1_500_000_000  # of a GPU: context, libraries, what the allocator cannot join; an estimate
MOMENTS_BYTES = 2**28  # of a GPU: pieces of moments that pass through (`mach.networks.offload`)
BIAS_BYTES = 4  # stored biases stay float32
OFFSET_BYTES = 8
STEPS_BYTES = 4 * 256  # a precomputed progression of the decoder's index (`mach.sketch.kernels.sweep.Index`)
N_PEERS = 2  # repetitions whose buckets the index of a table keeps beside each list of members, and
LANES = 16  # zeros at the end of these (`mach.sketch.kernels.lanes`)


@dataclass(frozen=True)
class Ledger:
    """What one configuration costs: parameters and bytes of arrays exact, FLOPs with a multiply-add as two.

    Parameters
    ----------
    n_classes, n_features, n_buckets, n_repetitions : int
        K, D, B and R, each 1 to `MAX_CAPACITY`.
    hidden : tuple of int
        Widths of the hidden layers; ``()`` is the linear network, sparse input straight into its outputs.
    n_heads : int
        Hash functions of a repetition, each with B outputs of its network.
    dense_input : bool
        Whether a row has all D features rather than ``nonzeros_per_row``; changes FLOPs only.
    weight_bytes : int
        Of one weight on disk: 2 is bfloat16; biases take 4 always.
    input_bytes : float, optional
        Of one weight of a sparse input layer on disk; by default as all others. 1 is int8, with 4 bytes a feature
        more; less is the share of its weights that are stored, in a byte each and 12 a feature.
    output_bytes : int, optional
        Of one weight of the output layer on disk; by default as all others. 1 is int8, with 4 bytes an output more.
    nonzeros_per_row : float
        Mean number of features of a sparse row; rounded.
    table_assignment : bool
        Whether buckets come from a table of shape (R, K) rather than from the universal family.
    reranking_bytes : int
        Of the re-ranker on disk (`mach.reranking.signals`); 0: there is none. Apart from all others, for
        it grows with K and the data.
    n_workers : int
        Repetitions trained at once.
    sampled : float
        Share of the outputs that a step computes (`mach.networks.steps.Steps`), its rows' targets apart.

    Raises
    ------
    ConfigError
        When a count is out of range.
    """

    n_classes: int
    n_features: int
    n_buckets: int
    n_repetitions: int
    hidden: tuple[int, ...] = (512,)
    _: KW_ONLY
    n_heads: int = 1
    dense_input: bool = False
    weight_bytes: int = 2
    input_bytes: float | None = None
    output_bytes: int | None = None
    nonzeros_per_row: float = 100
    table_assignment: bool = False
    reranking_bytes: int = 0
    n_workers: int = 1
    sampled: float = 1.0

    def __post_init__(self) -> None:
        for name in ("n_classes", "n_features", "n_buckets", "n_repetitions", "n_heads", "weight_bytes", "n_workers"):
            check_count(name, getattr(self, name))
        check_count("nonzeros_per_row", self.nonzeros_per_row, least=0)
        for i, width in enumerate(self.hidden, 1):
            check_count(f"hidden layer {i}", width)

    @property
    def n_outputs(self) -> int:
        return self.n_heads * self.n_buckets

    @property
    def n_active(self) -> int:
        """Features of a row: all, or the non-zero ones."""
        return self.n_features if self.dense_input else min(round(self.nonzeros_per_row), self.n_features)

    @property
    def n_input(self) -> int:
        """Parameters of a repetition's first layer, the only one of the linear network."""
        return self._layers(self.n_outputs)[0]

    @property
    def n_hidden(self) -> int:
        return sum(self._layers(self.n_outputs)[1:-1])

    @property
    def n_output(self) -> int:
        return self._layers(self.n_outputs)[-1] if self.hidden else 0

    @property
    def n_repetition_parameters(self) -> int:
        return sum(self._layers(self.n_outputs))

    @property
    def n_parameters(self) -> int:
        return self.n_repetitions * self.n_repetition_parameters

    @property
    def n_one_vs_all_parameters(self) -> int:
        """Of one network of the same hidden widths with K outputs."""
        return sum(self._layers(self.n_classes))

    @property
    def input_weight_bytes(self) -> float:
        """Of one stored weight of the input layer."""
        return self.weight_bytes if self.dense_input or self.input_bytes is None else self.input_bytes

    @property
    def repetition_bytes(self) -> int:
        """One repetition's arrays on disk, biases in float32; a file's header adds a kilobyte."""
        n_outputs, hidden, D = self.n_outputs, self.hidden, self.n_features
        n_biases = sum(hidden) + n_outputs
        n_input = D * (hidden[0] if hidden else n_outputs)
        n_output = n_outputs * hidden[-1] if hidden else 0
        stored = int(self.input_weight_bytes * n_input)
        stored += OFFSET_BYTES * (D + 1) if self.input_weight_bytes < 1 else 0
        stored += BIAS_BYTES * D if self.input_weight_bytes <= 1 else 0
        stored += (self.n_repetition_parameters - n_biases - n_input - n_output) * self.weight_bytes
        is_int8 = self.output_bytes == 1 and bool(hidden)
        stored += n_output + BIAS_BYTES * n_outputs if is_int8 else n_output * self.weight_bytes
        return stored + n_biases * BIAS_BYTES

    @property
    def table_bytes(self) -> int:
        """The assignment's array on disk; 0 for the universal family."""
        width = np.min_scalar_type(self.n_buckets - 1).itemsize
        return self.n_heads * self.n_repetitions * self.n_classes * width if self.table_assignment else 0

    @property
    def index_bytes(self) -> int:
        """The decoder's index in memory (`mach.sketch.hashing.Assignment.index`)."""
        n_functions, K, B = self.n_heads * self.n_repetitions, self.n_classes, self.n_buckets
        if not self.table_assignment:
            return n_functions * ((n_functions + 1) * STEPS_BYTES + 3 * 8)
        width, n_peers = 2 if B <= 2**16 else 4, min(N_PEERS, n_functions - 1)
        n_copies = (n_functions > 1) + (np.min_scalar_type(B - 1).itemsize < width)  # by class, widened
        lists = n_peers * (K + LANES) * width + K * 4 + (B + 1) * 8  # peers, members, and where a bucket begins
        return n_functions * (n_copies * K * width + lists)

    @property
    def query_flops(self) -> int:
        """Forward pass of one row through all repetitions."""
        return self.n_repetitions * self._forward_flops(self.n_outputs)

    @property
    def one_vs_all_query_flops(self) -> int:
        return self._forward_flops(self.n_classes)

    @property
    def example_flops(self) -> int:
        """Forward and backward pass of one row in training."""
        return self.n_repetitions * self._training_flops(math.ceil(self.sampled * self.n_outputs))

    @property
    def dense_example_flops(self) -> int:
        """The same of one network of these widths that has all D features of a row, and K outputs."""
        return replace(self, dense_input=True)._training_flops(self.n_classes)

    @property
    def disk_bytes(self) -> int:
        """All repetitions and the assignment."""
        return self.n_repetitions * self.repetition_bytes + self.table_bytes

    @property
    def model_bytes(self) -> int:
        """The same and the decoder's index, as in memory once every mapped page was touched."""
        return self.disk_bytes + self.index_bytes

    @property
    def training_bytes(self) -> int:
        """Weights and Adam moments of the one repetition that a worker trains at a time."""
        input_bytes = TRAINING_BYTES if self.dense_input else INPUT_TRAINING_BYTES
        return input_bytes * self.n_input + TRAINING_BYTES * (self.n_hidden + self.n_output)

    @property
    def worker_bytes(self) -> int:
        """The same and its process, which is what a cluster reserves; mapped data come on top."""
        return self.training_bytes + PROCESS_BYTES

    @property
    def n_rounds(self) -> int:
        """Rounds in which the workers train all repetitions."""
        return -(-self.n_repetitions // self.n_workers)

    def device_bytes(
        self, n_together: int, n_rows: int = 256, *, number_bytes: int = 2, host_memory: HostMemory = "none"
    ) -> int:
        """Memory of a GPU on which so many repetitions train together (`mach.networks.batched`).

        A batch has ``n_rows``, a number in products ``number_bytes`` (2 is bfloat16, 4 float32), and ``host_memory``
        says what stays in main memory: nothing, input layers, moments of other layers as well.

        With w = ``number_bytes``, U = min(D, N nnz) features of a batch, and H1 the width of the input layer, a
        repetition takes ``D (w H1 + 4)`` for its input layer (from main memory: three times U rows of it); for a dense
        parameter 4 as master, 8 as moments (0 from main memory), 2 as bfloat16 copy and w as gradient; and for a row
        ``w`` a logit and ``2 w`` an activation. Once come the batch itself, 56 a non-zero, and the figures of one
        repetition, 16 a logit. All rows, 8 a non-zero, are on the device only where they leave half of it free.
        """
        n_outputs, w = self.n_outputs, number_bytes
        width = self.hidden[0] if self.hidden else n_outputs
        n_entries = n_rows * self.n_active
        n_input_rows = self.n_features if host_memory == "none" else 3 * min(self.n_features, n_entries)
        dense = 4 + (0 if host_memory == "all" else 8) + (2 if w == 2 else 0) + w
        repetition = n_input_rows * (width * w + 4) + dense * (self.n_hidden + self.n_output)
        repetition += n_rows * w * (n_outputs + 2 * sum(self.hidden))
        once = 56 * n_entries + 16 * n_rows * n_outputs + (MOMENTS_BYTES if host_memory == "all" else 0)
        return n_together * repetition + once + DEVICE_PROCESS_BYTES

    def repetitions_within(self, n_bytes: int, n_rows: int = 256, **options: Any) -> int:
        """How many repetitions can be trained together in so much memory of a device, at most R; as `device_bytes`."""
        none = self.device_bytes(0, n_rows, **options)
        each = self.device_bytes(1, n_rows, **options) - none
        return max(0, min(self.n_repetitions, (n_bytes - none) // each))

    def rows(self) -> list[tuple[str, float, str]]:
        """Lines to print: (name, value, unit)."""
        per_repetition, stored = self.n_repetition_parameters, self.input_weight_bytes
        return [
            ("classes", self.n_classes, ""),
            ("features", self.n_features, ""),
            ("buckets", self.n_buckets, ""),
            ("repetitions", self.n_repetitions, ""),
            *([("heads of a repetition", self.n_heads, "")] if self.n_heads > 1 else []),
            *((f"width of hidden layer {i}", width, "") for i, width in enumerate(self.hidden, 1)),
            ("assumed: a stored weight", self.weight_bytes, "bytes"),
            *([("assumed: one of the input layer", stored, "bytes")] if stored < 2 else []),
            ("assumed: features in a row", self.n_active, "dense" if self.dense_input else "sparse"),
            ("parameters a repetition", per_repetition, ""),
            ("input layer", 100 * self.n_input / per_repetition, "%"),
            ("hidden layers", 100 * self.n_hidden / per_repetition, "%"),
            ("output layer", 100 * self.n_output / per_repetition, "%"),
            ("parameters", self.n_parameters, ""),
            ("parameters, one-vs-all", self.n_one_vs_all_parameters, ""),
            ("a repetition on disk", self.repetition_bytes, "bytes"),
            ("model on disk", self.disk_bytes, "bytes"),
            ("model in memory, all touched", self.model_bytes, "bytes"),
            ("training, weights and moments", self.training_bytes, "bytes a worker"),
            ("training, its process with them", self.worker_bytes, "bytes a worker"),
            ("training", self.example_flops, "FLOPs a row"),
            ("training, one-vs-all", self._training_flops(self.n_classes), "FLOPs a row"),
            ("training, dense network", self.dense_example_flops, "FLOPs a row"),
            ("training, less than the dense network", 100 * (1 - self.example_flops / self.dense_example_flops), "%"),
            ("query", self.query_flops, "FLOPs"),
            ("query, one-vs-all", self.one_vs_all_query_flops, "FLOPs"),
            *([("re-ranker on disk, grows with K", self.reranking_bytes, "bytes")] if self.reranking_bytes else []),
            *([("rounds of training", self.n_rounds, "")] if self.n_workers > 1 else []),
        ]

    def _layers(self, n_outputs: int) -> list[int]:
        """Weights and biases of every layer."""
        return [below * above + above for below, above in pairwise((self.n_features, *self.hidden, n_outputs))]

    def _forward_flops(self, n_outputs: int) -> int:
        return sum(2 * below * above for below, above in pairwise((self.n_active, *self.hidden, n_outputs)))

    def _training_flops(self, n_outputs: int) -> int:
        """Forward, gradient of the weights, and gradient of the inputs, which the first layer does not need."""
        first = self.hidden[0] if self.hidden else n_outputs
        return 3 * self._forward_flops(n_outputs) - 2 * self.n_active * first


def check_count(name: str, count: float, least: int = 1) -> None:
    """Raise a ConfigError where a count is out of range."""
    if not least <= count <= MAX_CAPACITY:
        raise ConfigError(f"{name} is {shown(count)}: must be at least {least} and at most {MAX_CAPACITY}")


def shown(number: float) -> str:
    """For one line of a message: a number of hundreds of digits is not printed."""
    return "a number of more than 20 digits" if 10**20 <= abs(number) < math.inf else str(number)
