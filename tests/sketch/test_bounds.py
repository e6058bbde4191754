import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.errors import ConfigError
from mach.sketch.bounds import plan, repetitions_needed
from mach.sketch.hashing import MAX_CAPACITY, UniversalAssignment
from mach.sketch.ledger import Ledger
from mach.sketch.tables import TableAssignment


@given(st.integers(2, 10**8), st.integers(2, 10**5), st.floats(1e-9, 0.5))
def test_repetitions_needed_is_the_smallest_that_satisfies_the_union_bound(n_classes, n_buckets, delta):
    R = repetitions_needed(n_classes, n_buckets, delta)
    log_failure = [2 * math.log(n_classes) - r * math.log(n_buckets) for r in (R, R - 1)]
    assert log_failure[0] <= math.log(delta) + 1e-9
    assert R == 1 or log_failure[1] > math.log(delta) - 1e-9


def test_repetitions_needed_tells_drawn_pairs_apart():
    R = repetitions_needed(300, 16, delta=0.05)
    failures = 0
    for seed in range(60):
        assignment = UniversalAssignment.draw(n_classes=300, n_buckets=16, n_repetitions=R, seed=seed)
        failures += len(np.unique(assignment.buckets(np.arange(300)), axis=1).T) < 300
    assert failures <= 60 * 0.05 + 4


def test_ledger_by_hand():
    book = Ledger(1000, 50, 16, 3, hidden=(8, 4), nonzeros_per_row=9.6)
    assert (book.n_input, book.n_hidden, book.n_output) == (50 * 8 + 8, 8 * 4 + 4, 4 * 16 + 16)
    assert book.n_parameters == 3 * (408 + 36 + 80)
    assert book.n_one_vs_all_parameters == 408 + 36 + 4 * 1000 + 1000
    assert book.repetition_bytes == 2 * (50 * 8 + 8 * 4 + 4 * 16) + 4 * (8 + 4 + 16)
    assert book.disk_bytes == 3 * book.repetition_bytes
    assert Ledger(1000, 50, 16, 3, (8, 4), weight_bytes=4).disk_bytes == 4 * book.n_parameters
    assert book.training_bytes == 4 * 408 + 14 * (36 + 80)
    assert book.query_flops == 3 * 2 * (10 * 8 + 8 * 4 + 4 * 16)
    assert book.example_flops == 3 * 2 * (2 * 10 * 8 + 3 * (8 * 4 + 4 * 16))
    assert Ledger(1000, 50, 16, 3, (8, 4), nonzeros_per_row=9.6, sampled=0.25).example_flops == 3 * 2 * (
        2 * 10 * 8 + 3 * (8 * 4 + 4 * 4)
    )
    assert book.dense_example_flops == 2 * (2 * 50 * 8 + 3 * (8 * 4 + 4 * 1000))
    assert book.one_vs_all_query_flops == 2 * (10 * 8 + 8 * 4 + 4 * 1000)
    assert Ledger(1000, 50, 16, 3, hidden=(8, 4), dense_input=True).query_flops == 3 * 2 * (50 * 8 + 8 * 4 + 4 * 16)


def test_ledger_of_heads_and_int8():
    book = Ledger(1000, 50, 16, 3, hidden=(8,), n_heads=2, input_bytes=1)
    assert book.n_output == 8 * 32 + 32
    assert book.repetition_bytes == 50 * 8 + 4 * 50 + 2 * 8 * 32 + 4 * (8 + 32)
    assert book.index_bytes == Ledger(1000, 50, 16, 6, hidden=(8,)).index_bytes
    assert plan(26_000, 100, n_heads=4).n_repetitions == 1
    assert Ledger(1000, 50, 16, 3, hidden=(8,), input_bytes=1, dense_input=True).input_weight_bytes == 2
    kept = Ledger(1000, 50, 16, 3, hidden=(8,), n_heads=2, input_bytes=0.3, output_bytes=1)
    assert kept.repetition_bytes == int(0.3 * 50 * 8) + 8 * 51 + 4 * 50 + (8 + 4) * 32 + 4 * (8 + 32)


def test_ledger_of_the_linear_network():
    book = Ledger(1000, 50, 16, 3, hidden=(), nonzeros_per_row=10)
    assert (book.n_input, book.n_hidden, book.n_output) == (50 * 16 + 16, 0, 0)
    assert book.n_one_vs_all_parameters == 50 * 1000 + 1000
    assert book.query_flops == 3 * 2 * 10 * 16
    assert book.example_flops == 2 * book.query_flops


def test_ledger_rows_print_shares_that_add_up():
    rows = {name: (value, unit) for name, value, unit in Ledger(1000, 50, 16, 3, hidden=(8,)).rows()}
    assert sum(rows[f"{layer}"][0] for layer in ("input layer", "hidden layers", "output layer")) == pytest.approx(100)
    assert rows["model on disk"] == (3 * (2 * (50 * 8 + 8 * 16) + 4 * (8 + 16)), "bytes")


def test_rows_print_what_was_assumed():
    rows = plan(1000, 50, hidden=(8, 4), weight_bytes=4, nonzeros_per_row=7).rows()
    assert ("width of hidden layer 2", 4, "") in rows
    assert ("assumed: a stored weight", 4, "bytes") in rows
    assert ("assumed: features in a row", 7, "sparse") in rows
    assert ("assumed: features in a row", 50, "dense") in Ledger(1000, 50, 16, 3, dense_input=True).rows()


@pytest.mark.parametrize(("n_buckets", "n_repetitions"), [(300, 7), (70_000, 3), (16, 1)])
def test_model_bytes_count_the_index_of_the_decoder(n_buckets, n_repetitions):
    K, B, R = 1000, n_buckets, n_repetitions
    universal = UniversalAssignment.draw(n_classes=K, n_buckets=B, n_repetitions=R, seed=0)
    table = TableAssignment.from_table(universal.buckets(np.arange(K)), B)
    for assignment, table_bytes in ((universal, 0), (table, table.table_RK.nbytes)):
        arrays = [value for value in assignment.index if isinstance(value, np.ndarray)]
        arrays = [array for array in arrays if not np.shares_memory(array, table.table_RK)]  # counted on disk
        bytes_at = {array.__array_interface__["data"][0]: array.nbytes for array in arrays if array.size}
        book = Ledger(K, 50, B, R, table_assignment=assignment is table)
        assert book.index_bytes == sum(bytes_at.values())
        assert book.disk_bytes == R * book.repetition_bytes + table_bytes
        assert book.model_bytes == book.disk_bytes + book.index_bytes


def test_ledger_counts_what_torch_counts():
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Linear(50, 8), torch.nn.ReLU(), torch.nn.Linear(8, 16))
    assert Ledger(1000, 50, 16, 1, hidden=(8,)).n_parameters == sum(p.numel() for p in network.parameters())


def test_plan_at_the_measured_point():
    chosen = plan(26_000, 50_000, n_workers=3)
    assert (chosen.n_buckets, chosen.n_repetitions, chosen.n_rounds) == (2048, 4, 2)
    assert chosen.rows()[-1][1] == 2


@given(st.integers(2, 10**7), st.integers(10, 10**5), st.integers(10**6, 10**10), st.booleans())
@settings(max_examples=60)
def test_plan_keeps_its_budget_and_is_the_best_that_does(n_classes, n_features, budget, of_bytes):
    limit = {"memory_bytes": budget} if of_bytes else {"n_parameters": budget}

    def fits(book: Ledger) -> bool:
        return (book.disk_bytes if of_bytes else book.n_parameters) <= budget

    def candidates() -> Iterator[Ledger]:
        start = min(16384, max(64, 2 ** round(math.log2(max(1, n_classes / 16)))))
        for B in [2**i for i in range(1, 15)]:
            if min(64, (n_classes + 1) / 2) <= B <= min(start, n_classes):
                least = max(2, repetitions_needed(n_classes, B))
                yield from (Ledger(n_classes, n_features, B, R) for R in range(least, max(least, 8) + 1))

    allowed = [book for book in candidates() if fits(book)]
    if not allowed:
        with pytest.raises(ConfigError, match=f"^no B and R fit .*{budget}.*$"):
            plan(n_classes, n_features, **limit)
        return
    book = plan(n_classes, n_features, **limit)
    assert fits(book)
    assert book.n_repetitions >= max(2, repetitions_needed(n_classes, book.n_buckets))
    assert all(book.n_buckets * book.n_repetitions >= other.n_buckets * other.n_repetitions for other in allowed)


def test_plan_keeps_what_is_given():
    assert plan(26_000, 100, n_repetitions=1).n_repetitions == 1
    assert plan(26_000, 100, n_buckets=777).n_buckets == 777
    assert plan(26_000, 100, hidden=(), weight_bytes=4).disk_bytes == 4 * 4 * (100 * 2048 + 2048)
    assert plan(26_000, 100, hidden=()).disk_bytes == 4 * (2 * 100 * 2048 + 4 * 2048)


def test_impossible_numbers():
    cases: dict[str, Callable[[], object]] = {
        "delta is 1": lambda: repetitions_needed(10, 4, 1.0),
        "n_buckets is 0": lambda: Ledger(10, 10, 0, 1),
        "n_workers is 0": lambda: plan(10, 10, n_workers=0),
        "takes .* bytes": lambda: plan(10**6, 10**6, memory_bytes=1000),
        "fit 0 bytes": lambda: plan(1000, 10, memory_bytes=0),
        "fit .* 0 parameters": lambda: plan(1000, 10, n_parameters=0, memory_bytes=10**5000),
        "n_buckets is 0: must": lambda: plan(1000, 10, n_buckets=0),
        "n_repetitions is 0": lambda: plan(1000, 10, n_repetitions=0),
        "memory_bytes is inf.*finite": lambda: plan(1000, 10, memory_bytes=math.inf),  # type: ignore[arg-type]
        "n_parameters is nan.*finite": lambda: plan(1000, 10, n_parameters=math.nan),  # type: ignore[arg-type]
        "memory_bytes is -1.*finite": lambda: plan(1000, 10, memory_bytes=-1),
        "nonzeros_per_row is inf": lambda: Ledger(1000, 10, 16, 2, nonzeros_per_row=math.inf),
        f"n_classes is a number of .* at most {MAX_CAPACITY}": lambda: plan(10**400, 10),
        "n_classes is 2147483648": lambda: Ledger(2**31, 10, 16, 2),
        "n_classes is 10{10}:": lambda: repetitions_needed(10**10, 16),
        "n_features is a number": lambda: plan(10, 10**400),
        "n_buckets is a number": lambda: plan(10, 10, n_buckets=10**5000),
        "n_workers is a number": lambda: plan(10, 10, n_workers=10**400),
        "hidden layer 2 is 0": lambda: Ledger(10, 10, 2, 1, hidden=(8, 0)),
    }
    for message, call in cases.items():
        with pytest.raises(ConfigError, match=rf"\A(?=.*{message}).+\Z"):  # on one line
            call()


def test_a_huge_finite_budget_is_no_limit():
    assert plan(MAX_CAPACITY, 1000, memory_bytes=10**5000, n_workers=5).n_rounds == 2
