"""A stranger's run: what it holds must follow from its manifest and configuration, and each fault is one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mach
from mach.errors import StorageError
from mach.networks.stored import SMALL, check_stored, wild_matrix
from mach.runs.run import Run
from mach.runs.status import status
from mach.training.notes import Notes
from tests.attacks.hostile import WEIGHTS, Hostile, refusal

HUGE = 2**63 - 1
NAN, INF = np.float32(np.nan), np.float32(np.inf)
LAST = "classes/0007.safetensors"
RERANKER = "reranker.safetensors"
MANIFEST, DONE, CURRENT = "manifest.json", "repetitions/r001/DONE", "classes/CURRENT"
OUTSIDE = [
    "../../../x",
    "/x",
    "a/b",
    "..",
    "",
    ".hidden",
    "C:\\x",
    "0" * 31,
    "0" * 31 + "g",
    "0" * 31 + "\x00",
    "0" * 33,
]
Change = Callable[[Hostile], Any]
Case = tuple[str, str, Change, list[str]]  # name, fixture, what is changed, what must be said


def first(value: Any) -> Callable[[Any], Any]:
    """The array with another first entry."""

    def changed(array: Any) -> Any:
        array.flat[0] = value
        return array

    return changed


def last(value: Any) -> Callable[[Any], Any]:
    def changed(array: Any) -> Any:
        array.flat[-1] = value
        return array

    return changed


def case(name: str, change: Change, *said: str, of: str = "-edited") -> Case:
    return name, of, change, list(said)


def in_tensors(file: str, of: str = "-edited") -> Callable[..., Case]:
    def made(name: str, *said: str, **arrays: Any) -> Case:
        return case(f"{file}: {name}", lambda run: run.set(file, **arrays), file, *said, of=of)

    return made


weights, bare = in_tensors(WEIGHTS), in_tensors(WEIGHTS, "-int8")
deep, plain = in_tensors(WEIGHTS, "-int4"), in_tensors(WEIGHTS, "-float32")
classes, reranker, order = in_tensors(LAST), in_tensors(RERANKER), in_tensors(RERANKER, "-order-edited")
names = in_tensors("class_names.safetensors")

TENSORS = [
    # networks
    weights("a layer nobody asked for", "trunk.layers.0.weight", trunk__layers__0__weight=np.ones((99, 7), np.float32)),
    weights("a bias nobody asked for", "trunk.layers.7.bias", trunk__layers__7__bias=np.ones(3, np.float32)),
    weights("any further name", "extra", extra=np.ones(1, np.float32)),
    weights("a missing name", "input.bias", input__bias=...),
    weights("no scale", "input.scale", input__scale=...),
    weights("scales of one entry", "input.scale", input__scale=np.ones(1, np.float32)),
    weights("scales of another type", "input.scale", input__scale=lambda a: a.astype(np.float64)),
    weights("a scale that is no number", "input.scale", input__scale=first(NAN)),
    weights("an infinite scale", "output.scale", output__scale=first(INF)),
    weights("a bias that is no number", "output.bias", output__bias=first(NAN)),
    weights("a bias of another type", "output.bias", output__bias=lambda a: a.astype(np.int32)),
    weights("a bias of bits", "input.bias", input__bias=lambda a: a.astype(np.uint16)),
    weights("no offsets", "input.", input__offsets=...),
    weights("offsets near 2^63", "input.offsets", input__offsets=first(-HUGE)),
    weights("a last offset near 2^63", "input.offsets", input__offsets=last(HUGE)),
    weights("offsets that fall", "input.offsets", input__offsets=lambda a: a[::-1].copy()),
    weights("offsets of other length", "input.offsets", input__offsets=lambda a: a[:-1]),
    weights("offsets of another type", "input.offsets", input__offsets=lambda a: a.astype(np.int32)),
    weights("weights of another shape", "input.", input__weight=lambda a: a[None]),
    weights("weights of no dimension", "input.weight", input__weight=np.uint8(1)),
    weights("a wider output", "output.weight", output__weight=lambda a: np.hstack([a, a])),
    weights("an output of bytes", "needs float32 or uint16 or int8 of", output__weight=lambda a: a.view(np.uint8)),
    weights("an output of doubles", "output.weight", output__weight=lambda a: a.astype(np.float64)),
    weights("an output of booleans", "output.weight", output__weight=lambda a: a.astype(np.bool_)),
    bare("bytes without scale", "input.scale", input__weight=lambda a: a[:, :8].view(np.uint8), input__scale=...),
    bare("a scale too many", "input.offsets", input__offsets=np.zeros(88, np.int64)),
    bare("fewer features", "input.weight", input__weight=lambda a: a[:-1], input__scale=lambda a: a[:-1]),
    deep("a hidden layer too many", "trunk.layers.1", trunk__layers__1__weight=np.zeros((12, 12), np.float32)),
    deep("integers in a hidden layer", "trunk.layers.0.weight", trunk__layers__0__weight=np.ones((12, 15), np.int8)),
    deep("another hidden width", "trunk.layers.0.weight", trunk__layers__0__weight=np.ones((13, 15), np.uint16)),
    deep("hidden weights without number", "r001", trunk__layers__0__weight=np.full((12, 15), 0x7FC0, np.uint16)),
    plain("weights without number", "r001", "NaN or infinity", output__weight=lambda a: np.full_like(a, NAN)),
    plain("infinite weights", "r001", "NaN or infinity", input__weight=lambda a: np.full_like(a, INF)),
    # class names
    names("no offsets", "24 classes", offsets=...),
    names("a further array", "24 classes", more=np.zeros(1, np.uint8)),
    names("offsets of no dimension", "class_names.safetensors", offsets=np.int64(1)),
    names("names of other K", "24 classes", offsets=lambda a: a[:-1]),
    names("offsets of another type", "offsets", offsets=lambda a: a.astype(np.float64)),
    names("letters of another type", "utf8", utf8=lambda a: a.astype(np.int64)),
    names("offsets beyond the end", "offsets", offsets=last(HUGE)),
    names("offsets that fall", "offsets", offsets=lambda a: a[::-1].copy()),
    names("offsets below 0", "offsets", offsets=first(-5)),
    names("no UTF-8", "UTF-8", "class ", utf8=lambda a: np.full_like(a, 0xFF)),
    # changes of the classes
    classes("no names", "names.offsets", names__offsets=...),
    classes("names of no dimension", "names.offsets", names__offsets=np.int64(3)),
    classes("a further array", "extra", extra=np.ones(3, np.float32)),
    classes("no UTF-8", "names", "UTF-8", names__utf8=lambda a: np.full_like(a, 0xFF)),
    classes("offsets of names near 2^63", "names", names__offsets=last(HUGE)),
    classes("an id that is no class", "removed", removed=np.array([HUGE], np.int64)),
    classes("an id below 0", "exemplars.classes", exemplars__classes=first(-1)),
    classes("a feature beyond D", "exemplars.indices", exemplars__indices=last(2**31 - 1)),
    classes("rows that fall", "exemplars.indptr", exemplars__indptr=lambda a: a[::-1].copy()),
    classes("rows near 2^63", "exemplars.indptr", exemplars__indptr=last(HUGE)),
    classes("rows of wild length", "exemplars", exemplars__values=lambda a: a * 1e30),
    classes("values without number", "exemplars.values", exemplars__values=first(NAN)),
    classes("an infinite lift", "exemplars.lifts", exemplars__lifts=first(INF)),
    classes("a bucket beyond B", "table", table=first(2**31)),
    classes("anchors without number", "anchors", anchors=first(NAN)),
    classes("counts below 0", "counts", counts=first(-1)),
    classes("a subset of no class", "subset.warm", subset__warm=first(HUGE)),
    classes("a subset of two dimensions", "subset.warm", subset__warm=np.zeros((2, 2), np.int64)),
    # re-rankers
    reranker("offsets near 2^63", "offsets", offsets=last(HUGE)),
    reranker("offsets that fall", "offsets", offsets=lambda a: a[::-1].copy()),
    reranker("offsets below 0", "offsets", offsets=first(-HUGE)),
    reranker("a further array", "extra", extra=np.ones(1, np.float32)),
    reranker("scales without number", "scales", scales=first(NAN)),
    reranker("infinite biases", "biases", biases=first(INF)),
    reranker("priors without number", "priors", priors=first(NAN)),
    reranker("priors of other K", "priors", priors=lambda a: a[:-1]),
    reranker("codes of no dimension", "gaps", codes=np.int8(1)),
    order("rules near 2^63", "rules.offsets", rules__offsets=last(HUGE)),
    order("confidences of 0", "rules.confidences", rules__confidences=first(0)),
    order("supports below 0", "rules.supports", rules__supports=first(-5)),
    order("an order without number", "stacker.w_IH", stacker__w_IH=first(NAN)),
    order("an order of other width", "stacker.w_HG", stacker__w_HG=lambda a: a[:-1]),
    order("repeats of two dimensions", "repeats", repeats=lambda a: a[None]),
    order("log rows below 0", "log_rows", log_rows=first(-INF)),
]


def in_header(file: str, name: str, change: Callable[[dict[str, Any]], Any], *said: str) -> Case:
    return case(f"{file}: header: {name}", lambda run: run.header(file, change), file, *said)


def entry(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(values)


def crammed(content: bytes, file: str = WEIGHTS) -> Change:
    return lambda run: (run / file).write_bytes(content)


def sized(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


HEADERS = [
    *(
        in_header(file, "metadata that is no object", lambda header: header.update(__metadata__=[1]), "metadata")
        for file in (WEIGHTS, RERANKER, LAST, "class_names.safetensors")
    ),
    in_header(WEIGHTS, "metadata of numbers", lambda header: header.update(__metadata__={"repetition": 1}), "metadata"),
    in_header(RERANKER, "nested metadata", lambda header: header["__metadata__"].update(candidates={}), "metadata"),
    in_header(WEIGHTS, "no object", lambda header: [header]),
    in_header(WEIGHTS, "an entry that is none", lambda header: header.update({"input.bias": 5}), "input.bias"),
    in_header(WEIGHTS, "an unknown type", entry("input.bias", dtype="F8_E4M3"), "input.bias"),
    in_header(WEIGHTS, "a type that is a list", entry("input.bias", dtype=["F32"]), "input.bias"),
    in_header(WEIGHTS, "sides below 0", entry("input.bias", shape=[-16, -1]), "input.bias"),
    in_header(WEIGHTS, "sides of 2^63", entry("input.bias", shape=[2**63, 2**63, 0]), "input.bias"),
    in_header(WEIGHTS, "sides of fractions", entry("input.bias", shape=[16.5]), "input.bias"),
    in_header(WEIGHTS, "sides that are texts", entry("input.bias", shape=["16"]), "input.bias"),
    in_header(WEIGHTS, "a hundred sides", entry("input.bias", shape=[16, *[1] * 99]), "input.bias"),
    in_header(WEIGHTS, "spans of 2^70", entry("input.bias", data_offsets=[0, 2**70]), "input.bias"),
    in_header(WEIGHTS, "spans that are infinite", entry("input.bias", data_offsets=[0, float("inf")])),
    in_header(WEIGHTS, "spans of three", entry("input.bias", data_offsets=[0, 1, 2]), "input.bias"),
    case("a header of 2^64", crammed(b"\xff" * 8 + b"{}"), WEIGHTS),
    case("a header in no UTF-8", crammed(sized(b'{"\xff": 1}')), WEIGHTS),
    case("a header of 5,000 digits", crammed(sized(b'{"a": ' + b"9" * 5000 + b"}")), WEIGHTS),
    case("a header that nests deeply", crammed(sized(b"[" * 100_000)), WEIGHTS),
    case("an empty file", crammed(b""), WEIGHTS),
    case("a lone surrogate as a name", crammed(sized(b'{"\\ud800": 1}')), WEIGHTS),
]

DISAGREE = [
    case(
        "text features wider than the network",
        lambda run: run.text(idf=np.ones(99, np.float32), n_features=99),
        "text",
        "31",
        "99",
    ),
    case(
        "text features narrower", lambda run: run.text(idf=np.ones(30, np.float32), n_features=30), "text", "31", "30"
    ),
    case("more frequencies than features", lambda run: run.text(idf=np.ones(40, np.float32)), "text", "40"),
    case("frequencies without number", lambda run: run.text(idf=np.full(31, NAN)), "text", "idf"),
    case("frequencies of two dimensions", lambda run: run.text(idf=np.ones((31, 1), np.float32)), "text"),
    case("frequencies of doubles", lambda run: run.text(idf=np.ones(31)), "text", "float64"),
    case("frequencies of another type", lambda run: run.text(idf=np.ones(31, np.complex64)), "text"),
    case("terms of other number", lambda run: run.text(terms="a\nb"), "text", "terms"),
    case("terms twice", lambda run: run.text(terms="\n".join(["a"] * 31)), "text", "terms"),
    case("more words than features", lambda run: run.text(n_words=10**6), "text", "n_words"),
    case("words below 0", lambda run: run.text(n_words=-3), "text", "n_words"),
    case("features that are a text", lambda run: run.text(n_features="31"), "text", "n_features"),
    case(
        "hashed features of other D",
        lambda run: run.text(idf=np.ones(7, np.float32), n_features=7),
        "text",
        "64",
        "7",
        of="-float32",
    ),
    case("text features that are gone", lambda run: (run / "text/terms.txt").unlink(), "text"),
    case("K of the manifest", lambda run: run.json(MANIFEST, n_classes=25), "class", "25"),
    case("K of the assignment", lambda run: run.assign(n_classes=23), MANIFEST, "23", "24"),
    case("B of the assignment", lambda run: run.assign(n_buckets=7), "damaged"),
    case("B of 0", lambda run: run.assign(n_buckets=0), MANIFEST, "n_buckets"),
    case("B of 1", lambda run: run.assign(n_buckets=1), MANIFEST, "n_buckets"),
    case(
        "fewer functions than repetitions",
        lambda run: run.assign(multipliers=[18], offsets=[24]),
        MANIFEST,
        "functions",
    ),
    case("no functions", lambda run: run.assign(multipliers=[], offsets=[]), MANIFEST, "functions"),
    case(
        "a multiplier that has no inverse", lambda run: run.assign(multipliers=[18, 28, 5, 0]), MANIFEST, "multiplier"
    ),
    case("a prime that is none", lambda run: run.assign(prime=30), MANIFEST, "multiplier"),
    case(
        "a multiplier above the prime",
        lambda run: run.assign(multipliers=[18, 28, 5, 2**31 - 1]),
        MANIFEST,
        "multiplier",
    ),
    case("an offset above the prime", lambda run: run.assign(offsets=[24, 15, 28, 2**30]), MANIFEST, "offset"),
    case("a prime below K", lambda run: run.assign(prime=2), MANIFEST, "prime"),
    case("a table of other K", lambda run: run.table(np.zeros((4, 19), np.uint8)), MANIFEST, "19", "20", of="-table"),
    case("a table of fewer functions", lambda run: run.table(np.zeros((3, 20), np.uint8)), "functions", of="-table"),
    case(
        "a table of fractions",
        lambda run: run.npy("assignment.npy", np.full((4, 20), 0.5)),
        "assignment.npy",
        of="-table",
    ),
    case(
        "a table of one dimension",
        lambda run: run.npy("assignment.npy", np.zeros(20, np.uint8)),
        "assignment.npy",
        of="-table",
    ),
    case(
        "a table of objects", lambda run: run.npy("assignment.npy", np.array([[None]])), "assignment.npy", of="-table"
    ),
    case("counts of other K", lambda run: run.npy("class_counts.npy", np.zeros(7, np.int64)), "class_counts.npy", "24"),
    case(
        "counts of two dimensions",
        lambda run: run.npy("class_counts.npy", np.zeros((24, 1), np.int64)),
        "class_counts.npy",
    ),
    case("counts below 0", lambda run: run.npy("class_counts.npy", np.full(24, -1)), "class_counts.npy"),
    case("counts near 2^63", lambda run: run.npy("class_counts.npy", np.full(24, HUGE)), "class_counts.npy"),
    case("counts of fractions", lambda run: run.npy("class_counts.npy", np.ones(24)), "class_counts.npy"),
    case("counts that are records", lambda run: run.npy("class_counts.npy", np.zeros(24, "i4,i4")), "class_counts.npy"),
    case("no counts", lambda run: (run / "class_counts.npy").unlink(), "class_counts.npy"),
    case("dense input", lambda run: run.json(MANIFEST, dense_input=True), ""),
    case("other heads", lambda run: run.toml("hashing", heads=3), ""),
    case("other widths", lambda run: run.toml("network", hidden=[17]), "r00"),
    case(
        "another repetition's weights", lambda run: run.tensors(WEIGHTS, lambda a, m: m.update(repetition="0")), WEIGHTS
    ),
    case("an unknown loss", lambda run: run.json(MANIFEST, loss="x"), MANIFEST, "loss"),
    case("a row of fewer than no features", lambda run: run.json(MANIFEST, row_features=-1), MANIFEST, "row_features"),
]


def promised(shape: tuple[int, ...], dtype: str = "<i8", data: bytes = b"", order: bool = False) -> bytes:
    """A .npy file whose header claims a shape."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape!r}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


COUNTS = "class_counts.npy"
NPY = [
    case("7 TiB", crammed(promised((2**40 - 2**37,)), COUNTS), COUNTS),
    case("2^63 entries", crammed(promised((2**63,)), COUNTS), COUNTS),
    case("sides whose product overflows", crammed(promised((2**40, 2**40)), COUNTS), COUNTS),
    case("sides below 0", crammed(promised((-1,)), COUNTS), COUNTS),
    case("a giant text type", crammed(promised((24,), "<U1000000000"), COUNTS), COUNTS),
    case("a type of objects", crammed(promised((24,), "|O"), COUNTS), COUNTS),
    case("no header", crammed(b"\x93NUMPY", COUNTS), COUNTS),
    case("a header cut short", crammed(promised((24,))[:40], COUNTS), COUNTS),
    case("a header that nests", crammed(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, COUNTS), COUNTS),
    case("a header of another version", crammed(b"\x93NUMPY\x09\x00" + b" " * 99, COUNTS), COUNTS),
    case("a header of 4 GiB", crammed(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", COUNTS), COUNTS),
    case("an empty array file", crammed(b"", COUNTS), COUNTS),
    case("7 TiB of frequencies", crammed(promised((2**40,), "<f4"), "text/idf.npy"), "text"),
    case("7 TiB of buckets", crammed(promised((4, 2**40), "|u1"), "assignment.npy"), "assignment.npy", of="-table"),
]

DIGITS = "9" * 5000


def swapped(file: str, key: str, value: str) -> Change:
    """Another value in place of the first one of a key."""

    def change(run: Hostile) -> None:
        found = re.search(rf'"{key}": *[^,\n}}]+', (run / file).read_text())
        assert found
        run.replaced(file, found[0], f'"{key}": {value}')

    return change


JSON = [
    *(
        case(f"{file}: {what}", crammed(content, file), "" if what == "many digits" else file)
        for file in (MANIFEST, DONE, "RERANKED", "calibration.json", CURRENT, "curve.json", "text/text.json")
        for what, content in (
            ("no JSON", b"{"),
            ("empty", b""),
            ("a list", b"[1]"),
            ("a number", b"1"),
            ("null", b"null"),
            ("no UTF-8", b'{"a": "\xff"}'),
            ("deep", b"[" * 100_000),
            ("deep objects", b'{"a":' * 100_000),
            ("many digits", f'{{"format": {DIGITS}}}'.encode()),
            ("infinite", b'{"format": Infinity}'),
        )
    ),
    *(
        case(
            f"{file}: {key} is {value:.9}",
            swapped(file, key, value),
            file,
            key,
        )
        for file, key in (
            (MANIFEST, "n_classes"),
            (MANIFEST, "n_rows"),
            (MANIFEST, "prime"),
            (DONE, "steps"),
            (DONE, "worker_seconds"),
            ("RERANKED", "cpu_seconds"),
            ("RERANKED", "n_weights"),
            (CURRENT, "version"),
            ("calibration.json", "prior"),
            ("calibration.json", "n_rows"),
        )
        for value in ("Infinity", "NaN", "-1e999", DIGITS, "1" + "0" * 400, "null", '"x"', "[]", "{}", '"\\ud800"')
    ),
    case("a missing key", lambda run: run.json(MANIFEST, n_classes=...), MANIFEST, "n_classes"),
    case("no assignment", lambda run: run.json(MANIFEST, assignment=...), MANIFEST, "assignment"),
    case(
        "an assignment without buckets",
        lambda run: run.json(MANIFEST, assignment__n_buckets=...),
        MANIFEST,
        "n_buckets",
    ),
    case("an assignment without family", lambda run: run.json(MANIFEST, assignment={}), MANIFEST, "family"),
    case("buckets of a text", lambda run: run.json(MANIFEST, assignment__n_buckets="8x"), MANIFEST, "n_buckets"),
    case("buckets of 2^62", lambda run: run.json(MANIFEST, assignment__n_buckets=2**62), MANIFEST, "n_buckets"),
    case(
        "multipliers that are a text",
        lambda run: run.json(MANIFEST, assignment__multipliers="1"),
        MANIFEST,
        "multipliers",
    ),
    case(
        "multipliers that are infinite",
        lambda run: run.json(MANIFEST, assignment__multipliers=[float("inf")] * 4),
        MANIFEST,
    ),
    case(
        "RERANKED without candidates",
        lambda run: run.json("RERANKED", settings__candidates=...),
        "RERANKED",
        "candidates",
    ),
    case("RERANKED without settings", lambda run: run.json("RERANKED", settings={}), "RERANKED", "candidates"),
    case(
        "candidates that are a text",
        lambda run: run.json("RERANKED", settings__candidates="x"),
        "RERANKED",
        "candidates",
    ),
    case(
        "a curve of one knot too many",
        lambda run: run.json("calibration.json", plain__scores=[0.0]),
        "calibration.json",
        "plain",
    ),
    case(
        "a curve that nests",
        lambda run: run.json("calibration.json", plain__scores=[[0.0]]),
        "calibration.json",
        "plain",
    ),
    case("a prior of 1e300", lambda run: run.json("calibration.json", prior=1e300), "calibration.json", "prior"),
    case("a version that no step made", lambda run: run.json(CURRENT, version=99), CURRENT, "99"),
    case("a version below 0", lambda run: run.json(CURRENT, version=-7), CURRENT, "version"),
    case("a step of version 2^62", lambda run: run.json(CURRENT, steps__0__version=2**62), CURRENT),
]


RULES = [
    order(f"rules of class {k}", "rules.classes is not within", rules__classes=lambda a, k=k: np.full_like(a, k))
    for k in (-(2**31), 2**31 - 1)
]


TOML = [
    case(f"config.toml: {what}", crammed(content, "config.toml"), "config.toml")
    for what, content in (
        ("no TOML", b"["),
        ("empty", b""),
        ("no UTF-8", b'a = "\xff"'),
        ("deep arrays", b"a = " + b"[" * 100_000),
        ("deep tables", b"a" + b".a" * 100_000 + b" = 1"),
        ("deep inline tables", b"a = " + b"{a=" * 100_000),
        ("deep names", b"[" + b"a." * 100_000 + b"a]"),
        ("many digits", f"a = {DIGITS}".encode()),
        ("many hexadecimal digits", b"[training]\nepochs = 0x" + b"f" * 5000),
        ("a section that is a list", b"data = [1]"),
        ("a key of two lines", b'[data]\n"a\\nb" = 1'),
        ("a day", b"[data]\ntrain = 1979-05-27"),
        ("a huge number of epochs", b'[data]\ntrain = "x"\n[training]\nepochs = 0x' + b"f" * 99),
    )
] + [
    case("deep options", lambda run: (run / "config.toml").write_text(nested(run)), "config.toml"),
    case("infinite rate", lambda run: run.toml("training", rate=float("inf")), "config.toml", "rate"),
    case("the retired prior is a text", lambda run: run.toml("decoding", prior="x"), "config.toml", "prior"),
    case("the retired prior is infinite", lambda run: run.toml("decoding", prior=float("nan")), "config.toml", "prior"),
    case("the retired assignment is a list", lambda run: run.toml("hashing", assignment=["learned"]), "config.toml"),
    case("a learned assignment that is none", lambda run: run.toml("hashing", assignment="learned"), ""),
]


def nested(run: Hostile) -> str:
    text = (run / "config.toml").read_text()
    return text.replace("trunk_options = {}", "trunk_options.a" + ".a" * 2000 + " = 1")


@pytest.mark.parametrize("case", [*TENSORS, *HEADERS, *DISAGREE, *NPY, *JSON, *RULES, *TOML], ids=lambda case: case[0])
def test_one_line_says_what_is_wrong(case: Case, tmp_path: Path):
    _, of, change, said = case
    run = Hostile(tmp_path / "run", of)
    change(run)
    line = refusal(run.path)
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("file", "of", "arrays"),
    [
        (WEIGHTS, "-edited", {"input__weight": lambda a: np.full_like(a, 0xF0)}),
        (RERANKER, "-edited", {"gaps": lambda a: -a - 1}),
        (RERANKER, "-edited", {"gaps": lambda a: np.full_like(a, 2**15 - 1)}),
        (RERANKER, "-order-edited", {"repeats": lambda a: np.full_like(a, 2**32 - 1)}),
    ],
)
def test_what_only_reading_all_would_show_reads_nothing_outside(
    file: str, of: str, arrays: dict[str, Any], tmp_path: Path
):
    """Features beyond D, units beyond the last and classes beyond K: answers are wrong, finite and of the run."""
    run = Hostile(tmp_path / "run", of)
    run.set(file, **arrays)
    with mach.load(run.path) as model:
        ids, scores = model.topk(["red cup ala", "brown ene"], 5)
        assert np.isfinite(scores).all()
        assert ((ids >= 0) & (ids < model.n_classes)).all()
        with pytest.raises(StorageError, match="has digest"):
            model.verify()


def test_large_matrices_are_looked_at_once_an_answer_is_not_finite(tmp_path: Path):
    """Opening maps them; `wild_matrix` reads them, and queries are not blamed for the file."""
    wild = np.zeros(SMALL + 1, np.float32).reshape(1, -1)
    wild[0, -1] = np.nan
    arrays = {"output.weight": wild, "output.bias": np.zeros(1, np.float32)}
    check_stored(arrays, {"output.weight": wild.shape, "output.bias": (1,)}, "a file", has_trunk=False)
    assert wild_matrix(arrays) == "output.weight"
    with pytest.raises(StorageError, match=r"a file: output\.weight holds NaN or infinity"):
        check_stored({"output.weight": wild[:, 1:]}, {"output.weight": (1, SMALL)}, "a file", has_trunk=False)


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"loss": "x"}', b'{"loss": NaN}', b"[" * 10**5, b'{"\\ud800": 1}'])
def test_metrics_of_a_stranger(content: bytes, tmp_path: Path):
    run = Hostile(tmp_path / "run")
    (run / "repetitions/r001/metrics.jsonl").write_bytes(b'{"epoch": 1}\n' + content + b"\n")
    with pytest.raises(StorageError, match=r"metrics\.jsonl, line 2") as caught:
        status(Run.open(run.path), 1)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("notes", ["", "{}", "[]", '{"metrics": 5}', "9" * 5000, '{"figures": [{"a": 1}]}'])
def test_checkpoints_of_a_stranger(notes: str):
    state = {"n_steps": np.array([5], np.int64)}
    with pytest.raises(StorageError, match="its notes are damaged"):
        Notes.of(state, {"notes": notes}, "state.safetensors")
    for steps in (np.array([-1]), np.array([]), np.array([2**62]), np.array([0.5]), np.array(5)):
        with pytest.raises(StorageError, match="n_steps is no number of steps"):
            Notes.of({"n_steps": steps}, {"notes": notes}, "state.safetensors")
