"""Repetitions as one network: what each would have become on its own, resident or streamed, and on from anywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from mach.config import Config, NetworkConfig
from mach.data.batch import read_batch, read_targets
from mach.data.rows import RowView
from mach.data.store import Store
from mach.errors import ConfigError
from mach.networks import offload
from mach.networks.batched import BatchedNetwork, Member, buckets_on, can_be_batched, step_keys
from mach.networks.feed import Feed
from mach.networks.figures import StepFigures
from mach.networks.kernels import batched as reference
from mach.networks.kernels.memory import from_bfloat16
from mach.networks.network import Network
from mach.sketch.hashing import Assignment, UniversalAssignment
from mach.sketch.ledger import HostMemory, Ledger
from mach.sketch.tables import TableAssignment
from mach.training.setup import set_up

R, B, N = 3, 32, 50
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA")])
each_device = pytest.mark.parametrize("device", ["cpu", CUDA])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: threads that wait for each other on busy cores take most of the time."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def store(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return set_up(config, tmp_path_factory.mktemp("batched") / "run")[1]


class Pair:
    """The same repetitions one by one and as one network, and steps of both on the same rows."""

    def __init__(
        self,
        store: Store,
        device: str = "cpu",
        *,
        hidden: tuple[int, ...] = (24,),
        loss: str = "binary",
        precision: str = "float32",
        n_heads: int = 1,
        dropout: float = 0.3,
        host_memory: HostMemory = "none",
        is_resident: bool = True,
        is_table: bool = False,
        power: float = 1.0,
    ) -> None:
        self.store, self.device, self.n_heads = store, device, n_heads
        drawn = UniversalAssignment.draw(n_classes=store.n_classes, n_buckets=B, n_repetitions=R * n_heads, seed=1)
        self.assignments: list[Assignment] = [
            drawn.select(list(range(r * n_heads, (r + 1) * n_heads))) for r in range(R)
        ]
        if is_table:
            tables = [assignment.buckets(np.arange(store.n_classes)) for assignment in self.assignments]
            self.assignments = [TableAssignment.from_table(table, B) for table in tables]
        self.config = NetworkConfig(hidden=list(hidden), dropout=dropout, power=power)
        self.options: dict[str, Any] = {"loss": loss, "precision": precision}
        self.networks = [self.network(seed) for seed in range(R)]
        self.together = self.batched([self.network(seed) for seed in range(R)], host_memory)
        is_resident = is_resident and host_memory == "none"
        host, view = self.together.host, RowView(power=power)
        self.feed = Feed(store, self.together.device, view, host, is_resident=is_resident)
        self.order = np.random.default_rng(0).permutation(store.n_rows)

    def network(self, seed: int) -> Network:
        bias = np.random.default_rng(seed).standard_normal(self.n_heads * B).astype(np.float32)
        shape: dict[str, Any] = {"n_features": self.store.n_features, "n_outputs": self.n_heads * B}
        return Network(self.config, dense_input=False, bias=bias, seed=seed, **shape, **self.options)

    def batched(self, networks: list[Network], host_memory: HostMemory = "none") -> BatchedNetwork:
        options: dict[str, Any] = {"device": self.device, "host_memory": host_memory}
        together = BatchedNetwork(networks[0], self.config, n_repetitions=R, **options)
        self.members: list[Member] = [together.adopt(*pair) for pair in zip(networks, self.assignments, strict=True)]
        return together

    def rows(self, step: int) -> Any:
        return self.order[step * N : (step + 1) * N]

    def step_batched(self, step: int) -> list[StepFigures]:
        batch = self.feed.batch(self.rows(step), self.rows(step + 1))
        found = self.together.step(batch, 0.01, measured=True)
        assert found is not None
        return found

    def step_single(self, step: int) -> list[StepFigures]:
        batch, found = read_batch(self.store, self.rows(step)), []
        for network, assignment in zip(self.networks, self.assignments, strict=True):
            figures = network.step(batch, read_targets(self.store, self.rows(step), assignment), 0.01, measured=True)
            assert figures is not None
            found.append(figures)
        return found

    def differences(self) -> dict[str, float]:
        """Largest relative differences (by norm) of the arrays in the states."""
        found: dict[str, float] = {}
        for network, member in zip(self.networks, self.members, strict=True):
            theirs, ours = network.state(), member.state()
            assert {n: (a.shape, a.dtype) for n, a in theirs.items()} == {
                n: (a.shape, a.dtype) for n, a in ours.items()
            }
            for name, array in theirs.items():
                pair = [np.asarray(from_bfloat16(x), np.float64) for x in (array, ours[name])]
                size = max(float(np.linalg.norm(pair[0])), 1e-6)
                found[name] = max(found.get(name, 0.0), float(np.linalg.norm(pair[0] - pair[1])) / size)
        return found


CASES: list[dict[str, Any]] = [
    {},
    {"hidden": ()},
    {"hidden": (24, 16, 8), "loss": "softmax"},
    {"loss": "softmax", "n_heads": 2, "is_table": True},
    {"hidden": (), "loss": "softmax", "n_heads": 2},
    {"is_resident": False, "hidden": (24, 16)},
    {"host_memory": "all", "hidden": (24, 16)},
    {"host_memory": "input", "hidden": ()},
]


@each_device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_together_each_becomes_what_it_would_alone(store: Store, device: str, case: dict[str, Any]) -> None:
    """Figures and all arrays of the state, dropout included, after steps that share many features."""
    pair = Pair(store, device, **case)
    start = [{name: np.array(array) for name, array in member.state().items()} for member in pair.members]
    for step in range(5):
        for ours, theirs in zip(pair.step_batched(step), pair.step_single(step), strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
            assert ours.bucket_precision == pytest.approx(theirs.bucket_precision, abs=2.5 / N)
    assert max(pair.differences().values()) < 2e-3, pair.differences()
    moved = [name for name, array in pair.members[1].state().items() if not np.array_equal(array, start[1][name])]
    assert sorted(moved) == sorted(start[1])
    rows = read_batch(store, pair.order[-20:])
    for network, member in zip(pair.networks, pair.members, strict=True):
        torch.testing.assert_close(member.logits(rows), network.logits(rows), rtol=1e-3, atol=1e-3)
        assert sorted(member.weights()) == sorted(network.weights())


@each_device
@pytest.mark.parametrize("case", [{}, {"hidden": (24, 16), "loss": "softmax"}, {"host_memory": "all"}], ids=str)
def test_together_in_bfloat16(store: Store, device: str, case: dict[str, Any]) -> None:
    """One step is the same as far as bfloat16 goes; later ones part, for optimisers divide by small gradients."""
    pair = Pair(store, device, precision="bfloat16", **case)
    for step in range(5):
        for ours, theirs in zip(pair.step_batched(step), pair.step_single(step), strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=0.02)
        if step == 0:
            differences = {n: d for n, d in pair.differences().items() if not n.startswith("weights.")}
            assert max(differences.values()) < 0.03, differences  # means are gradients here


@pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(),
    reason="Triton is not installed, or a GPU is there for its kernels",
)
@pytest.mark.parametrize("case", [{"hidden": (24, 16)}, {"loss": "softmax", "n_heads": 2}, {"hidden": ()}], ids=str)
def test_together_by_kernels_in_the_interpreter(store: Store, case: dict[str, Any]) -> None:
    pair = Pair(store, **case)
    pair.together.kernels = import_module("mach.networks.kernels.triton_batched")
    for ours, theirs in zip(pair.step_batched(0), pair.step_single(0), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    assert max(pair.differences().values()) < 2e-3, pair.differences()


@each_device
def test_main_memory_holds_what_a_device_would(store: Store, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, rows handed over from batch to batch and moments in pieces that do not divide the weights."""
    monkeypatch.setattr(offload, "PIECE", 100)
    options: dict[str, Any] = {"hidden": (24, 16), "precision": "bfloat16"}
    resident, streamed, everything = (Pair(store, device, host_memory=h, **options) for h in ("none", "input", "all"))
    for step in range(5):
        assert resident.step_batched(step) == streamed.step_batched(step) == everything.step_batched(step)
        if step == 3:  # between steps, while the next batch is on its way
            rows = read_batch(store, resident.order[:9])
            assert torch.equal(resident.members[2].logits(rows), streamed.members[2].logits(rows))
    for others in (streamed, everything):
        for mine, theirs in zip(resident.members, others.members, strict=True):
            for name, array in mine.state().items():
                np.testing.assert_array_equal(array, theirs.state()[name], err_msg=name)


@each_device
def test_a_repetition_goes_on_elsewhere(store: Store, device: str) -> None:
    """From together to alone and back: as far as rounding goes, it is as if it had never moved."""
    pair = Pair(store, device)
    for step in range(3):
        pair.step_batched(step)
        pair.step_single(step)
    moved = [pair.network(seed) for seed in range(R)]
    for network, member in zip(moved, pair.members, strict=True):
        network.load_state({name: np.array(array) for name, array in member.state().items()})
        assert network.n_steps == 3
    alone, pair.networks = pair.networks, moved
    for step in range(3, 5):
        pair.step_single(step)
    pair.together = pair.batched(pair.networks)
    pair.networks = alone
    for step in range(3, 5):
        pair.step_single(step)
    for step in range(5, 7):
        pair.step_batched(step)
        pair.step_single(step)
    assert max(pair.differences().values()) < 2e-3


@pytest.mark.parametrize("is_resident", [True, False])
def test_powers_of_features_are_those_of_a_single_network(store: Store, is_resident: bool) -> None:
    pair = Pair(store, power=2.0, is_resident=is_resident)
    for step in range(4):
        pair.step_batched(step)
        pair.step_single(step)
    assert max(pair.differences().values()) < 2e-3


def test_a_device_without_enough_memory_says_what_to_do(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    pair = Pair(store)
    monkeypatch.setattr(reference, "sparse_forward", fail)
    with pytest.raises(
        ConfigError, match=r"memory to train 3 repetitions together: set launch.shard below 3, or a smaller"
    ):
        pair.step_batched(0)


@pytest.mark.parametrize("case", [{"hidden": (64, 48)}, {"hidden": (), "n_heads": 4}], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("host_memory", ["none", "input", "all"])
def test_the_ledger_counts_what_stays_on_a_device(
    store: Store, case: dict[str, Any], precision: str, host_memory: HostMemory
) -> None:
    """Tensors there, and with them the largest gradient, against the formula for batches without rows."""
    pair = Pair(store, precision=precision, host_memory=host_memory, **case)
    together, whole = pair.together, [pair.together.weight_DW, pair.together.square_DR]
    tensors = [*together.half.values(), *(whole if host_memory == "none" else [])]
    tensors += [
        t
        for n, t in together.tensors.items()
        if host_memory != "all" or n.startswith("weights.") or not n.endswith(".weight")
    ]
    shape: dict[str, Any] = {"hidden": case["hidden"], "n_heads": case.get("n_heads", 1)}
    counted = Ledger(store.n_classes, store.n_features, B, R, **shape)
    options: dict[str, Any] = {"number_bytes": together.dtype.itemsize, "host_memory": host_memory}
    ours = counted.device_bytes(R, 0, **options) - counted.device_bytes(0, 0, **options)
    gradients = R * together.dtype.itemsize * (counted.n_hidden + counted.n_output)
    n_bytes = sum(tensor.nbytes for tensor in tensors) + gradients
    assert 0.9 * n_bytes - 20_000 <= ours <= 1.1 * n_bytes


@each_device
@pytest.mark.parametrize("host_memory", ["none", "input", "all"])
@pytest.mark.parametrize("hidden", [(24,), ()])
def test_batches_of_rows_without_features_or_classes(
    store: Store, device: str, host_memory: HostMemory, hidden: tuple[int, ...]
) -> None:
    """Between ordinary ones; only biases learn from the former."""
    pair = Pair(store, device, host_memory=host_memory, hidden=hidden)
    bare: Any = SimpleNamespace(is_dense=False, n_rows=store.n_rows, n_classes=store.n_classes, n_nonzeros=0)
    bare.feature_indptr = bare.class_indptr = np.zeros(store.n_rows + 1, np.int64)
    for name in ("feature_indices", "feature_values", "class_ids"):
        setattr(bare, name, getattr(store, name))
    bare_feed = Feed(bare, pair.together.device, RowView(), pair.together.host)
    for step in range(5):
        feed, pair.store = (bare_feed, bare) if step in {1, 2} else (pair.feed, store)
        pair.together.step(feed.batch(pair.rows(step)), 0.01)
        pair.step_single(step)
    assert max(pair.differences().values()) < 2e-3, pair.differences()


@each_device
@pytest.mark.parametrize("is_table", [False, True])
def test_buckets_on_a_device_are_those_of_the_assignment(device: str, is_table: bool) -> None:
    universal, classes = UniversalAssignment.draw(n_classes=700, n_buckets=B, n_repetitions=5, seed=3), [3, 699, 0, 3]
    table = TableAssignment.from_table(np.random.default_rng(5).integers(0, B, (5, 700)), B)
    assignment: Assignment = table if is_table else universal
    buckets = buckets_on(torch.device(device), [assignment.select([0, 1]), assignment.select([4, 2])])
    found_FM = buckets(torch.tensor(classes, device=device)).cpu().numpy()
    np.testing.assert_array_equal(found_FM, assignment.select([0, 1, 4, 2]).buckets(classes))


def test_keys_are_those_of_numpy() -> None:
    seeds = np.array([0, 1, 2**32 - 1, 123456789], np.uint32)
    steps = np.array([0, 1, 7, 10**6, 2**32 - 1], np.uint32)
    expected = [[np.random.SeedSequence([int(s), int(t)]).generate_state(1)[0] for s in seeds] for t in steps]
    np.testing.assert_array_equal(step_keys(seeds, steps), expected)


def test_what_can_be_batched() -> None:
    assert can_be_batched(NetworkConfig(), dense_input=False)
    assert not can_be_batched(NetworkConfig(), dense_input=True)
    assert not can_be_batched(NetworkConfig(trunk="a:B"), dense_input=False)


def test_where_the_store_is(store: Store, tmp_path: Path) -> None:
    """Both kinds of feed give the same batches, whether or not they were announced."""
    device = torch.device("cpu")
    feeds = [Feed(store, device, RowView(), is_resident=kind) for kind in (True, False)]
    rows = np.array([5, 0, 77, 5])
    feeds[1].batch(rows, rows[:2])
    batches = [feed.batch(rows[:2]) for feed in feeds]
    for name in ("indptr_N1", "slots", "values", "offsets_N1", "classes_M"):
        assert torch.equal(*(getattr(batch, name) for batch in batches)), name
    unannounced = feeds[1].batch(rows, rows[::-1])
    assert torch.equal(unannounced.classes_M, feeds[0].batch(rows).classes_M)
    for feed in feeds:
        feed.close()
