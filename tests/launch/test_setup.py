"""Setting up a run beside others that do the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mach.config import Config, LaunchConfig
from mach.data.prepare import prepare as prepare_data
from mach.errors import ConfigError
from mach.launch import setup, start
from mach.launch.driver import Driver
from mach.launch.setup import USABLE, plan_of, set_up, sharded
from mach.trainer import Progress
from tests.launch.test_start import with_keys


def test_a_run_that_appears_while_the_data_are_read_is_joined(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prepare = prepare_data

    def prepare_while_another_is_faster(*arguments, **options):
        monkeypatch.setattr(start, "prepare", prepare)
        set_up(config, tmp_path / "run")
        return prepare(*arguments, **options)

    monkeypatch.setattr(start, "prepare", prepare_while_another_is_faster)
    run, store = set_up(config, tmp_path / "run")
    assert run.manifest.data_fingerprint == store.fingerprint
    assert (tmp_path / "run/manifest.json").exists()


def test_a_run_made_before_some_keys_were_there_keeps_their_defaults(config: Config, tmp_path: Path):
    config = with_keys(config, network={"hidden": [8], "weights": "int4", "keep": 1.0, "power": 1.0})
    config = with_keys(config, reranking={"candidates": 0, "loss": "hinge"})
    run, _ = set_up(config, tmp_path / "run")
    file, newer = tmp_path / "run/config.toml", ("keep = ", "power = ", 'loss = "hinge"')
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith(newer)))
    network = config.network.model_dump(include={"hidden", "weights"})
    left = config.model_dump(exclude={"network", "reranking"}, exclude_unset=True)
    sparse = Config.model_validate(left | {"network": network})
    again, _ = set_up(sparse, tmp_path / "run")
    assert again.config.network == run.config.network
    assert again.config.reranking == run.config.reranking


def test_a_gpu_takes_as_many_repetitions_as_the_ledger_says(config: Config, tmp_path: Path):
    """Of three: all, two, one, one from main memory, or none and then a line that says so."""
    run, store = set_up(config, tmp_path / "run")
    ledger = plan_of(run.config, store).ledger
    options: dict[str, Any] = {"n_rows": run.config.training.batch, "number_bytes": 4}
    needs = [ledger.device_bytes(n, **options) for n in range(4)]
    streamed = [ledger.device_bytes(n, host_memory="all", **options) - needs[0] for n in range(2)]
    gpu = LaunchConfig(gpus=0.5)
    for n in (1, 2, 3):
        n_bytes = round(needs[n] / 0.5 / USABLE) + 2
        chosen = sharded(LaunchConfig(gpus=0.5, workers=1), run, store, n_bytes)
        assert (chosen.shard, chosen.host_memory) == (n, "none")
        assert sharded(gpu, run, store, n_bytes).shard == min(n, 2)  # two workers share it: three are two and one
    assert sharded(LaunchConfig(gpus=1.0, workers=3), run, store, 10**12).shard == 1
    assert sharded(LaunchConfig(shard=2), run, store, 10).shard == 2
    assert sharded(LaunchConfig(), run, store).shard == 1
    with pytest.raises(
        ConfigError, match=r"3 repetitions together take about .* set launch.shard to at most 1, or a smaller"
    ):
        sharded(LaunchConfig(gpus=1.0, shard=3), run, store, round(needs[1] / USABLE) + 2)
    assert streamed[1] > needs[1] - needs[0]  # of so small a network, moments in pieces take more than they spare
    with pytest.raises(ConfigError, match=r"a repetition takes about 1.5 GB of a GPU, 0.9 GB are ours: set a smaller"):
        sharded(gpu, run, store, 2 * 10**9)


def test_where_a_repetition_is_larger_than_a_gpu(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, store = set_up(config, tmp_path / "run")
    large = dataclasses.replace(plan_of(run.config, store).ledger, n_features=10**8)
    monkeypatch.setattr(setup, "plan_of", lambda config, store: SimpleNamespace(ledger=large))
    gpu = LaunchConfig(gpus=1.0)
    chosen = sharded(gpu, run, store, 8 * 10**9)
    assert (chosen.shard, chosen.host_memory) == (3, "input")
    with pytest.raises(ConfigError, match=r"launch.host_memory = 'input'"):
        sharded(gpu.model_copy(update={"host_memory": "none"}), run, store, 8 * 10**9)


@pytest.mark.parametrize(("n_together", "expected"), [(1, (110, 300, 105)), (3, (30, 300, 15))])
def test_steps_of_a_shard_count_for_all_that_take_them(n_together: int, expected: tuple[int, ...]):
    """Repetition 1 of three: after the first one is done, or beside it."""
    told: list[Any] = []
    schedule: Any = SimpleNamespace(progressed=lambda worker, now, *steps: told.append(steps))
    driver = Driver(schedule, SimpleNamespace(), SimpleNamespace(), 1)  # type: ignore[arg-type]
    driver._shard[0] = (0, 1, 2)
    driver._progressed(0, 0.0, Progress(1, 10, 100, 1, 1, 0.0, 0.0, 0.0, 0.0, 5, n_together))
    assert told == [expected]
