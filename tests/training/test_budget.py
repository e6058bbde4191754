"""A budget of minutes: what is chosen for it, by a planted rate."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import mach
from mach.cli import main
from mach.config import Config, parse_config
from mach.errors import ConfigError
from mach.training import budget, recipe
from mach.training.budget import choices, within
from mach.training.work import Work

SHAPE = recipe.Shape(n_rows=40_000, n_features=80_000, n_classes=26_000, row_features=90.0, row_classes=2.0)


def work_of(config: Config) -> Work:
    return Work(recipe.fill(config, SHAPE), SHAPE.n_rows, SHAPE.n_classes, SHAPE.row_features, SHAPE.row_classes)


def config_of(**sections: dict) -> Config:
    return parse_config({"data": {"train": "x"}, "launch": {"workers": 1}} | sections, "test")


def test_choices_go_from_the_most_to_the_least_and_each_is_sooner_done():
    found = choices(config_of(), work_of, 1.0)
    seconds = [choice.seconds for choice in found]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0] / 20
    assert [choice.config.training.effort for choice in found] == ["best"] + 2 * ["balanced"] + 5 * ["fast"]
    assert [choice.seconds for choice in choices(config_of(), work_of, 3.0)] == pytest.approx([3 * s for s in seconds])


def test_what_is_given_stays():
    given = config_of(training={"effort": "balanced", "epochs": 9}, reranking={"pilots": 2})
    for choice in choices(given, work_of, 1.0):
        filled = work_of(choice.config).config
        assert filled.training.epochs == 9
        assert filled.training.effort != "best"
        assert filled.reranking.pilots == 2


@pytest.mark.parametrize("rung", range(5))
def test_the_most_that_fits_is_taken_and_it_is_said_what_is_left_out(rung: int, monkeypatch: pytest.MonkeyPatch):
    found = choices(config_of(), work_of, 2.0)
    monkeypatch.setattr(budget, "measured", lambda *given: 2.0)
    monkeypatch.setattr(budget, "resolve", lambda config, store, trunk: (config, None, None))
    monkeypatch.setattr(Work, "of", lambda config, store: work_of(config))
    said: list[str] = []
    minutes = (found[rung].seconds + 7.5) / 60 / budget.USED
    options = {"say": said.append, "trunk": None}
    assert within(config_of(), None, minutes, so_far=lambda: 7.0, **options) == found[rung].config  # type: ignore[arg-type]
    assert found[rung].text in said[0]
    assert len(said) == 1 + (rung > 0)
    assert rung == 0 or f"left out {found[rung - 1].text}" in said[1]
    within(config_of(), None, 0.001, so_far=lambda: 0.0, **options)  # type: ignore[arg-type]
    assert found[-1].text in said[-2]
    assert "too few" in said[-1]


def test_a_run_is_made_as_its_minutes_say_and_goes_on_so(planted: Path, tmp_path: Path):
    told = io.StringIO()
    tree = {
        "data": {"train": str(planted / "train.txt"), "cache": str(tmp_path / "cache")},
        "training": {"batch": 64},
        "reranking": {"candidates": 0},
    }
    train = partial(mach.train, tree, tmp_path / "run", console=Console(file=told, width=200))
    run = train(minutes=1e-6).run
    assert (run.config.hashing.repetitions, run.config.training.epochs) == (1, 1)
    assert "1e-06 minutes: effort fast, 1 repetition, 1 epoch, 0 pilots, no re-ranker; about " in told.getvalue()
    assert "1e-06 minutes: too few" in told.getvalue()
    assert train(minutes=60).run.config.training.epochs == 1
    assert "60 minutes: the run goes on with the effort that it began with" in told.getvalue()
    with pytest.raises(ConfigError, match=r"minutes = -1: give more than 0"):
        train(minutes=-1)


def test_a_dry_run_says_what_its_minutes_choose(planted: Path, tmp_path: Path):
    given = ("--minutes", "1e-6", "--dry-run", "--set", f"data.cache={tmp_path}", "--set", "training.batch=64")
    done = CliRunner().invoke(main, ["train", str(planted / "train.txt"), str(tmp_path / "run"), *given])
    assert done.exit_code == 0, done.stderr
    assert "minutes: effort fast, 1 repetition, 1 epoch" in done.stderr
    rows = {line[2:46].strip(): line[46:].split()[0] for line in done.stdout.splitlines() if line[46:].strip()}
    assert (rows["effort"], rows["epochs"], rows["repetitions"]) == ("fast", "1", "1")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_run_that_has_begun_says_that_its_effort_stays(trained: Path):
    done = CliRunner().invoke(main, ["train", str(trained), "--minutes", "5", "--dry-run"])
    assert done.exit_code == 0, done.stderr
    assert "5 minutes: the run goes on with the effort that it began with" in done.stderr
