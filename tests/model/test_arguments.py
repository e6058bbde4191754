"""What Python callers pass: one clear error or the obvious answer; a model travels between processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import csr_array

import mach
from mach.errors import ConfigError, DataError, DegradedWarning, MachError
from mach.model.model import MachModel
from tests.conftest import N_CLASSES, N_FEATURES


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> MachModel:
    """A small model of texts."""
    folder = tmp_path_factory.mktemp("worded")
    (folder / "t.csv").write_text("text,classes\n" + 20 * "green apple,apple\nlong banana,banana\nred cherry,cherry\n")
    tree = {
        "data": {"train": str(folder / "t.csv"), "cache": str(folder), "validation_fraction": 0.0},
        "hashing": {"repetitions": 2, "buckets": 3, "heads": 1},
        "network": {"hidden": [8]},
        "training": {"epochs": 2},
        "reranking": {"candidates": 0},
    }
    return mach.train(tree, folder / "run", launcher="here")


def rows_of(n: int = 2) -> np.ndarray:
    return np.eye(n, N_FEATURES, dtype=np.float32)


@pytest.mark.parametrize("k", [0, -1, 1.5, "3", float("nan"), 10**30, True, [3], np.float32(2)])
def test_k_is_a_whole_number(model: MachModel, k):
    for ask in (
        model.topk,
        model.search,
        lambda q, k: similar(model, k),
    ):
        with pytest.raises(ConfigError, match=r"^k .*: need a whole number of at least 1$"):
            ask(rows_of(), k)


def similar(model: MachModel, k):
    return model.classes.similar(3, k)


def test_by_default_there_are_ten_or_all(model: MachModel, worded: MachModel):
    assert model.topk(rows_of())[0].shape == model.search(rows_of()).ids_Nk.shape == (2, 10)
    assert sorted(worded.topk("green apple")[0].tolist()) == [0, 1, 2]
    three: Any = np.int8(3)
    assert model.topk(rows_of(), three)[0].shape == (2, 3)
    for k in (N_CLASSES, N_CLASSES + 1, 2**40):  # all there are, as a server and the estimator answer
        assert model.topk(rows_of(), k)[0].shape == (2, N_CLASSES)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 1.5},
        {"budget": -1},
        {"budget": "3"},
        {"budget": 10**30},
        {"tail": "x"},
        {"tail": float("nan")},
        {"tail": -1.0},
        {"tail": None},
        {"tail": True},
        {"repetitions": 1.5},
        {"repetitions": 0},
        {"repetitions": 9},
        {"rerank": "no"},
        {"allowed": [1.5]},
        {"allowed": [10**30]},
        {"allowed": [-1]},
        {"allowed": [N_CLASSES]},
        {"allowed": "no such subset"},
        {"allowed": object()},
    ],
)
def test_options_of_a_wrong_type_or_range_are_one_line(model: MachModel, options: dict):
    [name] = options
    with pytest.raises(MachError) as caught:
        model.topk(rows_of(), 2, **options)
    told = str(caught.value)
    assert name in told or (name == "allowed" and ("class" in told or "subset" in told))
    assert "\n" not in told


@pytest.mark.parametrize(
    "queries",
    [
        None,
        [],
        np.empty(0, object),
        np.empty((0, N_FEATURES)),
        csr_array((0, N_FEATURES)),
        [[]],
        5,
        float("nan"),
        {"a": 1},
        b"abc",
        object(),
        iter(["a"]),
        [["a"], [1]],
        ["a", None],
        ["a", 3],
        [3, "a"],
        [10**400, 1],
        np.full((1, N_FEATURES), 1j),
        np.zeros((1, N_FEATURES), "datetime64[D]"),
        np.zeros((1, N_FEATURES), dtype=[("a", "f4")]),
        np.full((1, N_FEATURES), np.nan),
        np.zeros((1, 1, N_FEATURES)),
        csr_array(np.full((1, N_FEATURES), 1j)),
        pa.array(["a", None]),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_query_is_refused_in_one_line(model: MachModel, worded: MachModel, queries):
    for asked in (model, worded):
        for ask in (asked.topk, asked.search, lambda q, asked=asked: asked.score(q, [0])):
            with pytest.raises(DataError, match=r"^(quer|there are no queries|this model was trained on)[^\n]*$"):
                ask(queries)


def damaged(**arrays) -> csr_array:
    rows = csr_array(np.eye(3, N_FEATURES, dtype=np.float32))
    for name, array in arrays.items():
        setattr(rows, name, np.array(array, getattr(rows, name).dtype))
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        damaged(indptr=[0, 2, 1, 3]),
        damaged(indptr=[1, 1, 2, 3]),
        damaged(indptr=[0, 1, 2, 9]),
        damaged(indptr=[0, 1, 3]),
        damaged(indptr=[0, -1, 2, 3]),
        damaged(data=[1.0]),
        damaged(indices=[0, 1, N_FEATURES]),
        damaged(indices=[0, 1, -1]),
    ],
)
def test_a_damaged_matrix_is_refused(model: MachModel, rows: csr_array):
    with pytest.raises(DataError, match=r"^queries (are no sound CSR matrix|hold features)"):
        model.topk(rows, 2)


class Column:
    """As pandas and Polars hold texts or numbers."""

    def __init__(self, values) -> None:
        self.values = values

    def to_numpy(self):
        return np.array(self.values)


def test_columns_and_arrow_arrays_are_their_texts(worded: MachModel, model: MachModel):
    texts = ["green apple", "long banana"]
    expected = worded.topk(texts, 2)
    for given in (
        Column(texts),
        pa.array(texts),
        pa.chunked_array([texts[:1], texts[1:]]),
        np.array(texts),
        tuple(texts),
    ):
        for found, wanted in zip(worded.topk(given, 2), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(model.topk(Column(rows_of()), 2)[0], model.topk(rows_of(), 2)[0])
    exact = [[Fraction(value) for value in row.tolist()] for row in rows_of()]
    np.testing.assert_array_equal(model.topk(exact, 2)[0], model.topk(rows_of(), 2)[0])


class Stream:
    """Rows that can be had as Arrow's stream alone, as of DuckDB; a reader gives them once."""

    def __init__(self, table) -> None:
        self.reader = table.to_reader()

    def __arrow_c_stream__(self, requested_schema=None):
        return self.reader.__arrow_c_stream__(requested_schema)


class ColumnStream:
    """One column of the kind."""

    def __init__(self, array) -> None:
        self.array = array

    def __arrow_c_stream__(self, requested_schema=None):
        return self.array.__arrow_c_stream__(requested_schema)


def test_whatever_streams_arrow_is_a_table_or_column(worded: MachModel, model: MachModel):
    texts = ["green apple", "long banana"]
    expected = worded.topk(texts, 2)[0]
    for given in (
        Stream(pa.table({"some": texts})),
        Stream(pa.table({"id": [7, 8], "text": texts})),
        pa.table({"text": texts, "more": ["x", "y"]}),
        ColumnStream(pa.chunked_array([texts])),
    ):
        np.testing.assert_array_equal(worded.topk(given, 2)[0], expected)
    one = worded.topk(Stream(pa.table({"text": texts[:1]})), 2)[0]
    assert one.shape == (1, 2), "a table of one row is no single query"
    numbers = pa.table({str(d): column for d, column in enumerate(rows_of().T)})
    np.testing.assert_array_equal(model.topk(Stream(numbers), 2)[0], model.topk(rows_of(), 2)[0])
    np.testing.assert_array_equal(model.topk(numbers, 2)[0], model.topk(rows_of(), 2)[0])
    with pytest.raises(DataError, match=r"no column 'text': did you mean texts\?; there are texts, b"):
        worded.topk(pa.table({"texts": texts, "b": texts}), 2)
    with pytest.raises(DataError, match="row 1 is None, no text"):
        worded.topk(pa.table({"text": ["a", None]}), 2)


@pytest.mark.parametrize("ids", [[1.5], "x", None, [10**30], [-5], [N_CLASSES], [None]])
def test_ids_that_are_none_have_no_names_and_no_scores(model: MachModel, ids):
    with pytest.raises(DataError, match=r"^(ids|class|id) "):
        model.names(ids)
    with pytest.raises(DataError, match=r"^(ids|id) "):
        model.score(rows_of(), ids)


def test_edits_of_no_class_are_refused(model: MachModel):
    editor: Any = model.classes
    error = pytest.raises(DataError, match=r"^(there|\d+ classes to rename|class|names)")
    for edit in (
        lambda: editor.similar([]),
        lambda: editor.rename([], "x"),
        lambda: editor.rename([1, 2], "x"),
        lambda: editor.remove([]),
        lambda: editor.add([]),
        lambda: editor.upvote([], []),
        lambda: editor.associate([], []),
    ):
        with error:
            edit()


@pytest.mark.parametrize("chosen", [[1.5], "01", [None], [-1], 1.5, [True]])
def test_repetitions_to_load_are_whole_numbers(trained: Path, chosen):
    with pytest.raises(ConfigError, match=r"^repetition .*: need a whole number of at least 0$"):
        mach.load(trained, repetitions=chosen)


@pytest.mark.parametrize("path", [None, 3, 1.5, b"runs"])
def test_a_path_is_a_text_or_a_path(path):
    with pytest.raises(ConfigError, match=r"^path .*: need a text or a path$"):
        mach.load(path)


def test_a_model_travels_as_its_path_repetitions_and_version(trained: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    model = mach.load("run", repetitions=[2, 0])
    model.classes.rename(3, "older")
    packed = pickle.dumps(model)
    assert len(packed) < 2_000
    model.classes.rename(3, "newer")
    monkeypatch.chdir(trained)  # its path is whole
    again = pickle.loads(packed)
    assert again.repetitions == [2, 0]
    assert [*again.names([3]), *model.names([3])] == ["older", "newer"]
    for found, wanted in zip(again.topk(rows_of(3), 5), model.topk(rows_of(3), 5), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_method_is_mapped_over_processes(model: MachModel):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answers = pool.map(model.topk, [rows_of()[:1], rows_of()[1:]])
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in answers]), model.topk(rows_of())[0])


def test_a_model_says_what_it_is(model: MachModel, trained: Path):
    expected = f"<MachModel {re.escape(str(trained))}: {N_CLASSES} classes, 3 of 3 repetitions>"
    assert re.fullmatch(expected, repr(model))
    assert "1 of 3 repetitions" in repr(mach.load(trained, repetitions=[1]))


def test_a_repetition_whose_folder_is_gone_is_told(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/repetitions/r001")
    with pytest.warns(DegradedWarning, match="2 of 3 repetitions answer"):
        assert mach.load(os.fspath(tmp_path / "run")).repetitions == [0, 2]
