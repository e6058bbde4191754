"""One spelling of a class name in lists and tables, and what lists of names look like."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.config import DataConfig, TextConfig
from mach.data.joining import join
from mach.data.names import class_name, ids_by_name, listed
from mach.data.prepare import prepare
from mach.data.store import Reference, Store
from mach.data.writer import StoreWriter
from mach.errors import DataError

CAFE = "Caf\u00e9"
DECOMPOSED = "Cafe\u0301"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def rows_of(*classes: str | list[str]) -> str:
    lines = [json.dumps({"text": f"word {n}", "classes": names}) + "\n" for n, names in enumerate(classes)]
    Path("rows.jsonl").write_text("".join(lines))
    return "rows.jsonl"


def ready(source: str, names: str | None = None, like: Reference | Store | None = None, **more) -> Store:
    if names is not None:
        Path("names.txt").write_text(names)
    config = DataConfig(train="unused", classes=None if names is None else "names.txt", **more)
    return prepare(config, TextConfig(), source, like=like)


def names_of(store: Store) -> list[str]:
    return list(store.class_names or [])


def ids(store: Store) -> list[int]:
    return store.class_ids.tolist()


@given(st.text())
def test_a_spelling_is_its_own(text):
    assert class_name(class_name(text)) == class_name(text)
    assert class_name(f" {unicodedata.normalize('NFD', text)}\t") == class_name(text)
    class_name(text + "\ud800").encode()  # what nobody could show is gone


def test_rows_and_lists_agree_whatever_the_form():
    store = ready(rows_of(DECOMPOSED, f" {CAFE} ", "tea"))
    assert (names_of(store), ids(store)) == ([CAFE, "tea"], [0, 0, 1])
    store = ready(rows_of(CAFE, "tea", "tea"), names=f"tea \n {DECOMPOSED}\n")
    assert (names_of(store), ids(store)) == (["tea", CAFE], [1, 0, 0])
    assert store.meta["n_unknown_classes"] == 0
    with pytest.raises(DataError, match=r"names\.txt line 2: class 'Café' stands on line 1 too"):
        ready(rows_of(CAFE), names=f"{CAFE}\n{DECOMPOSED} \n")


def old_store(names: list[str], rows: str) -> Store:
    """A store of an earlier version, whose names are as they were written."""
    made = ready(rows)
    with StoreWriter("old", source="old", n_features=made.n_features, n_classes=len(names)) as writer:
        writer.class_names, writer.text_features = names, made.text_features
    return Store.open("old")


def test_rows_for_a_run_of_an_earlier_version_find_its_names():
    old = old_store([f" {DECOMPOSED}", "tea", "tea "], rows_of("x"))
    test = ready(rows_of(CAFE, DECOMPOSED, "tea", "unknown"), like=old)
    assert (ids(test), test.meta["n_unknown_classes"]) == ([0, 0, 1], 1)
    more = prepare(DataConfig(train="unused"), TextConfig(), rows_of("new", CAFE, "newer", "new"), like=old, grows=True)
    assert (ids(more), names_of(more)[3:]) == ([3, 0, 4, 3], ["new", "newer"])


def test_joined_rows_keep_one_id_a_name():
    old: Any = old_store([f" {DECOMPOSED}", "tea"], rows_of("x"))
    new = ready(rows_of("new", CAFE), names="new\n" + CAFE)
    with StoreWriter("like", source="new", n_features=old.n_features, n_classes=2) as writer:
        writer.class_names, writer.text_features = [CAFE, "new "], old.text_features
    assert names_of(join(Store.open("like"), None, old)) == [f" {DECOMPOSED}", "tea", "new "]
    assert names_of(new) == ["new", CAFE]


def test_ids_by_name_takes_the_first_of_equal_ones():
    assert ids_by_name([" b", "a", "b", "a"]) == {" b": 0, "a": 1, "b": 2}
    assert ids_by_name([DECOMPOSED, f"{CAFE} "])[CAFE] == 0


# --- id<TAB>name


def test_a_list_of_ids_and_names_is_read_by_its_ids():
    store = ready(rows_of("pear", "apple"), names="1\tpear\n0\tapple \n\n")
    assert (names_of(store), ids(store)) == (["apple", "pear"], [1, 0])
    Path("n.txt").write_text("1 2 2\n1 0:1\n")
    assert names_of(ready("n.txt", names="1\tpear\n0\tapple\n")) == ["apple", "pear"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0\ta\n2\tb\n", r"names\.txt line 2: id 2 of 'b' is outside 0\.\.1: number the 2 classes from 0, each once"),
        ("0\ta\n0\tb\n", r"names\.txt line 2: id 0 of 'b' stands on another line too: number"),
        ("Q42\ta\nQ43\tb\n", r"names\.txt line 1: 'Q42\\ta' is no id<TAB>name, and most lines have a tab: write one"),
        ("0\ta\n1\tb\nc\n", r"names\.txt line 3: 'c' is no id<TAB>name"),
    ],
)
def test_a_list_of_another_kind_is_refused_by_what_it_is(lines, message):
    with pytest.raises(DataError, match=message) as caught:
        ready(rows_of("a", "b"), names=lines)
    assert "\n" not in str(caught.value)


def test_a_tab_in_few_names_is_part_of_them():
    assert listed(["a\tb", "c", "d"], "names.txt") == ["a\tb", "c", "d"]
