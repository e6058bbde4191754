"""What every measure of a page means, in a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from mach.cli.report.page import Legend

_MEANINGS = {
    "P@k": "share of the k best classes that are right, the mean over rows; P@1 is how often the first is right",
    "nDCG@k": "as P@k, but a right class counts more the higher it stands; 100 where all right ones come first",
    "PSP@k": "as P@k, but rare classes count more (propensity-scored); 100 is the best that k classes can reach",
    "recall@k": "share of a row's own classes that are among the k best, the mean over rows",
    "hit@k": "share of rows of which at least one of the k best classes is right",
    "R": "how many repetitions (networks) answer together",
    "re-ranked": "the best candidates are put into a better order by what else is known of their classes",
    "loss": "what training makes small: the mean over its rows and buckets, of the epoch's last figures",
    "bucket precision": "rows whose best bucket holds one of their classes, of training rows",
    "validation": "the same of rows that were held out and never learned from",
    "rows a second": "speed of one worker's training",
    "left": "time until the repetition is finished at its present speed",
    "calibration error (ECE)": "how far probabilities are from what is right, the mean over bins; 0 is perfect",
    "before, after": "scores taken for probabilities as they are, and those that calibration makes of them",
    "pairs": "a row and one of its best classes, each right or wrong",
    "bucket": "one of the B groups that a hash function puts the classes into; a network tells buckets apart",
    "rows of a bucket": "training rows of its classes, once for each class",
    "training rows": "rows that have the class, of those that were learned from",
    "found": "rows that have the class and list it among their five best",
    "expected": "rows that would find it if it were found as often as others of about as many training rows",
    "often first instead": "the class that most often stands first in its rows, wrongly, and in how many of them",
    "size": "weights of all networks, and of the re-ranker, on disk",
    "time": "seconds of training, summed over all workers and the re-ranker",
}


def legend(*names: str) -> Legend:
    """The measures of these names, each with its meaning."""
    return Legend([(name, _MEANINGS[name]) for name in names])


def legend_of(measures: Sequence[str]) -> Legend:
    """Those that a table of accuracy has."""
    kinds = dict.fromkeys(f"{name.partition('@')[0]}@k" for name in measures if "@" in name)
    return legend(*(kind for kind in kinds if kind in _MEANINGS), "R", "re-ranked")
