"""Blows to small runs at random moments, from a seed: every run must end in the bits of one that nobody disturbed.

    .venv/bin/python benchmarks/kills.py --blows 100 --seed 1

A blow is a signal (SIGKILL, SIGTERM, SIGHUP, or SIGSTOP and SIGCONT) to the command, to the process group of one of its
workers or to all of them, or a repetition's folder that is removed. It strikes in a stage that the files of the run
tell: training, pilots, re-ranking, calibration; or while classes are edited. In half of the processes the clock jumps
by a day once. Whatever ends is started again by the same command. A run that the blows miss is run again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

STAGES = ("training", "pilots", "re-ranking", "calibration")
EDITS = "edits"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGSTOP")
TARGETS = ("command", "worker", "all")
REMOVAL = "removal"
N_CLASSES, N_EDITS, N_REPETITIONS = 60, 12, 2
LONGEST_SECONDS = 300.0  # that a process may take, however busy the machine is
ENDS = ("same bits", "other bits", "stuck")
TOLD = "run the same command again"  # what a polite stop says
CONFIG = """
[data]
train = "{folder}/train.txt"
cache = "{folder}/cache"
validation_fraction = 0.1
[hashing]
repetitions = 2
buckets = 32
heads = 1
[network]
hidden = [32]
[reranking]
candidates = 20
pilots = 1
pairs = 0
[training]
epochs = 25
batch = 64
checkpoint_seconds = 0.05
[launch]
workers = 2
"""
CLOCK = """
import os, random, time
jump, calls, real = float(os.environ["JUMP"]), int(os.environ["JUMP_AFTER"]), time.time
def shifted():
    global calls
    calls -= 1
    return real() + (jump if calls < 0 else 0.0)
time.time = shifted
"""
EDITOR = """
import sys
import mach
from scipy.sparse import csr_array
model = mach.load(sys.argv[1])
print("begins", flush=True)
while (version := model.classes.version) < int(sys.argv[2]):
    if version % 3 == 0:
        example = csr_array(([0.5, 0.25], ([0, 0], [version, 9 + version])), shape=(1, model.n_features))
        model.classes.add([f"new {version}"], [example])
    elif version % 3 == 1:
        model.classes.rename(version, f"name {version}")
    else:
        model.classes.remove([30 + version])
"""


@dataclass
class Outcome:
    """What became of the blows, one row of the table each, and what looked wrong on the way."""

    blows: collections.Counter[tuple[str, str, str]] = field(
        default_factory=collections.Counter
    )  # signal, target, stage
    ends: collections.Counter[str] = field(default_factory=collections.Counter)  # of runs
    faults: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        outcome = strike(Path(folder), asked.blows, random.Random(asked.seed))
    names = [f"{name}, {target}" for name in SIGNALS for target in TARGETS] + [REMOVAL]
    columns = (*STAGES, EDITS)
    print("".join(f"{cell:>19}" for cell in ("", *columns)))
    for name in names:
        signal_name, _, target = name.partition(", ")
        print("".join(f"{cell:>19}" for cell in (name, *(outcome.blows[signal_name, target, c] for c in columns))))
    print(f"{sum(outcome.blows.values())} blows; runs: {', '.join(f'{outcome.ends[end]} {end}' for end in ENDS)}")
    print("\n".join(outcome.faults))
    sys.exit(1 if outcome.faults else 0)


def strike(folder: Path, n_blows: int, chance: random.Random) -> Outcome:
    """Train an undisturbed run, then others until so many blows have struck; a fifth of them strikes edits."""
    outcome = Outcome()
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(CLOCK)
    (folder / "train.txt").write_text(planted())
    (folder / "run.toml").write_text(CONFIG.format(folder=folder))
    reference, edited = folder / "reference", folder / "edited"
    seconds = undisturbed(folder, reference)
    shutil.copytree(reference, edited)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", EDITOR, str(edited), str(N_EDITS)], check=True, stdout=subprocess.PIPE)
    print(f"undisturbed: {', '.join(f'{stage} {took:.2f} s' for stage, took in seconds.items())}", flush=True)
    seconds[EDITS] = max(0.2, (time.monotonic() - began) / 4)
    kinds = [*itertools.product(SIGNALS, TARGETS), (REMOVAL, "")]
    plans = {stage: cycled(kinds, chance) for stage in STAGES}
    of_edits = cycled([(name, "command") for name in SIGNALS], chance)
    n_runs = n_told = 0
    while sum(outcome.blows.values()) < n_blows:
        run, n_runs = folder / f"run{n_runs}", n_runs + 1
        if sum(outcome.blows.values()) < n_blows * 4 // 5:
            blows = {stage: next(plans[stage]) for stage in STAGES}
            end = train_under(folder, run, blows, seconds, chance, outcome)
            compare(run, reference, end, blows, outcome)
        else:
            shutil.copytree(reference, run)
            blows = {f"{EDITS} {n}": next(of_edits) for n in range(4)}
            end = edit_under(folder, run, list(blows.values()), seconds[EDITS], chance, outcome)
            compare(run, edited, end, blows, outcome)
        shutil.rmtree(run, ignore_errors=True)
        print(f"{n_runs} runs, {sum(outcome.blows.values())} blows", *outcome.faults[n_told:], sep="\n  ", flush=True)
        n_told = len(outcome.faults)
    return outcome


def cycled(kinds: list[tuple[str, str]], chance: random.Random) -> Iterator[tuple[str, str]]:
    """All of them, in another order every time."""
    while True:
        yield from chance.sample(kinds, len(kinds))


def planted() -> str:
    """Rows of one or two classes, each of which owns three features."""
    generator, lines = np.random.default_rng(1), [f"2000 220 {N_CLASSES}"]
    for _ in range(2000):
        classes = np.sort(generator.choice(N_CLASSES, generator.integers(1, 3), replace=False))
        features = sorted(3 * int(k) + int(j) for k in classes for j in generator.choice(3, 2, replace=False))
        features.append(180 + int(generator.integers(40)))
        lines.append(",".join(map(str, classes)) + "".join(f" {j}:{generator.uniform(0.3, 0.7):.4f}" for j in features))
    return "\n".join(lines) + "\n"


# -- processes


def start(folder: Path, command: list[str], chance: random.Random | None = None) -> subprocess.Popen[bytes]:
    """A process that leads a group of its own; its clock jumps in half of the cases where there is chance."""
    environment = dict(os.environ)
    if chance is not None and chance.random() < 0.5:
        paths = [str(folder / "site"), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "JUMP": str(chance.choice((-86400, 86400)))}
        environment |= {"JUMP_AFTER": str(chance.randrange(60))}
    with (folder / "errors.txt").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )


def train(folder: Path, run: Path, chance: random.Random | None = None) -> subprocess.Popen[bytes]:
    return start(folder, ["-m", "mach.cli", "train", str(folder / "run.toml"), str(run)], chance)


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    except OSError:
        return []


def is_stuck(process: subprocess.Popen[bytes], began: float) -> bool:
    """Whether a process that runs has run for too long; it is ended then."""
    if process.poll() is not None or time.monotonic() - began < LONGEST_SECONDS:
        return False
    for pid in (*workers_of(process), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return True


def hit(process: subprocess.Popen[bytes], name: str, target: str, chance: random.Random) -> str:
    """Send a signal; returns who got it. Those who are stopped go on after a while."""
    workers = workers_of(process)
    if target == "worker" and not workers:
        target = "command"
    pids = {"command": [process.pid], "worker": [chance.choice(workers or [0])], "all": [process.pid, *workers]}[target]
    numbers = [signal.SIGSTOP, signal.SIGCONT] if name == "SIGSTOP" else [signal.Signals[name]]
    for number in numbers:
        for pid in chance.sample(pids, len(pids)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number) if target == "command" else os.killpg(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(chance.uniform(0.1, 1.5))
    return target


# -- training


def stage_of(run: Path) -> str:
    """The stage that the files of a run tell; nothing when it is over."""
    if any(not (run / f"repetitions/r{r:03d}/DONE").exists() for r in range(N_REPETITIONS)):
        return STAGES[0]
    if not (run / "RERANKED").exists():
        return STAGES[2 if (run / "reranking/examples0.safetensors").exists() else 1]
    return "" if (run / "calibration.json").exists() else STAGES[3]


def undisturbed(folder: Path, run: Path) -> dict[str, float]:
    """Train a run and say how long each stage took; what comes before the first repetition is no part of training."""
    process, began, seen = train(folder, run), time.monotonic(), ""
    seconds: dict[str, float] = {}
    while process.poll() is None:
        stage = stage_of(run) if (run / "repetitions").exists() else ""
        if stage != seen:
            if seen:
                seconds[seen] = time.monotonic() - began
            seen, began = stage, time.monotonic()
        time.sleep(0.001)
    if process.returncode or set(seconds) != set(STAGES):
        raise SystemExit(f"the undisturbed run failed, {seconds}: {(folder / 'errors.txt').read_text()}")
    return seconds


def train_under(
    folder: Path,
    run: Path,
    blows: dict[str, tuple[str, str]],
    seconds: dict[str, float],
    chance: random.Random,
    outcome: Outcome,
) -> str:
    """Train a run with a blow in every stage; returns how it ended, "" where it finished."""
    left, process, began = dict(blows), train(folder, run, chance), time.monotonic()
    told, n_polite = "", 0  # of the blow since which this process runs
    while True:
        if is_stuck(process, began):
            return "stuck"
        if process.poll() is not None:
            judge(process, told, folder, outcome)
            n_polite += process.returncode not in (0, -signal.SIGKILL)
            if n_polite > 2 * len(blows) + 2:
                return "stuck"
            if not process.returncode and STAGES[3] in left:  # it was too short for the blow: once more
                (run / "calibration.json").unlink(missing_ok=True)
            elif not process.returncode and told != REMOVAL:  # which may have come after all was looked at
                return ""
            process, began, told = train(folder, run, chance), time.monotonic(), ""
            continue
        stage = stage_of(run) if (run / "repetitions").exists() else ""
        if stage not in left:
            time.sleep(0.001)
            continue
        time.sleep(chance.uniform(0.0, 0.8 * seconds[stage]))
        stage = stage_of(run)  # it may be over all the same
        if stage not in left or process.poll() is not None:
            continue
        name, target = left.pop(stage)
        if name == REMOVAL:
            shutil.rmtree(run / f"repetitions/r{chance.randrange(N_REPETITIONS):03d}", ignore_errors=True)
        else:
            target = hit(process, name, target, chance)
        told = name
        outcome.blows[name, target, stage] += 1


def judge(process: subprocess.Popen[bytes], told: str, folder: Path, outcome: Outcome) -> None:
    """Note what an ended process says that it should not: more than lines, or another exit code than those of ours."""
    errors = (folder / "errors.txt").read_text(errors="replace")
    codes = (0, 2, 3, -signal.SIGKILL) if told in ("SIGKILL", REMOVAL) else (0, 3)
    if "Traceback" in errors or process.returncode not in codes:
        outcome.faults.append(f"after {told or 'nothing'}: exit code {process.returncode}: {errors[-600:]}")
    elif process.returncode == 3 and TOLD not in errors:
        outcome.faults.append(f"after {told or 'nothing'}: no word of how to go on: {errors[-300:]}")


# -- edits


def edit_under(
    folder: Path, run: Path, blows: list[tuple[str, str]], seconds: float, chance: random.Random, outcome: Outcome
) -> str:
    """Edit a run's classes under some blows, one process each, then to the end."""
    for name, target in (*blows, ("", "")):
        process = start(folder, ["-c", EDITOR, str(run), str(N_EDITS)], chance)
        began, before = time.monotonic(), {path.name for path in (run / "classes").glob("*")}
        while name and process.poll() is None and {path.name for path in (run / "classes").glob("*")} == before:
            time.sleep(0.001)  # until it has begun to write
        if name and process.poll() is None:
            time.sleep(chance.uniform(0.0, seconds / 8))
            if process.poll() is None:
                outcome.blows[name, hit(process, name, target, chance), EDITS] += 1
        while process.poll() is None:
            if is_stuck(process, began):
                return "stuck"
            time.sleep(0.005)
        errors = (folder / "errors.txt").read_text(errors="replace")
        if not name and process.returncode:
            outcome.faults.append(f"edits cannot go on: {errors[-600:]}")
    return ""


# -- bits


def bits(run: Path) -> dict[str, str]:
    """Digests of all that decides answers, and the names of leftovers."""
    names = ["manifest.json", "class_counts.npy", "reranker.safetensors", "calibration.json"]
    names += [str(path.relative_to(run)) for path in run.glob("repetitions/*/weights.safetensors")]
    names += [str(path.relative_to(run)) for path in run.glob("classes/*.safetensors")]
    found = {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names if (run / name).exists()}
    kinds = ("*.tmp", "state.safetensors", "progress.json", "pilots")
    left = sorted(str(path.relative_to(run)) for kind in kinds for path in run.rglob(kind))
    return found | dict.fromkeys(left, "left over")


def compare(run: Path, reference: Path, end: str, blows: dict[str, tuple[str, str]], outcome: Outcome) -> None:
    found, wanted = ({}, {}) if end else (bits(run), bits(reference))
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    end = end or ("other bits" if differing else "same bits")
    outcome.ends[end] += 1
    if end != "same bits":
        outcome.faults.append(f"{end} ({', '.join(differing)}) after {blows}")


if __name__ == "__main__":
    main()
