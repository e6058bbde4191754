"""The recipe fills what is left open, touches nothing that is given, and learns."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import completed, differing_keys, load_config, load_run_config, parse_config
from mach.errors import ConfigError
from mach.model.accuracy import evaluate
from mach.model.loading import load
from mach.training.recipe import ROW_FEATURES, Shape, before_reading, fill
from mach.training.setup import FREE_KEYS, set_up
from mach.training.shard import ShardJob, train_shard
from tests.test_fixtures import FIXTURES


def open_config(**sections):
    return parse_config({"data": {"train": "x"}} | sections, "test")


SIZES = st.integers(1, 10**9), st.integers(1, 10**8), st.integers(1, 10**8)


@settings(deadline=None)
@given(*SIZES)
def test_every_shape_gets_a_whole_configuration_that_fits_it(n_rows, n_features, n_classes):
    filled = fill(open_config(), Shape(n_rows, n_features, n_classes))
    assert filled.hashing.buckets is not None
    assert filled.hashing.buckets <= max(n_classes, 2)
    assert filled.data.validation_fraction * n_rows <= n_rows / 10
    assert fill(filled, Shape(7, 7, 7)) == filled  # nothing is open any more


@settings(deadline=None)
@given(*SIZES, st.integers(1, 100))
def test_more_of_a_kind_never_turns_a_choice_back(n_rows, n_features, n_classes, times):
    """More rows: more buckets, fewer epochs, less dropout. More features: narrower. More buckets: longer steps."""

    def chosen(*sizes):
        config = fill(open_config(), Shape(*sizes))
        return config.hashing.buckets, config.network.hidden[0], config.training

    buckets, width, training = chosen(n_rows, n_features, n_classes)
    more_buckets, _, more_training = chosen(n_rows * times, n_features, n_classes)
    assert more_buckets >= buckets
    assert more_training.epochs <= training.epochs
    assert more_training.rate >= training.rate
    assert chosen(n_rows, n_features * times, n_classes)[1] <= width
    assert chosen(n_rows, n_features, n_classes * times)[0] >= buckets
    networks = [fill(open_config(), Shape(n, n_features, n_classes)).network for n in (n_rows, n_rows * times)]
    assert networks[1].dropout <= networks[0].dropout


def test_the_largest_features_weigh_more_in_long_rows_and_less_in_short_ones():
    lengths = (4, 14, 25, 57, 200)
    powers = [fill(open_config(), Shape(42_000, 90_000, 33_513, row_features=m)).network.power for m in lengths]
    assert powers == sorted(powers)
    assert powers[0] < powers[2] == 1 < powers[-1]
    assert fill(open_config(), Shape(42_000, 90_000, 33_513)).network.power == 1  # lengths are not known


def test_more_rows_take_less_dropout_and_a_given_one_stays():
    shapes = [Shape(n, 90_000, 33_513) for n in (42_000, 500_000)]
    few, many = (fill(open_config(), shape).network.dropout for shape in shapes)
    assert 0 < many < few
    assert fill(open_config(network={"hidden": [16], "dropout": 0.4}), shapes[0]).network.dropout == 0.4


def test_more_rows_are_held_out_where_they_teach_and_no_pilot_does():
    def held(effort, **reranking):
        config = open_config(training={"effort": effort}, reranking=reranking)
        return round(40_000 * fill(config, Shape(40_000, 20_000, 30_000)).data.validation_fraction)

    assert (held("fast"), held("balanced"), held("best")) == (2000, 2000, 800)
    assert (held("balanced", pilots=1), held("best", pilots=0), held("best", candidates=0)) == (800, 2000, 0)


def test_an_order_is_learned_where_rows_are_enough_and_not_too_many():
    def found(n_rows=40_000, *, is_dense=False, row_classes=6.0, row_features=98, **sections):
        shape = Shape(n_rows, 20_000, 200_000, is_dense=is_dense, row_features=row_features, row_classes=row_classes)
        sections = {"training": {"effort": "best"}} | sections
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


def test_short_rows_of_few_classes_get_a_pilot_before_the_best_effort():
    def pilots(effort, **shape):
        return fill(open_config(training={"effort": effort}), Shape(40_000, 20_000, 20_000, **shape)).reranking.pilots

    short, long, many = ({"row_features": m, "row_classes": c} for m, c in ((17, 6), (90, 3), (17, 28)))
    assert [pilots("balanced", **shape) for shape in (short, long, many)] == [1, 0, 0]
    assert [pilots("fast", **short), pilots("best", **short), pilots("best", **many)] == [0, 1, 3]


def test_short_rows_of_few_classes_are_reranked_by_pairs_of_features():
    shapes = [Shape(40_000, 20_000, 20_000, row_features=m, row_classes=c) for m, c in ((17, 6), (90, 3), (17, 28))]
    best = {"training": {"effort": "best"}}
    assert [fill(open_config(**best), shape).reranking.pairs for shape in shapes] == [12, 0, 0]
    assert fill(open_config(**best, reranking={"pairs": 3}), shapes[1]).reranking.pairs == 3
    assert fill(open_config(**best, reranking={"pairs": 0}), shapes[0]).reranking.pairs == 0


SHAPES = [
    Shape(40_000, 20_000, 20_000, row_features=17, row_classes=6),
    Shape(40_000, 80_000, 26_000, row_features=75, row_classes=3),
    Shape(40_000, 24_000, 260_000, row_features=17, row_classes=28),
    Shape(1_800_000, 300_000, 400_000, row_features=8, row_classes=1),
    Shape(900, 300, 3_000, row_features=8, row_classes=1),
    Shape(40_000, 300, 3_000, is_dense=True),
]
EFFORTS = ("fast", "balanced", "best")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_smaller_effort_does_less_and_only_many_sparse_rows_go_without_the_best_if_none_is_given(shape: Shape):
    filled = [fill(open_config(training={"effort": effort}), shape) for effort in EFFORTS]
    assert filled[2 if shape.is_dense or shape.n_rows < 5_000 else 1] == fill(open_config(), shape)
    assert [config.training.effort for config in filled] == list(EFFORTS)
    for number in (
        [config.hashing.repetitions for config in filled],
        [config.network.hidden[0] for config in filled],
        [config.training.epochs for config in filled],
        [config.reranking.candidates for config in filled],
        [config.reranking.pairs for config in filled],
        [config.reranking.pilots for config in filled],
    ):
        assert number == sorted(number)
    fast, best = filled[0], filled[-1]
    assert (fast.hashing.repetitions, fast.training.epochs) < (best.hashing.repetitions, best.training.epochs)


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_key_that_is_given_wins_over_the_effort(effort: str):
    keys: dict[str, dict] = {
        "hashing": {"repetitions": 7, "heads": 3},
        "network": {"hidden": [1500]},
        "training": {"effort": effort, "epochs": 11},
        "reranking": {"candidates": 33, "pairs": 5, "pilots": 2},
    }
    for shape in SHAPES:
        filled = fill(open_config(**keys), shape)
        for section, values in keys.items():
            assert {key: getattr(getattr(filled, section), key) for key in values} == values


def test_a_run_keeps_its_effort(planted: Path, tmp_path: Path):
    """What it was begun with is written down; another one is refused, and a run of before the dial has none."""
    data = {"train": str(planted / "train.txt"), "cache": str(tmp_path / "cache")}
    run, _ = set_up(open_config(data=data, training={"effort": "fast"}), tmp_path / "run")
    assert (run.config.training.effort, run.config.hashing.repetitions) == ("fast", 2)
    assert set_up(open_config(data=data), run.path)[0].config == run.config
    with pytest.raises(ConfigError, match=r"training.effort: 'best' here, 'fast' there"):
        set_up(open_config(data=data, training={"effort": "best"}), run.path)
    old, _ = set_up(open_config(data=data, training={"effort": "best"}), tmp_path / "old")
    file = old.path / "config.toml"
    written = file.read_text().replace('effort = "best"\n', "")
    file.write_text(written)
    for training in ({}, {"effort": "best"}):
        assert set_up(open_config(data=data, training=training), old.path)[0].config.training.effort is None
        assert file.read_text() == written
    with pytest.raises(ConfigError, match=r"training.effort: 'fast' here, None there"):
        set_up(open_config(data=data, training={"effort": "fast"}), old.path)


def test_a_run_that_starts_from_another_one_takes_no_effort():
    with pytest.raises(ConfigError, match='effort = "fast" with training.start') as caught:
        open_config(training={"effort": "fast", "start": "there"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_a_run_of_before_is_gone_on_with_as_it_began(path: Path):
    old, _ = load_run_config(path / "config.toml")
    given = parse_config({"data": {"train": old.data.train, "cache": old.data.cache}}, "test")
    shape = Shape(2_000_000, 300_000, 400_000, row_features=8, row_classes=1)
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
    training = config.training.changed(effort="best")
    assert (filled.network, filled.training, filled.hashing) == (config.network, training, config.hashing)
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
