"""Make the format fixtures under tests/fixtures: run directories of each format, which must load forever.

.venv/bin/python -m tests.fixtures          # makes those that are missing; one that is there is never made again
.venv/bin/python -m tests.fixtures check    # tells which answers are no longer the same bits
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mach.config import Config
from mach.model.classes.versions import Versions
from mach.model.loading import load
from mach.model.model import MachModel
from mach.reranking.record import is_due
from mach.runs.manifest import FORMAT
from mach.runs.run import Run
from mach.training import conductor

Tree = dict[str, dict[str, Any]]
Answer = dict[str, Any]

FOLDER = Path(__file__).parent / "fixtures"
COLOURS = ["red", "green", "blue", "black", "white", "yellow", "pink", "brown"]
SHAPES = ["cup", "hat", "car"]
NOISE = [f"{vowel}{consonant}{vowel}" for vowel in "aeio" for consonant in "lmnrs"]
EVERY = 30  # classes asked for by `score`, at most


def colours(folder: Path) -> dict[str, Any]:
    """Rows of one or two classes, each a word of the row."""
    rows = [
        {"text": f"a {a} and {b} thing", "classes": sorted({a, b})} for a in COLOURS for b in COLOURS for _ in range(4)
    ]
    return {"train": _jsonl(folder / "colours.jsonl", rows)}


def things(folder: Path, *, n_rows: int = 700, most: int = 3, separator: str | None = None) -> dict[str, Any]:
    """Rows of some classes of which every one is two words, so that others are nearly right; some words are missing."""
    generator = np.random.default_rng(7)
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    shares = 1 / np.arange(4, 4 + len(names))
    rows = []
    for _ in range(n_rows):
        n = int(generator.integers(1, most + 1))
        classes = generator.choice(len(names), n, replace=False, p=shares / shares.sum())
        words = [word for k in classes for word in names[k].split() if generator.random() < 0.9]
        words += list(generator.choice(NOISE, generator.integers(1, 5)))
        found = sorted(names[k] for k in classes)
        rows.append({"text": " ".join(words), "classes": separator.join(found) if separator else found})
    rows += rows[:60]  # rows with the same features
    if separator:
        rows = [{"title": row["text"], "text": "with words", "labels": row["classes"]} for row in rows]
    return {"train": _jsonl(folder / "things.jsonl", rows)}


def one_thing(folder: Path) -> dict[str, Any]:
    """Rows of one class."""
    return things(folder, n_rows=400, most=1)


def separated(folder: Path) -> dict[str, Any]:
    """Classes in a string, text in two columns."""
    data = things(folder, separator="; ")
    columns = {"text_columns": ["title", "text"], "class_column": "labels", "class_separator": ";"}
    return data | {"test": data["train"], "format": "jsonl"} | columns


def documents(folder: Path) -> dict[str, Any]:
    """One document a class."""
    rows = [
        {
            "id": f"{a} {shape}",
            "title": f"the {a} {shape}",
            "body": f"It is {a} beside {b}. Every {shape} is {b} inside.",
        }
        for i, (a, b) in enumerate(zip(COLOURS, COLOURS[3:] + COLOURS[:3], strict=True))
        for shape in SHAPES[: 1 + i % 3]
    ]
    return {"train": _jsonl(folder / "documents.jsonl", rows), "class_column": "id"}


def numbers(folder: Path) -> dict[str, Any]:
    """Repository text with class names in a file; beside it a table of buckets."""
    generator, n_classes = np.random.default_rng(5), 20
    lines = []
    for _ in range(300):
        classes = np.sort(generator.choice(n_classes, generator.integers(1, 3), replace=False))
        features = np.unique(np.concatenate([2 * classes, 2 * classes + 1, 40 + generator.choice(20, 2)]))
        shown = " ".join(f"{j}:{generator.uniform(0.3, 0.7):.3f}" for j in features)
        lines.append(f"{','.join(map(str, classes))} {shown}")
    (folder / "numbers.txt").write_text(f"{len(lines)} 60 {n_classes}\n" + "\n".join(lines) + "\n")
    (folder / "names.txt").write_text("".join(f"number {k}\n" for k in range(n_classes)))
    np.save(folder / "table.npy", generator.integers(0, 8, (4, n_classes)))
    return {"train": str(folder / "numbers.txt"), "classes": str(folder / "names.txt")}


def dense(folder: Path) -> dict[str, Any]:
    """Dense rows without class names."""
    generator = np.random.default_rng(6)
    centres, classes = generator.standard_normal((10, 12)), generator.integers(0, 10, 300)
    rows = centres[classes] + 0.3 * generator.standard_normal((300, 12))
    np.save(folder / "dense.npy", rows.astype(np.float32))
    np.save(folder / "dense.classes.npy", classes)
    return {"train": str(folder / "dense.npy")}


def more_things(folder: Path) -> dict[str, Any]:
    """New rows, some of a new class."""
    rows = [{"text": f"a {a} boat {b}", "classes": [f"{a} hat", "boat"]} for a in COLOURS[:4] for b in NOISE[:5]]
    return {"train": _jsonl(folder / "more.jsonl", rows)}


def edit(model: MachModel) -> None:
    """Every verb, one version each; the last but one is undone."""
    model.classes.add(
        ["striped cup", "pair"],
        examples=[["red white cup", "white cup red ala"], ["hat hat black pink", "pink black hat"]],
    )
    model.classes.add(["night", "secret"], texts=["black blue brown", []], by="hash")
    model.classes.upvote(["brown ala car", "white cup"], ["black hat", "red cup"])
    model.classes.associate(["ama ene"], ["green hat"], k=2)
    model.classes.remove(["green car", "pair"])
    model.classes.rename("blue hat", "sky hat")
    model.classes.name_subset("warm", ["red cup", "yellow cup", "striped cup", "pink cup"])
    model.classes.remove(["red cup"])
    model.classes.undo()


def edit_a_little(model: MachModel) -> None:
    """What a run that starts from this one takes over."""
    model.classes.add(["striped cup"], examples=[["red white cup", "white cup red ala"]])
    model.classes.remove(["green car"])
    model.classes.name_subset("warm", ["red cup", "yellow cup"])


COLOUR_QUERIES = ["a red thing", "something black and white", "BROWN", "nothing known"]
SEEN = ["pink cup white hat red car omo eme eme", "red car imi ili oso"]  # the first rows of `things`
THING_QUERIES = ["red cup ala", "a blue hat beside a green car", "brown ene", *SEEN, "nothing known"]
SMALL: Tree = {"hashing": {"repetitions": 2, "buckets": 6}, "network": {"hidden": [16], "dropout": 0.0}}
INT4: Tree = {
    "data": {"validation_fraction": 0.25},
    "hashing": {"repetitions": 2, "heads": 2, "buckets": 6},
    "network": {"hidden": [16], "dropout": 0.0, "weights": "int4"},
}
ORDERED: Tree = {
    "data": {"validation_fraction": 0.2},
    "hashing": {"repetitions": 2, "heads": 2, "buckets": 8},
    "network": {"hidden": [16], "dropout": 0.1, "weights": "int4", "keep": 0.5},
}
EASY = {"weight": 0.0, "prior": 0.0}  # of a blend: so few rows teach an order that is better than it
PAIRS = {"candidates": 12, "pairs": 4, "cost": 0.5, "power": 0.5, "threshold": 0.08, "class_weights": 64}
PLAIN = {"candidates": 0}


def _hashed(kind: str, **more: Any) -> Tree:
    return {
        "hashing": {"repetitions": 2, "heads": 2, "buckets": 8, "assignment": kind, **more},
        "network": {"hidden": [16], "dropout": 0.0, "weights": "int8"},
    }


@dataclass(frozen=True)
class Kind:
    """How a fixture is made.

    Parameters
    ----------
    tree : Tree
        Its configuration; what is left open is chosen by the recipe.
    rows : callable
        Writes the data into a folder and returns keys of ``data``.
    queries : list
        Texts, or rows of numbers.
    edit : callable, optional
        What is done to the classes afterwards.
    start : Kind, optional
        Of a run, not kept, that training starts from.
    epochs : int
    """

    tree: Tree
    rows: Callable[[Path], dict[str, Any]] = things
    queries: list[Any] | None = None
    edit: Callable[[MachModel], None] | None = None
    start: Kind | None = None
    epochs: int = 20


def _numbers(n_features: int, *rows: dict[int, float]) -> list[list[float]]:
    return [[row.get(j, 0.0) for j in range(n_features)] for row in rows]


def _colours(tree: Tree) -> Kind:
    return Kind(tree, colours, COLOUR_QUERIES, epochs=60)


# What runs of this format may hold, by the end of their folder's name.
KINDS: dict[str, Kind] = {
    "": _colours(SMALL),
    "-reranked": _colours(
        {
            "data": {"row_features": 64, "validation_fraction": 0.25},
            "hashing": {"repetitions": 2, "heads": 2, "buckets": 6},
            "network": {"hidden": [15], "dropout": 0.0, "weights": "int4"},
            "reranking": {"candidates": 4, "weight": 1.0, "prior": 0.1},
            "decoding": {"prior": 0.1},
        }
    ),
    "-reranked-pairs": _colours(
        INT4
        | {
            "reranking": {"candidates": 4, "pairs": 3, "weight": 1.0, "prior": 0.1},
            "decoding": {"prior": 0.1},
        }
    ),
    "-reranked-repeats": _colours(INT4 | {"reranking": {"candidates": 4, "weight": 1.0, "prior": 0.1, "repeats": 1.0}}),
    "-kept": _colours(
        {
            "hashing": {"repetitions": 2, "heads": 2, "buckets": 6},
            "network": {"hidden": [16], "dropout": 0.0, "weights": "int4", "keep": 0.3, "power": 1.5},
        }
    ),
    "-order-views": Kind(
        ORDERED
        | {
            "reranking": {
                **EASY,
                "candidates": 12,
                "loss": "logistic",
                "cost": 4.0,
                "threshold": 0.1,
                "pilots": 2,
                "views": ["presence", "cautious", "bold"],
            }
        }
    ),
    "-order-inputs": Kind(ORDERED | {"reranking": {**PAIRS, "inputs": True, "views": ["bold"]}}),
    "-order-edited": Kind(ORDERED | {"reranking": {**PAIRS, **EASY, "pilots": 1, "views": []}}, edit=edit),
    "-edited": Kind(ORDERED | {"reranking": {**PAIRS, "pilots": 0}}, edit=edit),
    "-started": Kind(
        {"training": {"replay": 2.0, "epochs": 4}},
        more_things,
        start=Kind(ORDERED | {"reranking": {**PAIRS, "pilots": 0}}, edit=edit_a_little),
    ),
    "-started-bare": Kind(
        {"training": {"replay": 0.0, "epochs": 4}},
        more_things,
        start=Kind(_hashed("universal", capacity=30) | {"reranking": PLAIN}),
    ),
    "-int4": Kind(
        {
            "hashing": {"repetitions": 2, "heads": 3, "buckets": 8},
            "network": {"hidden": [15, 12], "weights": "int4", "keep": 1.0},
            "reranking": PLAIN,
        }
    ),
    "-int8": Kind(_hashed("universal") | {"reranking": PLAIN, "text": {"words": None, "characters": [2, 2]}}),
    "-float32": Kind(
        {
            "hashing": {"repetitions": 2, "heads": 2, "buckets": 8},
            "network": {"hidden": [16], "weights": "float32", "power": 0.5},
            "reranking": PLAIN,
            "text": {"hashing": True, "n_features": 64, "tfidf": False, "sublinear": True},
        }
    ),
    "-linear": Kind(
        {
            "hashing": {"repetitions": 2, "heads": 2, "buckets": 8},
            "network": {"hidden": [], "weights": "float32"},
            "reranking": PLAIN,
        }
    ),
    "-trunk": Kind(
        {
            "hashing": {"repetitions": 2, "buckets": 8},
            "network": {"hidden": [12], "trunk": "torch.nn:Linear", "trunk_options": {"out_features": 10}},
            "reranking": PLAIN,
        }
    ),
    "-learned": Kind(
        _hashed("learned", choices=3, relearn_epochs=[5, 10]) | {"reranking": {"candidates": 8, "repeats": 0.0}}
    ),
    "-clustered": Kind(
        _hashed("clustered", choices=4) | {"reranking": PLAIN, "decoding": {"aggregate": "unbiased-mean"}}
    ),
    "-balanced": Kind(
        _hashed("balanced", choices=2)
        | {
            "data": {"validation_fraction": 0.2},
            "reranking": {"candidates": 8, "bytes": 1500, "pairs": 0},
            "decoding": {"aggregate": "logit-mean"},
        }
    ),
    "-random": Kind(
        _hashed("random") | {"reranking": PLAIN, "decoding": {"aggregate": "mean", "prior": 0.05, "candidates": 10}}
    ),
    "-table": Kind(
        {
            "hashing": {"repetitions": 2, "heads": 2, "buckets": 8, "table": "{folder}/table.npy"},
            "network": {"hidden": [16]},
            "reranking": {"candidates": 5, "weight": 0.7, "prior": 0.0, "repeats": -1.0},
            "decoding": {"aggregate": "min"},
        },
        numbers,
        _numbers(
            60,
            {0: 0.5, 1: 0.6},
            dict.fromkeys((0, 1, 30, 31, 49, 50), 0.4),
            {6: 0.4, 7: 0.5, 20: 0.4, 21: 0.6, 44: 0.5},
            {41: 1.0},
            {},
        ),
    ),
    "-softmax": Kind(
        _hashed("universal")
        | {
            "training": {"loss": "softmax", "sampled": 0.5},
            "reranking": {"candidates": 6, "pairs": 3, "weight": 0.5},
            "decoding": {"aggregate": "median", "prior": -0.1},
        },
        one_thing,
    ),
    "-documents": Kind(
        {
            "data": {
                "strong_columns": ["title"],
                "weak_columns": ["body"],
                "phrases": 12,
                "word_dropout": 0.1,
                "typos": 0.05,
                "phrase_seed": 3,
            },
            "hashing": {"repetitions": 2, "heads": 2, "buckets": 8},
            "network": {"hidden": [16]},
            "text": {"characters": [3, 3], "min_rows": 3, "n_features": 150},
            "reranking": {"candidates": 6},
        },
        documents,
    ),
    "-dense": Kind(
        {"hashing": {"repetitions": 2, "heads": 2, "buckets": 6}, "network": {"hidden": [16]}},
        dense,
        np.random.default_rng(1).standard_normal((4, 12)).round(2).tolist(),
    ),
    "-all-keys": Kind(
        {
            "data": {"row_features": 32, "validation_fraction": 0.2},
            "text": {"words": [1, 2], "min_rows": 4, "n_features": 300, "sublinear": True},
            "hashing": {"repetitions": 2, "heads": 2, "buckets": 8, "capacity": 40, "seed": 3},
            "network": {
                "hidden": [15, 12],
                "dropout": 0.1,
                "input_dropout": 0.1,
                "power": 1.5,
                "weights": "int4",
                "keep": 0.5,
            },
            "training": {
                "loss": "binary",
                "schedule": "cosine",
                "warmup": 0.1,
                "dither": 0.2,
                "patience": 19,
                "checkpoint_seconds": 20.0,
                "seed": 7,
            },
            "decoding": {"aggregate": "log-mean", "prior": 0.05, "candidates": 50},
            "reranking": {
                "candidates": 12,
                "loss": "logistic",
                "cost": 2.0,
                "negatives": 500,
                "pairs": 4,
                "power": 0.5,
                "iterations": 5,
                "tolerance": 0.2,
                "threshold": 0.02,
                "class_weights": 60,
                "weight": 0.1,
                "prior": 0.1,
                "repeats": -0.5,
                "pilots": 1,
                "views": ["cautious"],
                "inputs": True,
            },
            "launch": {
                "address": "elsewhere:6379",
                "workers": 1,
                "memory_bytes": 10**9,
                "resources": {"node": 1.0},
                "shard": 1,
                "host_memory": "none",
                "attempts": 2,
            },
        },
        separated,
        [f"{query} with words" for query in THING_QUERIES],
    ),
}


def main() -> None:
    if sys.argv[1:] == ["check"]:
        for path in sorted(FOLDER.glob("run-format-*")):
            print(path.name, ", ".join(changed(path)) or "same bits")
        return
    for end, kind in KINDS.items():
        target = FOLDER / f"run-format-{FORMAT}{end}"
        if not target.exists():
            print("making", target.name)
            make(target, kind)
    print("keys in no configuration:", ", ".join(unused_keys()) or "none")


def make(target: Path, kind: Kind) -> None:
    """Train a run of this kind, and note what it answers."""
    with tempfile.TemporaryDirectory() as folder:
        made = train(Path(folder), kind, Path(folder, "run"))
        shutil.rmtree(made / "reranking", ignore_errors=True)
        for scratch in made.rglob("lock"):
            scratch.unlink()
        for file in [made / "config.toml", *made.rglob("DONE"), *made.glob("classes/CURRENT")]:
            file.write_text(file.read_text().replace(folder, "/elsewhere").replace(os.uname().nodename, "elsewhere"))
        shutil.copytree(made, target)
    (target / "expected.json").write_text(as_json(expected_of(target, kind)))


def train(folder: Path, kind: Kind, made: Path) -> Path:
    """A run of this kind, with all that ``mach train`` makes, and then edited."""
    written = kind.rows(folder)
    own: Tree = json.loads(json.dumps(kind.tree).replace("{folder}", str(folder)))
    if kind.start:
        train(folder, kind.start, folder / "start")
        own["training"]["start"] = str(folder / "start")
        common: Tree = {"data": {}, "training": {}}
    else:
        common = {"data": {}, "training": {"epochs": kind.epochs, "batch": 32, "rate": 0.02, "precision": "float32"}}
    common["data"] = written | {"cache": str(folder / "cache")}
    tree = own | {name: values | own.get(name, {}) for name, values in common.items()}
    with conductor.train(tree, made, launcher="here") as model:
        is_learned = model.reranker is not None and model.reranker.order is not None
        assert bool(model.run.config.reranking.pilots) == is_learned
        if kind.edit:
            kind.edit(model)
    return made


def expected_of(path: Path, kind: Kind) -> dict[str, Any]:
    """What a run says of itself and answers."""
    versions = [step.version for step in Versions(Run.open(path)).current().steps]
    between = [versions[len(versions) // 2], versions[-1]] if len(versions) > 1 else []
    asked = [None, *([0] if versions else []), *between]
    queries = THING_QUERIES if kind.queries is None else kind.queries
    expected: dict[str, Any] = {"queries": queries, "versions": []}
    for version in asked:
        with load(path, version=version) as model:
            found = {"version": version, **described(model)}
            found["answers"] = [
                {"verb": verb, "how": how, **answer(model, queries, verb, how)}
                for verb, how in questions(model, networks=version is None)
            ]
            expected["versions"].append(found)
    return expected | {"is_due": is_due(Run.open(path))}


def described(model: MachModel) -> dict[str, Any]:
    """What a model says of itself; its path is left out."""
    name = model.name_function()
    info = {key: value for key, value in model.info().items() if key != "path"}
    history = [[step.version, step.parent, step.verb, step.what] for step in model.classes.history()]
    return {"names": name and name(range(model.n_classes)), "history": history, "info": info}


def questions(model: MachModel, *, networks: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Verbs and their arguments, all that a model can be asked for; whatever its classes are only if wanted."""
    n_classes = model.n_classes
    some = [k for k in range(0, n_classes, 2) if k not in model.classes.edits.removed]
    hows: list[dict[str, Any]] = [{}, {"tail": 0.5}, {"allowed": some}, {"budget": 4}, {"repetitions": 1}]
    hows += [{"allowed": name} for name in model.classes.edits.subsets]
    if model.reranker is not None:
        hows += [{"rerank": False}, {"rerank": False, "tail": 0.5}, {"rerank": False, "allowed": some}]
    if model.calibration is not None:
        hows += [{"probabilities": True}, {"probabilities": True, "rerank": False}]
        hows += [{"probabilities": True, "tail": 0.5}]
    for how in hows:
        yield "topk", {"k": 3} | how
    ids = list(range(min(n_classes, EVERY)))
    hows_of_scores: list[dict[str, Any]] = [{}, {"rerank": False}, {"tail": 0.5}]
    for how in hows_of_scores:
        if model.reranker is not None or "rerank" not in how:
            yield "score", {"ids": ids} | how
    if networks:
        yield "bucket_scores", {}
    if not (model.run.config.network.hidden or model.run.manifest.dense_input):
        return  # there is no output layer
    there = [k for k in some if model.classes.edits.is_there_K is None or model.classes.edits.is_there_K[k]]
    yield "similar_classes", {"classes": there[:3], "k": 3}


def answer(model: MachModel, queries: list[Any], verb: str, how: dict[str, Any]) -> Answer:
    """A verb's answer, as lists; scores as the shortest decimals that are the same float32."""
    asked: Any = queries if isinstance(queries[0], str) else np.array(queries, np.float32)
    if verb == "similar_classes":
        ids, scores = model.classes.similar(**how)
    elif verb == "topk":
        ids, scores = model.topk(asked, **how)
    else:
        ids, scores = None, model.score(asked, **how) if verb == "score" else model.bucket_scores(asked)
    shortest = np.vectorize(lambda score: float(str(score)), otypes=[float])(scores)
    assert np.array_equal(shortest.astype(np.float32), scores)
    return ({} if ids is None else {"ids": ids.tolist()}) | {"scores": shortest.tolist()}


def changed(path: Path) -> list[str]:
    """Questions that a run answers otherwise than on the day it was made, if only by a bit."""
    expected = json.loads((path / "expected.json").read_text())
    if "versions" not in expected:
        with load(path, trunk=Run.open(path).config.network.trunk) as model:
            found = model.topk(expected["queries"], k=3)
        return [] if found[1].tolist() == expected["scores"] and found[0].tolist() == expected["ids"] else ["topk"]
    others = []
    for version in expected["versions"]:
        with load(path, version=version["version"], trunk=Run.open(path).config.network.trunk) as model:
            for asked in version["answers"]:
                found_ = answer(model, expected["queries"], asked["verb"], asked["how"])
                if any(asked[name] != value for name, value in found_.items()):
                    others.append(f"{asked['verb']} {asked['how']} of version {version['version']}")
    return others


def as_json(expected: dict[str, Any]) -> str:
    """JSON, with a line for every answer."""
    lines = []
    for version in expected["versions"]:
        answers = ",\n  ".join(map(json.dumps, version["answers"]))
        rest = json.dumps({key: value for key, value in version.items() if key != "answers"})
        lines.append(f'{rest[:-1]}, "answers": [\n  {answers}]}}')
    rest = json.dumps({key: value for key, value in expected.items() if key != "versions"})
    return f'{rest[:-1]},\n "versions": [\n' + ",\n".join(lines) + "]}\n"


def unused_keys() -> list[str]:
    """Keys of today's configuration that no fixture's config.toml has."""
    trees = [tomllib.loads(file.read_text()) for file in FOLDER.glob("run-format-*/config.toml")]
    there = {(section, key) for tree in trees for section, values in tree.items() for key in values}
    known = {
        (section, key)
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }
    return [".".join(key) for key in sorted(known - there)]


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


if __name__ == "__main__":
    main()
