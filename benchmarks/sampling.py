"""What sampling the buckets of a step costs in accuracy and saves in time: one repetition by several shares.

    .venv/bin/python benchmarks/shapes.py quarter ../shared/data/debfiles-name2dir /tmp/shapes/quarter
    .venv/bin/python benchmarks/sampling.py /tmp/shapes/quarter --write          # some 20 minutes

The set is repository text of rows of one class each; all but the share is the recipe's, without re-ranking. Training
runs through the command line, one repetition after the other, so that seconds compare; accuracy is on all test rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path

from accuracy import mach
from hardware import commit, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train.txt and test.txt")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.25, 0.125])
    parser.add_argument("--buckets", type=int, default=4096)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "run.toml")
        config.write_text(f'[data]\ntrain = "{options.data / "train.txt"}"\ntest = "{options.data / "test.txt"}"\n')
        for share in options.shares:
            run = str(Path(folder, f"run-{share}"))
            keys = [f"training.sampled={share}", f"hashing.buckets={options.buckets}", "hashing.repetitions=1"]
            keys += ["reranking.candidates=0", "data.validation_fraction=0.0"]
            mach("train", str(config), run, "--workers", "1", *(word for key in keys for word in ("--set", key)))
            info, last = json.loads(mach("info", run, "--json")), json.loads(mach("evaluate", run, "--json"))[-1]
            rows.append((share, info["worker_seconds"], last))
            print(f"share {share}: {info['worker_seconds']:.0f} s, P@1 {last['P@1']:.1f}", flush=True)
    lines = [
        f"# Sampled buckets on {options.data.name}",
        "",
        f"{datetime.date.today()}, {processor()}, commit {commit()}. K = {info['n_classes']:,}, B = {options.buckets}, "
        "R = 1, no re-ranking;",
        f"`.venv/bin/python benchmarks/sampling.py {options.data.name}`.",
        "",
        "| share of a head's buckets | worker seconds | times faster | P@1 | P@3 | P@5 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {share:g} | {seconds:.0f} | {rows[0][1] / seconds:.2f} | {last['P@1']:.2f} | {last['P@3']:.2f} | "
            f"{last['P@5']:.2f} |"
            for share, seconds, last in rows
        ),
    ]
    print("\n".join(lines))
    if options.write:
        name = f"sampling-{options.data.name}-{datetime.date.today()}.md"
        (Path(__file__).parent / "results" / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
