"""Answers as people want them: probabilities where there are any, a header, a threshold, names of rows, near words."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from starlette.testclient import TestClient

from mach.cli import main
from mach.config import parse_config
from mach.errors import ConfigError
from mach.model.loading import load
from mach.serving.server import Settings
from mach.training import conductor


def mach(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run over texts of one word a class, and queries with keys."""
    folder = tmp_path_factory.mktemp("answers")
    draw = np.random.default_rng(0)
    names = [f"class {word}" for word in ("ant", "bee", "cat", "dog", "elk", "fox")]
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["isbn", "text", "classes"])
        for n in range(400):
            k, noise = draw.integers(6), draw.integers(30)
            table.writerow([f"i-{n:03}", f"{names[k]} word{noise}", names[k if draw.random() < 0.9 else (k + 1) % 6]])
    tree = {
        "data": {"train": str(folder / "rows.csv"), "cache": str(folder / "cache"), "validation_fraction": 0.3},
        "hashing": {"repetitions": 2, "buckets": 4, "heads": 1},
        "network": {"hidden": []},
        "reranking": {"candidates": 0},
        "training": {"epochs": 6, "batch": 32, "rate": 0.02},
    }
    conductor.train(tree, folder / "run", launcher="here").close()
    return folder / "run"


def test_a_calibrated_run_answers_with_probabilities_below_a_header(run: Path):
    said = mach("query", run, "the cat", "a dog").stdout.splitlines()
    assert said[0].split() == ["probability", "id", "class"]
    assert said[0].index("probability") + len("probability") == said[2].index(said[2].split()[0]) + 6
    assert said[1] == "the cat"
    assert said[2].endswith("  class cat")
    values = [float(line.split()[0]) for line in said[2:8]]
    assert 0.5 < values[0] <= 1
    assert values[-1] >= 0
    assert [line for line in said if "probability" in line] == said[:1]
    scores = mach("query", run, "the cat", "--scores").stdout.splitlines()
    assert scores[0].split() == ["score", "id", "class"]
    assert float(scores[2].split()[0]) < 0, "a mean of logarithms"
    cut = mach("query", run, "the cat", "-k", 50)
    assert (cut.stdout.splitlines(), cut.stderr) == (said[:8], "mach: -k 50: the run has 6 classes, so all are told\n")
    plain = json.loads(mach("query", run, "the cat", "--json", "--repetitions", "0").stdout)
    assert "scores" in plain, "the calibration is for all repetitions"


def test_a_query_without_a_known_word_is_answered_by_the_shares_of_rows(run: Path):
    found = json.loads(mach("query", run, "zzz", "--json").stdout)
    by_score = json.loads(mach("query", run, "zzz", "--json", "--scores").stdout)
    values = found["probabilities"]
    assert not found["known"]
    assert values == sorted(values, reverse=True)
    assert sorted(found["ids"]) == sorted(by_score["ids"])
    with load(run) as model:
        ids, chances = model.topk(["zzz", "the cat"], probabilities=True)
        client = TestClient(Settings((str(run),)).app())
        with client:
            told = client.post("/v1/projects/run/suggest", data={"text": "zzz"}).json()["results"]
        assert found["ids"] == ids[0].tolist() == [one["id"] for one in told] != by_score["ids"]
        assert ids[1].tolist() == model.topk("the cat")[0].tolist()
        assert (np.diff(chances) <= 0).all()


def test_a_threshold_leaves_out_the_others(run: Path):
    every = json.loads(mach("query", run, "the cat", "--json").stdout)
    few = json.loads(mach("query", run, "the cat", "--json", "--threshold", every["probabilities"][1]).stdout)
    assert few["ids"] == every["ids"][:2]
    assert few["names"] == every["names"][:2]
    assert (
        mach("query", run, "the cat", "--threshold", "1").stdout.splitlines()[2] == "  no class has a probability of 1"
    )
    for number in ("2", "-0.1", "nan"):
        refused = mach("query", run, "the cat", "--threshold", number)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"--threshold {number}: a probability is 0 to 1" in refused.stderr
    by_score = json.loads(mach("query", run, "the cat", "--json", "--scores", "--threshold", "-1000").stdout)
    assert len(by_score["scores"]) == 6


def test_a_number_that_is_none_is_called_so(run: Path):
    assert "'five' is not a valid whole number" in mach("query", run, "the cat", "-k", "five").stderr


def test_a_threshold_needs_probabilities_or_says_scores(trained: Path):
    assert "mach calibrate" in mach("query", trained, "1:1", "--threshold", "0.3").stderr
    assert mach("query", trained, "1:1", "--threshold", "0.3", "--scores").exit_code == 0
    assert "scores" in json.loads(mach("query", trained, "1:1", "--json").stdout)


def test_ids_of_rows_are_carried_into_every_format(run: Path, tmp_path: Path):
    rows = run.parent / "rows.csv"
    isbns = [f"i-{n:03}" for n in range(400)]
    lines = [json.loads(line) for line in mach("predict", run, rows, "--id", "isbn", "-k", 2).stdout.splitlines()]
    assert [line["row"] for line in lines] == isbns
    for name in ("out.CSV", "out.Parquet", "out.NPZ"):
        assert mach("predict", run, rows, "--id", "isbn", "-k", 2, "-o", tmp_path / name).exit_code == 0
    with (tmp_path / "out.CSV").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["row"] for row in table[::2]] == isbns
    assert "probability" in table[0]
    assert pq.read_table(tmp_path / "out.Parquet")["row"].to_pylist() == isbns
    with np.load(tmp_path / "out.NPZ") as arrays:
        assert arrays["row"].tolist() == isbns


def test_a_column_of_ids_that_is_not_there_is_one_line(run: Path, planted: Path, trained: Path):
    wrong = mach("predict", run, run.parent / "rows.csv", "--id", "isnb")
    assert wrong.exit_code == 2
    assert "no column 'isnb': did you mean isbn?" in wrong.stderr
    assert "no table" in mach("predict", trained, planted / "test.txt", "--id", "isbn").stderr


@pytest.mark.parametrize("verb", ["query", "train"])
def test_a_verb_on_nothing_shows_its_usage(verb: str):
    done = mach(verb)
    assert done.exit_code == 2
    assert f"{verb} [OPTIONS]" in done.output
    assert "--trunk" in done.output


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("training.epoch=3", "unknown key training.epoch: did you mean epochs?"),
        ("text.epochs=3", "unknown key text.epochs: did you mean training.epochs?"),
        ("trainning.epochs=3", "unknown key trainning: did you mean training?"),
        ("epochs=3", "did you mean training.epochs?"),
        ("training.effort=Fats", "did you mean fast?"),
    ],
)
def test_a_key_or_value_that_is_nearly_right_is_shown(typed: str, words: str):
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"train": "x"}}, "test", [typed])
    assert words in str(caught.value)


def test_a_word_that_nothing_is_near_has_no_suggestion():
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"train": "x"}}, "test", ["training.zzz=3"])
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "means"),
    [("512", [512]), ("512,256", [512, 256]), ("[]", []), ("[512]", [512])],
)
def test_a_list_needs_no_brackets(typed: str, means: list[int]):
    assert parse_config({"data": {"train": "x"}}, "test", [f"network.hidden={typed}"]).network.hidden == means


def test_a_list_of_words_needs_neither_brackets_nor_quotes():
    config = parse_config({"data": {"train": "x"}}, "test", ["data.text_columns=title, about"])
    assert config.data.text_columns == ["title", "about"]


def test_a_verb_that_is_nearly_right_is_shown():
    assert "did you mean train?" in mach("trian").output


def test_one_is_no_plural(run: Path):
    assert mach("classes", "subset", run, "some", "class cat").stderr.splitlines()[-1].count("1 class;") == 1
    wrong = mach("classes", "remove", run, "class cta")
    assert "did you mean class cat?" in wrong.stderr
