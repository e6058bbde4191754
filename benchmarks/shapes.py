"""Data sets of other shapes, made from those of shared/data, as repository text that `peers.py --data` reads.

    .venv/bin/python benchmarks/shapes.py groups ../shared/data/debfiles-name2dir /tmp/shapes/groups
    .venv/bin/python benchmarks/shapes.py drift ../shared/data/debfiles-name2dir /tmp/shapes/drift
    .venv/bin/python benchmarks/shapes.py short ../shared/data/gnd-core /tmp/shapes/short

groups: rows of one to eight files of a Debian package with their directories as classes (66,000 rows, K = 74,984), half
of the words left out, as in messages of commits: classes that go together, and few rows each. short: the first eight
words of gnd-core's records (K = 24,473). drift: groups of the files of other packages, of which the last eighth by name
is for test rows alone, so that these have other words than the training rows, and a quarter of their pairs of a row and
a class has a class that none of those has. quarter: the packages of debfiles whose name's CRC is a multiple of four.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from mach.config import DataConfig, TextConfig
from mach.data.prepare import prepare
from mach.data.store import Store

SHARE = 0.5  # of the words of a group that stay
LEARNED = 0.88  # of a package's files, where words drift
SIZES = [1, 2, 2, 3, 3, 4, 6, 8]  # files of a group, equally likely
N_TRAIN, N_TEST, MOST_OF_A_PACKAGE = 60_000, 6_000, 60
Row = tuple[list[int], str]  # classes, "feature:value ..."


def rows_and_texts(folder: Path, part: str) -> Iterator[tuple[str, str]]:
    with lzma.open(folder / f"{part}.txt.xz", "rt") as rows, lzma.open(folder / f"{part}_texts.txt.xz", "rt") as texts:
        next(rows)
        yield from zip((row.rstrip("\n") for row in rows), (text.rstrip("\n") for text in texts), strict=True)


def by_package(folder: Path, part: str) -> Iterator[tuple[int, Row]]:
    """Rows of debfiles with the CRC of their package's name."""
    for row, text in rows_and_texts(folder, part):
        k, _, features = row.partition(" ")
        yield zlib.crc32(text.rsplit(None, 1)[-1].encode()), ([int(k)], features)


def n_features(folder: Path) -> int:
    with lzma.open(folder / "train.txt.xz", "rt") as rows:
        return int(next(rows).split()[1])


def write(out: Path, parts: dict[str, list[Row]], n_features: int) -> None:
    """Both parts, their classes counted anew."""
    ids: dict[int, int] = {}
    for rows in parts.values():
        for classes, _ in rows:
            for k in classes:
                ids.setdefault(k, len(ids))
    for part, rows in parts.items():
        lines = [f"{len(rows)} {n_features} {len(ids)}"]
        lines += [f"{','.join(str(ids[k]) for k in classes)} {features}" for classes, features in rows]
        (out / f"{part}.txt").write_text("\n".join(lines) + "\n")
        print(f"{out / part}.txt: {len(rows):,} rows, K = {len(ids):,}")


def quarter(folder: Path, out: Path) -> None:
    parts = {p: [row for crc, row in by_package(folder, p) if crc % 4 == 0] for p in ("train", "test")}
    write(out, parts, n_features(folder))


def groups(folder: Path, out: Path) -> None:
    packages: dict[int, list[tuple[int, str]]] = {}
    for crc, (classes, features) in by_package(folder, "train"):
        if crc % 3 == 1:
            packages.setdefault(crc, []).append((classes[0], features))
    draw, found = random.Random(1), []
    for _, files in sorted(packages.items()):
        if len({k for k, _ in files}) >= 4:
            found += [group(files, draw) for _ in range(min(len(files) // 3, MOST_OF_A_PACKAGE))]
    draw.shuffle(found)
    parts = {"train": found[:N_TRAIN], "test": found[N_TRAIN : N_TRAIN + N_TEST]}
    write(out, parts, n_features(folder))


def drift(folder: Path, out: Path) -> None:
    packages: dict[str, list[tuple[str, int, str]]] = {}
    for row, text in rows_and_texts(folder, "train"):
        k, _, features = row.partition(" ")
        package = text.rsplit(None, 1)[-1]
        if zlib.crc32(package.encode()) % 3 == 2:
            packages.setdefault(package, []).append((text, int(k), features))
    draw, parts = random.Random(1), {"train": list[Row](), "test": list[Row]()}
    for _, files in sorted(packages.items()):
        if len({k for _, k, _ in files}) >= 4:
            by_name = [file[1:] for file in sorted(files)]
            learned, later = by_name[: int(LEARNED * len(files))], by_name[int(LEARNED * len(files)) :]
            n_groups = min(len(files) // 3, MOST_OF_A_PACKAGE)
            parts["train"] += [group(learned, draw) for _ in range(n_groups)]
            if len(later) >= 2:
                parts["test"] += [group(later, draw) for _ in range(max(1, n_groups // 10))]
    for part, n_rows in (("train", N_TRAIN), ("test", N_TEST)):
        draw.shuffle(parts[part])
        del parts[part][n_rows:]
    write(out, parts, n_features(folder))


def group(files: list[tuple[int, str]], draw: random.Random) -> Row:
    picked = draw.sample(files, min(draw.choice(SIZES), len(files)))
    sums: dict[int, float] = {}
    for _, features in picked:
        for item in features.split():
            j, value = item.split(":")
            sums[int(j)] = sums.get(int(j), 0.0) + float(value)
    kept = {j: value for j, value in sums.items() if draw.random() < SHARE} or sums
    length = sum(value * value for value in kept.values()) ** 0.5
    return sorted({k for k, _ in picked}), " ".join(f"{j}:{value / length:.5g}" for j, value in sorted(kept.items()))


def short(folder: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        like: Store | None = None
        for part in ("train", "test"):
            source = Path(scratch, f"{part}.jsonl")
            source.write_text("".join(beginnings(rows_and_texts(folder, part))))
            config = DataConfig(train=str(source), cache=scratch)
            store = prepare(config, TextConfig(min_rows=2), str(source), like=like)
            like = like or store
            lines = [f"{store.n_rows} {store.n_features} {store.n_classes}"]
            for n in range(store.n_rows):
                ids = store.class_ids[store.class_indptr[n] : store.class_indptr[n + 1]]
                entries = slice(store.feature_indptr[n], store.feature_indptr[n + 1])
                pairs = zip(store.feature_indices[entries], store.feature_values[entries], strict=True)
                line = f"{','.join(map(str, ids))} {' '.join(f'{j}:{value:.5g}' for j, value in pairs)}"
                lines.append(line.rstrip())  # omikuji refuses a blank behind the classes
            (out / f"{part}.txt").write_text("\n".join(lines) + "\n")
            print(f"{out / part}.txt: {store.n_rows:,} rows, K = {store.n_classes:,}")


def beginnings(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for row, text in rows:
        classes = row.split(" ")[0]
        yield json.dumps({"text": " ".join(text.split()[:8]), "classes": classes.split(",") if classes else []}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=("groups", "drift", "short", "quarter"))
    parser.add_argument("folder", type=Path, help="gnd-core for short, debfiles-name2dir for the others")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if not (options.folder / "train.txt.xz").is_file():
        parser.error(f"{options.folder} holds no train.txt.xz: give the folder of a data set")
    options.out.mkdir(parents=True, exist_ok=True)
    {"groups": groups, "drift": drift, "short": short, "quarter": quarter}[options.shape](options.folder, options.out)


if __name__ == "__main__":
    main()
