from __future__ import annotations

from pathlib import Path

import pytest

from mach import config as config_module
from mach.config import Config, differing_keys, load_config, parse_config, to_toml
from mach.errors import ConfigError

MINIMAL = {"data": {"train": "train.txt"}}


def test_defaults_fill_everything_but_the_data():
    config = parse_config(MINIMAL, "test")
    assert config.hashing.repetitions >= 1
    with pytest.raises(ConfigError, match=r"^test: data is missing$"):
        parse_config({}, "test")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=3", ["unknown key training.epoch", "epochs"]),
        ("trainin.epochs=3", ["unknown key trainin", "training"]),
        ("training.epochs=many", ["training.epochs = 'many'"]),
        ("training.epochs=0", ["training.epochs = 0", "greater than or equal to 1"]),
        ("network.hidden=[0]", ["hidden = [0]", "at least 1"]),
        ("network.dropout=1.0", ["network.dropout = 1.0", "less than 1"]),
        ("text.words=[2, 1]", ["words = [2, 1]", "shortest"]),
        ("epochs=3", ["section.key=value"]),
        ("training.epochs", ["section.key=value"]),
        ("training.epochs.deep=1", ["training.epochs"]),
        ("training.epochs=true", ["training.epochs = True"]),
        ("launch.host_memory=input", ["launch.host_memory is no key any more", "ledger"]),
    ],
)
def test_bad_values_are_named_in_one_line(tmp_path: Path, override: str, words: list[str]):
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = "train.txt"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_overrides_take_toml_values_and_bare_words(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntrain = "a.txt"\n[training]\nepochs = 3\n')
    config = load_config(path, ["training.epochs=5", "data.train=b c.txt", "network.hidden=[8, 4]"])
    assert (config.training.epochs, config.data.train, config.network.hidden) == (5, "b c.txt", [8, 4])


def test_toml_round_trip_keeps_every_value(tmp_path: Path):
    config = parse_config(
        {
            "data": {"train": 'quo"te\\back\nline ü', "class_separator": "\t"},
            "network": {"trunk": "a.b:C", "trunk_options": {"depth": 2, "name": "x", "nested": {"a": [1, 2]}}},
            "training": {"rate": 1e-4},
        },
        "test",
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path) == config


def test_a_missing_or_broken_file_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read configuration .*missing.toml"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(ConfigError, match="broken.toml is not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_differing_keys_name_both_values():
    mine = parse_config({**MINIMAL, "training": {"epochs": 3}}, "mine")
    theirs = parse_config({**MINIMAL, "training": {"epochs": 4}, "launch": {"workers": 7}}, "theirs")
    assert differing_keys(mine, theirs, ignore=("launch.",)) == ["training.epochs: 3 here, 4 there"]
    assert differing_keys(mine, mine) == []


def test_every_key_is_described_or_named_after_its_meaning():
    undescribed = {"epochs", "data", "text", "hashing", "network", "training", "decoding", "launch"}
    for section in Config.model_fields.values():
        for key, field in getattr(section.annotation, "model_fields", {}).items():
            assert field.description or key in undescribed, key


def test_a_retired_key_is_refused_in_a_new_configuration_and_kept_apart_in_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(config_module.RETIRED, "training.dance", "steps are steps")
    (tmp_path / "config.toml").write_text('[data]\ntrain = "x"\n[training]\ndance = 3\nepochs = 2\n')
    with pytest.raises(ConfigError, match=r"config.toml: training.dance is no key any more, leave it out: steps"):
        load_config(tmp_path / "config.toml")
    config, retired = config_module.load_run_config(tmp_path / "config.toml", ["training.batch=7"])
    assert (config.training.epochs, config.training.batch, retired) == (2, 7, {"training.dance": 3})


@pytest.mark.parametrize("override", ["training.epoch=3", "training.epochs=-3", "nosection.key=1"])
def test_what_was_set_is_named_rather_than_the_data(override):
    with pytest.raises(ConfigError, match=f"^--set {override}: "):
        parse_config({"data": {"train": "rows.csv"}}, "rows.csv", ["training.batch=8", override])
    with pytest.raises(ConfigError, match=r"^rows.csv: .*both switched off"):  # which min_rows did not do
        parse_config({"data": {"train": "rows.csv"}, "text": {"words": None}}, "rows.csv", ["text.min_rows=2"])
    with pytest.raises(ConfigError, match=r"^rows.csv: training.rate"):
        parse_config({"data": {"train": "rows.csv"}, "training": {"rate": -1.0}}, "rows.csv", ["training.batch=8"])
