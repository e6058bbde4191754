"""Files of classes: tables and lists, what rows may call a class, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mach.config import DataConfig, TextConfig, parse_config
from mach.data.class_table import of_classes_alone
from mach.data.omissions import told
from mach.data.prepare import prepare
from mach.data.store import Reference, Store
from mach.errors import ConfigError, DataError
from tests.data.test_class_texts import columns

ROWS = [("red apple", "g:1"), ("fast car", "Auto"), ("slow car", "u:3")]
CLASSES: list[dict[str, Any]] = [
    {"id": "g:1", "name": "Äpfel", "alternatives": ["apple", "pomme"], "text": "eine  Frucht", "parents": ["Obst"]},
    {"id": "g:2", "name": "Obst", "alternatives": []},
    {"id": "g:3", "name": " Auto ", "alternatives": ["car"], "uri": "u:3"},
    {"id": "g:4", "name": ""},
]
TEXTS = [
    ["Äpfel", "Obst", "Auto", ""],
    [("apple", "pomme"), (), ("car",), ()],
    ["eine  Frucht", "", "", ""],
    ["", "", "u:3", ""],
    [(1,), (), (), ()],
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))
    Path("rows.jsonl").write_text("".join(json.dumps({"text": t, "classes": [c]}) + "\n" for t, c in ROWS))


def ready(classes: str | None, source: str = "rows.jsonl", like: Store | None = None, **options: Any) -> Store:
    return prepare(DataConfig(train="", classes=classes, **options), TextConfig(), source, like=like)


def save(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def table(kind: str, rows: list[dict[str, Any]]) -> str:
    name = f"classes.{kind}"
    if kind == "parquet":
        pq.write_table(
            pa.Table.from_pylist(
                rows, pa.schema([(n, pa.string()) if n not in LISTS else (n, pa.list_(pa.string())) for n in FIELDS])
            ),
            name,
        )
    elif kind == "jsonl":
        save(name, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        sign = "," if kind == "csv" else "\t"
        cells = [["|".join(row.get(n) or []) if n in LISTS else row.get(n) or "" for n in FIELDS] for row in rows]
        save(name, "".join(sign.join(line) + "\n" for line in [FIELDS, *cells]))
    return name


LISTS = ("alternatives", "parents")
FIELDS = ["id", "name", "alternatives", "text", "uri", "parents"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_any_kind_says_what_classes_are(kind: str) -> None:
    store = ready(table(kind, CLASSES))
    assert list(store.class_names or []) == ["g:1", "g:2", "g:3", "g:4"]
    assert store.class_texts is not None
    assert columns(store.class_texts) == TEXTS
    assert store.class_ids.tolist() == [0, 2, 2]  # by id, name and address
    assert ready(f"classes.{kind}").path == store.path


def test_classes_without_a_row_are_classes_and_are_counted() -> None:
    store = ready(table("csv", CLASSES))
    assert store.n_classes == 4
    assert told(store) == ["rows.jsonl: 2 of 4 classes have no training row"]
    queries = ready(None, like=store)
    assert queries.class_ids.tolist() == [0, 2, 2]
    assert told(queries, is_query=True) == []
    assert told(ready(save("names.txt", "g:1\nAuto\nu:3\nmore\n"))) == []  # a list says which there may be


def test_a_name_of_two_classes_means_neither() -> None:
    store = ready(table("csv", [*CLASSES[:3], {"id": "g:4", "name": "Auto"}]))
    assert (store.class_ids.tolist(), store.meta["n_unknown_classes"]) == ([0, 2], 1)
    assert "1 class name of its rows left out, not in data.classes, such as 'Auto'" in told(store)[0]


@pytest.mark.parametrize("ids", [["2", "0", "1"], ["a", "b", "c"], None])
def test_numbers_of_classes_are_ids_or_places(ids: list[str] | None) -> None:
    numbers = save("rows.svm", "0 1:1\n2 2:1\n")
    rows = [{"name": name} | ({} if ids is None else {"id": ids[k]}) for k, name in enumerate("xyz")]
    store = ready(table("jsonl", rows), numbers)
    assert store.class_texts is not None
    by_number = ids == ["2", "0", "1"]
    assert list(store.class_texts.names) == (["y", "z", "x"] if by_number else ["x", "y", "z"])
    assert list(store.class_names or []) == (list("abc") if ids == ["a", "b", "c"] else list(store.class_texts.names))


def test_a_list_stays_a_list() -> None:
    for name, text in (
        ("n.csv", "g:1\nAuto\nu:3\n"),
        ("n.tsv", "1\tAuto\n0\tg:1\n2\tu:3\n"),
        ("n", "g:1\nAuto\nu:3\n"),
    ):
        store = ready(save(name, text))
        assert (list(store.class_names or []), "class_texts.safetensors" in store.meta["bytes"]) == (
            ["g:1", "Auto", "u:3"],
            False,
        )


def test_the_former_name_of_the_key_still_counts() -> None:
    assert DataConfig(train="", class_names="n.txt").classes == "n.txt"  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"data\.class"):
        parse_config({"data": {"train": "", "class_names": "a", "classes": "b"}}, "here")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("c.csv", "id,name\na,x\na,y\n", "c.csv line 3: class 'a' stands at c.csv line 2 too: "),
        ("c.csv", "id,name\na,x\n,y\n", "c.csv line 3: a class without id: give it one, or leave it out"),
        ("c.csv", "id,name\na\n", "c.csv line 2: 1 field instead of 2: quote the text that holds ','"),
        ("c.csv", "key,title\na,b\n", "c.csv line 1 has no column id and none called name: "),
        ("c.csv", "id,name,name\na,b,c\n", "c.csv line 1 has 2 columns 'name': rename or remove all but one"),
        ("c.csv", "id,name\n", "c.csv lists no class: give a file with at least one"),
        ("c.jsonl", '{"id": "a", "name": true}\n', "c.jsonl line 1: True in column 'name' is no text: "),
        ("c.jsonl", '{"id": "a", "alternatives": [{}]}\n', "c.jsonl line 1: {} in column 'alternatives' is no text: "),
        ("c.jsonl", json.dumps({"name": "x" * 5000}), "c.jsonl line 1: 'xx"),
        ("c.parquet", "PAR1", "c.parquet is no Parquet file or is damaged"),
        ("c.csv.gz", "none", "c.csv.gz is damaged or cut short"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_classes_is_refused_by_one_line(name: str, content: str, line: str) -> None:
    with pytest.raises(DataError) as caught:
        ready(save(name, content))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [("0", "0"), ("0", "2"), ("1", "2"), ("0", "9" * 50)])
def test_class_numbers_that_do_not_count_from_0_are_refused(ids: tuple[str, str]) -> None:
    rows = [{"id": k, "name": f"name {k}"[:20]} for k in ids]
    with pytest.raises(DataError, match=r"classes\.csv line \d: (id|class '0')"):
        ready(table("csv", rows), save("rows.svm", "0 1:1\n1 2:1\n"))


def test_words_of_class_texts_are_features_that_networks_do_not_read() -> None:
    before, after = ready(None), ready(table("csv", CLASSES))
    plain, known = before.text_features, after.text_features
    assert plain is not None
    assert known is not None
    assert known.n_features == plain.n_features + len({"äpfel", "pomme", "eine", "frucht", "obst", "auto"})
    for text in ("red apple", "slow red car car"):
        assert sorted(known.transform([text])[2]) == sorted(plain.transform([text])[2])  # weights to the bit
    _, ids, values = known.transform(["Obst, red Obst"])
    seen = dict(zip(ids.tolist(), values.tolist(), strict=True))
    [obst] = known.counted(["obst"])[1].tolist()
    assert (seen[obst], sorted(seen.values())) == (0.0, [0.0, 1.0])
    assert known.counted(["obst obst"])[2].tolist() == [2]
    assert np.isfinite(known.transform(["Obst"])[2]).all()


def test_words_of_a_plain_list_are_features_too_but_for_codes_and_in_runs_of_before() -> None:
    names = save("names.txt", "".join(f"{name}\n" for name in ("g:1", "Auto", "u:3", "Birne 1914", "Q42")))
    plain, store = ready(None).text_features, ready(names)
    known = store.text_features
    assert plain is not None
    assert known is not None
    assert {"auto", "birne", "1914", "q42"} & set(known.words()) == {"auto", "birne"}
    assert known.reads_list
    assert set(plain.words()) < set(known.words())
    for features, expected in ((plain, plain), (known, known)):
        former = Reference(store.path, "", features.n_features, 5, False, store.class_names, features)
        options = DataConfig(train="", classes=names)
        found = prepare(options, TextConfig(), "rows.jsonl", former=former).text_features
        assert found is not None
        assert found.fingerprint() == expected.fingerprint()


def test_class_words_come_before_rarer_terms_of_rows() -> None:
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"text": f"w{n} w{n % 9}", "classes": ["g:1"]}) + "\n" for n in range(60))
    )
    config = DataConfig(train="", classes=table("csv", CLASSES))
    features = prepare(config, TextConfig(n_features=20, min_rows=2), "rows.jsonl").text_features
    assert features is not None
    assert len(features.counted(["äpfel apple pomme eine frucht obst auto car"])[1]) == 8


def test_class_words_take_at_most_half_of_the_vocabulary() -> None:
    classes = save("many.csv", "name\ng:1\nAuto\nu:3\n" + "".join(f"name{n}\n" for n in range(50)))
    features = prepare(DataConfig(train="", classes=classes), TextConfig(n_features=8), "rows.jsonl").text_features
    assert features is not None
    assert len(features.counted(["red apple fast car slow"])[1]) == 4


def test_a_table_of_classes_is_all_that_is_learned_from(tmp_path: Path):
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CLASSES[:3]))
    keys = of_classes_alone("few.jsonl")
    assert keys["data.strong_columns"] == ["name", "alternatives"]  # not every line has a text
    assert "data.weak_columns" not in keys
    Path("whole.csv").write_text("id,name,alternatives,text\na,b,c,d\n")
    keys = of_classes_alone("whole.csv")
    assert keys["data.strong_columns"] == ["name", "alternatives"]
    assert keys["data.weak_columns"] == ["text"]
    Path("names.csv").write_text("name\nHeat pump\nBoiler\n")
    assert of_classes_alone("names.csv") == {
        "data.classes": "names.csv",
        "data.class_column": "name",
        "data.strong_columns": ["name"],
        "text.words": [1, 1],
        "text.characters": [3, 4],
    }
    Path("list.txt").write_text("Heat pump\nBoiler\n")
    with pytest.raises(DataError, match="^list.txt is no table with a column id or name: --class-table needs one"):
        of_classes_alone("list.txt")
