"""Readers of texts with class names: all formats alike, classes that may be missing, errors that name the place."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from mach.config import DataConfig
from mach.data.formats import FORMATS, LINES
from mach.data.tables import Table
from mach.errors import DataError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


TABLE = [('red, "round"\napple', ["fruit", "7"]), ("", []), ("ärger", ["fruit"])]


def columns(**options: object) -> DataConfig:
    return DataConfig.model_validate({"train": "x", "class_separator": "|"} | options)


def form(kind: str) -> Table:
    found = LINES if kind == "lines" else FORMATS[kind]
    assert isinstance(found, Table)
    return found


def texts(path: Path, kind: str, config: DataConfig, block_bytes: int = 2**20) -> list[tuple[str, list[str]]]:
    chunks = list(form(kind).texts(path, config, block_bytes))
    assert not chunks or chunks[-1].fraction > 0.9
    return [row for chunk in chunks for row in zip(chunk.texts, chunk.class_names, strict=True)]


@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_tables_of_all_formats_read_alike(tmp_path, block_bytes):
    import pyarrow
    import pyarrow.parquet

    csv = '\ufeffid,classes,text\r\n1,fruit| 7 |,"red, ""round""\napple"\r\n\r\n2,,\r\n3,fruit,ärger\r\n'.encode()
    records = [{"text": text, "classes": names} for text, names in TABLE]
    lines = "\n".join(map(json.dumps, records)).encode() + b"\n\n"
    for path, kind in (
        (write(tmp_path / "t.csv", csv), "csv"),
        (write(tmp_path / "t.csv.gz", gzip.compress(csv)), "csv"),
        (write(tmp_path / "t.jsonl", lines), "jsonl"),
        (write(tmp_path / "t.jsonl.xz", lzma.compress(lines)), "jsonl"),
    ):
        assert texts(path, kind, columns(), block_bytes) == TABLE
    parquet = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), parquet)
    assert texts(parquet, "parquet", columns(), block_bytes) == TABLE
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None], "classes": [7, None]}), parquet)
    assert texts(parquet, "parquet", columns()) == [("a", ["7"]), ("", [])]


def test_columns_are_joined_and_one_name_is_kept_whole(tmp_path):
    path = write(
        tmp_path / "t.jsonl", '{"a": "x", "b": null, "c": "y", "k": "p|q"}\n{"a": "", "b": "z", "c": "", "k": 3}'
    )
    config = columns(text_columns=["a", "b", "c"], class_column="k", class_separator=None)
    assert texts(path, "jsonl", config) == [("x y", ["p|q"]), ("z", ["3"])]


def test_a_text_may_be_longer_than_the_csv_modules_limit(tmp_path):
    path = write(tmp_path / "t.csv", "text,classes\n" + "long " * 40_000 + ",a\n")
    assert len(texts(path, "csv", columns())[0][0]) == 200_000


def save_parquet(path: Path, **columns: object) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_the_class_column_may_be_missing_where_classes_are_optional(tmp_path):
    csv = write(tmp_path / "t.csv", "text,id\na,1\nb,2\n")
    lines = write(tmp_path / "t.jsonl", '{"text": "a"}\n{"text": "b", "classes": ["c"]}\n')
    parquet = save_parquet(tmp_path / "t.parquet", text=["a", "b"])
    for path in (csv, lines, parquet):
        [chunk] = form(path.suffix[1:]).texts(path, columns(), classes_optional=True)
        assert chunk.texts == ["a", "b"]
        assert chunk.class_names == ([[], ["c"]] if path == lines else [[], []])
        with pytest.raises(DataError, match="has no column 'classes'"):
            texts(path, path.suffix[1:], columns())
        with pytest.raises(DataError, match="has no column 'body'"):
            list(form(path.suffix[1:]).texts(path, columns(text_columns=["body"]), classes_optional=True))


def test_plain_lines_are_texts(tmp_path):
    path = write(tmp_path / "copy", "\ufeffred, apple\r\n\n a\u2028b".encode())
    assert texts(path, "lines", columns()) == [("red, apple", []), ("", []), (" a\u2028b", [])]
    with pytest.raises(DataError, match="^standard input line 2: byte 0xdf is not UTF-8"):
        texts(write(path, b"a\nstra\xdfe\n"), "lines", columns())


def test_lone_surrogates_are_replaced(tmp_path):
    path = write(tmp_path / "t.jsonl", r'{"text": "a\ud800 \ud83d\ude00", "classes": ["\udfff", "\ud83d\ude00", "b"]}')
    assert texts(path, "jsonl", columns()) == [("a\ufffd \U0001f600", ["\ufffd", "\U0001f600", "b"])]


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_a_header_without_a_comma_says_what_parts_its_columns(tmp_path, sign):
    rows = [("text", "classes"), (f'"a{sign} b, c\nd"', "x"), ("e, f", "y")]
    path = write(tmp_path / "t.csv", "\ufeff" + "".join(f"{sign.join(row)}\n" for row in rows))
    assert texts(path, "csv", columns()) == [(f"a{sign} b, c\nd", ["x"]), ("e, f", ["y"])]
    commas = write(tmp_path / "u.csv", f'text,classes,"n{sign}"\na{sign}b,c,\n')
    assert texts(commas, "csv", columns()) == [(f"a{sign}b", ["c"])]


def test_a_list_of_strings_is_one_text(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": ["a b", "c"], "classes": ["x"]}\n{"text": [], "classes": ["y"]}')
    assert texts(path, "jsonl", columns()) == [("a b\nc", ["x"]), ("", ["y"])]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("t.csv", "", "is empty or lacks a header"),
        ("t.csv", "text,label\na,b\n", "line 1 has no column 'classes'; there are text, label: set"),
        ("t.csv", "text;label\na;b\n", "line 1 has no column 'classes'; there are text, label: set"),
        ("t.csv", "text;classes\na;b;c\n", "line 2: 3 fields instead of 2: quote the text that holds ';'"),
        (
            "t.csv",
            "title,classes\na,b\n",
            "title, classes: set text_columns, class_column (mach train --text, --classes)",
        ),
        ("t.csv", 'text,classes\n"a\nb",c\nd\n', "line 4: 1 field instead of 2: quote the text that holds ','"),
        ("t.csv", 'text,classes\n"a"b,c\n', "line 2: no valid CSV ("),
        ("t.csv", b"text,classes\na,b\nstra\xdfe,c\n", "line 3: byte 0xdf is not UTF-8: convert the file to UTF-8"),
        ("t.jsonl", b'{"text": "\xdf"}', "line 1: byte 0xdf is not UTF-8"),
        ("t.jsonl", '{"text": "a", "classes": []}\n\n{"text": ', "line 3: '{\"text\":' is no JSON ("),
        ("t.jsonl", "[" * 100_000, "line 1: '[[[["),
        ("t.jsonl", "[1]", "line 1: '[1]' is no JSON object: write one a line"),
        ("t.jsonl", '{"body": "a"}', "line 1 has no column 'text'; there are body: set"),
        ("t.jsonl", '{"text": 5, "classes": []}', "line 1: column 'text' holds 5, not text"),
        ("t.jsonl", '{"text": "a", "classes": [true]}', "line 1: True in column 'classes' is no class name"),
        ("t.jsonl", '{"text": "a", "classes": {"b": 1}}', "line 1: {'b': 1} in column 'classes' is no class name"),
        ("t.parquet", "PAR1 or not", "is no Parquet file or is damaged ("),
    ],
)
def test_bad_tables_are_named(tmp_path, name, content, complaint):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        texts(path, path.suffix[1:], columns())
    message = str(caught.value)
    assert message.startswith(str(path))
    assert complaint in message
    assert "\n" not in message


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    path = save_parquet(tmp_path / "t.parquet", text=["a"], label=[1])
    with pytest.raises(DataError, match="has no column 'classes'; there are text, label"):
        texts(path, "parquet", columns())


def test_a_parquet_file_with_bytes_that_are_no_text(tmp_path):
    import pyarrow

    surrogate = pyarrow.array([b"\xed\xa0\x80"], type=pyarrow.binary()).view(pyarrow.string())
    path = save_parquet(tmp_path / "t.parquet", text=surrogate, classes=["a"])
    with pytest.raises(DataError, match=r"t\.parquet is no Parquet file or is damaged \(.*utf-8.*\): write it again"):
        texts(path, "parquet", columns())
