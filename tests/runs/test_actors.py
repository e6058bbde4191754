"""Distributed queries: the bits of one process, whichever actors are lost; rare cases with a seam that plays Ray."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mach import cli
from mach.config import Config
from mach.data.prepare import prepare
from mach.data.store import Store
from mach.errors import ConfigError, DegradedWarning, IncompleteRunError, StorageError
from mach.model.accuracy import evaluate
from mach.model.ask import Answer
from mach.model.loading import load
from mach.model.model import MachModel
from mach.runs import actors as serving
from mach.runs.actors import RemoteScorer
from mach.runs.ray import ActorLostError, Cluster, Resources
from mach.runs.run import Run
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard
from tests.fixtures import COLOUR_QUERIES

cluster_utils = pytest.importorskip("ray.cluster_utils")

NODE: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
ignore_warnings = pytest.mark.filterwarnings("ignore::mach.errors.DegradedWarning")


@pytest.fixture(scope="module")
def test_rows(config: Config, trained: Path) -> Store:
    assert config.data.test is not None
    return prepare(config.data, config.text, config.data.test, like=Run.open(trained).reference())


@pytest.fixture(scope="module")
def dense(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over dense rows, of two repetitions of an epoch."""
    folder = tmp_path_factory.mktemp("dense")
    generator = np.random.default_rng(0)
    np.save(folder / "train.npy", generator.standard_normal((300, 12), dtype=np.float32))
    np.save(folder / "train.classes.npy", generator.integers(0, 20, 300))
    changed = {
        "data": config.data.model_copy(update={"train": str(folder / "train.npy"), "classes": None}),
        "hashing": config.hashing.model_copy(update={"repetitions": 2, "buckets": 8}),
        "training": config.training.model_copy(update={"epochs": 1}),
    }
    run, store = set_up(config.model_copy(update=changed), folder / "run")
    train_shard(ShardJob(str(run.path), str(store.path), (0, 1)))
    return folder / "run"


def expect_bits(answer: Answer, expected: Answer) -> None:
    for name in ("ids_Nk", "scores_Nk", "exact_N", "bound_N"):
        np.testing.assert_array_equal(getattr(answer, name), getattr(expected, name))


class Checked:
    """Asks a model, and compares every answer with that of a local model of the repetitions that gave it."""

    def __init__(self, model: MachModel, rows: Any) -> None:
        self.model, self.rows = model, rows
        self.locals: dict[tuple[int, ...], Answer] = {}

    def __call__(self) -> Answer:
        answer = self.model.search(self.rows, 5)
        kept = tuple(np.flatnonzero(answer.answered_NR[0]).tolist())
        if kept not in self.locals:
            numbers = [self.model.repetitions[column] for column in kept]
            self.locals[kept] = load(self.model.run.path, repetitions=numbers).search(self.rows, 5)
        expect_bits(answer, self.locals[kept])
        return answer

    def until(self, condition: Callable[[Answer], bool], seconds: float = 300.0) -> Answer:
        deadline = time.monotonic() + seconds
        while not condition(answer := self()):
            assert time.monotonic() < deadline, [part.cause for part in parts_of(self.model)]
            time.sleep(0.05)
        return answer


def parts_of(model: MachModel) -> list[Any]:
    scorer: Any = model.ensemble.scorer
    return scorer._parts


# -- a real cluster: three raylets of this machine


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head and two nodes of two processors each; one connection, which all models of this module share."""
    nodes = cluster_utils.Cluster(initialize_head=True, connect=False, head_node_args=NODE)
    for _ in range(2):
        nodes.add_node(**NODE)
    with Cluster(nodes.address):
        yield nodes
    import ray

    assert not ray.is_initialized()
    nodes.shutdown()


@pytest.fixture(scope="module")
def remote(nodes: Any, trained: Path) -> Iterator[MachModel]:
    """Three actors; whatever a test does to them, they come back."""
    with load(trained, launcher="ray", workers=3, timeout_seconds=60, start_seconds=600) as model:
        yield model


def ask_actor(model: MachModel, part: int, question: Callable[[Any], Any]) -> Any:
    import ray

    return ray.get(parts_of(model)[part].actor._handle.__ray_call__.remote(question), timeout=300)


def process_of(model: MachModel, part: int) -> int:
    return ask_actor(model, part, lambda actor: os.getpid())


def test_answers_have_the_bits_of_one_process(remote: MachModel, model: MachModel, test_rows: Store):
    answer = remote.search(test_rows, 7)
    expect_bits(answer, model.search(test_rows, 7))
    assert answer.answered_NR.shape == (400, 3)
    assert not answer.is_degraded
    for n in (1, 5, 40):
        rows = test_rows.features(0, n)
        for mine, local in zip(remote.topk(rows), model.topk(rows), strict=True):
            np.testing.assert_array_equal(mine, local)
        np.testing.assert_array_equal(remote.score(rows, [3, 50, 77]), model.score(rows, [3, 50, 77]))
    np.testing.assert_array_equal(remote.bucket_scores(test_rows), model.bucket_scores(test_rows))
    assert evaluate(remote, test_rows) == evaluate(model, test_rows)
    assert remote.info() == model.info()
    remote.verify()
    assert len({ask_actor(remote, part, _node) for part in range(3)}) > 1


def _node(actor: Any) -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


@pytest.mark.slow
def test_texts_and_dense_rows(nodes: Any, dense: Path):
    rows = np.random.default_rng(1).standard_normal((30, 12), dtype=np.float32)
    text = Path(__file__).parents[1] / "fixtures/run-format-1"
    for path, queries in ((text, COLOUR_QUERIES), (text, COLOUR_QUERIES[0]), (dense, rows), (dense, rows[0])):
        with load(path, launcher="ray", workers=1, start_seconds=600) as remote:
            expect_bits(remote.search(queries, 3), load(path).search(queries, 3))


@ignore_warnings
def test_a_killed_actor_degrades_the_answers_until_it_is_back(remote: MachModel, test_rows: Store):
    ask = Checked(remote, test_rows.features(0, 40))
    assert not ask().is_degraded
    killer = threading.Timer(0.2, os.kill, (process_of(remote, 1), signal.SIGKILL))
    killer.start()
    with pytest.warns(DegradedWarning, match=r"2 of 3 repetitions answer, without \[1\] \(.*died"):
        answer = ask.until(lambda answer: answer.is_degraded)
    assert answer.answered_NR.tolist() == [[True, False, True]] * 40
    ask.until(lambda answer: not answer.is_degraded)


@ignore_warnings
@pytest.mark.slow
def test_a_removed_node_degrades_the_answers_until_its_actors_live_elsewhere(
    nodes: Any, remote: MachModel, test_rows: Store
):
    ask = Checked(remote, test_rows.features(0, 3))
    homes = [ask_actor(remote, part, _node) for part in range(3)]
    node = next(node for node in nodes.worker_nodes if node.node_id in homes)
    nodes.remove_node(node, allow_graceful=False)
    answer = ask.until(lambda answer: answer.is_degraded)
    assert answer.answered_NR[0].tolist() == [home != node.node_id for home in homes]
    ask.until(lambda answer: not answer.is_degraded)
    assert node.node_id not in [ask_actor(remote, part, _node) for part in range(3)]
    nodes.add_node(**NODE)


@ignore_warnings
def test_when_all_are_lost_it_is_said_and_they_come_back(remote: MachModel, test_rows: Store):
    ask = Checked(remote, test_rows.features(0, 3))
    ask()
    for part in range(3):
        os.kill(process_of(remote, part), signal.SIGKILL)
    with pytest.raises(IncompleteRunError, match=r"no repetition answers now \(.*died.*\): ask again in a while"):
        ask.until(lambda answer: False)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(IncompleteRunError):
            ask.until(lambda answer: not answer.is_degraded)
            return
    pytest.fail("they did not come back")


@ignore_warnings
def test_weights_that_cannot_be_read_are_told_and_tried_again(nodes: Any, trained: Path, test_rows: Store, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    weights = run / "repetitions/r001/weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    with pytest.warns(DegradedWarning, match=r"without \[1\] \(.*r001.*the file is damaged \(on node .*\)\)"):
        model = load(run, launcher="ray", workers=3, start_seconds=600)
    with model:
        ask = Checked(model, test_rows.features(0, 3))
        assert ask().answered_NR[0].tolist() == [True, False, True]
        weights.write_bytes(whole)
        ask.until(lambda answer: not answer.is_degraded)
    for file in run.glob("repetitions/*/weights.safetensors"):
        file.unlink()
    with pytest.raises(IncompleteRunError, match=r"no repetition answers now \(cannot read .*No such file"):
        load(run, launcher="ray")
    with pytest.raises(StorageError, match="is not a run directory"):
        load(tmp_path / "nothing", launcher="ray")


def test_closing_ends_the_actors(nodes: Any, trained: Path, test_rows: Store):
    model = load(trained, launcher="ray", workers=2, start_seconds=600)
    pids = [process_of(model, part) for part in range(2)]
    model.close()
    model.close()
    with pytest.raises(ConfigError, match="is closed: load it again"):
        model.topk(test_rows)
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_command_line_asks_actors(nodes: Any, trained: Path):
    answers = [
        CliRunner().invoke(cli.main, ["query", str(trained), "3:0.5 4:0.5", "--json", *options])
        for options in ([], ["--launcher", "ray", "--address", nodes.address, "--workers", "2"])
    ]
    assert answers[0].exit_code == answers[1].exit_code == 0, answers[1].output
    assert answers[0].stdout == answers[1].stdout != ""


def test_only_a_cluster_takes_its_arguments(trained: Path):
    with pytest.raises(ConfigError, match=r"workers, threads: .* choose the launcher ray"):
        load(trained, workers=2, threads=1)
    with pytest.raises(ConfigError, match="launcher 'slurm' is unknown"):
        load(trained, launcher="slurm")
    with load(trained) as model:
        model.close()
    assert model.topk([0.0] * model.n_features)  # closing a local model does nothing


# -- rare cases, with a seam that plays Ray, and its clock


class FakeCall:
    def __init__(self, cluster: FakeCluster, actor: FakeActor, answer: Callable[[], Any]) -> None:
        self.cluster, self.actor, self.answer = cluster, actor, answer

    def has_ended(self) -> bool:
        return not self.actor.is_slow

    def result(self, timeout_seconds: float | None = None) -> Any:
        if self.actor.is_killed:
            raise ActorLostError("the actor died")
        if self.actor.is_slow:
            self.cluster.time += timeout_seconds or 0.0
            raise TimeoutError
        return self.answer()


class FakeActor:
    is_slow = is_killed = False

    def __init__(self, cluster: FakeCluster, kept: Any) -> None:
        self.cluster, self.kept = cluster, kept
        self.asked: list[str] = []

    def call(self, method: str, *arguments: Any) -> Any:
        self.asked.append(method)
        return FakeCall(self.cluster, self, lambda: getattr(self.kept, method)(*arguments))

    def kill(self) -> None:
        self.is_killed = True


class FakeCluster:
    """Actors of this process; ``time`` passes only while an answer is waited for."""

    def __init__(self) -> None:
        self.time = 0.0
        self.actors: list[FakeActor] = []
        self.starts: list[float] = []
        self.is_closed = False

    def start(self, kind: type, *arguments: Any, resources: Resources, spread: bool) -> Any:
        self.actors.append(FakeActor(self, kind(*arguments)))
        self.starts.append(self.time)
        return self.actors[-1]

    def wait(self, calls: Any, timeout_seconds: float) -> list[Any]:
        ended = [call for call in calls if call.has_ended()]
        if not ended:
            self.time += timeout_seconds
        return ended

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    monkeypatch.setattr(serving, "node_name", lambda: "here")
    return FakeCluster()


def model_on(fake: Any, path: Path, n_workers: int = 3) -> MachModel:
    run = Run.open(path)
    scorer = RemoteScorer(fake, run, [0, 1, 2], n_workers, Resources(), timeout_seconds=10, clock=lambda: fake.time)
    scorer.wait_for_start(60)
    return MachModel(run, [0, 1, 2], scorer)


@ignore_warnings
def test_fewer_repetitions_are_the_first_ones_whoever_is_lost(fake: FakeCluster, trained: Path, test_rows: Store):
    model, rows = model_on(fake, trained), test_rows.features(0, 3)
    assert not model.search(rows, 5, repetitions=2).is_degraded
    fake.actors[0].is_slow = True
    answer = model.search(rows, 5, repetitions=2)
    assert answer.answered_NR.tolist() == [[False, True]] * 3
    expected = load(trained, repetitions=[1]).search(rows, 5)
    np.testing.assert_array_equal(answer.scores_Nk, expected.scores_Nk)
    with pytest.raises(IncompleteRunError, match="none of the first 1 repetitions"):
        model.search(rows, 5, repetitions=1)


@ignore_warnings
def test_a_late_actor_is_left_alone_until_it_has_answered(fake: FakeCluster, trained: Path, test_rows: Store):
    ask = Checked(model_on(fake, trained, 2), test_rows.features(0, 3))
    ask()
    fake.actors[0].is_slow = True
    with pytest.warns(DegradedWarning, match=r"1 of 3 repetitions answer, without \[0, 1\] \(no answer within 10 s\)"):
        assert ask().answered_NR[0].tolist() == [False, False, True]
    n_asked = len(fake.actors[0].asked)
    assert (fake.time, ask().is_degraded) == (10.0, True)  # at once
    assert len(fake.actors[0].asked) == n_asked
    fake.actors[0].is_slow = False
    assert not ask().is_degraded
    fake.actors[0].is_slow = True
    ask()
    fake.time += 31
    ask()
    assert fake.actors[0].is_killed
    assert len(fake.actors) == 3
    assert not ask().is_degraded


@ignore_warnings
def test_an_actor_that_cannot_start_is_tried_ever_more_rarely(fake: FakeCluster, trained: Path, tmp_path: Path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "repetitions/r002/weights.safetensors").unlink()
    with pytest.warns(DegradedWarning, match=r"without \[2\] \(cannot read .*r002.*\(on node here\)\)"):
        model = model_on(fake, run)
    for _ in range(500):
        fake.time += 0.5
        model.topk([0.0] * model.n_features)
    pauses = np.diff([0.0, *fake.starts[3:]])
    assert pauses[:6] == pytest.approx([1, 2, 4, 8, 16, 32], abs=1.1)
    assert pauses[6:] == pytest.approx(60, abs=1.1)


@ignore_warnings
def test_one_that_has_answered_is_replaced_at_once_and_only_once(fake: FakeCluster, trained: Path, test_rows: Store):
    model = model_on(fake, trained)
    ask = Checked(model, test_rows.features(0, 3))
    ask()
    fake.actors[1].is_killed = True
    assert ask().is_degraded
    assert fake.starts == [0.0] * 4
    scorer: Any = model.ensemble.scorer
    scorer._lost(parts_of(model)[1], fake.actors[1], "as another thread sees it")
    assert not ask().is_degraded
    assert len(fake.actors) == 4
    model.close()
    assert fake.is_closed
    assert all(actor.is_killed for actor in fake.actors[2:])


@ignore_warnings
def test_what_does_not_answer_is_nan_or_a_share(fake: FakeCluster, trained: Path, test_rows: Store, model: MachModel):
    remote = model_on(fake, trained)
    fake.actors[0].is_slow = True
    rows = test_rows.features(0, 4)
    probs_NRB = remote.bucket_scores(rows)
    assert np.isnan(probs_NRB[:, 0]).all()
    np.testing.assert_array_equal(probs_NRB[:, 1:], model.bucket_scores(rows)[:, 1:])
    measured = evaluate(remote, test_rows)
    rest = evaluate(load(trained, repetitions=[1, 2]), test_rows)
    assert [row["degraded"] for row in measured] == [1.0] * 3
    assert [row["P@1"] for row in measured] == [rest[0]["P@1"], rest[1]["P@1"], rest[1]["P@1"]]


def test_classes_are_changed_over_actors_as_in_one_process(fake: FakeCluster, trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    remote = model_on(fake, tmp_path / "run")
    rows = np.zeros((4, remote.n_features), np.float32)
    rows[:, [361, 364, 370]] = [[0.5, 0.5, 0.5], [0.3, 0.5, 0.6], [0.6, 0.5, 0.3], [0.5, 0.4, 0.6]]
    remote.classes.add("new", [rows[:3]])
    remote.classes.remove([1, 2])
    local = load(tmp_path / "run")
    assert local.topk(rows[:3], 1)[0].ravel().tolist() == [local.n_classes - 1] * 3
    for how in ({}, {"repetitions": 2}, {"tail": 1.0}):
        for found, wanted in zip(list(remote.topk(rows, **how)), list(local.topk(rows, **how)), strict=True):
            np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ConfigError, match="launcher local"):
        remote.classes.similar(5)


def test_a_run_that_is_another_on_its_node_is_refused(fake: FakeCluster, trained: Path):
    server = serving.ScoreServer(str(trained), ("other data", "other configuration"), [0], {})
    with pytest.raises(ConfigError, match=r"is another run there: .* \(on node here\)"):
        server.open()


def test_a_model_without_a_ready_actor_is_refused(fake: FakeCluster, trained: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FakeActor, "is_slow", True)
    with pytest.raises(IncompleteRunError, match="not ready within 60 s"):
        model_on(fake, trained)
    assert fake.time == 60.0
