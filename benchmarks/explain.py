"""Whether explanations are true: parts that add up to the score, and words without which it is lower.

    .venv/bin/mach train benchmarks/data/gnd-core-text/train.jsonl RUN --text text --classes classes --effort fast
    .venv/bin/python benchmarks/explain.py RUN benchmarks/data/gnd-core-text/test.jsonl

For each of the first 1,000 texts its best class is explained. The word that is named first is cut out of the text by
its offsets, and the rest scored anew by another call. The same is done with the word of largest share in the class's
classifier, where there is one, and, to compare, with a random word.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import numpy as np

import mach


def without(text: str, spans: tuple[tuple[int, int], ...]) -> str:
    """The text with blanks in place of a word."""
    letters = list(text)
    for begin, end in spans:
        letters[begin:end] = " " * (end - begin)
    return "".join(letters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--cases", type=int, default=1000)
    given = parser.parse_args()
    model, random = mach.load(given.run), np.random.default_rng(0)
    lowered: dict[str, list[bool]] = {"named first": [], "largest share of the classifier": [], "random": []}
    errors, n_words, seconds = [], [], {"topk": 0.0, "explain": 0.0}
    with given.texts.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, given.cases)]
    for text in texts:
        began = time.process_time()
        ids, scores = model.topk(text, 1)
        asked = time.process_time()
        why = model.explain(text, int(ids[0]))
        seconds["topk"] += asked - began
        seconds["explain"] += time.process_time() - asked
        errors.append(abs(why.start + sum(part.added for part in why.parts) - float(scores[0])))
        n_words.append(len(why.words))
        reasons = [one for part in why.parts for one in part.reasons if len(one.words) == 1 and one.added > 0]
        words = {
            "named first": why.words[0].spans if why.words and why.words[0].lost > 0 else None,
            "largest share of the classifier": max(reasons, key=lambda one: one.added).spans if reasons else None,
            "random": why.words[random.integers(len(why.words))].spans if why.words else None,
        }
        for kind, spans in words.items():
            if spans is not None:
                lowered[kind].append(bool(model.score(without(text, spans), ids)[0] < scores[0]))
    print(f"{len(texts):,} texts, {np.mean(n_words):.1f} words each; {model.info()['effort']} run, {model.aggregate}")
    print(f"parts add up to the score within {max(errors):.1e}")
    for kind, found in lowered.items():
        print(f"{kind}: without it the score is lower in {100 * np.mean(found):.1f} % of {len(found):,}")
    print(f"an explanation takes the processor {seconds['explain'] / seconds['topk']:.1f} times as long as a query")


if __name__ == "__main__":
    main()
