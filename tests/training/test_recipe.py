"""The recipe fills what is left open, touches nothing that is given, and learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.config import completed, differing_keys, load_config, load_run_config, parse_config
from mach.errors import ConfigError
from mach.evaluation.accuracy import evaluate
from mach.model.loading import load
from mach.training.recipe import ROW_FEATURES, Shape, before_reading, fill
from mach.training.setup import FREE_KEYS, set_up
from mach.training.shard import ShardJob, train_shard
from tests.test_fixtures import FIXTURES


def open_config(**sections):
    return parse_config({"data": {"train": "x"}} | sections, "test")


@given(st.integers(1, 10**9), st.integers(1, 10**8), st.integers(1, 10**8))
def test_every_shape_gets_a_sane_configuration(n_rows, n_features, n_classes):
    filled = fill(open_config(), Shape(n_rows, n_features, n_classes))
    assert 2 <= (filled.hashing.buckets or 0) <= max(n_classes, 2)
    assert 256 <= filled.network.hidden[0] <= 1408
    assert 3 <= filled.training.epochs <= 15
    n_held_out = filled.data.validation_fraction * n_rows
    assert n_held_out == 0 if n_rows < 5000 else 499 <= n_held_out <= 2001
    assert fill(filled, Shape(7, 7, 7)) == filled  # nothing is open any more


def test_many_rows_get_more_buckets_longer_steps_and_less_dropout():
    found = [fill(open_config(), Shape(n, 90_000, 33_513)) for n in (42_000, 335_000)]
    keys = [(c.hashing.buckets, c.training.rate, c.network.dropout) for c in found]
    assert keys == [(512, 6e-3, 0.3), (2048, 1e-2, 0.023)]
    assert fill(open_config(), Shape(10**9, 90_000, 400_000)).hashing.buckets == 4096


def test_powers_follow_the_features_of_a_row_and_few_rows_get_wide_networks():
    lengths = (0, 8, 14.6, 16, 40, 57, 90)
    powers = [fill(open_config(), Shape(42_000, 90_000, 33_513, row_features=m)).network.power for m in lengths]
    assert powers == [1.0, 0.5, 0.74, 1.0, 1.0, 1.26, 1.5]
    widths = [fill(open_config(), Shape(n, 90_000, 33_513)).network.hidden[0] for n in (42_000, 335_000)]
    assert widths == [1024, 512]
    dropouts = [
        fill(open_config(**given), Shape(42_000, 90_000, 33_513)).network.dropout
        for given in ({}, {"network": {"hidden": [16]}}, {"network": {"hidden": [16], "dropout": 0.4}})
    ]
    assert dropouts == [0.3, 0.2, 0.4]


def test_an_order_is_learned_where_rows_are_enough_and_not_too_many():
    def found(n_rows=40_000, *, is_dense=False, row_classes=6.0, row_features=98, **sections):
        shape = Shape(n_rows, 20_000, 200_000, is_dense=is_dense, row_features=row_features, row_classes=row_classes)
        return fill(open_config(**sections), shape).reranking.pilots

    assert (found(), found(row_classes=28.0), found(5_000), found(300_000)) == (1, 3, 1, 1)
    assert found(row_features=15, row_classes=28.0) == 3
    for nothing in (
        found(4_999),
        found(300_001),
        found(is_dense=True),
        found(decoding={"aggregate": "min"}),
        found(reranking={"candidates": 0}),
        found(reranking={"pilots": 0}),
        found(training={"start": "there"}),
    ):
        assert nothing == 0
    assert found(reranking={"pilots": 2}) == 2


def test_epochs_are_the_whole_part_of_the_formula():
    for n_rows, n_epochs in ((49_060, 5), (45_000, 6)):
        assert fill(open_config(), Shape(n_rows, 12_558, 15_015)).training.epochs == n_epochs


def test_short_rows_of_few_classes_are_reranked_by_pairs_of_features():
    shapes = [Shape(40_000, 20_000, 20_000, row_features=m, row_classes=c) for m, c in ((17, 6), (90, 3), (17, 28))]
    assert [fill(open_config(), shape).reranking.pairs for shape in shapes] == [12, 0, 0]
    assert fill(open_config(reranking={"pairs": 3}), shapes[1]).reranking.pairs == 3
    assert fill(open_config(reranking={"pairs": 0}), shapes[0]).reranking.pairs == 0


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_a_run_of_before_is_gone_on_with_as_it_began(path: Path):
    old, _ = load_run_config(path / "config.toml")
    given = parse_config({"data": {"train": old.data.train, "cache": old.data.cache}}, "test")
    shape = Shape(2_000_000, 300_000, 400_000, row_features=8, row_classes=1, is_exclusive=True)
    assert differing_keys(fill(completed(given, old), shape), old, ignore=FREE_KEYS) == []


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"sampled": 0.5}}, "training.sampled is no key any more"),
        ({"network": {"keep": 0.5}}, "network.keep is no key any more"),
        ({"reranking": {"pairs": 65}}, "reranking.pairs = 65"),
        ({"reranking": {"pairs": 1}}, "one feature has no product with another"),
    ],
)
def test_what_cannot_be_asked_for_gets_one_line(sections, said):
    with pytest.raises(ConfigError) as caught:
        open_config(**sections)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_given_stays():
    given_keys: dict[str, dict] = {
        "hashing": {"repetitions": 1, "heads": 3, "buckets": 10},
        "network": {"hidden": [9], "dropout": 0.9, "weights": "float32"},
        "training": {"epochs": 1, "batch": 3, "rate": 1.0},
        "reranking": {"candidates": 0},
    }
    config = open_config(**given_keys)
    filled = fill(config, Shape(50_000, 1000, 1000))
    for section, keys in given_keys.items():
        assert {key: getattr(getattr(filled, section), key) for key in keys} == keys
    assert filled.data.validation_fraction == 0.0  # there is nothing to choose with them
    assert before_reading(config).data.row_features == ROW_FEATURES
    zero = open_config(data={"train": "x", "row_features": 0})
    assert before_reading(zero) == zero


@pytest.mark.parametrize("sections", [{"network": {"hidden": []}}, {"network": {"trunk": "a:B"}}])
def test_networks_of_another_kind_keep_the_defaults(sections):
    config = open_config(**sections)
    filled = fill(config, Shape(50_000, 1000, 1000))
    assert (filled.network, filled.training, filled.hashing) == (config.network, config.training, config.hashing)
    dense = fill(open_config(), Shape(50_000, 1000, 1000, is_dense=True))
    assert (dense.reranking.candidates, dense.hashing.heads, dense.training.batch) == (0, 1, 256)


def test_keys_left_out_are_those_of_another_configuration():
    mine, theirs = open_config(training={"epochs": 2}), open_config(training={"epochs": 3, "rate": 0.5})
    both = completed(mine, theirs)
    assert (both.training.epochs, both.training.rate) == (2, 0.5)


def test_four_lines_are_a_run_that_learns_and_goes_on_as_it_began(planted: Path, tmp_path: Path):
    lines = f'[data]\ntrain = "{planted / "train.txt"}"\ntest = "{planted / "test.txt"}"\n'
    (tmp_path / "config.toml").write_text(lines)
    config = load_config(tmp_path / "config.toml", [f"data.cache={tmp_path / 'cache'}", "reranking.candidates=0"])
    run, store = set_up(config, tmp_path / "run")
    assert run.config.training.batch == 512
    assert store.row_features == ROW_FEATURES
    train_shard(ShardJob(str(run.path), str(store.path), (0, 1, 2, 3)))
    model = load(run.path)
    from mach.data.prepare import prepare

    test = prepare(run.config.data, run.config.text, str(planted / "test.txt"), like=run.reference())
    assert evaluate(model, test, curve=False)[-1]["P@1"] > 0.9
    again, _ = set_up(config, tmp_path / "run")
    assert again.config == run.config
    other = load_config(tmp_path / "config.toml", [f"data.cache={tmp_path / 'cache'}", "training.epochs=7"])
    with pytest.raises(ConfigError, match="training.epochs"):
        set_up(other, tmp_path / "run")


def test_a_store_keeps_the_features_that_it_was_prepared_with(planted: Path, tmp_path: Path):
    from mach.data.prepare import prepare

    config = open_config(data={"train": str(planted / "train.txt"), "row_features": 2})
    store = prepare(config.data, config.text, config.data.train, tmp_path / "store")
    assert int((store.feature_indptr[1:] - store.feature_indptr[:-1]).max()) == 2
    run, _ = set_up(open_config(data={"train": str(tmp_path / "store")}), tmp_path / "run")
    assert run.config.data.row_features == run.manifest.row_features == 2
    stated = open_config(data={"train": str(tmp_path / "store"), "row_features": 3})
    with pytest.raises(ConfigError, match="was prepared with 2: leave the key out"):
        set_up(stated, tmp_path / "other")
