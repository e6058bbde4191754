"""All file formats by one contract: the same rows in each make the same store, and damaged files say so in a line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csc_array, csr_array, save_npz

from mach import config
from mach.config import DataConfig, TextConfig
from mach.data.formats import FORMATS, format_of
from mach.data.prepare import prepare
from mach.data.sources import Numbers
from mach.data.store import Store
from mach.errors import ConfigError, DataError

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
# rows of six features and four classes; of text and named classes
CLASSES, X_ND = [[0, 2], [1], [3]], np.array([[0, 0.5, 0, 0, 1, 0], [0, 0, 0, 0, 0, 2], [1, 0, 0, 0, 0, 0]], np.float32)
ROWS = [{"text": "red apple", "classes": "fruit|red"}, {"text": "", "classes": "fruit"}, {"text": "ä b", "classes": ""}]


def lines() -> str:
    pairs = [" ".join(f"{d}:{x:g}" for d, x in enumerate(row) if x) for row in X_ND]
    return "".join(f"{','.join(map(str, ids))} {row}\n" for ids, row in zip(CLASSES, pairs, strict=True))


def class_arrays() -> dict[str, Any]:
    indptr = np.cumsum([0, *map(len, CLASSES)])
    return {"Y_indices": np.concatenate(CLASSES), "Y_indptr": indptr, "Y_shape": np.array([3, 4])}


def write_repository(path: Path) -> None:
    path.write_text(f"3 6 4\n{lines()}")


def write_svmlight(path: Path) -> None:
    path.write_text(f"# a comment\n{lines()}")


def write_npz(path: Path) -> None:
    x = csr_array(X_ND)
    np.savez(path, **class_arrays(), X_data=x.data, X_indices=x.indices, X_indptr=x.indptr, X_shape=x.shape)


def write_npy(path: Path) -> None:
    np.save(path, X_ND)
    np.savez(path.with_suffix(".classes.npz"), **class_arrays())


def write_table(path: Path, separator: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["classes", "text"], delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


def write_fasttext(path: Path) -> None:
    labels = [" ".join(f"__label__{name}" for name in row["classes"].split("|") if name) for row in ROWS]
    # a line without a word is a row only where it has a class
    path.write_text("".join(f"{label} {row['text']}\n" for label, row in zip(labels, ROWS, strict=True)))


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "repository": write_repository,
    "svmlight": write_svmlight,
    "npz": write_npz,
    "npy": write_npy,
    "csv": lambda path: write_table(path, ","),
    "tsv": lambda path: write_table(path, "\t"),
    "fasttext": write_fasttext,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
class TestFormat:
    """What every entry of the table keeps; a new one needs a writer above."""

    def store(self, path: Path) -> Store:
        data = DataConfig(train="x", class_separator="|", cache=str(path.parent / "cache"))
        return prepare(data, TextConfig(), str(path))

    def written(self, name: str, folder: Path) -> Path:
        path = folder / f"rows{FORMATS[name].endings[0]}"
        WRITERS[name](path)
        return path

    def test_it_is_described(self, name: str):
        entry = FORMATS[name]
        assert entry.name == name
        assert all(format_of("auto", f"Rows{ending.upper()}") is entry for ending in entry.endings)

    def test_the_same_rows_make_the_same_store(self, name: str, tmp_path: Path):
        is_numbers = isinstance(FORMATS[name], Numbers)
        store = self.store(self.written(name, tmp_path))
        expected = CLASSES if is_numbers else [[0, 1], [0], []]
        assert [ids.tolist() for ids in np.split(store.class_ids, store.class_indptr[1:-1])] == expected
        if not is_numbers:
            assert list(store.class_names or []) == ["fruit", "red"]
            like = self.store(self.written("jsonl", tmp_path))
            assert store.fingerprint == like.fingerprint
        elif FORMATS[name].is_dense:
            np.testing.assert_array_equal(store.dense_ND, X_ND)
        else:
            np.testing.assert_array_equal(store.features(0, 3).toarray(), X_ND)

    def test_it_may_be_compressed_where_it_is_text(self, name: str, tmp_path: Path):
        path = self.written(name, tmp_path)
        for ending, compress in COMPRESSIONS.items():
            packed = path.with_name(path.name + ending)
            packed.write_bytes(compress(path.read_bytes()))
            if FORMATS[name].is_packed:
                with pytest.raises(ConfigError, match="tells no format"):
                    self.store(packed)
            else:
                assert self.store(packed).compute_fingerprint() == self.store(path).fingerprint

    @pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe damaged\n", b"PK\x03\x04", b"[[[["])
    def test_a_damaged_file_gives_one_line_that_names_it(self, name: str, content: bytes, tmp_path: Path):
        path = self.written(name, tmp_path)
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            self.store(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_file_cut_short_is_no_shorter_set(self, name: str, tmp_path: Path):
        path = self.written(name, tmp_path)
        if not FORMATS[name].is_packed:  # of plain text only a compressed file shows that it was longer
            packed = path.with_name(path.name + ".gz")
            packed.write_bytes(gzip.compress(path.read_bytes() * 9)[:-9])
            path = packed
        else:
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DataError, match=path.name):
            self.store(path)


def test_the_configuration_names_the_formats_of_the_table():
    assert set(typing.get_args(config.Format)) == {"auto", "builtin", *FORMATS}
    endings = [ending for entry in FORMATS.values() for ending in entry.endings]
    assert len(set(endings)) == len(endings)


def test_unknown_endings_list_what_is_known():
    with pytest.raises(ConfigError, match=r"rows\.xml tells no format: it may be \.txt, \.svm, .*; or set format"):
        format_of("auto", "rows.xml")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_parts_behind_each_other_are_one_file(pack: Callable[[bytes], bytes], tmp_path: Path):
    """As `cat` makes them; of xz with padding between them, which `lzma.LZMADecompressor` leaves to its caller."""
    padding = b"\0" * 2**18 if pack is lzma.compress else b""
    ending = {gzip.compress: ".gz", bz2.compress: ".bz2"}.get(pack, ".xz")
    path = tmp_path / f"a.svm{ending}"
    whole = pack(b"0 1:1\n") + padding + pack(b"") + padding + pack(b"1 1:1\n")
    path.write_bytes(whole + padding)
    data = DataConfig(train="x", cache=str(tmp_path / "cache"))
    assert prepare(data, TextConfig(), str(path)).class_ids.tolist() == [0, 1]
    path.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"a\.svm\..* is damaged or cut short"):
        prepare(data, TextConfig(), str(path))


def test_lists_of_a_row_group_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("mach.data.parquet.LIST_VALUES", 4)
    table = pyarrow.table({"text": ["a", "b", "c"], "classes": [["x", "y"], ["x", "z"], ["y"]]})
    data = DataConfig(train="x", cache=str(tmp_path / "cache"))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert prepare(data, TextConfig(), str(tmp_path / "a.parquet")).class_ids.tolist() == [0, 1, 0, 2, 1]
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="column 'classes' has 5 values in row group 0, at most 4 are read at a time: "):
        prepare(data, TextConfig(), str(tmp_path / "b.parquet"))


def test_lines_of_fasttext_may_have_any_ending_and_labels_anywhere(tmp_path: Path):
    path = tmp_path / "train.txt"
    path.write_text("__label__a red __label__b apple\n\ngreen pear\n")
    store = prepare(DataConfig(train="x", class_column="other", cache=str(tmp_path)), TextConfig(), str(path))
    assert list(store.class_names or []) == ["a", "b"]
    assert store.class_indptr.tolist() == [0, 2, 2]
    assert prepare(DataConfig(train="x", cache=str(tmp_path)), TextConfig(), str(path), like=store).n_rows == 2


def pair(folder: Path, name: str = "X.trn.npz", **save: Any) -> Path:
    """As `scipy.sparse.save_npz` writes them, and PECOS names them."""
    x, y = csr_array(X_ND), csr_array(np.array([[k in ids for k in range(4)] for ids in CLASSES], np.float32))
    save_npz(folder / name, save.get("x", x))
    save_npz(folder / name.replace("X", "Y"), save.get("y", y))
    return folder / name


def test_a_pair_of_sparse_matrices_is_read(tmp_path: Path):
    store = prepare(DataConfig(train="x", cache=str(tmp_path)), TextConfig(), str(pair(tmp_path)))
    assert [ids.tolist() for ids in np.split(store.class_ids, store.class_indptr[1:-1])] == CLASSES
    np.testing.assert_array_equal(store.features(0, 3).toarray(), X_ND)
    (tmp_path / "Y.trn.npz").unlink()
    queries = prepare(DataConfig(train="x", cache=str(tmp_path)), TextConfig(), str(tmp_path / "X.trn.npz"), like=store)
    assert (queries.n_rows, len(queries.class_ids)) == (3, 0)


def test_a_dense_matrix_may_have_its_classes_in_a_pair(tmp_path: Path):
    pair(tmp_path).unlink()
    np.save(tmp_path / "X.trn.npy", X_ND)
    store = prepare(DataConfig(train="x", cache=str(tmp_path)), TextConfig(), str(tmp_path / "X.trn.npy"))
    assert store.class_ids.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "Y.trn.npz").unlink(), "save them as Y.trn.npz"),
        (lambda folder: pair(folder, x=csc_array(X_ND)), "save it as CSR"),
        (lambda folder: pair(folder, y=csr_array(np.ones((2, 4), np.float32))), "must be of the same rows"),
    ],
)
def test_a_pair_that_is_none_is_one_line(tmp_path: Path, break_it: Callable[[Path], Any], words: str):
    path = pair(tmp_path)
    break_it(tmp_path)
    with pytest.raises(DataError, match=words):
        prepare(DataConfig(train="x", cache=str(tmp_path)), TextConfig(), str(path))


def test_one_matrix_of_another_name_has_no_classes(tmp_path: Path):
    data, rows = DataConfig(train="x", cache=str(tmp_path)), tmp_path / "rows.npz"
    like = prepare(data, TextConfig(), str(pair(tmp_path)))
    pair(tmp_path).rename(rows)
    with pytest.raises(DataError, match=r"call it X.npz, and its classes Y.npz"):
        prepare(data, TextConfig(), str(rows))
    asked = prepare(data, TextConfig(), str(rows), like=like)  # queries need none
    np.testing.assert_array_equal(asked.features(0, 3).toarray(), X_ND)
    assert not len(asked.class_ids)
