"""The command line as a user types it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from mach.cli import main
from mach.cli.classes import classes
from mach.config import Config, DataConfig, TextConfig, load_config, parse_config, to_toml
from mach.data.prepare import prepare
from mach.training.recipe import Shape, fill
from tests.conftest import N_CLASSES


def mach(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def values_of(result: Result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_surface_is_frozen():
    """Verbs and options are a promise: change this list only with the changelog."""
    surface = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in [*main.commands.items(), *(("classes " + n, c) for n, c in classes.commands.items())]
    }
    assert surface == {
        "prepare": ["--config", "--json", "--like", "--set", "source", "store"],
        "plan": [
            "--buckets", "--classes", "--device-memory", "--features", "--hidden", "--json", "--memory",
            "--parameters", "--repetitions", "--workers", "-B", "-R",
        ],
        "train": [
            "--address", "--class-table", "--classes", "--dry-run", "--effort", "--from", "--launcher", "--minutes",
            "--repetitions", "--separator", "--set", "--text", "--trunk", "--workers", "config", "run",
        ],
        "status": ["--json", "run"],
        "evaluate": [
            "--address", "--at", "--curve", "--json", "--launcher", "--reliability", "--repetitions", "--rerank",
            "--tail", "--trunk", "--workers", "data", "run",
        ],
        "predict": [
            "--address", "--allowed", "--id", "--launcher", "--output", "--probabilities", "--repetitions", "--rerank",
            "--tail", "--threshold", "--trunk", "--workers", "-k", "-o", "data", "run",
        ],
        "query": [
            "--address", "--allowed", "--explain", "--json", "--launcher", "--probabilities", "--project",
            "--repetitions", "--rerank", "--tail", "--threshold", "--token-file", "--trunk", "--url", "--workers", "-k",
            "queries", "run",
        ],
        "calibrate": ["--address", "--json", "--launcher", "--repetitions", "--trunk", "--workers", "data", "run"],
        "report": ["--images", "--output", "--trunk", "-o", "others", "run"],
        "info": ["--json", "--trunk", "--verify", "run"],
        "serve": [
            "--address", "--host", "--language", "--launcher", "--learn", "--no-auth", "--port", "--queue",
            "--token-file", "--workers", "runs",
        ],
        "warm-up": [],
        "classes": [],
        "classes add": ["--by", "--example", "--from", "--text", "--trunk", "name", "run"],
        "classes associate": ["--trunk", "run", "source", "target"],
        "classes list": ["--all", "--history", "--json", "--trunk", "run"],
        "classes remove": ["--trunk", "chosen", "run"],
        "classes rename": ["--trunk", "chosen", "name", "run"],
        "classes subset": ["--trunk", "chosen", "name", "run"],
        "classes undo": ["--trunk", "run"],
        "classes upvote": ["--trunk", "chosen", "query", "run"],
    }  # fmt: skip


def test_help_and_import_stay_light():
    code = "import sys, mach, mach.cli; "
    code += "print(sorted({'torch', 'sklearn', 'ray', 'numba', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
    for name in main.commands:
        assert mach(name, "--help").exit_code == 0


def test_it_runs_with_the_older_click_of_annif():
    code = "import click; click.ParamType.__class_getitem__ = None; import mach.cli"  # no generic before click 8.4
    subprocess.run([sys.executable, "-c", code], check=True)


def test_train_evaluate_status_and_info(config: Config, tmp_path: Path):
    (tmp_path / "planted.toml").write_text(to_toml(config, brief=True))
    run = tmp_path / "run"
    result = mach("train", tmp_path / "planted.toml", run, "--repetitions", "0,2", "--set", "training.epochs=6")
    assert result.exit_code == 0, result.stderr
    assert "2 of 3 repetitions finished" in result.stderr
    assert result.stdout == ""
    status = values_of(mach("status", run, "--json"))
    assert [row["state"] for row in status] == ["finished", "waiting", "finished"]
    assert status[0]["epoch"] == 6
    curve = values_of(mach("evaluate", run, "--json", "--at", "1,2"))
    assert [row["n_repetitions"] for row in curve] == [1, 2]
    assert curve[-1]["P@1"] > 80
    assert {"P@2", "nDCG@2", "PSP@2", "recall@2"} <= curve[0].keys()
    assert values_of(mach("info", run, "--json"))["repetitions"] == [0, 2]
    table = mach("evaluate", run, "--no-curve")
    assert "P@1" in table.stdout
    assert mach("info", run).stdout.startswith("path")


def test_a_table_needs_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books.csv").write_text("title,about,subjects\n" + 9 * "sour,apple,fruit|green\nripe,plum,fruit|blue\n")
    columns = ["--text", "title, about", "--classes", "subjects", "--separator", "|", "--set", "data.cache=cache"]
    planned = mach("train", "books.csv", *columns, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    (tmp_path / "same.toml").write_text(planned.stdout)  # all of it: the ledger stands in comments
    data = load_config(tmp_path / "same.toml").data
    assert "\n# buckets " in planned.stdout
    assert (data.train, data.text_columns, data.class_column) == ("books.csv", ["title", "about"], "subjects")
    assert (data.class_separator, data.cache) == ("|", "cache")
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_ledger_and_trains_nothing(config: Config, tmp_path: Path):
    (tmp_path / "planted.toml").write_text(to_toml(config))
    result = mach("train", tmp_path / "planted.toml", tmp_path / "run", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "rounds of training" in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_second_warm_up_finds_all_kernels_compiled():
    done = mach("warm-up")  # the first one, where nobody has installed by `scripts/environment`
    assert done.exit_code == 0
    if done.stderr != "all kernels are compiled\n":
        done = mach("warm-up")
    assert done.stderr == "all kernels are compiled\n"


@pytest.mark.parametrize(("effort", "given"), [("fast", ["--effort", "fast"]), ("best", [])])
def test_a_dry_run_says_the_effort_and_what_it_decides(planted: Path, tmp_path: Path, effort: str, given: list[str]):
    said = mach("train", planted / "train.txt", "--dry-run", "--set", f"data.cache={tmp_path}", *given).stdout
    rows = {line[2:46].strip(): line[46:].split()[0] for line in said.splitlines() if line[46:].strip()}
    shape = Shape.of(prepare(DataConfig(train="x", cache=str(tmp_path)), TextConfig(), str(planted / "train.txt")))
    chosen = fill(parse_config({"data": {"train": "x"}, "training": {"effort": effort}}, "test"), shape)
    assert rows["effort"] == effort
    assert rows["epochs"] == str(chosen.training.epochs)
    assert rows["repetitions"] == str(chosen.hashing.repetitions)
    assert rows["pilots"] == str(chosen.reranking.pilots)


def test_plan_keeps_the_budget():
    rows = values_of(mach("plan", "--classes", 26296, "--features", 77412, "--memory", "400MB", "--json"))
    assert rows["model on disk"] <= 400e6
    small = values_of(mach("plan", "--classes", 26296, "--features", 77412, "--parameters", 170_000_000, "--json"))
    assert small["parameters"] <= 170_000_000
    result = mach("plan", "--classes", 26296, "--features", 77412, "--memory", "3kB")
    assert result.exit_code == 2
    assert "raise the budget" in result.stderr


def test_prepare_says_what_it_read(planted: Path, tmp_path: Path):
    described = values_of(mach("prepare", planted / "train.txt", tmp_path / "store", "--json"))
    assert (described["n_rows"], described["n_classes"]) == (3000, N_CLASSES)
    assert mach("prepare", planted / "test.txt", tmp_path / "test", "--like", tmp_path / "store").exit_code == 0


def test_an_unknown_ending_is_refused_before_rows_are_read(trained: Path, tmp_path: Path):
    refused = mach("predict", trained, tmp_path / "no rows.txt", "-o", tmp_path / "top.xyz")
    assert refused.exit_code == 2
    assert "top.xyz: the ending must be one of .jsonl, .csv, .parquet, .npz" in refused.stderr


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "npz"])
def test_predictions_in_every_format(trained: Path, planted: Path, tmp_path: Path, ending: str):
    path = tmp_path / f"out.{ending}"
    result = mach("predict", trained, planted / "test.txt", "-o", path, "-k", 4)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in mach("predict", trained, planted / "test.txt", "-k", 4).stdout.splitlines()]
    assert len(lines) == 400
    expected = np.array([line["ids"] for line in lines])
    if ending == "npz":
        with np.load(path) as arrays:
            np.testing.assert_array_equal(arrays["ids"], expected)
    elif ending == "parquet":
        table = pq.read_table(path).to_pylist()
        assert [row["ids"] for row in table] == expected.tolist()
        assert table[0]["names"][0] == f"class number {expected[0, 0]}"
    elif ending == "csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["id"]) for row in rows] == expected.ravel().tolist()
        assert rows[5] | {"row": "1", "rank": "2"} == rows[5]
    else:
        assert [json.loads(line) for line in path.read_text().splitlines()] == lines


def test_queries_from_arguments_and_stdin(trained: Path, planted: Path):
    line = (planted / "test.txt").read_text().splitlines()[1]
    classes, _, features = line.partition(" ")
    answer = values_of(mach("query", trained, features, "-k", 3, "--json"))
    assert set(map(int, classes.split(","))) <= set(answer["ids"])
    assert answer["names"][0] == f"class number {answer['ids'][0]}"
    piped = mach("query", trained, "-", "-k", 3, stdin=f"{features}\n\n{features}\n")
    assert piped.stdout.count(features) == 2
    assert f"class number {answer['ids'][0]}" in piped.stdout
    assert mach("query", trained, "-", stdin="").exit_code == 0
    nothing = mach("query", trained, stdin="")
    assert nothing.exit_code == 2
    assert "standard input is empty" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{tmp}/missing.toml"], ["cannot read configuration", "missing.toml"]),
        (["train", "{tmp}/config.toml", "--set", "training.epoch=3"], ["unknown key training.epoch"]),
        (["train", "{tmp}/config.toml", "{tmp}/new", "--set", "data.train={tmp}/none.txt"], ["none.txt"]),
        (["train", "{tmp}/config.toml", "{tmp}/new", "--repetitions", "7"], ["repetitions 7", "0-2"]),
        (["train", "{tmp}/config.toml", "{tmp}/new", "--repetitions", "x"], ["'x' is no number"]),
        (["evaluate", "{tmp}/nothing"], ["nothing is not a run directory"]),
        (["evaluate", "{run}", "{tmp}/none.txt"], ["none.txt"]),
        (["evaluate", "{run}", "--at", "one"], ["'one' is no number"]),
        (["evaluate", "{run}", "{planted}/unlabelled.txt"], ["unlabelled.txt has no row with a known class"]),
        (["calibrate", "{run}", "{planted}/unlabelled.txt"], ["unlabelled.txt has no row with a known class"]),
        (["predict", "{run}", "{planted}/test.txt", "-o", "{tmp}/out.pickle"], [".jsonl, .csv, .parquet, .npz"]),
        (["predict", "{run}", "{planted}/test.txt", "-o", "{tmp}/no/such/out.csv"], ["out.csv", "No such file"]),
        (["query", "{run}", "black queen"], ["black queen", "index:value"]),
        (["query", "{run}", "99999:1"], ["99999:1"]),
        (["query", "{run}", " -1:1"], ["-1:1", "out of range"]),
        (["query", "{run}", "3:1 3:2"], ["3:1 3:2", "repeated"]),
        (["evaluate", "{run}", "--at", "1000000000"], ["1000000000"]),
        (["train", "{tmp}/config.toml", "{tmp}/new", "--set", "training.rate=inf"], ["training.rate", "finite"]),
        (["train", "{tmp}/config.toml", "{tmp}/new", "--from", "{tmp}/none"], ["{tmp}/none", "is not a run directory"]),
        (["train", "{tmp}/config.toml", "{tmp}/new", "--set", "training.patience=2"], ["training.patience", "no key"]),
        (
            ["train", "{tmp}/config.toml", "{tmp}/new", "--set", "training.effort=more"],
            ["training.effort", "'balanced'"],
        ),
        (
            ["train", "{tmp}/config.toml", "{tmp}/new", "--set", "network.trunk=os:system"],
            ["os:system", "never imports"],
        ),
        (["train", "{tmp}/config.toml", "{tmp}/new", "--trunk", "no.such:Trunk"], ["no.such:Trunk", "PYTHONPATH"]),
        (["train", "{tmp}/config.toml", "{tmp}/new", "--trunk", "trunk.py"], ["'trunk.py'", "package.module:Class"]),
        (["query", "{run}", "--trunk", "no.such:Trunk", "1:1"], ["{run}/config.toml", "no.such:Trunk"]),
        (["train", "{tmp}/config.toml", "--repetitions", "1-0"], ["1-0", "ascending"]),
        (["plan", "--classes", "1000", "--features", "10", "--memory", "inf"], ["inf"]),
        (["plan", "--classes", "1000", "--features", "10", "--memory", "0MB"], ["0"]),
        (["query", "{run}", "-k", "0", "1:1"], ["0"]),
        (["plan", "--classes", "1000", "--features", "10", "--memory", "much"], ["--memory much", "200MB"]),
        (["prepare", "{planted}/names.txt", "{tmp}/store"], ["names.txt", "line 1"]),
        (["train", "{one}", "{tmp}/run", "--set", "data.cache={one}.d"], ["one class alone", "--separator"]),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    config: Config, trained: Path, planted: Path, tmp_path: Path, arguments: list[str], words: list[str]
):
    (tmp_path / "config.toml").write_text(to_toml(config))
    (planted / "one.csv").write_text("text,classes\nred apple,a\ngreen apple,a\n")
    places = {"tmp": tmp_path, "run": trained, "planted": planted, "one": planted / "one.csv"}
    result = mach(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith(("mach: ", "Error: "))
    for word in words:
        assert word.format(**places) in lines[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml"]


def test_output_that_cannot_be_written_is_one_line(trained: Path):
    command = [sys.executable, "-c", "from mach.cli import main; main()", "info", str(trained)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.decode()) == (2, "mach: standard output: No space left on device\n")


def test_an_unfinished_run_is_exit_code_3(config: Config, trained: Path, tmp_path: Path):
    result = mach("evaluate", trained, "--repetitions", "9")
    assert result.exit_code == 3
    assert "[9] are not finished" in result.stderr


def test_every_option_is_documented():
    for command in main.commands.values():
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (command.name, parameter.name)
