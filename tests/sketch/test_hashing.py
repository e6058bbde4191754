import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.errors import ConfigError, StorageError
from mach.sketch.hashing import (
    MAX_CAPACITY,
    Assignment,
    UniversalAssignment,
    meeting_distances,
    smallest_prime_at_least,
)
from mach.sketch.tables import TableAssignment, extends, from_description, grown


def universal(n_classes: int, n_buckets: int, n_repetitions: int, seed: int) -> Assignment:
    return UniversalAssignment.draw(
        n_classes=n_classes, n_buckets=n_buckets, n_repetitions=n_repetitions, seed=seed, capacity=n_classes + seed % 99
    )


def table(n_classes: int, n_buckets: int, n_repetitions: int, seed: int) -> Assignment:
    table_RK = np.random.default_rng(seed).integers(0, n_buckets, (n_repetitions, n_classes))
    return TableAssignment.from_table(table_RK, n_buckets)


def members_of(assignment: Assignment, r: int, b: int) -> np.ndarray:
    """Ascending: an implicit progression modulo p, or a part of a list."""
    index = assignment.index
    if index.is_table:
        return index.members_RK[r, index.firsts_RB1[r, b] : index.firsts_RB1[r, b + 1]]
    images = np.arange(b, index.prime, index.n_buckets)
    classes = (images - index.offsets_R[r]) % index.prime * index.inverses_R[r] % index.prime
    return np.sort(classes[classes < assignment.n_classes])


shapes = st.tuples(st.integers(1, 400), st.integers(2, 300), st.integers(1, 4), st.integers(0, 10_000))


@pytest.mark.parametrize("make", [universal, table])
class TestEveryAssignment:
    @given(shape=shapes)
    @settings(max_examples=40)
    def test_buckets_and_members_are_inverse(self, make, shape):
        """The members of a bucket as the decoder lists them."""
        assignment = make(*shape)
        K, B, R = assignment.n_classes, assignment.n_buckets, assignment.n_repetitions
        assert shape[:3] == (K, B, R)
        buckets_RK = assignment.buckets(np.arange(K))
        assert buckets_RK.shape == (R, K)
        assert buckets_RK.dtype == np.int32
        assert buckets_RK.min() >= 0
        assert buckets_RK.max() < B
        for r in range(R):
            for b in range(B):
                assert np.array_equal(members_of(assignment, r, b), np.flatnonzero(buckets_RK[r] == b))

    def test_select_reorders_repetitions(self, make):
        assignment = make(50, 7, 4, 3)
        chosen = assignment.select([2, 0])
        classes = np.arange(50)
        assert np.array_equal(chosen.buckets(classes), assignment.buckets(classes)[[2, 0]])

    def test_description_survives_json(self, make):
        assignment = make(50, 7, 4, 3)
        description = json.loads(json.dumps(assignment.describe()))
        again = from_description(description, getattr(assignment, "table_RK", None))
        assert type(again) is type(assignment)
        assert np.array_equal(again.buckets(np.arange(50)), assignment.buckets(np.arange(50)))

    def test_damage_is_detected(self, make):
        assignment = make(50, 7, 4, 3)
        description = assignment.describe()
        table_RK = getattr(assignment, "table_RK", None)
        if table_RK is None:
            description["offsets"][2] = (description["offsets"][2] + 1) % description["prime"]
        else:
            table_RK = table_RK.copy()
            table_RK[3, 49] = (table_RK[3, 49] + 1) % 7
        with pytest.raises(StorageError, match="checksum"):
            from_description(description, table_RK)


def test_golden_values():
    assignment = UniversalAssignment.draw(n_classes=1000, n_buckets=16, n_repetitions=3, seed=7)
    assert assignment.prime == 1009
    assert assignment.buckets([0, 1, 2, 500, 999]).tolist() == [
        [9, 15, 5, 12, 9],
        [14, 6, 14, 2, 14],
        [11, 2, 9, 13, 7],
    ]
    assert assignment.checksum() == "003247536ac28343484f069c45d042e9"
    assert TableAssignment.from_table([[0, 1, 2], [2, 0, 1]], 3).checksum() == "e58dc6bb529f817ec4cc9333220532fc"


@given(st.integers(2, 5000), st.integers(2, 500), st.integers(0, 1000))
@settings(max_examples=40)
def test_universal_buckets_are_balanced(n_classes, n_buckets, seed):
    assignment = UniversalAssignment.draw(n_classes=n_classes, n_buckets=n_buckets, n_repetitions=1, seed=seed)
    counts_B = np.bincount(assignment.buckets(np.arange(n_classes))[0], minlength=n_buckets)
    assert counts_B.max() <= -(-assignment.prime // n_buckets)


def test_universal_pairs_collide_at_most_as_often_as_promised():
    n_buckets, n_draws = 8, 800
    assignment = UniversalAssignment.draw(n_classes=1009, n_buckets=n_buckets, n_repetitions=n_draws, seed=5)
    buckets_RN = assignment.buckets([0, 1, 2, 8, 16, 504, 505, 1008])
    for i in range(8):
        for j in range(i):
            rate = np.mean(buckets_RN[:, i] == buckets_RN[:, j])
            assert rate <= 1 / n_buckets + 4 * np.sqrt(1 / n_buckets / n_draws)  # four standard errors


def test_raising_repetitions_appends():
    few, many = (
        UniversalAssignment.draw(n_classes=99, n_buckets=9, n_repetitions=R, seed=4).buckets(np.arange(99))
        for R in (2, 5)
    )
    assert np.array_equal(many[:2], few)
    assert len({row.tobytes() for row in many}) == 5


@given(st.integers(2**20, MAX_CAPACITY), st.integers(2, 2**20), st.data())
@settings(max_examples=40)
def test_large_capacities_are_exact(n_classes, n_buckets, data):
    assignment = UniversalAssignment.draw(n_classes=n_classes, n_buckets=n_buckets, n_repetitions=2, seed=0)
    k = data.draw(st.integers(0, n_classes - 1))
    classes = [k, n_classes - 1]
    for r in range(2):
        a, b = int(assignment.multipliers_R[r]), int(assignment.offsets_R[r])
        expected = [(a * c + b) % assignment.prime % n_buckets for c in classes]
        assert assignment.buckets(classes)[r].tolist() == expected


@pytest.mark.parametrize(
    ("n", "prime"), [(1, 2), (8, 11), (25, 29), (2**31 - 20, 2**31 - 19), (2**31 - 1, 2**31 - 1), (561, 563)]
)
def test_smallest_prime(n, prime):
    assert smallest_prime_at_least(n) == prime


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_classes": 0}, "n_classes 0"),
        ({"capacity": 5}, "capacity 5"),
        ({"capacity": MAX_CAPACITY + 1}, str(MAX_CAPACITY)),
        ({"n_classes": 2**31}, str(MAX_CAPACITY)),
        ({"n_buckets": 1}, "n_buckets 1"),
        ({"n_buckets": 10**30}, "must be 2 to"),
        ({"n_repetitions": 0}, "n_repetitions 0"),
    ],
)
def test_impossible_draws(change, message):
    with pytest.raises(ConfigError, match=message):
        UniversalAssignment.draw(**{"n_classes": 10, "n_buckets": 4, "n_repetitions": 1, "seed": 0, **change})


@pytest.mark.parametrize("make", [universal, table])
@pytest.mark.parametrize("wrong", [None, "7", 7.0, True, [1.5], -1, 2**70])
def test_a_damaged_description_is_one_line(make, wrong):
    assignment = make(50, 7, 4, 3)
    for name in assignment.describe():
        description = {**assignment.describe(), name: wrong}
        if wrong is None:
            del description[name]
        if name != "n_classes" or make is universal:  # a table knows K itself
            with pytest.raises(StorageError, match=r"\A.+\Z"):
                from_description(description, getattr(assignment, "table_RK", None))


def test_a_description_that_does_not_fit_together():
    description = UniversalAssignment.draw(n_classes=50, n_buckets=7, n_repetitions=3, seed=0).describe()
    for change in ({"offsets": [1, 2]}, {"prime": 47}, {"prime": 2**31 + 11}, {"multipliers": [[1], [2], [3]]}):
        with pytest.raises(
            StorageError, match="assignment: prime|50 classes, 7 buckets, prime|assignment: multipliers"
        ):
            from_description({**description, **change})
    with pytest.raises(StorageError, match="places class 1 in bucket 2"):
        from_description({**TableAssignment.from_table([[0, 2]], 3).describe(), "n_buckets": 2}, [[0, 2]])


@pytest.mark.parametrize("make", [universal, table])
def test_an_assignment_extends_its_first_repetitions_only(make):
    longer = make(50, 7, 4, 3)
    assert all(extends(longer, longer.select(list(range(n)))) for n in (1, 3, 4))
    assert not extends(longer.select([0, 1]), longer)
    assert not extends(longer, longer.select([1]))
    assert not extends(longer, longer.select([0, 2]))
    assert not extends(longer, make(49, 7, 2, 3))
    assert not extends(longer, make(50, 8, 2, 3))


def test_other_constants_do_not_extend():
    a_R, b_R = np.array([5, 9, 11]), np.array([1, 2, 3])
    longer = UniversalAssignment(50, 7, 53, a_R, b_R)
    assert extends(longer, UniversalAssignment(50, 7, 53, a_R[:2], b_R[:2]))
    assert not extends(longer, UniversalAssignment(50, 7, 59, a_R[:2], b_R[:2]))
    assert not extends(longer, UniversalAssignment(50, 7, 53, a_R[:2] + 1, b_R[:2]))
    assert not extends(longer, UniversalAssignment(50, 7, 53, a_R[:2], b_R[:2] + 1))
    assert not extends(longer, TableAssignment.from_table(longer.buckets(np.arange(50)), 7))


def test_impossible_tables():
    with pytest.raises(ConfigError, match="repetition 1 places class 0 in bucket 4"):
        TableAssignment.from_table([[0, 1], [4, 0]], 4)
    with pytest.raises(ConfigError, match="shape"):
        TableAssignment.from_table([0, 1], 4)
    with pytest.raises(StorageError, match="family"):
        from_description({"family": "cuckoo"})
    with pytest.raises(StorageError, match="missing"):
        from_description(TableAssignment.from_table([[0]], 2).describe())


@given(n_known=st.integers(2, 40), n_new=st.integers(0, 40), seed=st.integers(0, 99))
@settings(deadline=None)
def test_new_classes_take_the_less_loaded_of_two_buckets_and_old_ones_stay(n_known, n_new, seed):
    known, n_classes = table(n_known, 7, 2, seed), n_known + n_new
    counts_K = np.random.default_rng(seed).integers(0, 9, n_classes)
    buckets_RK = grown(known, counts_K, seed).buckets(np.arange(n_classes))
    np.testing.assert_array_equal(buckets_RK[:, :n_known], known.buckets(np.arange(n_known)))
    for r, buckets_K in enumerate(buckets_RK):
        choices_KC = np.random.default_rng([seed, r, n_known]).integers(0, 7, (n_classes, 2), np.int32)
        loads_B = np.zeros(7, int)
        for k in [*range(n_known), *sorted(range(n_known, n_classes), key=lambda k: -counts_K[k])]:
            assert k < n_known or buckets_K[k] == min(choices_KC[k], key=lambda b: loads_B[b])  # first of equals
            loads_B[buckets_K[k]] += max(1, counts_K[k])


def test_hash_functions_go_on_while_their_prime_has_room():
    known = universal(50, 7, 3, 8)  # has room for 58, hence p = 59
    more = grown(known, np.ones(59, int), 0)
    assert isinstance(more, UniversalAssignment)
    np.testing.assert_array_equal(more.buckets(np.arange(50)), known.buckets(np.arange(50)))
    assert isinstance(grown(known, np.ones(60, int), 0), TableAssignment)


@pytest.mark.parametrize(
    ("n_classes", "n_buckets", "n_repetitions"), [(26296, 1024, 8), (5000, 512, 6), (100003, 2048, 4)]
)
def test_no_two_classes_share_buckets_in_two_repetitions(n_classes, n_buckets, n_repetitions):
    """Independent random buckets would give K (K - 1) / 2 B^2 such pairs: hundreds in each pair of repetitions."""
    for seed in range(3):
        assignment = UniversalAssignment.draw(
            n_classes=n_classes, n_buckets=n_buckets, n_repetitions=n_repetitions, seed=seed
        )
        buckets_RK = assignment.buckets(np.arange(n_classes)).astype(np.int64)
        for r in range(n_repetitions):
            for s in range(r):
                assert len(np.unique(buckets_RK[r] * n_buckets + buckets_RK[s])) == n_classes


@given(st.integers(3, 400), st.integers(2, 60), st.integers(0, 100))
def test_meeting_distances_are_those_at_which_classes_meet(n_classes, n_buckets, seed):
    assignment = UniversalAssignment.draw(n_classes=n_classes, n_buckets=n_buckets, n_repetitions=1, seed=seed)
    p = assignment.prime
    everything = UniversalAssignment(p, n_buckets, p, assignment.multipliers_R, assignment.offsets_R)
    buckets = everything.buckets(np.arange(p))[0]
    shares = meeting_distances(int(assignment.multipliers_R[0]), p, n_buckets)
    for distance in range(1, p // 2 + 1):
        met = (buckets == np.roll(buckets, -distance)).mean()
        assert met == pytest.approx(shares.get(distance, 0.0), abs=1e-9)
