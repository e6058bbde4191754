"""Readers of numeric formats and of tables against plain Python, and what they say about bad files."""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
import struct
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from mach.data.formats import FORMATS, ROWS
from mach.data.sources import Numbers, Shape
from mach.data.store import Chunk
from mach.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
Row = tuple[list[int], list[tuple[int, Any]]]  # classes, features


def unpack(chunk: Chunk) -> list[Row]:
    assert isinstance(chunk.features, tuple)
    indptr, indices, values = chunk.features
    arrays = (chunk.class_indptr, chunk.class_ids, indptr, indices, values)
    assert [array.dtype.name for array in arrays] == ["int64", "int32", "int64", "int32", "float32"]
    return [
        (
            chunk.class_ids[chunk.class_indptr[n] : chunk.class_indptr[n + 1]].tolist(),
            [(int(i), v) for i, v in zip(indices[begin:end], values[begin:end], strict=True)],
        )
        for n, (begin, end) in enumerate(pairwise(indptr))
    ]


def form(kind: str) -> Numbers:
    found = ROWS if kind == "rows" else FORMATS[kind]
    assert isinstance(found, Numbers)
    return found


def read(path: Path, kind: str = "repository", block_bytes: int = 2**20) -> list[Row]:
    return [row for chunk in form(kind).chunks(path, form(kind).shape(path), block_bytes) for row in unpack(chunk)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


finite = st.floats(width=32, allow_nan=False, allow_infinity=False).map(np.float32)
rows = st.lists(
    st.tuples(
        st.lists(st.integers(0, 29), max_size=4),
        st.dictionaries(st.integers(0, 49), finite, max_size=5).map(lambda d: sorted(d.items())),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(rows=rows, block_bytes=st.integers(1, 60), newline=st.sampled_from(["\n", "\r\n"]), ends=st.booleans())
def test_repository_text_comes_back(tmp_path_factory, rows, block_bytes, newline, ends):
    lines = [
        ",".join(map(str, classes)) + "".join(f" {i}:{float(v)!r}" for i, v in features) for classes, features in rows
    ]
    text = newline.join([f"{len(rows)} 50 30", *lines]) + (newline if ends or not (lines and lines[-1]) else "")
    path = write(tmp_path_factory.mktemp("text") / "rows.txt", text)
    assert read(path, block_bytes=block_bytes) == [(sorted(set(classes)), features) for classes, features in rows]


digits = st.text("0123456789", max_size=24)
decimals = st.builds(
    lambda sign, whole, part, exponent: f"{sign}{whole}{part}{exponent}",
    st.sampled_from(["", "-", "+"]),
    digits.filter(bool),
    st.one_of(st.just(""), st.just("."), digits.map(".{}".format)),
    st.one_of(st.just(""), st.integers(-90, 40).map("e{}".format), st.integers(-20, 20).map("E{:+d}".format)),
)


def halfway(bits: int, nudge: int) -> str:
    """The exact decimal between two neighbours of float32, or one a hair beside it."""
    low, high = (struct.unpack("f", struct.pack("I", b))[0] for b in (bits, bits + 1))
    middle = (Decimal(low) + Decimal(high)) / 2
    return str(middle + nudge * middle.scaleb(-30)) if nudge else str(middle)


borders = st.builds(halfway, st.integers(0, 0x7F7FFFFE), st.integers(-1, 1))
doubles = st.floats(-1e38, 1e38, allow_nan=False).map("{:.17g}".format)


@settings(max_examples=300)
@given(token=st.one_of(decimals, borders, doubles))
def test_a_value_is_that_of_numpy_bit_for_bit(tmp_path_factory, token):
    with np.errstate(over="ignore"):
        expected = np.float32(float(token))
    path = write(tmp_path_factory.mktemp("value") / "rows.txt", f"1 1 1\n0 0:{token}\n")
    if np.isinf(expected):
        with pytest.raises(DataError, match="has no finite float32 value"):
            read(path)
    else:
        [(_, [(_, value)])] = read(path)
        assert value.tobytes() == expected.tobytes()


def test_a_dot_may_stand_at_either_end(tmp_path):
    assert read(write(tmp_path / "rows.txt", "1 3 1\n0 0:.5 1:2. 2:-.25e1\n")) == [([0], [(0, 0.5), (1, 2), (2, -2.5)])]


def test_blank_lines_are_rows_up_to_the_number_of_the_header(tmp_path):
    text = "4 9 9\r\n3,1,3 2:1 \t 4:2\t\r\n\r\n 5:1\n7\n\n \n"
    expected = [([1, 3], [(2, 1), (4, 2)]), ([], []), ([], [(5, 1)]), ([7], [])]
    assert read(write(tmp_path / "rows.txt", text)) == expected


def test_a_line_may_begin_with_a_feature(tmp_path):
    assert read(write(tmp_path / "rows.txt", "1 9 9\n5:1 6:2\n")) == [([], [(5, 1), (6, 2)])]


def test_svmlight_has_comments_query_ids_signs_and_blank_lines(tmp_path):
    text = "# made by hand\n1.0,+3 qid:7 1:0.5 # five\n\n 2:1\n0#\n2 4:1e-3#x\r\n"
    path = write(tmp_path / "rows.svm", text)
    expected = [([1, 3], [(1, 0.5)]), ([], [(2, 1)]), ([0], []), ([2], [(4, np.float32(1e-3))])]
    assert read(path, "svmlight") == expected
    assert read(path, "svmlight", block_bytes=3) == expected
    assert form("svmlight").shape(path) == Shape(None, None, None)


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_text_reads_alike_and_says_when_it_is_cut(tmp_path, ending, compress):
    rng = np.random.default_rng(0)
    text = "500 50 9\n" + "".join(f"{n % 9} {n % 50}:{rng.random()}\n" for n in range(500))
    path = write(tmp_path / f"rows.txt.{ending}", compress(text.encode()))
    assert read(path, block_bytes=100) == read(write(tmp_path / "rows.txt", text))
    write(path, path.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"rows\.txt\.{ending} is damaged or cut short .*: fetch it again"):
        read(path, block_bytes=100)
    write(path, b"no archive at all, whatever the name says")
    with pytest.raises(DataError, match=rf"rows\.txt\.{ending}"):
        read(path)


BAD_REPOSITORY = [
    ("", "is empty: the first line must be N D K"),
    ("0,1 2:1\n", "line 1: '0,1 2:1' is no header of three numbers N D K"),
    ("2 9 -9\n", "line 1: '2 9 -9' is no header"),
    (b"\x00\xff\x7fELF\n", r"line 1: '\x00\\xff\x7fELF' is no header"),
    ("1 9 3000000000\n", "line 1: D = 9 and K = 3000000000 must be at most 2147483647"),
    ("2 9 9\n", "ends at line 1 with 0 rows, its header says N = 2"),
    ("3 9 9\n1 1:1\n1 1:1", "ends at line 3 with 2 rows, its header says N = 3"),
    ("1 9 9\n1 1:1\n1 2:1\n", "line 3: '1' begins a row beyond the N of the header"),
    ("2 9 9\n1 1:1\n9 2:1\n", "line 3: class '9' is outside 0..8: raise K = 9 or correct it"),
    ("1 9 9\n1,99999999999999999999 2:1\n", "line 2: class '99999999999999999999' is outside 0..8"),
    ("1 9 9\n-1 2:1\n", "line 2: class '-1' is no integer from 0"),
    ("1 9 9\n1,cat 2:1\n", "line 2: class 'cat' is no integer from 0"),
    ("1 9 9\n1.0 2:1\n", "line 2: class '1.0' is no integer from 0"),
    ("1 9 9\n1, 2:1\n", "line 2: class '' is no integer from 0"),
    ("1 9 9\n 4 2:1\n", "line 2: feature '4' is not of the form index:value"),
    ("1 9 9\n1 2:1 3\n", "line 2: feature '3' is not of the form index:value"),
    ("1 9 9\n1 2:1 -3:1\n", "line 2: feature '-3:1' is not of the form index:value"),
    ("1 9 9\n1 2:1 9:1\n", "line 2: feature index '9' is outside 0..8: raise D = 9"),
    ("1 9 9\n1 3:1 2:1\n", "line 2: feature index '2' does not ascend: sort each row"),
    ("1 9 9\n1 3:1 3:1\n", "line 2: feature index '3' does not ascend"),
    ("2 9 9\n\n1 3:nan\n", "line 3: feature '3:nan' has no finite float32 value"),
    ("1 9 9\n1 3:-inf\n", "line 2: feature '3:-inf' has no finite float32 value"),
    ("1 9 9\n1 3:1e39\n", "line 2: feature '3:1e39' has no finite float32 value"),
    ("1 9 9\n1 3:340282356779733661637539395458142568448\n", "line 2: feature '3:3402823567797336"),
    ("1 9 9\n1 3:\n", "line 2: feature '3:' has no finite float32 value"),
    ("1 9 9\n1 3:1e\n", "line 2: feature '3:1e' has no finite float32 value"),
    ("1 9 9\n1 3:1.2.3\n", "line 2: feature '3:1.2.3' has no finite float32 value"),
    ("1 9 9\n1 3:1_0\n", "line 2: feature '3:1_0' has no finite float32 value"),
    ("1 9 9\n1 3:0x10\n", "line 2: feature '3:0x10' has no finite float32 value"),
    ("1 9 9\n1 3:" + "x" * 900 + "\n", "line 2: feature '3:xxxxx"),
    (b"1 9 9\n\x8f\x00\x01\xfe\n", r"line 2: class '\\x8f\x00\x01\\xfe' is no integer"),
]


@pytest.mark.parametrize("block_bytes", [2, 2**20])
@pytest.mark.parametrize(("content", "complaint"), BAD_REPOSITORY)
def test_bad_repository_text_is_named(tmp_path, content, complaint, block_bytes):
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(DataError) as caught:
        read(path, block_bytes=block_bytes)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert complaint in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("-1 1:1\n", "line 1: class '-1' is no integer from 0: write k1,k2 and number the classes from 0"),
        ("# one\n\n1.5 1:1\n", "line 3: class '1.5' is no integer"),
        ("1 1:1 3000000000:1\n", "line 1: feature index '3000000000' is outside 0..2147483646"),
        ("1 1:x#2:1\n", "line 1: feature '1:x' has no finite float32 value"),
    ],
)
def test_bad_svmlight_text_is_named(tmp_path, text, complaint):
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "bad.svm", text), "svmlight")
    assert complaint in str(caught.value)


def test_limits_come_from_the_given_shape(tmp_path):
    path = write(tmp_path / "rows.svm", "1 1:1\n3 2:1\n")
    with pytest.raises(DataError, match=r"line 2: class '3' is outside 0\.\.2: raise K = 3"):
        list(form("svmlight").chunks(path, Shape(None, 9, 3)))


def test_rows_without_a_header_are_those_of_standard_input(tmp_path):
    path = write(tmp_path / "copy", "3,1 2:1\n 4:1\n\n5:1 6:2")
    shape = form("rows").shape(path)
    expected = [([1, 3], [(2, 1)]), ([], [(4, 1)]), ([], []), ([], [(5, 1), (6, 2)])]
    assert [row for chunk in form("rows").chunks(path, shape, block_bytes=8) for row in unpack(chunk)] == expected
    with pytest.raises(DataError, match=r"^standard input line 4: feature index '6' is outside 0\.\.5"):
        list(form("rows").chunks(path, Shape(None, 6, 9)))


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nothing\.txt: No such file"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        read(tmp_path)


# --- numpy's files


def save_npz(path: Path, features: csr_array, classes: csr_array, **changes: object) -> Path:
    arrays = {
        f"{name}_{part}": getattr(matrix, part)
        for name, matrix in (("X", features), ("Y", classes))
        for part in ("data", "indices", "indptr", "shape")
    }
    np.savez_compressed(path, **{name: a for name, a in (arrays | changes).items() if a is not None})
    return path


@pytest.fixture
def pair() -> tuple[csr_array, csr_array]:
    rng = np.random.default_rng(1)
    dense = np.where(rng.random((40, 12)) < 0.3, rng.random((40, 12)), 0)
    return csr_array(dense), csr_array((rng.random((40, 5)) < 0.3).astype(np.int8))


@pytest.mark.parametrize("block_bytes", [8, 2**20])
def test_npz_pairs_come_back(tmp_path, pair, block_bytes):
    features, classes = pair
    path = save_npz(tmp_path / "rows.npz", features, classes)
    assert form("npz").shape(path) == (40, 12, 5)
    expected = [
        (
            classes.indices[classes.indptr[n] : classes.indptr[n + 1]].tolist(),
            [
                (features.indices[j], np.float32(features.data[j]))
                for j in range(features.indptr[n], features.indptr[n + 1])
            ],
        )
        for n in range(40)
    ]
    assert read(path, "npz", block_bytes) == expected


@pytest.mark.parametrize("block_bytes", [8, 2**20])
@pytest.mark.parametrize("order", ["C", "F"])
def test_dense_matrices_come_back_with_either_kind_of_classes(tmp_path, pair, block_bytes, order):
    features, classes = pair
    dense = np.asarray(features.todense(), order=order)
    path = tmp_path / "rows.npy"
    np.save(path, dense)
    np.save(tmp_path / "rows.classes.npy", np.arange(40) % 7)
    assert form("npy").shape(path) == (40, 12, None)
    chunks = list(form("npy").chunks(path, Shape(40, 12, None), block_bytes))
    np.testing.assert_array_equal(np.concatenate([c.features for c in chunks]), dense.astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([c.class_ids for c in chunks]), np.arange(40) % 7)
    assert chunks[-1].fraction == 1

    (tmp_path / "rows.classes.npy").unlink()
    save_npz(tmp_path / "rows.classes.npz", features, classes)
    assert form("npy").shape(path) == (40, 12, 5)
    chunks = list(form("npy").chunks(path, Shape(40, 12, 5), block_bytes))
    np.testing.assert_array_equal(np.concatenate([c.class_ids for c in chunks]), classes.indices)
    np.testing.assert_array_equal(np.concatenate([np.diff(c.class_indptr) for c in chunks]), np.diff(classes.indptr))


def test_classes_of_arrays_are_sorted_and_merged(tmp_path, pair):
    features = pair[0][:2]
    changes = {"Y_indices": np.array([4, 1, 4, 0]), "Y_indptr": np.array([0, 3, 4]), "Y_shape": (2, 5), "Y_data": None}
    path = save_npz(tmp_path / "rows.npz", features, pair[1], **changes)
    assert [classes for classes, _ in read(path, "npz")] == [[1, 4], [0]]


def test_classes_of_arrays_may_be_missing_where_they_are_optional(tmp_path, pair):
    features, classes = pair
    pairs, dense = tmp_path / "rows.npz", tmp_path / "dense.npy"
    save_npz(pairs, features, classes, Y_data=None, Y_indices=None, Y_indptr=None, Y_shape=None)
    np.save(dense, features.todense())
    for path, kind in ((pairs, "npz"), (dense, "npy")):
        shape = form(kind).shape(path, classes_optional=True)
        assert tuple(shape) == (40, 12, None)
        chunks = list(form(kind).chunks(path, shape, 64, classes_optional=True))
        assert sum(len(chunk.class_indptr) - 1 for chunk in chunks) == 40
        assert sum(len(chunk.class_ids) for chunk in chunks) == 0
        with pytest.raises(DataError, match="has no (array Y_indptr|classes beside it)"):
            read(path, kind)
    save_npz(pairs, features, classes, Y_indptr=None)  # some are there: then none may be missing
    with pytest.raises(DataError, match="has no array Y_indptr"):
        form("npz").shape(pairs, classes_optional=True)


def test_bad_arrays_are_named(tmp_path, pair):
    features, classes = pair
    path = tmp_path / "rows.npz"

    def complaint(**changes: object) -> str:
        save_npz(path, features, classes, **changes)
        with pytest.raises(DataError) as caught:
            read(path, "npz")
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(path), "FILE")

    data, indices = features.data.copy(), features.indices.copy()
    row = int(np.searchsorted(features.indptr, 30, side="right")) - 1
    data[30] = np.nan
    assert complaint(X_data=data) == f"FILE row {row}: feature value nan is not finite in float32: replace it"
    indices[30] = 12
    assert complaint(X_indices=indices).startswith(f"FILE row {row}: feature index 12 is outside 0..11")
    begin = int(features.indptr[np.argmax(np.diff(features.indptr) > 1)])
    indices = features.indices.copy()
    indices[begin + 1] = indices[begin]
    assert f"feature index {indices[begin]} does not ascend" in complaint(X_indices=indices)
    assert "row 0: class 5 is outside 0..4" in complaint(Y_indices=np.full_like(classes.indices, 5))
    assert "class -1 is outside" in complaint(Y_indices=np.full_like(classes.indices, -1))
    assert complaint(Y_indptr=None).startswith("FILE has no array Y_indptr: it needs X_data")
    assert "X_indptr and X_shape = [41, 12] are not those of a CSR matrix" in complaint(X_shape=(41, 12))
    assert "X_data has 3 entries, its indptr ends at" in complaint(X_data=np.ones(3))
    assert "it needs integers in one axis" in complaint(Y_indices=classes.indices.astype(float))
    assert "Y_indices" in complaint(Y_indices=np.array([{}] * len(classes.indices)))
    fewer = csr_array(classes[:39])
    assert complaint(Y_indptr=fewer.indptr, Y_indices=fewer.indices, Y_shape=(39, 5)).startswith(
        "FILE has classes of 39 rows, the features are those of 40"
    )
    save_npz(path, features, classes)
    write(path, path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"rows\.npz is damaged or cut short"):
        read(path, "npz")


def test_bad_dense_matrices_are_named(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.array([[0.0, 1.0], [2.0, np.inf]]))
    with pytest.raises(DataError, match=r"rows\.npy has no classes beside it: save them as rows\.classes\.npy"):
        read(path, "npy")
    np.save(tmp_path / "rows.classes.npy", np.array([0, 1]))
    with pytest.raises(DataError, match=r"rows\.npy row 1: feature value inf is not finite"):
        read(path, "npy")
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match="is no matrix of numbers"):
        read(path, "npy")
    np.save(path, np.array([[{}]]))
    with pytest.raises(DataError, match="is no array of numpy's"):
        read(path, "npy")
    np.save(path, np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"rows\.classes\.npy has classes of 2 rows, the features are those of 3"):
        read(path, "npy")
    write(path, path.read_bytes()[:140])
    with pytest.raises(DataError, match=r"rows\.npy"):
        read(path, "npy")


# --- a real set


@pytest.mark.skipif(not SHARED.exists(), reason=f"real data sets are absent: no {SHARED}")
def test_tate_leaf_agrees_with_plain_python():
    path = SHARED / "tate-leaf" / "test.txt.xz"
    with lzma.open(path, "rt") as file:
        n_rows, n_features, n_classes = map(int, file.readline().split())
        expected = []
        for line in file:
            classes, *features = line.rstrip("\n").split(" ")
            pairs = [feature.split(":") for feature in features]
            expected.append(
                (sorted({int(k) for k in classes.split(",") if k}), [(int(i), np.float32(float(v))) for i, v in pairs])
            )
    assert form("repository").shape(path) == (n_rows, n_features, n_classes)
    assert read(path, block_bytes=2**16) == expected
    assert math.isclose(sum(v**2 for _, features in expected for _, v in features) / n_rows, 1, rel_tol=1e-2)
