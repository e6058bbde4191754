"""The recipe: what a configuration leaves open, chosen from the shape of the data.

One rule for all data sets, found on validation rows of three (docs/results.md); a key that is given is never touched.
It holds for sparse rows. Dense rows, linear networks and trunks of the user's own keep the defaults of `mach.config`,
but for an effort that is given. The table is that of the best effort; what a smaller one does without is in `EFFORTS`.

========================  ======================================================================================
``data.row_features``     128: more are much work, and no gain beside ``power``
``validation_fraction``   where re-ranking has a blend to choose 2 % of the rows, but 500 to 2,000; without pilots,
                          by the effort or as given, 5 %, 500 to 4,000, which teach the order; none below 5,000
``repetitions, heads``    R = 8 networks of J = 2 hash functions: more networks help more than more heads
``buckets``               the power of two nearest 3.2 sqrt(K), as re-ranking tells apart what shares buckets, or
                          N / 160 where that is more, up to 4,096: many rows can teach more buckets
``hidden``                one layer of 6125 / D^0.22, in steps of 64, which bounds the bytes where D is large; at most
                          512: eight such networks are more accurate than four of 1,024 units, and cost less
``dropout``               0.2, less in proportion above 50,000 rows
``power``                 1 where a row has 16 to 40 features, 1.5 where it has 80: there the largest should outweigh
                          the rest; 0.5 where it has 13 or fewer: there the small ones should count as well
``weights``               int4, 0.3 bytes a weight of the input layer: rounding it costs no accuracy, and leaving its
                          least salient weights out little (docs/results.md)
``batch, rate``           512 and 6e-3, for 2,048 buckets and more 1e-2
``epochs``                6 sqrt(45,000 / N), its whole part, 3 to 15: more steps for fewer rows
``candidates``            100
``pairs``                 products of the 12 largest features of a row where it has less than 30 and fewer than 10
                          classes
``pilots``                3 where a row has 10 classes or more, whose order takes more rows to learn, else 1, which the
                          balanced effort keeps for the rows that have pairs here, as little is known of each of
                          their candidates; none below 5,000 and above 300,000 rows, with other aggregates than
                          log-means, for runs that start from another one, and for rows that are phrases of documents
========================  ======================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mach.config import IDENTITY, Config, Effort, HashingConfig, Section, TrainingConfig
from mach.networks.kernels.losses import named
from mach.reranking.settings import MANY_CLASSES

if TYPE_CHECKING:
    from mach.data.store import Store

ROW_FEATURES = 128
CANDIDATES = 100
FEW_FEATURES, PAIRS = 30, 12  # seen to gain at 6 to 17 features a row
# network.power by the binary logarithm of a row's features: best were 0.5 at 6 and 9, 0.75 at 15, 1 at 17, 1.5 at 98
LOG_FEATURES, POWERS = (3.75, 4.0, math.log2(40), math.log2(80)), (0.5, 1.0, 1.0, 1.5)
LEAST_PILOT_ROWS, MOST_PILOT_ROWS = 5_000, 300_000
LEAST_EPOCHS, MOST_EPOCHS = 3, 15


@dataclass(frozen=True)
class Spending:
    """What an effort allows."""

    repetitions: int
    widest: int  # units of the hidden layer, at most
    epochs: float  # share of those that the rows would get
    pairs: int  # as of the table, at most
    pilots: int  # as of the table, at most
    short_pilots: int  # of rows that have pairs in the table


# Measured in docs/results.md, "How much effort".
EFFORTS: dict[Effort, Spending] = {
    "fast": Spending(repetitions=2, widest=384, epochs=1 / 2, pairs=0, pilots=0, short_pilots=0),
    "balanced": Spending(repetitions=4, widest=384, epochs=2 / 3, pairs=0, pilots=0, short_pilots=1),
    "best": Spending(repetitions=8, widest=512, epochs=1, pairs=PAIRS, pilots=3, short_pilots=1),
}
DEFAULT: Effort = "balanced"  # of sparse rows that can have a pilot; fewer rows take seconds, and have the best


@dataclass(frozen=True)
class Shape:
    """N, D and K of the training rows, whether these are dense, and what one has on average."""

    n_rows: int
    n_features: int
    n_classes: int
    is_dense: bool = False
    row_features: float = 0.0
    row_classes: float = 0.0

    @classmethod
    def of(cls, store: Store) -> Shape:
        n_rows = max(store.n_rows, 1)
        features = 0.0 if store.is_dense else store.n_nonzeros / n_rows
        sizes = (store.n_rows, store.n_features, store.n_classes)
        return cls(*sizes, store.is_dense, features, len(store.class_ids) / n_rows)


def before_reading(config: Config) -> Config:
    """A configuration whose loss is known and whose ``data.row_features`` is settled, before its rows are read."""
    if config.training.loss != "auto":
        named(config.training.loss)
    if "row_features" in config.data.model_fields_set:
        return config
    return config.changed(data={"row_features": ROW_FEATURES})


def fill(config: Config, shape: Shape) -> Config:
    """A configuration with the recipe's values for all keys of the table above that it leaves open.

    Examples
    --------
    >>> config = Config.model_validate({"data": {"train": "x"}, "training": {"epochs": 9}})
    >>> filled = fill(config, Shape(n_rows=41_902, n_features=77_412, n_classes=26_296))
    >>> filled.hashing.buckets, filled.network.hidden, filled.training.epochs, filled.training.rate
    (512, [384], 9, 0.006)
    """
    sparse = not shape.is_dense
    is_measured = sparse and bool(config.network.hidden) and config.network.trunk is None
    is_old = "effort" in config.training.model_fields_set  # written down as none: a run of before the dial
    is_new = not is_old and config.training.start is None
    is_dear = is_measured and shape.n_rows >= LEAST_PILOT_ROWS and is_new
    effort = config.training.effort or (DEFAULT if is_dear else "best")
    spending = EFFORTS[effort]
    reranks = "candidates" not in config.reranking.model_fields_set or config.reranking.candidates > 0
    has_many_classes = shape.row_classes >= MANY_CLASSES
    is_short = not has_many_classes and 0 < shape.row_features < FEW_FEATURES
    can_learn = can_have_pilots(config, shape)
    most_pilots = spending.short_pilots if is_short else spending.pilots
    n_pilots = min(3 if has_many_classes else 1, most_pilots) if can_learn else 0
    teach = not (n_pilots if _is_open(config.reranking, "pilots") else config.reranking.pilots)
    held_out = held_out_fraction(shape.n_rows, teach=teach)
    choices: dict[str, dict[str, Any]] = {
        "data": {"validation_fraction": held_out if sparse and reranks else 0.0},
        "reranking": {"candidates": CANDIDATES if sparse else 0},
        "training": {"effort": effort},
    }
    if sparse and is_short:
        choices["reranking"] |= {"pairs": spending.pairs}
    if sparse and reranks and can_learn:
        choices["reranking"] |= {"pilots": n_pilots}
    if is_measured:
        n_buckets = _buckets(shape.n_classes, shape.n_rows)
        choices |= {
            "hashing": {"repetitions": spending.repetitions, "heads": 2, "buckets": n_buckets},
            "network": {
                "hidden": [min(_width(shape.n_features), spending.widest)],
                "dropout": round(0.2 * min(1.0, 50_000 / shape.n_rows), 3),
                "power": _power(shape.row_features),
                "weights": "int4",
            },
        }
        n_epochs = _share(_epochs(shape.n_rows), spending)
        choices["training"] |= {"epochs": n_epochs, "batch": 512, "rate": _rate(n_buckets)}
    elif effort != "best":
        choices["hashing"] = {"repetitions": min(spending.repetitions, HashingConfig().repetitions)}
        choices["training"] |= {"epochs": _share(TrainingConfig().epochs, spending)}
    if config.hashing.table == IDENTITY:
        choices["hashing"] = choices.get("hashing", {}) | {"heads": 1, "buckets": shape.n_classes}
    elif config.hashing.table is not None:
        choices.get("hashing", {}).pop("buckets", None)
    left_open = {}
    for section, values in choices.items():
        given = getattr(config, section)
        is_open = {key: _is_open(given, key) for key in values}
        left_open[section] = {key: value for key, value in values.items() if is_open[key]}
    return config.changed(**left_open)


def can_have_pilots(config: Config, shape: Shape) -> bool:
    """Whether an order is learned where nothing is said of it: there are rows enough, time, and rows like queries."""
    has_logs = config.decoding.aggregate in {"auto", "log-mean"}
    is_open = has_logs and config.training.start is None and not config.data.has_documents
    return LEAST_PILOT_ROWS <= shape.n_rows <= MOST_PILOT_ROWS and is_open


def effort_rows(config: Config) -> list[tuple[str, Any, str]]:
    """The effort of a configuration that is filled in, and what it decided: name, value and unit."""
    reranking = config.reranking
    return [
        ("effort", config.training.effort or "as the run began", ""),
        ("epochs", config.training.epochs, ""),
        ("candidates to re-rank", reranking.candidates, "a query"),
        ("features whose products count", reranking.pairs, "a row"),
        ("pilots", reranking.pilots, ""),
    ]


def held_out_fraction(n_rows: int, *, teach: bool) -> float:
    """Share of the rows on which probabilities and blends are fitted, more where they teach; 0 where there are few."""
    share, most = (0.05, 4000) if teach else (0.02, 2000)
    return 0.0 if n_rows < 5000 else min(max(share * n_rows, 500), most) / n_rows


def _buckets(n_classes: int, n_rows: int) -> int:
    nearest = 2 ** round(math.log2(max(3.2 * math.sqrt(n_classes), min(n_rows / 160, 4096))))
    return max(2, min(nearest, 2 ** int(math.log2(max(n_classes, 2)))))


def _rate(n_buckets: int) -> float:
    return round(6e-3 * min(max(n_buckets / 1024, 1.0), 2.0) ** 0.74, 3)


def _power(row_features: float) -> float:
    """Of rows whose features are not known, 1."""
    return round(float(np.interp(math.log2(row_features), LOG_FEATURES, POWERS)), 2) if row_features else 1.0


def _width(n_features: int) -> int:
    return 64 * max(round(6125 / n_features**0.22 / 64), 4)


def _epochs(n_rows: int) -> int:
    return min(max(int(6 * math.sqrt(45_000 / n_rows)), LEAST_EPOCHS), MOST_EPOCHS)


def _share(n_epochs: int, spending: Spending) -> int:
    return max(math.ceil(spending.epochs * n_epochs), LEAST_EPOCHS)


def _is_open(section: Section, key: str) -> bool:
    """Whether a key is left out, or has no value; an effort that was written down as none is an older run's."""
    return key not in section.model_fields_set or (key != "effort" and getattr(section, key) is None)
