"""Make the format fixtures under tests/fixtures: run directories of each format, which must load forever.

.venv/bin/python -m tests.fixtures        # only when the format number is raised; never overwrite an old one
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from mach.config import parse_config
from mach.launch.setup import set_up
from mach.loading import load
from mach.storage import FORMAT
from mach.training import ShardJob, train_shard

FOLDER = Path(__file__).parent / "fixtures"
COLOURS = ["red", "green", "blue", "black", "white", "yellow", "pink", "brown"]
QUERIES = ["a red thing", "something black and white", "BROWN", "nothing known"]


def main() -> None:
    target = FOLDER / f"run-format-{FORMAT}"
    if target.exists():
        raise SystemExit(f"{target} exists: a fixture is never made again")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"text": f"a {a} and {b} thing", "classes": sorted({a, b})}
            for a in COLOURS
            for b in COLOURS
            for _ in range(4)
        ]
        source = Path(folder, "colours.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {
            "data": {"train": str(source), "cache": folder},
            "hashing": {"repetitions": 2, "buckets": 6},
            "network": {"hidden": [16], "dropout": 0.0},
            "training": {"epochs": 60, "batch": 32, "rate": 0.02, "precision": "float32"},
        }
        made = Path(folder, "run")
        _, store = set_up(parse_config(tree, "fixture"), made)
        train_shard(ShardJob(str(made), str(store.path), (0, 1)))
        for scratch in made.rglob("lock"):
            scratch.unlink()
        for file in [made / "config.toml", *made.rglob("DONE")]:
            file.write_text(file.read_text().replace(folder, "/elsewhere").replace(os.uname().nodename, "elsewhere"))
        shutil.copytree(made, target)
    ids, scores = load(target).topk(QUERIES, k=3)
    expected = {"queries": QUERIES, "ids": ids.tolist(), "scores": scores.tolist()}
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
