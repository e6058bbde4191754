"""Make the format fixtures under tests/fixtures: run directories of each format, which must load forever.

.venv/bin/python -m tests.fixtures        # makes those that are missing; one that is there is never made again
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mach.calibrating import calibrate, held_out
from mach.config import parse_config
from mach.launch.reranker import train_reranker
from mach.launch.setup import set_up
from mach.loading import load
from mach.storage import FORMAT
from mach.training import ShardJob, train_shard

FOLDER = Path(__file__).parent / "fixtures"
COLOURS = ["red", "green", "blue", "black", "white", "yellow", "pink", "brown"]
QUERIES = ["a red thing", "something black and white", "BROWN", "nothing known"]
# Everything that a run of this format may hold, by the end of its folder's name.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "": {"hashing": {"repetitions": 2, "buckets": 6}, "network": {"hidden": [16], "dropout": 0.0}},
    "-reranked": {
        "data": {"row_features": 64, "validation_fraction": 0.25},
        "hashing": {"repetitions": 2, "heads": 2, "buckets": 6},
        "network": {"hidden": [15], "dropout": 0.0, "weights": "int4"},
        "reranking": {"candidates": 4, "weight": 1.0, "prior": 0.1},
        "decoding": {"prior": 0.1},
    },
    "-reranked-pairs": {
        "data": {"validation_fraction": 0.25},
        "hashing": {"repetitions": 2, "heads": 2, "buckets": 6},
        "network": {"hidden": [16], "dropout": 0.0, "weights": "int4"},
        "reranking": {"candidates": 4, "pairs": 3, "weight": 1.0, "prior": 0.1},
        "decoding": {"prior": 0.1},
    },
    "-reranked-repeats": {
        "data": {"validation_fraction": 0.25},
        "hashing": {"repetitions": 2, "heads": 2, "buckets": 6},
        "network": {"hidden": [16], "dropout": 0.0, "weights": "int4"},
        "reranking": {"candidates": 4, "weight": 1.0, "prior": 0.1, "repeats": 1.0},
    },
    "-kept": {
        "hashing": {"repetitions": 2, "heads": 2, "buckets": 6},
        "network": {"hidden": [16], "dropout": 0.0, "weights": "int4", "keep": 0.3, "power": 1.5},
    },
}


def main() -> None:
    for end, tree in KINDS.items():
        target = FOLDER / f"run-format-{FORMAT}{end}"
        if not target.exists():
            make(target, tree)


def make(target: Path, given: dict[str, dict[str, Any]]) -> None:
    """Train a run with such a configuration, and note what it answers."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"text": f"a {a} and {b} thing", "classes": sorted({a, b})}
            for a in COLOURS
            for b in COLOURS
            for _ in range(4)
        ]
        source = Path(folder, "colours.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = given | {
            "data": {"train": str(source), "cache": folder} | given.get("data", {}),
            "training": {"epochs": 60, "batch": 32, "rate": 0.02, "precision": "float32"},
        }
        made = Path(folder, "run")
        run, store = set_up(parse_config(tree, "fixture"), made)
        train_shard(ShardJob(str(made), str(store.path), (0, 1)))
        train_reranker(run, store, run.config.launch)
        if run.config.data.validation_fraction:
            with load(made) as model:
                calibrate(model, store, held_out(run, store))
        shutil.rmtree(made / "reranking", ignore_errors=True)
        for scratch in made.rglob("lock"):
            scratch.unlink()
        for file in [made / "config.toml", *made.rglob("DONE")]:
            file.write_text(file.read_text().replace(folder, "/elsewhere").replace(os.uname().nodename, "elsewhere"))
        shutil.copytree(made, target)
    model = load(target)
    ids, scores = model.topk(QUERIES, k=3)
    expected = {"queries": QUERIES, "ids": ids.tolist(), "scores": scores.tolist()}
    if model.calibration:
        expected["probabilities"] = model.topk(QUERIES, k=3, probabilities=True)[1].tolist()
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
