"""Counts of rows by their features and class against Python's own, and what a table does when it is full or damaged."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.reranking.kernels.repeats import LOAD, count_rows, counts_of

ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), max_size=4, unique=True),  # features
        st.lists(st.integers(0, 3), max_size=3, unique=True),  # classes
    ),
    max_size=30,
)


def csr(lists):
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    return indptr, np.array([j for row in lists for j in row], np.int32)


def features_of(lists):
    indptr, indices = csr(lists)
    return indptr, indices, np.linspace(0.5, 1.5, len(indices)).astype(np.float32)


def counted(features, classes, n_slots: int):
    class_indptr, class_ids = classes
    return count_rows(features, class_indptr, class_ids, np.arange(len(class_indptr) - 1), n_slots)


def looked_up(table, rows, ids_NC):
    counts_NC, totals_N = np.empty(ids_NC.shape, np.uint8), np.empty(len(ids_NC), np.uint8)
    counts_of(table, rows, ids_NC, counts_NC, totals_N)
    return counts_NC, totals_N


@settings(max_examples=100)
@given(ROWS, st.randoms())
def test_counts_are_those_of_a_dictionary(rows, random):
    pairs = Counter((frozenset(features), k) for features, classes in rows for k in classes)
    totals = Counter(frozenset(features) for features, _ in rows)
    n_most = len(rows) + sum(len(classes) for _, classes in rows)
    features, classes = features_of([row[0] for row in rows]), csr([row[1] for row in rows])
    table, n_entries = counted(features, classes, int(n_most / LOAD) + 2)
    assert n_entries == len(pairs) + len(totals)
    queries = [random.sample(features, len(features)) for features, _ in rows] + [[0, 1, 2, 3, 4, 5], []]
    ids_NC = np.tile(np.array([3, 0, -1, 2, 1]), (len(queries), 1))
    counts_NC, totals_N = looked_up(table, features_of(queries), ids_NC)
    assert totals_N.tolist() == [totals[frozenset(query)] for query in queries]
    expected = [
        [pairs[frozenset(query), int(k)] if k >= 0 else 0 for k in ids]
        for query, ids in zip(queries, ids_NC, strict=True)
    ]
    assert counts_NC.tolist() == expected


def test_values_of_zero_are_no_features_and_other_rows_are_not_counted():
    rows = (np.array([0, 2, 4]), np.array([1, 3, 1, 2], np.int32), np.array([1, 0, 2, 1], np.float32))
    table, n_entries = count_rows(rows, np.array([0, 1, 2]), np.array([7, 8], np.int32), np.array([0]), 5)
    assert n_entries == 2
    query = (np.array([0, 1]), np.array([1], np.int32), np.array([0.1], np.float32))
    counts_NC, totals_N = looked_up(table, query, np.array([[7, 8]]))
    assert (counts_NC.tolist(), totals_N.tolist()) == ([[1, 0]], [1])


def test_counts_end_at_255_and_a_table_that_is_too_small_drops_the_last():
    alike = features_of([[1]] * 300)
    classes = csr([[0]] * 300)
    table, _ = counted(alike, classes, 4)
    assert looked_up(table, features_of([[1]]), np.array([[0]]))[0].tolist() == [[255]]
    table, n_entries = counted(features_of([[1], [2], [3]]), csr([[0], [1], [2]]), 4)
    assert n_entries == 3
    counts_NC, totals_N = looked_up(table, features_of([[1], [2], [3]]), np.array([[0, 1, 2]] * 3))
    assert totals_N.tolist() == [1, 1, 0]
    assert counts_NC.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_a_table_without_a_free_slot_is_searched_once_round():
    damaged = np.full(8, 1, np.uint32)
    counts_NC, _ = looked_up(damaged, features_of([[1], [2]]), np.array([[0, 1, 2]] * 2))
    assert counts_NC.max() <= 1


def test_a_count_that_is_another_entrys_is_no_larger_than_all_rows_alike():
    n_slots = 50_000
    table, _ = counted(features_of([[1]]), csr([[0]]), n_slots)
    is_own = table != 0
    generator = np.random.default_rng(0)
    full = (generator.integers(0, 2**24, n_slots, dtype=np.uint32) << np.uint32(8)) + np.uint32(255)
    free = generator.random(n_slots) < 0.02
    damaged = np.where(is_own, table, np.where(free, 0, full)).astype(np.uint32)
    counts_NC, totals_N = looked_up(damaged, features_of([[1]]), np.arange(200_000)[None])
    assert counts_NC.max() <= totals_N[0]


def test_few_of_many_looks_find_what_is_not_there():
    generator = np.random.default_rng(0)
    rows = features_of(generator.integers(0, 10**6, (20_000, 3)).tolist())
    table, _ = counted(rows, csr(generator.integers(0, 10**6, (20_000, 1)).tolist()), 50_000)
    others = generator.integers(0, 10**6, (20_000, 100))
    assert looked_up(table, rows, others)[0].sum() <= 5  # two million looks, most of them at taken slots
