"""Hostile input by the thousand, from a seed: data files, model folders and queries that are nearly right.

    .venv/bin/python benchmarks/fuzz.py --data 5000 --models 5000 --queries 5000 --seed 1
    .venv/bin/python benchmarks/fuzz.py --seed 1 --only models:4711      # one case again, with its traceback

A case is a function of seed, kind and number alone. It begins with something good, whose structure is known, and
changes a few things: a number for one that matters, a key, a type, a shape, an offset, a header, a byte, an end, two
files or tensors for each other, a file for something that is none. Cases run in forked children with an alarm of 5 s
and a limit of address space; what they open for writing is watched. A case that the clock stops, not the seconds of
the processor, is tried again for 20 s and 80 s. A case ends well when mach answers, or refuses in one line.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 5  # of the processor, and of the clock at the first try
LONGEST_WAIT = 16 * SECONDS  # of the clock, which runs on where others use the machine
ADDRESS_BYTES = 12 * 2**30  # of a child, beside what it has when it begins
LONGEST = 2000  # characters of a message
TOLD_EVERY = 5000
KINDS = ("data", "models", "queries")
ENDS = ("answered", "refused", "traceback", "memory", "multi-line", "wrote outside", "crash", "hang")
GOOD = ("answered", "refused")
FIXTURES = Path(__file__).parents[1] / "tests/fixtures"
NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64),
    *(-(2**31), -(2**63), 10**20, 10**400, 0.5, -0.5, 1e-300, 1e38, 1e39, 1e300, float("inf"), float("-inf")),
]
TEXTS = [
    *("", " ", "\n", "\x00", "a\nb", "\x1b[31m", "../../x", "/etc/passwd", "..", "é", "e\u0301", "\u202ea", "\ud800"),
    *("a" * 5000, "9" * 5000, "NaN", "inf", "-1", "1e999", "0x10", "0123456789abcdef" * 2, "\ufeff", "[", "{}", "None"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"cases of {kind}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case, in this process")
    parser.add_argument("--shown", type=int, default=20, help="cases that ended badly to tell about")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        prepare_all(Path(folder))
        if asked.only:
            kind, _, number = asked.only.partition(":")
            print(run_case(Path(folder), asked.seed, kind, int(number), is_loud=True))
            return
        cases = [(kind, number) for kind in KINDS for number in range(getattr(asked, kind))]
        found, peak = run(cases, asked.seed, Path(folder), asked.workers)
    counts = collections.Counter((kind, end) for (kind, _), (end, _) in found.items())
    print("".join(f"{name:>14}" for name in ("", *ENDS)))
    for kind in KINDS:
        print("".join(f"{cell:>14}" for cell in (kind, *(counts[kind, end] for end in ENDS))))
    print(f"largest child: {peak / 2**20:.0f} MiB resident")
    bad = [(case, outcome) for case, outcome in found.items() if outcome[0] not in GOOD]
    seen: collections.Counter[str] = collections.Counter()
    for (kind, number), (end, what) in bad:
        seen[f"{kind} {what}"] += 1
        if seen[f"{kind} {what}"] <= (5 if end == "hang" else 1) and len(seen) <= asked.shown:
            print(f"{kind}:{number}  {end}  {what}")
    sys.exit(1 if bad else 0)


# -- children


def run(
    cases: list[tuple[str, int]], seed: int, folder: Path, n_workers: int = 1
) -> tuple[dict[tuple[str, int], tuple[str, str]], int]:
    """How every case ended, and the largest resident memory of a child, in bytes."""
    found: dict[tuple[str, int], tuple[str, str]] = {}
    left = [collections.deque(cases[worker::n_workers]) for worker in range(n_workers)]
    children: dict[int, tuple[int, int]] = {}  # process to worker and pipe
    buffers: dict[int, bytes] = {}
    patience = [SECONDS] * n_workers  # of the clock
    while any(left) or children:
        for worker in range(n_workers):
            if left[worker] and worker not in {w for w, _ in children.values()}:
                reader, writer = os.pipe()
                if (process := os.fork()) == 0:
                    os.close(reader)
                    _child(left[worker], seed, folder / f"worker{worker}", writer, patience[worker])
                os.close(writer)
                children[process], buffers[reader] = (worker, reader), b""
        for process, (worker, reader) in list(children.items()):
            content = os.read(reader, 2**16)
            buffers[reader] += content
            *lines, buffers[reader] = buffers[reader].split(b"\n")
            for line in lines:
                kind, number, end, what = json.loads(line)
                found[kind, number] = end, what
                left[worker].popleft()  # a child goes through them in order
                tell(found)
                patience[worker] = SECONDS
            if not content:
                _, status = os.waitpid(process, 0)
                os.close(reader)
                del children[process]
                if left[worker] and os.WIFSIGNALED(status):
                    signal_number = os.WTERMSIG(status)
                    if signal_number == signal.SIGALRM and patience[worker] < LONGEST_WAIT:
                        patience[worker] *= 4
                        continue
                    end = "hang" if signal_number in (signal.SIGALRM, signal.SIGPROF) else "crash"
                    found[left[worker].popleft()] = end, signal.Signals(signal_number).name
                    patience[worker] = SECONDS
                elif left[worker]:
                    found[left[worker].popleft()] = "crash", f"left with {os.WEXITSTATUS(status)}"
    return found, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def tell(found: dict[tuple[str, int], tuple[str, str]]) -> None:
    """Say now and then how far it is: a run that is ended before it is over has counted something."""
    if len(found) % TOLD_EVERY == 0:
        counts = collections.Counter(end for end, _ in found.values())
        print(f"{len(found):,} cases: {dict(counts)}", file=sys.stderr, flush=True)


def _child(cases: Iterable[tuple[str, int]], seed: int, folder: Path, writer: int, patience: int) -> None:
    status = 1
    try:
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)
        for kind, number in cases:
            signal.alarm(patience)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            end, what = run_case(folder, seed, kind, number)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            patience = SECONDS
            os.write(writer, (json.dumps([kind, number, end, what[:300]]) + "\n").encode())
        status = 0
    finally:
        os._exit(status)


WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.truncate"}  # of audit hooks
_watched: list[tuple[Path, list[str]]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or event not in WRITING:
        return
    if event == "open" and not (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        return
    if event in {"os.remove", "os.mkdir"} and arguments[-1] not in (-1, None) and not os.path.isabs(arguments[0]):
        return  # below an open folder, as when a tree is removed
    folder, outside = _watched[-1]
    for path in arguments[: 2 if event in {"os.rename", "os.link", "os.symlink"} else 1]:
        if isinstance(path, str | bytes | os.PathLike):
            text = os.fsdecode(path)
            parent = os.path.realpath(os.path.dirname(os.path.abspath(text)))
            if not parent.startswith(str(folder)) and "__pycache__" not in text and text != os.devnull:
                outside.append(f"{event} {text}")


def run_case(folder: Path, seed: int, kind: str, number: int, *, is_loud: bool = False) -> tuple[str, str]:
    """How a case ended, and what is to be said of it."""
    from mach.errors import MachError

    folder = folder.resolve() / "case"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("run", "cache", "tmp"):
        (folder / name).mkdir(parents=True)
    os.environ["MACH_CACHE"] = str(folder / "cache")
    tempfile.tempdir = str(folder / "tmp")
    drawn = random.Random(f"{seed} {kind} {number}")
    outside: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            act = {"data": data_case, "models": model_case, "queries": query_case}[kind](drawn, folder / "run")
            _watched.append((folder, outside))
            try:
                act()
                end, what = "answered", ""
            finally:
                _watched.pop()
    except MachError as error:
        line = str(error)
        is_line = len(line.splitlines()) <= 1 and len(line) <= LONGEST and "\x1b" not in line
        end, what = ("refused" if is_line else "multi-line"), line
    except MemoryError as error:
        if is_loud:
            traceback.print_exc()
        end, what = "memory", _place_of(error)
    except Exception as error:
        if is_loud:
            traceback.print_exc()
        end, what = "traceback", f"{_place_of(error)}: {type(error).__name__}: {error!s:.120}"
    return ("wrote outside", outside[0]) if outside else (end, what)


def _place_of(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/mach/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside of mach"


# -- what is good


_models: dict[str, Any] = {}
_sources: dict[str, Path] = {}
RUNS = (
    "-edited",
    "-order-edited",
    "-all-keys",
    "-int8",
    "-int4",
    "-float32",
    "-linear",
    "-table",
    "-learned",
    "-dense",
)


def prepare_all(folder: Path) -> None:
    """Import, compile and write everything once, before children are forked."""
    import mach

    os.environ["MACH_CACHE"] = str(folder / "first-cache")
    sys.addaudithook(_watch)
    for end in RUNS:
        _models[end] = mach.load(FIXTURES / f"run-format-1{end}")
        with contextlib.suppress(Exception):
            ask(FIXTURES / f"run-format-1{end}")
    _sources.update(write_sources(folder / "sources"))
    for path in _sources.values():
        read_source(path, folder / "first-cache")


def write_sources(folder: Path) -> dict[str, Path]:
    """A small good source of every format, by its name."""
    from scipy.sparse import csr_array

    folder.mkdir(parents=True)
    rows = [([k % 5, 5 + k % 3], {k % 7: 0.5, 8 + k % 4: -1.5}) for k in range(24)]
    lines = ["{} {}".format(",".join(map(str, ks)), " ".join(f"{j}:{v}" for j, v in fs.items())) for ks, fs in rows]
    texts = [(f"red apple {k % 4}, and ü {k % 3}", f"class {k % 5}|other") for k in range(24)]
    (folder / "rows.txt").write_text("24 12 8\n" + "\n".join(lines) + "\n")
    (folder / "rows.svm").write_text("\n".join(lines) + "\n")
    (folder / "rows.csv").write_text("text,classes\n" + "".join(f'"{text}",{name}\n' for text, name in texts))
    (folder / "rows.tsv").write_text("text\tclasses\n" + "".join(f"{text}\t{name}\n" for text, name in texts))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": t, "classes": [n]}) + "\n" for t, n in texts))
    X = csr_array(np.random.default_rng(0).integers(0, 2, (24, 12)).astype(np.float32))
    Y = csr_array(np.eye(8, dtype=np.float32)[np.arange(24) % 8])
    parts = {f"X_{name}": getattr(X, name) for name in ("data", "indices", "indptr", "shape")}
    np.savez(folder / "rows.npz", **parts, **{f"Y_{name}": getattr(Y, name) for name in ("indices", "indptr", "shape")})
    np.save(folder / "rows.npy", np.ones((24, 3), np.float32))
    np.save(folder / "rows.classes.npy", np.arange(24) % 4)
    sources = {path.suffix: path for path in folder.iterdir() if path.stem == "rows"}
    with contextlib.suppress(ImportError):
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({"text": [text for text, _ in texts], "classes": [name for _, name in texts]})
        parquet.write_table(table, folder / "rows.parquet")
        sources[".parquet"] = folder / "rows.parquet"
    from mach.config import DataConfig, TextConfig
    from mach.data.prepare import prepare

    for name in (".txt", ".jsonl", ".npy"):
        sources[f"store{name}"] = folder / f"store{name}"
        with contextlib.suppress(Exception):
            prepare(DataConfig(train=""), TextConfig(), str(folder / f"rows{name}"), folder / f"store{name}")
    return {name: path for name, path in sources.items() if path.exists()}


def read_source(path: Path, cache: Path) -> None:
    from mach.config import DataConfig, TextConfig
    from mach.data.prepare import prepare

    store = prepare(DataConfig(train="", cache=str(cache), class_separator="|"), TextConfig(), str(path))
    store.class_counts()
    store.describe()


def ask(path: Path) -> None:
    """Everything that a folder is asked for."""
    import mach
    from mach.runs.run import Run
    from mach.runs.status import outlook, status

    run = Run.open(path)
    outlook([status(run, r) for r in range(min(run.config.hashing.repetitions, 8))])
    with mach.load(path) as model:
        D = model.n_features
        queries: Any = ["red cup ala", "brown ene", ""] if model.run.text_features else np.eye(min(D, 64), D)[:3]
        model.topk(queries, 3)
        model.topk(queries, 3, tail=0.5, rerank=False)
        model.score(queries, [0, model.n_classes - 1])
        if model.calibration is not None:
            with contextlib.suppress(mach.errors.ConfigError):
                model.topk(queries, 3, probabilities=True)
        if model.name_function():
            model.names(range(min(model.n_classes, 1000)))
        for name in model.classes.edits.subsets:
            model.topk(queries, 2, allowed=name)
        model.accuracy_curve  # noqa: B018
        model.reference()
        model.info()


# -- data files


def data_case(drawn: random.Random, folder: Path) -> Callable[[], None]:
    name = drawn.choice(sorted(_sources))
    path = folder / f"rows{name}" if name.startswith(".") else folder / "store"
    if name.startswith("store"):
        shutil.copytree(_sources[name], path)
        targets = [file for file in path.rglob("*") if file.is_file()]
    else:
        for file in _sources[name].parent.glob(f"rows*{name}"):
            shutil.copy(file, folder)
        targets = [path, *(file for file in folder.iterdir() if drawn.random() < 0.3)]
    for _ in range(drawn.choice((1, 1, 1, 2, 3))):
        change_file(drawn, drawn.choice(targets))
    return lambda: read_source(path, folder.parent / "cache")


# -- model folders


def model_case(drawn: random.Random, folder: Path) -> Callable[[], None]:
    path, end = folder / "run", drawn.choice(RUNS)
    shutil.copytree(FIXTURES / f"run-format-1{end}", path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "expected.json")
    for _ in range(drawn.choice((1, 1, 1, 2, 3))):
        file = drawn.choice(files)
        if drawn.random() < 0.05:  # that of another run
            other = FIXTURES / f"run-format-1{drawn.choice(RUNS)}" / file.relative_to(path)
            if other.is_file() and is_plain(file):
                shutil.copy(other, file)
        else:
            change_file(drawn, file)
    sign(path, drawn)
    if drawn.random() < 0.1:
        return lambda: ask_shell(drawn, path)
    return lambda: ask(path)


def ask_shell(drawn: random.Random, path: Path) -> None:
    """A verb of the command line: its exit code is one of ours, and what it says of a fault is a line."""
    from click.testing import CliRunner

    from mach.cli import main as cli

    verb = drawn.choice(
        (["info"], ["query", "red cup"], ["status"], ["classes", "list"], ["evaluate"], ["info", "--verify"])
    )
    split = 2 if verb[0] == "classes" else 1
    result = CliRunner().invoke(cli, [*verb[:split], str(path), *verb[split:]])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code not in (0, 2, 3) or len(result.stderr.splitlines()) > 1:
        raise AssertionError(f"{verb[0]} left with {result.exit_code} and said {result.stderr[-200:]!r}")


def sign(path: Path, drawn: random.Random) -> None:
    """Bring digests into line with what was changed, mostly: a stranger can."""
    from mach.files.tensors import digest_of, map_tensors

    files = ("classes/CURRENT", "text/text.json", "text/terms.txt", "text/idf.npy", "manifest.json")
    if drawn.random() < 0.2 or any((path / file).exists() and not (path / file).is_file() for file in files):
        return
    with contextlib.suppress(Exception):
        current = json.loads((path / "classes/CURRENT").read_text())
        for step in current["steps"]:
            step["digest"] = digest_of(map_tensors(path / f"classes/{step['version']:04d}.safetensors")[0])
        (path / "classes/CURRENT").write_text(json.dumps(current))
    with contextlib.suppress(Exception):
        from mach.data.text import _digest

        told = json.loads((path / "text/text.json").read_text())
        bare = {key: value for key, value in told.items() if key != "fingerprint"}
        told["fingerprint"] = _digest(bare, (path / "text/terms.txt").read_bytes(), np.load(path / "text/idf.npy"))
        (path / "text/text.json").write_text(json.dumps(told))
    with contextlib.suppress(Exception), np.errstate(all="ignore"):
        from mach.sketch.hashing import UniversalAssignment

        manifest = json.loads((path / "manifest.json").read_text())
        told = manifest["assignment"]
        arrays = [np.array(told[name], np.int64) for name in ("multipliers", "offsets")]
        made = UniversalAssignment(told["n_classes"], told["n_buckets"], told["prime"], *arrays)
        told["checksum"] = made.checksum()
        (path / "manifest.json").write_text(json.dumps(manifest))


# -- queries


def query_case(drawn: random.Random, folder: Path) -> Callable[[], None]:
    model = _models[drawn.choice(RUNS)]
    queries = texts(drawn) if model.run.text_features and drawn.random() < 0.8 else numbers(drawn, model.n_features)
    values = [None, 0, 1, -1, 2, 10**6, 0.5, float("nan"), "x", [], [0], True, -np.inf, 10**30]
    how: dict[str, Any] = {}
    for name in ("tail", "budget", "allowed", "repetitions", "rerank", "probabilities"):
        if drawn.random() < 0.15:
            how[name] = drawn.choice(values)
    k = drawn.choice((1, 3, 10, 100, 10**6)) if drawn.random() < 0.8 else drawn.choice(values)
    if drawn.random() < 0.1 and isinstance(queries, str):
        return lambda: model.topk(model.parse(queries), 3)

    def act() -> None:
        try:
            model.topk(queries, k, **how)
        except (TypeError, ValueError) as error:  # arguments of Python's own types: Python says so
            if "mach/" not in (traceback.extract_tb(error.__traceback__)[-1].filename):
                raise

    return act


def texts(drawn: random.Random) -> Any:
    def one() -> Any:
        letters = "ab ü\u0301\u200d\U0001f600\t.,;|\x00\ud83d हिन"
        words = [drawn.choice((*TEXTS, "red", "cup", "brown", "hat")) for _ in range(drawn.randrange(6))]
        words += ["".join(drawn.choices(letters, k=drawn.randrange(12)))]
        return " ".join(words) if drawn.random() < 0.95 else drawn.choice((None, 5, b"red", 0.5, ["red"]))

    return drawn.choice((one, lambda: [one() for _ in range(drawn.randrange(5))], lambda: np.array([one()], object)))()


def numbers(drawn: random.Random, D: int) -> Any:
    from scipy.sparse import csr_array

    width = drawn.choice((D, D, D, D + 1, 1, 0, 2 * D))
    shape = drawn.choice(((2, width), (width,), (0, width), (1, 1, width), ()))
    array = np.asarray(np.random.default_rng(drawn.randrange(2**32)).standard_normal(shape), np.float32)
    if array.size and drawn.random() < 0.4:
        with np.errstate(all="ignore"):
            array.flat[drawn.randrange(array.size)] = drawn.choice(
                [v for v in NUMBERS if abs(v) < 1e308 or v in (np.inf, -np.inf)]
            )
    if drawn.random() < 0.3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return array.astype(drawn.choice(("f8", "i4", "c8", "?", "U", "O", "m8[s]", "f2")))
    if array.ndim == 2 and drawn.random() < 0.6:
        rows = csr_array(array)
        part = drawn.choice(("indptr", "indices", "data", ""))
        if part and getattr(rows, part).size:
            values = getattr(rows, part)
            values[drawn.randrange(values.size)] = drawn.choice((-1, 0, 1, D, 2**31 - 1, 10**6))
        return rows
    return array


# -- changes


def change_file(drawn: random.Random, path: Path) -> None:
    """One change of a file, by what it is."""
    if not is_plain(path) or path.stat().st_size > 2**24 or drawn.random() < 0.03:
        replace(drawn, path)
        return
    content = path.read_bytes()
    ways: list[Callable[[random.Random, bytes], bytes]] = [change_bytes, change_ends]
    if path.suffix == ".safetensors":
        ways = [change_tensors] * 5 + [change_header] * 4 + ways
    elif path.suffix == ".npy":
        ways = [change_array] * 4 + [change_tokens] + ways
    elif path.suffix in (".json", ".jsonl") or path.name in ("DONE", "RERANKED", "CURRENT"):
        ways = [change_json] * 6 + [change_tokens] * 2 + ways
    elif path.suffix not in (".npz", ".parquet") and not path.name.startswith(("feature", "class_")):
        ways = [change_tokens] * 5 + [change_lines] * 2 + ways
    elif path.name.startswith(("feature", "class_")):
        ways = [change_entries] * 5 + ways
    try:
        path.write_bytes(drawn.choice(ways)(drawn, content))
    except Exception:  # it was changed before, and is not what it was
        path.write_bytes(change_bytes(drawn, content))


def is_plain(path: Path) -> bool:
    """Whether to write there waits for nobody and changes nothing outside: an earlier change may have replaced it."""
    return path.is_file() and not path.is_symlink()


def replace(drawn: random.Random, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
        act = drawn.choice((os.mkfifo, os.mkdir, "zero", "loop", "holes", "out", None))
        if callable(act):
            act(path)
        elif act == "holes":
            with path.open("wb") as file:
                file.truncate(2**43)
        elif act is not None:
            path.symlink_to({"zero": "/dev/zero", "loop": path.name, "out": "/etc/hostname"}[act])


def change_bytes(drawn: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(drawn.choice((1, 1, 2, 8))):
        at = drawn.randrange(len(changed) + 1)
        part = bytes(drawn.choices(range(256), k=drawn.choice((1, 1, 4, 8))))
        changed[at : at + drawn.choice((0, len(part)))] = part
    return bytes(changed)


def change_ends(drawn: random.Random, content: bytes) -> bytes:
    at = drawn.randrange(len(content) + 1)
    return drawn.choice(
        (content[:at], content[at:], content + content, b"", content + content[:at], content + b"\0" * at)
    )


def change_lines(drawn: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    i, j = drawn.randrange(len(lines)), drawn.randrange(len(lines))
    act = drawn.randrange(4)
    if act == 0:
        lines[i], lines[j] = lines[j], lines[i]
    elif act == 1:
        del lines[i]
    elif act == 2:
        lines.insert(i, lines[j])
    else:
        lines[i] = lines[i] * drawn.choice((2, 100))
    return b"\n".join(lines)


def change_tokens(drawn: random.Random, content: bytes) -> bytes:
    """Another number or word in place of one."""
    import re

    tokens = list(re.finditer(rb"[\w.+-]+", content))
    token = drawn.choice(tokens)
    value = drawn.choice(
        [str(number)[:400] for number in NUMBERS if number != 10**400] + TEXTS + ["9" * 5000, "[" * 3000]
    )
    return content[: token.start()] + value.encode("utf-8", "surrogatepass") + content[token.end() :]


def change_json(drawn: random.Random, content: bytes) -> bytes:
    """Another value, key or depth, in JSON or a line of it."""
    lines = content.split(b"\n") if b"\n{" in content else [content]
    at = drawn.randrange(max(len(lines) - 1, 1))
    tree = [json.loads(lines[at])]
    node: Any = tree
    key: Any = 0
    for _ in range(drawn.randrange(6)):
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner:
            break
        node, key = inner, drawn.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    act = drawn.randrange(5)
    if act == 0 and node is not tree:
        del node[key]
    elif act == 1 and isinstance(node, dict):
        node[drawn.choice(TEXTS)] = node.pop(key)
    elif act == 2:
        node[key] = [node[key]]
    else:
        values = [*NUMBERS, *TEXTS, None, True, [], {}, [0], {"a": 1}]
        node[key] = drawn.choice([value for value in values if value != 10**400])
    lines[at] = json.dumps(tree[0]).encode()
    return b"\n".join(lines)


def change_header(drawn: random.Random, content: bytes) -> bytes:
    """Another entry of a tensor's header."""
    length = int.from_bytes(content[:8], "little")
    text = change_json(drawn, content[8 : 8 + length].strip())
    if drawn.random() < 0.1:
        return drawn.choice(NUMBERS[:10]).to_bytes(8, "little", signed=True) + text + content[8 + length :]
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def change_tensors(drawn: random.Random, content: bytes) -> bytes:
    """Another entry, type, shape or name of a tensor, or two for each other; the file stays one."""
    from mach.files.tensors import map_tensors, write_tensors

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        mapped, metadata = map_tensors(Path(file.name))
        arrays = {name: np.array(array) for name, array in mapped.items()}
    name, other = drawn.choice(list(arrays)), drawn.choice(list(arrays))
    act = drawn.randrange(7)
    if act == 0:
        arrays[name], arrays[other] = arrays[other], arrays[name]
    elif act == 1:
        del arrays[name]
    elif act == 2:
        arrays[
            drawn.choice(("extra", "trunk.layers.7.weight", "trunk.layers.0.bias", "input.offsets", *TEXTS[:12]))
        ] = arrays[name]
    elif act == 3:
        key = drawn.choice(list(metadata) or [""])
        metadata[key] = drawn.choice([str(number)[:40] for number in NUMBERS] + TEXTS)
    else:
        arrays[name] = changed_array(drawn, arrays[name])
    made = io.BytesIO()
    write_tensors(made, arrays, {key: value for key, value in metadata.items() if value.isascii()})
    return made.getvalue()


def change_array(drawn: random.Random, content: bytes) -> bytes:
    array = changed_array(drawn, np.load(io.BytesIO(content)))
    made = io.BytesIO()
    np.save(made, array)
    return made.getvalue()


def change_entries(drawn: random.Random, content: bytes) -> bytes:
    """Another entry of a raw array, whichever of some types it has."""
    dtype = drawn.choice(("<i8", "<i4", "<f4"))
    array = np.frombuffer(content[: len(content) // 8 * 8], dtype).copy()
    return changed_array(drawn, array).tobytes()


def changed_array(drawn: random.Random, array: Any) -> Any:
    act = drawn.randrange(5)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if act == 0:
            return array.astype(drawn.choice("bhilBIfd?"))
        if act == 1:
            return drawn.choice(
                (array[None], array.reshape(-1), array[:-1], array[:0], array.T, np.concatenate([array, array]))
            )
        if act == 2:
            return array[::-1].copy()
        for _ in range(drawn.choice((1, 1, 3))):
            at = drawn.randrange(max(array.size, 1))
            if array.dtype.kind == "f":
                array.flat[at] = drawn.choice((np.nan, np.inf, -np.inf, 1e38, -1e38, 0, 1e30))
            else:
                value = drawn.choice((0, 1, -1, 5, 127, 255, 2**15, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)))
                array.flat[at] = np.int64(value).astype(array.dtype)
        return array


if __name__ == "__main__":
    main()
