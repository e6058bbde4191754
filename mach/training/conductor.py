"""The conductor: the whole sequence from data to a finished, calibrated run, which is written down here alone.

Prepare the data, set up the run or open it again, train its repetitions, its re-ranker (pilots before it, each the same
sequence on other rows), calibrate probabilities, tidy up. The command line, the scikit-learn classifier, pilots, tests
and benchmarks call it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rich.console import Console

from mach.config import Config, LaunchConfig, load_config, load_run_config, parse_config
from mach.data.omissions import warn
from mach.data.store import Store
from mach.errors import ConfigError, IncompleteRunError, counted
from mach.files.compiled import timed
from mach.files.places import Place, place
from mach.model.calibration import calibrate_when_due, described, validated
from mach.model.loading import load
from mach.model.model import MachModel
from mach.networks.blas import blas_threads
from mach.networks.trunk import Trunk, agreed
from mach.reranking.fitting import RerankerTraining
from mach.reranking.record import Record, is_due
from mach.reranking.settings import FitSettings
from mach.runs.run import Run
from mach.sketch.ledger import Ledger
from mach.training.budget import within
from mach.training.finetuning import Origin, training_data
from mach.training.launch.capacity import plan_of
from mach.training.launch.display import Board, Report, bars, both, silence, stage_name
from mach.training.launch.launchers import Crew, n_workers
from mach.training.launch.nursery import Nursery
from mach.training.launch.process import environment
from mach.training.launch.schedule import shards_of
from mach.training.outlook import Outlook
from mach.training.pilot import teach
from mach.training.recipe import before_reading
from mach.training.setup import drop_store, resolve, set_up, with_trunk
from mach.training.work import CALIBRATING, ORDER, TEACHING, of_pilot, stages_of

FEW_CLASSES = 100  # a person who has no more is told of simpler tools
Source: TypeAlias = "Config | dict[str, Any] | str | Place"


def train(
    config: Source,
    path: str | Place | None = None,
    *,
    launcher: Literal["here", "local", "ray"] | None = None,
    workers: int | None = None,
    device: str | None = None,
    repetitions: Sequence[int] | None = None,
    minutes: float | None = None,
    start: str | Place | None = None,
    trunk: Trunk | None = None,
    report: Report | None = None,
    console: Console | None = None,
) -> MachModel:
    r"""Train a run from its data to its end, or go on where it stopped, and open it as a model.

    Parameters
    ----------
    config : str, Path, UPath, dict or Config
        What to train: a configuration, its sections as a dictionary, its TOML file, or a file, URL or ``builtin:NAME``
        with the training rows alone, for which the recipe chooses all else. A finished or begun run goes on with its
        own configuration.
    path : str, Path or UPath, optional
        Folder or URL of the run; by default ``runs/NAME``, after the file. What is there already is not made again.
    launcher : {"here", "local", "ray"}, optional
        Where work is done: in this process, in processes of this machine, or on a Ray cluster; by default what the
        configuration says. Where neither says so nor how many workers, they are processes, but for work of a few
        seconds. None of them changes a bit.
    workers : int, optional
        Most workers at a time.
    device : str, optional
        "cpu", "cuda" or "cuda:N"; by default processors, or what ``launch.gpus`` says.
    repetitions : sequence of int, optional
        Train these only; others may be trained elsewhere. The re-ranker waits until all are finished.
    minutes : float, optional
        Choose the most effort, epochs and repetitions that are planned to end within so many minutes on this machine,
        of what the configuration leaves open; the choice is told to the console. A run that has begun, or that starts
        from another one, goes on as it is.
    start : str, Path or UPath, optional
        Fine-tune: start from the weights of this finished run.
    trunk : class or str, optional
        A `torch.nn.Module` of your own instead of the hidden layers, or its name "package.module:Class". It is code, so
        it must be passed wherever a configuration or run names one.
    report : callable, optional
        Called with the name of a stage and the fraction of it that is done.
    console : rich.console.Console, optional
        Where a person reads along: bars and a live table on a terminal, lines elsewhere. By default nobody does.

    Returns
    -------
    MachModel
        The run, with the repetitions that are finished.

    Raises
    ------
    ConfigError
        When a key is wrong, or the run was made with another configuration or from other data.
    DataError, StorageError
        From reading rows and writing the run.
    IncompleteRunError
        When a repetition or a part of the re-ranker failed for good, or on Ctrl-C; all that is finished or
        checkpointed is kept, and the same call goes on from there. Repetitions that are trained "here" end by the
        KeyboardInterrupt itself.

    Examples
    --------
    A table is enough; its columns are ``text`` and ``classes`` unless ``data`` names others.

    >>> import mach
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> folder = TemporaryDirectory()
    >>> table = Path(folder.name, "fruits.csv")
    >>> _ = table.write_text("text,classes\n" + 40 * "sour green apple,apple\nlong ripe banana,banana\n")
    >>> config = {"data": {"train": str(table), "cache": folder.name}, "training": {"epochs": 30, "batch": 8}}
    >>> model = mach.train(config, Path(folder.name, "run"), launcher="here")
    >>> model.names(model.topk("a green apple", k=1)[0])
    ['apple']
    >>> mach.train(Path(folder.name, "run")).n_repetitions == model.n_repetitions  # nothing is left to do
    True
    >>> folder.cleanup()
    """
    given = {"launch.launcher": launcher, "launch.workers": workers, "training.start": start and str(start)}
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    options, where = configuration(config, path, overrides, trunk)
    if "repetitions" in options.hashing.model_fields_set:  # before a run is made, as far as can be
        _refuse_missing(repetitions, options.hashing.repetitions)
    console, outlook = console or Console(quiet=True), Outlook()
    n_threads = options.launch.threads  # more would wait for each other most of the time
    nursery = closing(Nursery(environment(n_threads)))
    with Board(console, outlook), timed(partial(outlook.compiles, "here")), blas_threads(n_threads), nursery as copies:
        is_new = not Run.is_at(where)
        tell = both(outlook, report or silence)
        tell("reading", 0.0)
        crew = replace(_crew(options, device, console, tell, outlook), nursery=copies)
        crew.say(f"reading {options.data.train}" if is_new else _standing(Run.open(where)))
        choose = chooser(minutes, options, where, crew.say, trunk, outlook.seconds)
        run, store = _set_up(options, where, console, tell, trunk, choose)
        warn(store)
        _refuse_missing(repetitions, run.config.hashing.repetitions)
        for line in (_summary(run, store), *_few(run), *_left_behind(run)) if is_new else ():
            crew.say(line)
        wanted = None if repetitions is None else sorted(set(repetitions))
        outlook.expect(stages_of(run, store, partial(crew.n_workers, run, store), wanted))
        crew.train(run, store, wanted)
        train_reranker(run, store, crew)
        tell_held = tell if run.config.data.validation_fraction else silence
        tell_held(CALIBRATING, 0.0)
        calibrated = calibrate_when_due(run, store)
        for line in () if calibrated is None else (described(calibrated), validated(calibrated)):
            crew.say(line)
        tell_held(CALIBRATING, 1.0)
        drop_store(run)
    finished = run.finished()
    if repetitions is None and len(finished) < run.config.hashing.repetitions:
        raise IncompleteRunError(
            f"{run.path}: repetitions other than {finished} are gone since they were trained: run the same command "
            "again to train them anew"
        )
    return load(run.path, repetitions=finished, trunk=trunk)


def configuration(
    source: Source, path: str | Place | None = None, overrides: Sequence[str] = (), trunk: Trunk | None = None
) -> tuple[Config, Place]:
    """The configuration and the run that arguments of `train` mean, after ``section.key=value`` overrides.

    ConfigError when a key is wrong, or it names a trunk that was not passed.
    """
    if isinstance(source, Config) and not overrides:
        return source, _named(source, path)
    if isinstance(source, dict | Config):
        tree = copy.deepcopy(source) if isinstance(source, dict) else source.model_dump(exclude_unset=True)
        config = parse_config(tree, "mach.train", list(overrides))
        return config, _named(config, path)
    where = place(source)
    if path is None and Run.is_at(where):
        file = where / "config.toml"
        config = load_run_config(file, list(overrides))[0]
        config = config.changed(training={"effort": config.training.effort})  # older runs have none
        given = {override.partition("=")[0].strip() for override in overrides}
        if "launch.address" not in given:
            config = _without_address(config, file)
        if "launch.launcher" not in given and config.launch.launcher == LaunchConfig().launcher:
            launch = config.launch.model_dump(exclude_unset=True, exclude={"launcher"})
            config = config.model_copy(update={"launch": LaunchConfig(**launch)})  # as of a new run, nobody has asked
        return _agreed(config, trunk, file), where
    if where.suffix == ".toml":
        config = _agreed(load_config(where, list(overrides)), trunk, where)
        return config, Path("runs") / where.stem if path is None else place(path)
    config = parse_config({"data": {"train": str(source)}}, str(source), list(overrides))
    return config, _named(config, path)


def chooser(
    minutes: float | None,
    config: Config,
    path: Place,
    say: Callable[[str], None],
    trunk: Trunk | None = None,
    so_far: Callable[[], float] = lambda: 0.0,
) -> Callable[[Config, Store], Config] | None:
    """What `within` chooses for some minutes; None without them, and for a run whose effort is fixed, which is said."""
    if minutes is None:
        return None
    if not minutes > 0:
        raise ConfigError(f"minutes = {minutes:g}: give more than 0, or leave it out")
    if Run.is_at(path) or config.training.start is not None:
        say(f"{counted(minutes, 'minute')}: the run goes on with the effort that it began with")
        return None
    return partial(within, minutes=minutes, say=say, trunk=trunk, so_far=so_far)


def plan_of_run(
    config: Config,
    report: Report = silence,
    trunk: Trunk | None = None,
    choose: Callable[[Config, Store], Config] | None = None,
) -> tuple[Config, Ledger]:
    """What `train` would make of a configuration: all keys, and the ledger. Data are prepared, nothing is trained."""
    config = with_trunk(config, trunk)
    start = Origin.of(config)
    config = before_reading(config if start is None else start.complete(config))
    store = training_data(config, None, report)
    warn(store)
    if choose is not None:
        config = choose(config, store)
    known = None if start is None else start.assignment(start.counts_K(store))
    resolved, _, _ = resolve(config, store, known, trunk)
    n_shards = len(shards_of(list(range(resolved.hashing.repetitions)), config.launch.shard))
    return resolved, plan_of(resolved, store, n_workers=n_workers(config.launch, n_shards))


def train_reranker(run: Run, store: Store, crew: Crew, *, settings: FitSettings | None = None) -> None:
    """Train the re-ranker if one is due (`mach.reranking.record.is_due`); another conductor here is waited for.

    With ``settings``, classifiers are fitted as these say, as pilots' are as those of their run. IncompleteRunError
    when parts were given up, or on KeyboardInterrupt; what is finished is kept.
    """
    if not is_due(run):
        return
    training = RerankerTraining(run, store)

    def train_pilot(config: Config, path: Place) -> Run:
        own = replace(crew, report=lambda stage, fraction: crew.report(of_pilot(int(path.name), stage), fraction))
        pilot, rows = _set_up(config, path, own.console, own.report, run.trunk)
        own.train(pilot, rows)
        train_reranker(pilot, rows, own, settings=training.settings)
        own.report(TEACHING, 0.0)
        return pilot

    try:
        with training.files.held():
            if not is_due(run):  # another made it meanwhile
                return
            for line in _no_longer_heard(run):
                crew.say(line)
            training.begin(settings)
            teach(training, train_pilot, crew.say)
            crew.make_parts(training)
            crew.report(stage_name(ORDER), 0.0)
            summary = training.finish()
            crew.report(stage_name(ORDER), 1.0)
    except KeyboardInterrupt:
        raise IncompleteRunError(
            f"stopped while the re-ranker was trained; all repetitions and its finished parts are in {run.path}: run "
            "the same command again to go on"
        ) from None
    for line in _told(summary):
        crew.say(line)


def _set_up(
    config: Config,
    path: Place,
    console: Console,
    report: Report,
    trunk: Trunk | None,
    choose: Callable[[Config, Store], Config] | None = None,
) -> tuple[Run, Store]:
    with bars(console) as draw:
        return set_up(config, path, both(draw, report), trunk=trunk, choose=choose)


def _crew(config: Config, device: str | None, console: Console, report: Report, outlook: Outlook) -> Crew:
    launch = config.launch
    if device == "cuda":
        device = "cuda:0"
    if device not in {None, "cpu"} and not launch.gpus:
        share = 1.0 / (launch.workers or 1) if launch.launcher == "local" else 1.0
        launch = launch.changed(gpus=share)
    return Crew(launch, device, console, report, outlook)


def _agreed(config: Config, trunk: Trunk | None, file: Place) -> Config:
    if config.network.trunk is not None:
        agreed(config.network.trunk, trunk, file)
    return config


def _without_address(config: Config, file: Place) -> Config:
    """A run's configuration without the cluster that it names: code goes there, so who goes on with it must say so."""
    if config.launch.launcher == "ray" and config.launch.address is not None:
        raise ConfigError(
            f"{file} names the cluster {config.launch.address}: pass it (--address, launch.address) if you trust it "
            "with your code and data, or choose another launcher"
        )
    return config.changed(launch={"address": None})


def _named(config: Config, path: str | Place | None) -> Place:
    """The run's folder, by default after the file or the name of the built-in set that has the training rows."""
    return Path("runs") / place(config.data.train.rpartition(":")[2]).stem if path is None else place(path)


def _refuse_missing(repetitions: Sequence[int] | None, n_repetitions: int) -> None:
    for r in repetitions or ():
        if not 0 <= r < n_repetitions:
            raise ConfigError(f"repetitions {r}: the run has repetitions 0-{n_repetitions - 1}")


def _standing(run: Run) -> str:
    """What a person is told of a run that is there, before its data are looked at."""
    n, n_finished = run.config.hashing.repetitions, len(run.finished())
    return f"{run.path}: {n_finished} of {counted(n, 'repetition')} finished before; going on"


def _few(run: Run) -> Iterator[str]:
    """What a person is told of very few classes."""
    n_classes = run.manifest.n_classes
    if n_classes <= FEW_CLASSES:
        yield (
            f"{counted(n_classes, 'class')}: for so few one output a class is simpler and as good, such as "
            "LogisticRegression of scikit-learn over TfidfVectorizer; mach is made for thousands"
        )


def _summary(run: Run, store: Store) -> str:
    """What is trained, in a line."""
    config = run.config
    sizes = counted(store.n_rows, "row"), counted(store.n_classes, "class"), counted(store.n_features, "feature")
    networks = counted(config.hashing.repetitions, "repetition"), counted(config.training.epochs, "epoch")
    effort = [f"effort {config.training.effort}"] if config.training.effort else []
    return f"{', '.join(sizes)}: {', '.join([*effort, *networks, counted(config.reranking.pilots, 'pilot')])}"


def _left_behind(run: Run) -> Iterator[str]:
    """What a person is told of a fine-tuned run: what was taught about the classes it started from is no row."""
    start = Origin.of(run.config)
    if start is not None and (n_taught := len(start.edits.exemplars)):
        yield (
            f"{n_taught:,} examples, texts and upvotes that {start.run.path} was taught after its training are no "
            f"rows, and are not in {run.path}: put those that still matter into the new table, or add them again"
        )


def _no_longer_heard(run: Run) -> Iterator[str]:
    """What a person is told where an older run's configuration fixed what a new re-ranker chooses."""
    gone = [key for key in ("weight", "prior", "bytes", "views") if run.retired.get(f"reranking.{key}")]
    if gone:
        yield (
            f"re-ranker: {', '.join(f'reranking.{key}' for key in gone)} of {run.path} are keys of an earlier version: "
            "the new re-ranker is made without them, and held-out rows choose its blend"
        )


def _told(summary: Record) -> Iterator[str]:
    """What a person is told of a finished re-ranker."""
    yield (
        f"re-ranker: {summary.n_weights:,} weights, {summary.n_bytes:,} bytes, {summary.cpu_seconds:.0f} s of "
        f"processors; {summary.formula}" + (", chosen by held-out rows" if summary.validated else "")
    )
    if summary.repeats < 0 and not summary.learned:
        yield (
            "re-ranker: classes that a training row with the same features has are put last, as held-out rows hardly "
            "ever repeat one: asked for a training row, the run answers with other classes (reranking.repeats = 0 and "
            "`--no-rerank` do not)"
        )
