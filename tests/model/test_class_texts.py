"""Texts of classes in a run: they travel with it, people read them, edits add to them, further training keeps them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mach.cli import main
from mach.config import parse_config
from mach.data.class_texts import FILE
from mach.errors import DataError, OmissionWarning
from mach.files.tensors import map_tensors
from mach.model.loading import load
from mach.runs.run import Run
from mach.training.conductor import train
from tests.attacks.hostile import line_of, tensor_bytes
from tests.data.test_class_texts import columns

CLASSES = """id,name,alternatives,text,uri,parents
c:1,apple,pomme|Apfel,a round fruit,http://x/1,c:4
c:2,car,auto,,,
c:3,ship,,,http://x/3,
c:4,fruit,,,,
c:5,bank,,money,,
c:6,bank,,river,,
"""
ROWS = [
    (f"red {word} {n % 7}", k) for n in range(60) for word, k in (("apple", "c:1"), ("car", "c:2"), ("boat", "c:3"))
]
OPTIONS: dict[str, Any] = {
    "hashing": {"repetitions": 2, "buckets": 4},
    "network": {"hidden": [8]},
    "training": {"epochs": 3, "batch": 16},
    "reranking": {"candidates": 0},
    "launch": {"launcher": "here"},
}


def save_rows(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "classes": [k]}) + "\n" for text, k in rows))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data are gone."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "classes.csv").write_text(CLASSES)
    data = {"train": save_rows(folder / "rows.jsonl", ROWS), "classes": str(folder / "classes.csv")}
    config = parse_config({"data": data | {"cache": str(folder / "cache")}} | OPTIONS, "here")
    with pytest.warns(OmissionWarning, match=r"rows\.jsonl: 3 of 6 classes have no training row"):
        train(config, folder / "run")
    for path in (folder / "classes.csv", folder / "rows.jsonl"):
        path.unlink()
    shutil.rmtree(folder / "cache")
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def mach(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_texts_travel_with_the_run(run: Path) -> None:
    texts = Run.open(run).class_texts
    assert texts is not None
    assert columns(texts) == [
        ["apple", "car", "ship", "fruit", "bank", "bank"],
        [("pomme", "Apfel"), ("auto",), (), (), (), ()],
        ["a round fruit", "", "", "", "money", "river"],
        ["http://x/1", "", "http://x/3", "", "", ""],
        [(3,), (), (), (), (), ()],
    ]


def test_people_read_names_and_may_ask_by_id_name_or_address(run: Path) -> None:
    model = load(run)
    assert model.names(range(6)) == ["apple", "car", "ship", "fruit", "bank", "bank"]
    assert model.classes.ids_of(["c:1", "car", "http://x/3", "c:6"]).tolist() == [0, 1, 2, 5]
    with pytest.raises(DataError, match="no class named 'bank'"):  # which of them?
        model.classes.ids_of("bank")


def test_answers_on_the_command_line_have_addresses(run: Path, tmp_path: Path) -> None:
    answer = json.loads(mach("query", run, "red apple 1", "--json", "-k", 6).stdout)
    known = {"apple": "http://x/1", "ship": "http://x/3"}
    assert answer["uris"] == [known.get(name, "") for name in answer["names"]]
    rows = save_rows(tmp_path / "rows.jsonl", ROWS[:3])
    mach("predict", run, rows, "-k", 2, "-o", tmp_path / "out.csv")
    header, first, *_ = (tmp_path / "out.csv").read_text().splitlines()
    assert header == "row,rank,id,score,name,uri,known"
    assert first.split(",")[5] == known.get(first.split(",")[4], "")
    for end in ("jsonl", "parquet"):
        assert mach("predict", run, rows, "-o", tmp_path / f"out.{end}").exit_code == 0
    assert "uris" in json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])


def test_rows_are_measured_by_id_name_and_address(run: Path, tmp_path: Path) -> None:
    rows = [("red apple", name) for name in ("c:1", "apple", "http://x/1", "bank")]
    measured = mach("evaluate", run, save_rows(tmp_path / "rows.jsonl", rows), "--json", "--at", "1")
    assert "1 class name of its rows left out, unknown to the run, such as 'bank'" in measured.stderr
    model = load(run)
    model.classes.rename("c:1", "Malus")
    assert model.names([0]) == ["Malus"]
    assert model.classes.ids_of(["Malus", "c:1"]).tolist() == [0, 0]
    rows = [("red apple", name) for name in ("c:1", "Malus", "http://x/1", "apple")]
    measured = mach("evaluate", run, save_rows(tmp_path / "more.jsonl", rows), "--json", "--at", "1")
    assert "1 class name of its rows left out, unknown to the run, such as 'apple'" in measured.stderr


def test_added_classes_have_texts_in_their_version(run: Path) -> None:
    model = load(run)
    model.classes.add("pear", texts=["a red fruit"], alternatives=[["poire", "pear"]], uris=["http://x/7"])
    model.classes.add(["plain"], examples=[["red car"]])
    for same in (model, load(run)):
        texts = same.answerer.catalogue.texts
        assert texts is not None
        assert [column[6:] for column in columns(texts)] == [
            ["pear", "plain"], [("poire",), ()], ["a red fruit", ""], ["http://x/7", ""], [(), ()],
        ]  # fmt: skip
        assert columns(texts)[0][:2] == ["apple", "car"]
    model.classes.rename("pear", "pears")
    assert model.answerer.catalogue.texts is not None
    assert list(model.answerer.catalogue.texts.names[6:]) == ["pears", "plain"]
    for _ in range(3):
        model.classes.undo()
    assert len(load(run).answerer.catalogue.texts or ()) == 6
    assert model.uri_function() is not None


def test_texts_of_an_added_class_come_from_the_command_line(run: Path, tmp_path: Path) -> None:
    entry = {"name": "pear", "texts": ["red"], "alternatives": ["poire"], "uri": "http://x/7"}
    (tmp_path / "new.jsonl").write_text(json.dumps(entry) + "\n")
    assert mach("classes", "add", run, "--from", tmp_path / "new.jsonl").exit_code == 0
    texts = load(run).answerer.catalogue.texts
    assert texts is not None
    assert (texts.spellings(6), texts.texts[6], texts.uris[6]) == (("pear", "poire"), "red", "http://x/7")


def test_what_is_no_text_is_refused_before_anything_changes(run: Path) -> None:
    model = load(run)
    with pytest.raises(DataError, match="class 'pear': alternatives \\[1\\]: need strings"):
        model.classes.add("pear", texts=["red"], alternatives=[[1]])  # type: ignore[list-item]
    with pytest.raises(DataError, match="uris: need one entry for each of the 1 names"):
        model.classes.add("pear", texts=["red"], uris=["a", "b"])
    assert model.classes.version == 0


def test_further_training_keeps_texts_and_takes_new_ones(run: Path, tmp_path: Path) -> None:
    load(run).classes.add("pear", texts=["a red fruit"], uris=["http://x/7"])
    rows = save_rows(tmp_path / "rows.jsonl", [("red boat", "c:3"), ("red plane", "plane")] * 20)
    data = {"train": rows, "cache": str(tmp_path / "cache")}
    start = {"training": {"start": str(run), "replay": 0.0, "epochs": 1}, "launch": OPTIONS["launch"]}
    texts = train(parse_config({"data": data} | start, "here"), tmp_path / "kept").run.class_texts
    assert texts is not None
    assert list(texts.names) == ["apple", "car", "ship", "fruit", "bank", "bank", "pear", "plane"]
    assert (texts.uris[0], texts.uris[6], texts.parents[0]) == ("http://x/1", "http://x/7", (3,))
    assert texts.alternatives[1] == ("auto",)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("names.offsets", ...),
        ("more", np.zeros(1, np.uint8)),
        ("texts.offsets", np.zeros(3, np.int64)),
        ("alternatives.indptr", np.arange(7)[::-1].copy()),
        ("alternatives.indptr", np.full(7, 2**62)),
        ("parents.ids", np.array([2**30], np.int32)),
        ("uris.utf8", np.full(20, 0xFF, np.uint8)),
    ],
)
def test_a_strangers_texts_are_refused_by_file_and_array(run: Path, name: str, array: Any) -> None:
    arrays, _ = map_tensors(run / FILE)
    changed = {key: np.array(value) for key, value in (arrays | {name: array}).items() if value is not ...}
    (run / FILE).write_bytes(tensor_bytes(changed, {}))

    def use() -> None:
        model = load(run)
        model.names(range(6))
        model.answerer.catalogue.uris(range(6))

    line = line_of(use)
    assert FILE in line
    assert name.partition(".")[0] in line


def test_a_file_of_no_tensors_is_refused(run: Path) -> None:
    (run / FILE).write_bytes(b"[]")
    assert FILE in line_of(lambda: load(run))
