"""Every verb that reads rows says what it leaves out of them, and takes a class name in any form."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from mach.model.loading import load
from tests.cli.test_cli import mach, values_of

NAMES = ["café", "thé", "crème", "pâté"]
OPTIONS = [
    f"--set={value}"
    for value in (
        "hashing.repetitions=1",
        "training.epochs=2",
        "training.precision=float32",
        "data.validation_fraction=0.0",
        "reranking.candidates=0",
        "launch.launcher=here",
    )
]


def rows(folder: Path, name: str, *more: tuple[str, str], n: int = 20) -> Path:
    lines = ["text,classes"] + [f"a cup of {name} {i % 3},{name}" for i in range(n) for name in NAMES]
    (folder / name).write_text("\n".join([*lines, *(",".join(row) for row in more)]) + "\n", encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("omissions")


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACH_CACHE", str(home / "cache"))


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A run whose training said what it left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACH_CACHE", str(home / "cache"))
        source = rows(home, "train.csv", ("more", ""), ("!?", "café"))
        result = mach("train", source, home / "run", *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert f"mach: {source}: 1 of 82 rows have no class, such as row 80\n" in result.stderr
    assert f"mach: {source}: 1 of 82 rows have no known feature, such as row 81\n" in result.stderr
    return home / "run"


@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_half_of_the_labels_never_vanish(tmp_path: Path, verb: str):
    source = rows(tmp_path, "rows.csv")
    (tmp_path / "names.txt").write_text("café\nthe\ncreme\npate\n", encoding="utf-8")
    result = mach(verb, source, tmp_path / "made", *OPTIONS, f"--set=data.classes={tmp_path / 'names.txt'}")
    assert result.exit_code == 2, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert "60 of 80 class names of its rows are not in data.classes, such as 'thé', 'crème', 'pâté'" in line
    assert not (tmp_path / "made").exists()


def test_prepare_says_what_it_leaves_out(tmp_path: Path, run: Path):
    source = rows(tmp_path, "rows.csv", ("x", ""), ("y", "new|class"))
    result = mach("prepare", source, tmp_path / "store")
    assert (result.exit_code, result.stderr) == (0, f"mach: {source}: 1 of 82 rows have no class, such as row 80\n")
    result = mach("prepare", source, tmp_path / "queries", "--like", run)
    assert (
        f"mach: {source}: 1 class name of its rows left out, unknown to the run, such as 'new|class'" in result.stderr
    )


@pytest.mark.parametrize("verb", ["evaluate", "calibrate", "predict"])
def test_verbs_that_ask_say_what_they_leave_out(tmp_path: Path, run: Path, verb: str):
    source = rows(tmp_path, "rows.csv", ("unheard", "café"), ("cup", "unheard"))
    result = mach(verb, run, source)
    assert result.exit_code == 0, result.stderr
    assert "1 class name of its rows left out, unknown to the run, such as 'unheard'" in result.stderr
    assert "1 of 82 rows have no known feature, such as row 80" in result.stderr


@pytest.mark.parametrize(("verb", "code"), [("evaluate", 2), ("calibrate", 2), ("predict", 0)])
def test_what_is_measured_is_mostly_known(tmp_path: Path, run: Path, verb: str, code: int):
    source = rows(tmp_path, "rows.csv", *[("cup", f"unheard {n}") for n in range(81)])
    result = mach(verb, run, source)
    assert result.exit_code == code, result.stderr
    assert "such as 'unheard 0', 'unheard 1', 'unheard 2'" in result.stderr
    assert ("81 of 161 class names of its rows are unknown to the run" in result.stderr) == bool(code)


@pytest.mark.parametrize("verb", ["evaluate", "calibrate", "predict"])
def test_rows_of_training_to_measure_on_are_told(home: Path, run: Path, tmp_path: Path, verb: str):
    others = rows(tmp_path, "others.csv", n=25)
    same = tmp_path / "copy.csv"
    same.write_text((home / "train.csv").read_text(encoding="utf-8"), encoding="utf-8")
    for source, is_told in ((home / "train.csv", True), (same, True), (others, False)):
        result = mach(verb, run, source)
        assert ("was trained on these rows" in result.stderr) == (is_told and verb != "predict"), result.stderr


def test_columns_of_rows_to_ask_about_are_those_of_training(run: Path, tmp_path: Path):
    (tmp_path / "others.csv").write_text("title;classes\na cup;the\n")
    result = mach("evaluate", run, tmp_path / "others.csv")
    assert (result.exit_code, "name its columns as those of the training rows" in result.stderr) == (2, True)


def test_a_run_that_is_trained_anew_says_which_column_differs(home: Path, run: Path):
    result = mach("train", home / "train.csv", run, *OPTIONS, "--text", "classes")
    assert result.exit_code == 2
    assert "data.text_columns: ['classes'] here, ['text'] there" in result.stderr


def test_a_forgotten_separator_is_named(tmp_path: Path):
    lines = ["text,classes", *(f"a {a} and {b},{a}|{b}" for a in NAMES for b in NAMES if a < b)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = 'set data.class_separator = "|"'
    result = mach("train", tmp_path / "rows.csv", tmp_path / "run", *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert (
        f"6 of 6 cells of classes hold '|', and each is read as one name: if it separates names, {said}"
        in result.stderr
    )
    result = mach("train", tmp_path / "rows.csv", tmp_path / "new", *OPTIONS, '--set=data.class_separator="|"')
    assert said not in result.stderr
    assert load(tmp_path / "new").n_classes == 4


def test_examples_without_a_feature_are_said(run: Path):
    added = mach("classes", "add", run, "milk", "--example", "a cup of milk", "--example", "unheard", "--text", "!")
    assert added.exit_code == 0, added.stderr
    assert "mach: 2 of 3 examples and texts have no known feature and are left out, of milk\n" in added.stderr
    with pytest.warns(UserWarning, match="1 of 2 queries have no known feature and are left out"):
        load(run).classes.upvote(["a cup", "unheard"], ["milk", "café"])
    assert mach("classes", "undo", run).exit_code == 0
    assert mach("classes", "undo", run).exit_code == 0


def test_a_class_name_is_taken_in_any_form(run: Path):
    model = load(run)
    for name in NAMES:
        decomposed = f" {unicodedata.normalize('NFD', name)}\t"
        assert model.classes.ids_of(decomposed).tolist() == model.classes.ids_of([name]).tolist()
        assert model.names(model.topk("a cup", k=1, allowed=[decomposed])[0]) == [name]
    decomposed = unicodedata.normalize("NFD", "thé")
    assert mach("classes", "rename", run, f"{decomposed} ", unicodedata.normalize("NFD", "  thé vért")).exit_code == 0
    assert values_of(mach("classes", "list", run, "--json"))[0]["name"] == "thé vért"
    for taken in ("cafe\u0301", " café"):
        result = mach("classes", "add", run, taken, "--text", "cup")
        assert (result.exit_code, "is taken" in result.stderr) == (2, True)
    for subset, asked in ((unicodedata.normalize("NFD", "été "), "été"), ("b", " b")):
        assert mach("classes", "subset", run, subset, unicodedata.normalize("NFD", "crème")).exit_code == 0
        answer = json.loads(mach("query", run, "a cup", "--allowed", asked, "--json").stdout)
        assert answer["names"] == ["crème"]
