"""What is left out of rows is said, and refused where it is much."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import pytest

from mach.config import DataConfig, TextConfig, load_config
from mach.data.omissions import refuse, require_classes, told
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import DataError

BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def table(rows: Sequence[tuple[str, object]]) -> str:
    lines = [json.dumps({"text": text, "classes": classes}) + "\n" for text, classes in rows]
    Path("t.jsonl").write_text("".join(lines))
    return "t.jsonl"


def ready(source: str, *, like: Store | None = None, check=lambda store: None, **more) -> Store:
    return prepare(DataConfig(train="unused", **more), TextConfig(), source, like=like, check=check)


def listing(*names: str) -> str:
    Path("names.txt").write_text("".join(f"{name}\n" for name in names))
    return "names.txt"


def test_everything_that_is_left_out_is_told():
    rows = [(f"word {n}", ["a"]) for n in range(8)] + [("!", ["b"]), ("word", []), ("word", ["misspelt"])]
    store = ready(table(rows), classes=listing("a", "b"))
    assert told(store) == [
        "t.jsonl: 1 class name of its rows left out, not in data.classes, such as 'misspelt'",
        "t.jsonl: 2 of 11 rows have no class, such as row 9, row 10",
        "t.jsonl: 1 of 11 rows have no known feature, such as row 8",
    ]
    refuse(store)
    test = ready(table([("word", []), ("unheard", [])]), like=store)
    assert told(test, is_query=True) == ["t.jsonl: 1 of 2 rows have no known feature, such as row 1"]
    test = ready(table([("word", ["a"]), ("word", ["x"])]), like=store)
    assert told(test, is_query=True) == [
        "t.jsonl: 1 class name of its rows left out, unknown to the run, such as 'x'",
        "t.jsonl: 1 of 2 rows have no class, such as row 1; measures count them as misses",
    ]
    assert told(ready(table([("word", ["a"])]))) == []


def test_a_list_that_misses_more_than_a_fifth_is_refused_with_three_names(home):
    rows = [("word", [name]) for name in "abcdefgh"] + [("word", ["a"])] * 8
    ready(table(rows), classes=listing(*"abcde"), check=refuse)  # 3 of 16
    with pytest.raises(DataError) as caught:
        ready(table(rows), classes=listing(*"abcd"), check=refuse)  # 4 of 16
    assert str(caught.value) == (
        "t.jsonl: 4 of 16 class names of its rows are not in data.classes, such as 'e', 'f', 'g'; at most 20% may "
        "be: correct the list or the rows"
    )
    assert len(list((home / "cache").glob("t-*"))) == 1  # of the first list: what is refused is not kept
    store = ready(table(rows), classes=listing(*"abcd"))
    with pytest.raises(DataError, match="4 of 16 class names"):  # what was kept is looked at, too
        ready("t.jsonl", classes="names.txt", check=refuse)
    assert store.n_rows == 16


def test_mostly_empty_rows_are_refused():
    with pytest.raises(DataError, match=r"2 of 3 rows have no class, such as row 0, row 1; at most 50% may: leave"):
        ready(table([("a", []), ("b", []), ("c", ["x"])]), check=refuse)
    with pytest.raises(DataError, match=r"2 of 3 rows have no known feature, such as row 1, row 2; .*text_columns"):
        ready(table([("a", ["x"]), ("", ["y"]), ("!", ["x"])]), check=refuse)
    ready(table([("a", []), ("c", ["x"])]), check=refuse)


def test_too_little_that_is_known_cannot_be_measured():
    train = ready(table([("a", ["x"]), ("b", ["y"])]))
    require_classes(ready(table([("a", ["x"]), ("b", ["unheard"])]), like=train))
    test = ready(table([("a", ["x"]), ("b", ["unheard", "of"])]), like=train)
    with pytest.raises(DataError, match=r"2 of 3 class names .* unknown to the run, such as 'unheard', 'of'"):
        require_classes(test)


@pytest.mark.parametrize("separator", ["|", ";", ",", "\t"])
def test_a_separator_that_was_forgotten_is_named(separator):
    late = [("word", "alone")] * 120 + [("word", separator.join(f"{n} {m}" for m in "ab")) for n in range(121)]
    [line] = told(ready(table(late)))
    spelt = "\\t" if separator == "\t" else separator
    assert line == (
        f"t.jsonl: 121 of 241 cells of classes hold {separator!r}, and each is read as one name: if it separates "
        f'names, set data.class_separator = "{spelt}"'
    )
    [line] = told(ready("t.jsonl", class_separator="#"))  # the wrong one, which is in no cell
    assert line.startswith(f"t.jsonl: 121 of 241 cells of classes hold {separator!r}")
    assert told(ready(table(late[:-1]))) == []  # half of them are not most
    assert told(ready("t.jsonl", class_separator=separator)) == []
    lists = [(text, [classes]) for text, classes in late]
    assert told(ready(table(lists))) == []


def test_a_list_and_a_separator_that_was_forgotten():
    with pytest.raises(DataError, match=r'set data\.class_separator = "\|", which most cells hold, or correct the'):
        ready(table([("word", "a|b"), ("word", "b|a")]), classes=listing("a", "b"), check=refuse)


# --- byte order marks


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"2 3 2\n0 1:1\n1 2:1\n"),
        ("a.svm", b"0 1:1\n1 2:1\n"),
        ("a.csv", b"text,classes\nred,x\nblue,y\n"),
        ("a.csv", b'"text",classes\nred,x\nblue,y\n'),
        ("a.tsv", b"text\tclasses\nred\tx\nblue\ty\n"),
        ("a.jsonl", b'{"text": "red", "classes": "x"}\n{"text": "blue", "classes": "y"}\n'),
    ],
)
def test_a_byte_order_mark_is_skipped(name, content, pack):
    name += {gzip.compress: ".gz", lzma.compress: ".xz"}.get(pack, "")
    fingerprints = []
    for mark in (b"", BOM):
        Path(name).write_bytes(pack(mark + content))
        store = ready(name, cache=f"cache{len(mark)}")
        fingerprints.append(store.fingerprint)
        assert store.n_rows == 2
    assert fingerprints[0] == fingerprints[1]


def test_a_byte_order_mark_of_lists_documents_and_configurations():
    Path("names.txt").write_bytes(BOM + b"x\ny\n")
    assert list(ready(table([("red", "x")]), classes="names.txt").class_names or []) == ["x", "y"]
    stores = []
    for mark in (b"", BOM):
        Path("d.csv").write_bytes(mark + b"title,name\nred apple,x\n")
        stores.append(ready("d.csv", strong_columns=["title"], class_column="name", cache=f"cache{len(mark)}"))
    assert stores[0].fingerprint == stores[1].fingerprint
    Path("c.toml").write_bytes(BOM + b'[data]\ntrain = "a.csv"\n')
    assert load_config(Path("c.toml")).data.train == "a.csv"


def test_words_for_nothing_that_became_classes_are_told_with_their_rows():
    rows = [("word", ["a", "NaN"]), ("word", ["NaN"]), ("word", ["None"]), ("word", [None])]
    [line, _] = told(ready(table(rows)))
    assert line.startswith("t.jsonl: 'NaN' (2 rows), 'None' (1 row) is a class like others")
    listed = ready("t.jsonl", classes=listing("a", "NaN", "None"))
    assert not any("NaN" in line for line in told(listed)), "a list says what is a class"
