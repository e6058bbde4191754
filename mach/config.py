"""The configuration of a run: strict sections read from TOML, overridden by ``--set a.b=value``.

Every key but ``data.train`` may be left out: in a new run `mach.training.recipe` then chooses some by the data, all
others have the defaults given here. An unknown key or a value of the wrong type is refused with one line that names it.
The resolved configuration is written into the run directory.
"""

from __future__ import annotations

import hashlib
import tomllib
from typing import Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mach.errors import ConfigError
from mach.files.places import Place, place, read_bytes

Format = Literal["auto", "repository", "svmlight", "npz", "npy", "csv", "tsv", "jsonl", "parquet", "builtin"]
DOCUMENTS = "builtin:characters-names"  # the embedded set's classes, each a document of its name
HostMemory = Literal["none", "input", "all"]
MAX_PILOTS = 5
Aggregate = Literal["auto", "mean", "unbiased-mean", "log-mean", "logit-mean", "min", "median", "trimmed-mean"]


class Section(BaseModel):
    """Base of all sections: immutable, strict types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where rows come from and how they are read (`mach.data`)."""

    train: str = Field(description="file, store directory or builtin:NAME with the training rows")
    test: str | None = Field(default=None, description="the same for the test rows; only `evaluate` reads it")
    format: Format = Field(default="auto", description="auto takes it from the file's ending")
    class_names: str | None = Field(default=None, description="file with one class name a line, line 1 is class 0")
    text_columns: list[str] = Field(default=["text"], min_length=1, description="columns of text, joined by a blank")
    class_column: str = Field(default="classes", description="column of class names: a list, or a string to separate")
    class_separator: str | None = Field(default=None, description="separator of names in a string; none: one name")
    strong_columns: list[str] | None = Field(
        default=None, description="the training table has one document a class: columns of text that is asked for whole"
    )
    weak_columns: list[str] | None = Field(
        default=None, description="columns of a document of whose text passages are asked for"
    )
    row_features: int = Field(
        default=0, ge=0, description="features of a sparse row that count, those of largest magnitude; 0: all"
    )
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0, description="share of training rows held out")
    cache: str | None = Field(default=None, description="folder of prepared stores; none: the user's cache folder")

    @property
    def has_documents(self) -> bool:
        """Whether training rows are phrases, sampled from one document a class."""
        return bool(self.strong_columns or self.weak_columns) or self.train == DOCUMENTS


class TextConfig(Section):
    """How text becomes sparse features (`mach.data.text`)."""

    words: list[int] | None = Field(default=[1, 1], description="shortest and longest word n-gram; none: no words")
    characters: list[int] | None = Field(default=None, description="the same for n-grams of characters within words")
    n_features: int = Field(default=2**18, ge=2, le=2**31 - 1, description="D of hashing, most terms of a vocabulary")
    hashing: bool = Field(default=False, description="hash terms instead of fitting a vocabulary")
    min_rows: int = Field(default=1, ge=1, description="a vocabulary term occurs in at least so many rows")
    sublinear: bool = Field(default=False, description="1 + log(count) instead of the count of a term in a row")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("words", "characters"):
            span = getattr(self, name)
            if span is not None and not (len(span) == 2 and 1 <= span[0] <= span[1] <= 16):
                raise ValueError(f"{name} = {span}: give [shortest, longest] with 1 <= shortest <= longest <= 16")
        if self.words is None and self.characters is None:
            raise ValueError("words and characters are both switched off: no text would have a feature")
        return self


class HashingConfig(Section):
    """How classes fall into buckets (`mach.sketch.hashing`)."""

    repetitions: int = Field(default=4, ge=1, le=1024, description="R")
    heads: int = Field(
        default=1, ge=1, le=64, description="J: hash functions of a repetition, each a head of its network"
    )
    buckets: int | None = Field(default=None, ge=2, le=2**20, description="B; none: by `mach.sketch.bounds.plan`")
    table: str | None = Field(
        default=None, description=".npy file of buckets, integers of shape (R or more, K), used instead of hashing"
    )


class NetworkConfig(Section):
    """The network of one repetition (`mach.networks`)."""

    hidden: list[int] = Field(default=[512], description="widths of hidden layers; empty: a linear network")
    dropout: float = Field(default=0.3, ge=0.0, lt=1.0, description="on hidden activations")
    power: float = Field(
        default=1.0, gt=0.0, le=8.0, description="of the features' values as networks see them, rows as long as before"
    )
    weights: Literal["int4", "int8", "bfloat16", "float32"] = Field(
        default="bfloat16",
        description="type of stored matrices; int8 of the input layer over sparse rows and of the output layer; int4 "
        "the same, but three tenths of the input layer's weights alone, where it is not the only layer",
    )
    trunk: str | None = Field(
        default=None,
        description="package.module:Class of a torch module used instead of the hidden layers; "
        "never imported for being named here: the caller must pass it too (trunk=, --trunk)",
    )
    trunk_options: dict[str, Any] = Field(default={}, description="keyword arguments of the trunk's class")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden = {self.hidden}: every width must be at least 1")
        try:
            tomli_w.dumps(self.trunk_options)
        except TypeError as error:
            raise ValueError(f"trunk_options = {self.trunk_options}: {error}: use values that TOML knows") from error
        return self


class TrainingConfig(Section):
    """How one repetition is fitted (`mach.training.shard`)."""

    loss: str = Field(
        default="auto",
        description="binary, softmax or auto: softmax where every row has exactly one class, else binary",
    )
    epochs: int = Field(default=12, ge=1)
    batch: int = Field(default=256, ge=1, description="rows a step")
    rate: float = Field(default=3e-3, gt=0.0, description="peak learning rate of Adam")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of dense matrix products; auto: bfloat16 where the processor multiplies it natively",
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many epochs without a better validation figure; none: never"
    )
    checkpoint_seconds: float = Field(default=30.0, ge=0.0, description="least time between checkpoints")
    seed: int = Field(default=0, ge=0, description="hash functions, initial weights, row order and dropout")
    start: str | None = Field(default=None, description="finished run whose weights training starts from")
    replay: float | None = Field(
        default=None, ge=0.0, description="rows of that run's own data drawn a new row, in every epoch; none: 1"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.replay is not None and self.start is None:
            raise ValueError(f"replay = {self.replay:g} needs training.start, the run whose rows it means")
        return self


class DecodingConfig(Section):
    """How R bucket scores become class scores (`mach.sketch.decoder`)."""

    aggregate: Aggregate = Field(default="auto", description="auto: log-mean")


class RerankingConfig(Section):
    """What is known of a query's best classes, which puts them in a better order (`mach.reranking`)."""

    candidates: int = Field(default=0, ge=0, le=10_000, description="C: classes of a query to order anew; 0: none")
    pairs: int = Field(
        default=0,
        ge=0,
        le=64,
        description="largest features of a row whose products are features of the classifiers as well; 0: none",
    )
    repeats: float | None = Field(
        default=None,
        description="strength of what training rows with a query's set of features, whatever their values, say of its "
        "classes, below 0 to put classes last that such a row has; 0: off; none: by validation rows, else 0",
    )
    pilots: int = Field(
        default=0,
        ge=0,
        le=MAX_PILOTS,
        description="runs on part of the rows, thrown away, whose other rows teach an order of candidates (a fifth of "
        "the rows each); 0: aggregate, classifiers and counts are blended",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pairs == 1:
            raise ValueError("pairs = 1: one feature has no product with another: give 0, or 2 and more")
        return self


class LaunchConfig(Section):
    """Where repetitions are trained; only ``threads``, ``gpus`` and ``shard`` change the weights.

    On a GPU the repetitions of a shard see the same rows in the same order (`mach.training.shard`).
    """

    launcher: Literal["here", "local", "ray"] = Field(
        default="local", description="the process that asks, processes of this machine, or a Ray cluster"
    )
    address: str | None = Field(default=None, description="head of the Ray cluster, host:port; none: found by Ray")
    workers: int | None = Field(
        default=None, ge=1, description="none: here one for every `threads` cores, on a cluster one a shard"
    )
    threads: int = Field(default=1, ge=1, description="threads of a worker, and processors that Ray reserves for it")
    gpus: float = Field(default=0.0, ge=0.0, le=1.0, description="GPU of a worker; a fraction shares one")
    resources: dict[str, float] = Field(default={}, description="custom Ray resources of a worker")
    shard: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="repetitions that a worker takes at a time, on a GPU as one network; none: 1, on a GPU of this "
        "machine as many as the ledger says fit its memory",
    )


class Config(Section):
    """A whole run."""

    data: DataConfig
    text: TextConfig = TextConfig()
    hashing: HashingConfig = HashingConfig()
    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
    reranking: RerankingConfig = RerankingConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.patience is not None and self.data.validation_fraction == 0.0:
            raise ValueError("training.patience needs rows to watch: set data.validation_fraction, such as 0.05")
        if self.reranking.pilots and self.decoding.aggregate not in {"auto", "log-mean"}:
            raise ValueError(
                f"reranking.pilots = {self.reranking.pilots} with decoding.aggregate = {self.decoding.aggregate!r}: an "
                'order is learned from log-means: take "log-mean", or no pilots'
            )
        if self.reranking.pilots and self.training.start is not None:
            raise ValueError(
                f"reranking.pilots = {self.reranking.pilots} with training.start: networks that started from others "
                "have seen the rows that pilots would teach from: give 0"
            )
        return self


# Keys of earlier versions, and what took their place. A new configuration may not name them. A run that was made
# with them still loads: `load_run_config` returns their values apart.
_DERIVED = "how classifiers are fitted follows from the rows: leave it out"
_BLEND = "held-out rows choose the blend: leave it out, and give data.validation_fraction"
_LOST = "other ways to place classes lost to hashing: leave it out, or give buckets of your own as hashing.table"
RETIRED: dict[str, str] = {
    "data.phrases": "16 phrases are sampled from each document",
    "data.word_dropout": "phrases leave out a tenth of the words",
    "data.typos": "a tenth of the longer words of phrases is mistyped",
    "data.phrase_seed": "phrases follow from the document alone",
    "text.tfidf": "terms are always weighted by their inverse row frequency",
    "decoding.prior": "held-out rows choose it where training ends (data.validation_fraction)",
    "decoding.candidates": "a query begins with 100 candidates and takes more where its certificate needs them",
    "launch.memory_bytes": "Ray reserves for a worker what the ledger says",
    "launch.attempts": "a repetition is given up after three failures without progress",
    "launch.host_memory": "as much stays in main memory as lets launch.shard fit the GPU, by the ledger",
    "hashing.capacity": "hash functions are drawn for the classes of the data; later ones get theirs when they come",
    "hashing.seed": "training.seed is the one seed of a run",
    "hashing.assignment": _LOST,
    "hashing.choices": _LOST,
    "hashing.relearn_epochs": _LOST,
    "network.input_dropout": "features of rows are never dropped: leave it out",
    "network.keep": 'weights = "int4" keeps three tenths of the input layer, other types keep all: leave it out',
    "training.schedule": "the rate always falls to 0 in a line: leave it out",
    "training.warmup": "it follows from the number of rows (mach.networks.steps): leave it out",
    "training.sampled": "it follows from the loss and the number of buckets (mach.networks.steps): leave it out",
    "training.dither": "it follows from the loss and the precision (mach.networks.steps): leave it out",
    "reranking.loss": _DERIVED,
    "reranking.cost": _DERIVED,
    "reranking.power": _DERIVED,
    "reranking.threshold": _DERIVED,
    "reranking.class_weights": _DERIVED,
    "reranking.negatives": _DERIVED,
    "reranking.iterations": _DERIVED,
    "reranking.tolerance": _DERIVED,
    "reranking.bytes": "a re-ranker takes what it takes, as `mach plan` says: leave it out, or give fewer candidates",
    "reranking.weight": _BLEND,
    "reranking.prior": _BLEND,
    "reranking.views": "further sets of classifiers gained less than they took: leave it out",
    "reranking.inputs": "pilots keep what a learned order weighs by themselves: leave it out",
}


def load_config(path: str | Place, overrides: list[str] | None = None) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides (values in TOML syntax; bare words are strings).

    Raises
    ------
    ConfigError
        One line naming the file or override, the key, the value and what is allowed.
    """
    return parse_config(_read_toml(path), str(path), overrides)


def load_run_config(path: str | Place, overrides: list[str] | None = None) -> tuple[Config, dict[str, Any]]:
    """The configuration that a run was made with, and the values of its keys that are `RETIRED` since."""
    tree = _read_toml(path)
    retired = {}
    for key in RETIRED:
        section, _, name = key.partition(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            retired[key] = tree[section].pop(name)
    return parse_config(tree, str(path), overrides), retired


def parse_config(tree: dict[str, Any], where: str, overrides: list[str] | None = None) -> Config:
    """Validate a nested dictionary after overrides; ``where`` names its origin in messages."""
    for override in overrides or []:
        _apply(tree, override)
    for key, reason in RETIRED.items():
        section, _, name = key.partition(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            raise ConfigError(f"{where}: {key} is no key any more: {reason}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def differing_keys(mine: Config, theirs: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """Keys whose values differ, each as ``section.key: mine here, theirs there``; ``ignore`` holds prefixes."""
    flat_mine, flat_theirs = _flatten(mine.model_dump()), _flatten(theirs.model_dump())
    keys = sorted(flat_mine.keys() | flat_theirs.keys())
    return [
        f"{key}: {flat_mine.get(key)!r} here, {flat_theirs.get(key)!r} there"
        for key in keys
        if not key.startswith(ignore) and flat_mine.get(key) != flat_theirs.get(key)
    ]


def completed(config: Config, like: Config) -> Config:
    """A configuration with the values of another one for all keys that it leaves out."""
    tree = like.model_dump()
    for section in Config.model_fields:
        tree[section] |= getattr(config, section).model_dump(exclude_unset=True)
    return parse_config(tree, "with the keys of the run")


def fingerprint(config: Config, ignore: tuple[str, ...] = ()) -> str:
    """Digest of all keys but those that begin with one of ``ignore``."""
    kept = {key: value for key, value in _flatten(config.model_dump()).items() if not key.startswith(ignore)}
    return hashlib.blake2b(repr(sorted(kept.items())).encode(), digest_size=16).hexdigest()


def to_toml(config: Config, retired: dict[str, Any] | None = None) -> str:
    """The configuration as TOML text that `load_config` reads back to an equal object; unset keys are left out.

    With ``retired``, values of retired keys as `load_run_config` returns them, it is that of a run that has them.
    """
    tree = config.model_dump(exclude_none=True)
    for key, value in (retired or {}).items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return tomli_w.dumps(tree)


def _read_toml(path: str | Place) -> dict[str, Any]:
    try:
        return tomllib.loads(read_bytes(place(path)).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ConfigError(f"--set {override}: write section.key=value, for example training.epochs=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()  # a bare word, as people type it
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {part} is not a section")
    node[path[-1]] = value


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = Config.model_fields.get(str(first["loc"][0]))
        known: Any = getattr(section.annotation, "model_fields", {}) if section and len(first["loc"]) > 1 else None
        names = known if known is not None else Config.model_fields
        return f"unknown key {key}; known there: {', '.join(names)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}".removeprefix(": ")
    return f"{key} = {first['input']!r}: {first['msg'].lower()}"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
