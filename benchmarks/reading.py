"""Reading repository text beside plain Python, scikit-learn's svmlight reader, and what the machine could do.

    python benchmarks/reading.py            # about a minute
    python benchmarks/reading.py --write    # also writes benchmarks/results/reading-<date>.md

The same bytes for all: the training rows of gnd-core, decompressed, from the page cache; one thread. scikit-learn
gets them without the header line, which it cannot read; plain Python is a loop over lines with float() and numpy
arrays at the end. Methods take turns; figures are medians, ratios are to plain Python within the same run.
The last rows prepare the largest set, debfiles-name2dir, in a process of its own.
"""

import argparse
import datetime
import io
import lzma
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from hardware import commit, processor

from mach.data.formats import FORMATS
from mach.data.writer import StoreWriter

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
ROUNDS = 3
REPOSITORY = FORMATS["repository"]
PREPARE = """
import re, sys, time
from pathlib import Path
from mach.config import DataConfig, TextConfig
from mach.data.prepare import prepare
begin = time.perf_counter()
store = prepare(DataConfig(train="-", cache=sys.argv[2]), TextConfig(), sys.argv[1])
seconds = time.perf_counter() - begin
# not ru_maxrss: that of a child begins at its parent's size
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
print(store.n_rows, seconds, peak)
"""


def read(path):
    return sum(len(chunk.class_ids) for chunk in REPOSITORY.chunks(path, REPOSITORY.shape(path)))


def read_into_store(path):
    shape = REPOSITORY.shape(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        limits = {"n_features": shape.n_features, "n_classes": shape.n_classes}
        with StoreWriter(Path(folder) / "store", source="benchmark", **limits) as writer:
            for chunk in REPOSITORY.chunks(path, shape):
                writer.append(chunk)


def read_with_python(path):
    indptr, indices, values, classes = [0], [], [], []
    with path.open() as file:
        next(file)
        for line in file:
            names, *features = line.split(" ")
            classes.append([int(k) for k in names.split(",") if k])
            for feature in features:
                index, value = feature.split(":")
                indices.append(int(index))
                values.append(float(value))
            indptr.append(len(indices))
    return np.array(indptr), np.array(indices, np.int32), np.array(values, np.float32), classes


def read_with_sklearn(path):
    from sklearn.datasets import load_svmlight_file

    body = path.read_bytes().partition(b"\n")[2]
    return load_svmlight_file(io.BytesIO(body), multilabel=True, dtype=np.float32, zero_based=True)


def copy(path):
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/reading-<date>.md")
    write = parser.parse_args().write
    archive = DATA / "gnd-core" / "train.txt.xz"
    if not archive.exists():
        sys.exit(f"no {archive}: put the data sets beside the project")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        path.write_bytes(lzma.decompress(archive.read_bytes()))
        n_megabytes = path.stat().st_size / 1e6
        methods = {
            "floor: copy from the page cache": (copy, path),
            "floor: decompress the .xz": (lambda source: lzma.decompress(source.read_bytes()), archive),
            "mach, chunks": (read, path),
            "mach, chunks into a store on disk, flushed": (read_into_store, path),
            "mach, .xz chunks into a store": (read_into_store, Path(folder) / "train.txt.xz"),
            "scikit-learn load_svmlight_file": (read_with_sklearn, path),
            "plain Python": (read_with_python, path),
        }
        (Path(folder) / "train.txt.xz").write_bytes(archive.read_bytes())
        read(path)  # compile, or load from numba's cache
        seconds = {name: [] for name in methods}
        for _ in range(ROUNDS):
            for name, (method, source) in methods.items():
                begin = time.perf_counter()
                method(source)
                seconds[name].append(time.perf_counter() - begin)
        largest = DATA / "debfiles-name2dir" / "train.txt.xz"
        command = [sys.executable, "-c", PREPARE, str(largest), folder]
        n_rows, wall, peak = map(float, subprocess.check_output(command, cwd=ROOT, text=True).split())

    speeds = {name: n_megabytes / statistics.median(times) for name, times in seconds.items()}
    python = speeds["plain Python"]
    lines = [
        f"# Reading, {datetime.date.today()}",
        "",
        f"`python benchmarks/reading.py` at {commit()}, {processor()}, "
        f"Python {platform.python_version()}; {n_megabytes:.0f} MB of repository text, median of {ROUNDS} rounds.",
        "",
        "| method | MB of text a second | times plain Python |",
        "|---|---|---|",
        *(f"| {name} | {speed:,.0f} | {speed / python:.1f} |" for name, speed in speeds.items()),
        "",
        f"debfiles-name2dir train (.xz, {n_rows:,.0f} rows) prepared in a process of its own: {wall:.1f} s, "
        f"peak resident memory {peak:.0f} MiB.",
    ]
    print("\n".join(lines))
    if write:
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        (results / f"reading-{datetime.date.today()}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
