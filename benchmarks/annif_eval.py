"""Annif's own ``train`` and ``eval`` on gnd-core, of this backend and of omikuji's in turns: docs/annif.md.

    pip install '.[annif]' 'annif[omikuji]==1.4.3'     # in an environment of its own
    python -m nltk.downloader punkt_tab                # Annif's analyzers ask for it
    mach warm-up
    python benchmarks/annif_eval.py FOLDER             # a project may be named: --projects mach-fast

CPU seconds are user + system of a command and all its processes. Disk is the project's folder but for the corpus.
"""

from __future__ import annotations

import argparse
import csv
import lzma
import os
import re
import subprocess
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "shared/data/gnd-core"
OMIKUJI = "backend = omikuji\nanalyzer = ANALYZER"
PROJECTS = {
    "omikuji-parabel": OMIKUJI,
    "mach-fast": "backend = mach\neffort = fast",
    "omikuji-bonsai": f"{OMIKUJI}\ncluster_balanced = False\ncluster_k = 100\nmax_depth = 3",
    "mach": "backend = mach",
}
METRICS = ("Precision@1", "Precision@3", "Precision@5", "F1@5", "NDCG@10")
CORPORA = ("omikuji-train.txt", "mach-train.jsonl", "mach-train-classes.jsonl")  # for `annif train --cached`


def lines(name: str) -> list[str]:
    with lzma.open(SOURCE / name, "rt", encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def prepare(folder: Path, analyzer: str) -> None:
    """A vocabulary, two corpora and the projects, as Annif reads them."""
    names, english = lines("labels.txt.xz"), lines("label_names_en.txt.xz")
    uris = [f"http://d-nb.info/gnd/{name.partition(':')[2]}" for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gnd.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [
                ("uri", "label_en"),
                *((uri, en.strip() or name) for uri, en, name in zip(uris, english, names, strict=True)),
            ]
        )
    for split in ("train", "test"):
        with (folder / f"{split}.tsv").open("w", encoding="utf-8") as file:
            for row, text in zip(lines(f"{split}.txt.xz")[1:], lines(f"{split}_texts.txt.xz"), strict=True):
                if classes := row.partition(" ")[0]:
                    subjects = " ".join(f"<{uris[int(k)]}>" for k in classes.split(","))
                    file.write(f"{' '.join(text.split())}\t{subjects}\n")
    projects = (f"[{name}]\nlanguage = en\nvocab = gnd\nlimit = 100\n{how}\n\n" for name, how in PROJECTS.items())
    (folder / "projects.cfg").write_text("".join(projects).replace("ANALYZER", analyzer))


def annif(folder: Path, *arguments: str) -> tuple[str, float, float]:
    """What a command says, its CPU seconds and its seconds."""
    environment = os.environ | {"ANNIF_CONFIG": "mach.serving.annif.Config"}
    begin = time.perf_counter()
    with (folder / "said.txt").open("w+b") as said:
        process = subprocess.Popen(["annif", *arguments], cwd=folder, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        said.seek(0)
        text = said.read().decode()
    if status:
        raise SystemExit(f"annif {' '.join(arguments)} failed:\n{text[-2000:]}")
    return text, used.ru_utime + used.ru_stime, seconds


def megabytes(folder: Path) -> float:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in CORPORA)
    return sum(path.stat().st_size for path in files) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--projects", nargs="+", choices=PROJECTS, default=list(PROJECTS))
    parser.add_argument("--analyzer", default="simple", help="of omikuji's projects, such as snowball(english)")
    given = parser.parse_args()
    prepare(given.folder, given.analyzer)
    annif(given.folder, "load-vocab", "gnd", "gnd.csv")
    heads = ("project", *METRICS, "train, CPU s (s)", "eval, CPU s (s)", "disk, MB")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for name in given.projects:
        _, train_cpu, train_seconds = annif(given.folder, "train", name, "train.tsv")
        metrics = [part for metric in METRICS for part in ("-m", metric)]
        said, eval_cpu, eval_seconds = annif(given.folder, "eval", name, "test.tsv", *metrics)
        values = [float(re.search(rf"^{re.escape(metric)}[^:]*:\s+([\d.]+)", said, re.M)[1]) for metric in METRICS]
        cells = [f"{100 * value:.1f}" for value in values]
        cells += [f"{train_cpu:.0f} ({train_seconds:.0f})", f"{eval_cpu:.0f} ({eval_seconds:.0f})"]
        cells.append(f"{megabytes(given.folder / 'data/projects' / name):.0f}")
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
