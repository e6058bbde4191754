"""Write gnd-core as raw text with class names, for configs/gnd-core-text.toml: what a user with a JSONL file has.

    .venv/bin/python benchmarks/gnd_text.py        # benchmarks/data/gnd-core-text/{train,test}.jsonl

Source: LLMs4Subjects, SemEval-2025 task 5 (CC BY 4.0).
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "shared/data/gnd-core"
FOLDER = Path(__file__).parent / "data/gnd-core-text"


def lines(name: str) -> list[str]:
    with lzma.open(SOURCE / name, "rt", encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def main() -> None:
    names = lines("labels.txt.xz")
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "names.txt").write_text("".join(name + "\n" for name in names))
    for split in ("train", "test"):
        rows, texts = lines(f"{split}.txt.xz")[1:], lines(f"{split}_texts.txt.xz")
        assert len(rows) == len(texts)
        with (FOLDER / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row, text in zip(rows, texts, strict=True):
                classes = [names[int(k)] for k in row.partition(" ")[0].split(",") if k]
                file.write(json.dumps({"text": text, "classes": classes}, ensure_ascii=False) + "\n")
        print(f"{FOLDER / split}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    main()
