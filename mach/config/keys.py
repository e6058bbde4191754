"""The keys: one section of the configuration a class, one key a field with its limits and two sentences about it."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import AliasChoices, model_validator

from mach.config.section import Section, key

Format = Literal["auto", "repository", "svmlight", "npz", "npy", "csv", "tsv", "fasttext", "jsonl",
                 "parquet", "builtin"]  # fmt: skip
DOCUMENTS = "builtin:characters-names"  # the embedded set's classes, each a document of its name
IDENTITY, MAX_PILOTS, MAX_CANDIDATES, MAX_PAIRS = "identity", 5, 10_000, 64
Effort = Literal["fast", "balanced", "best"]
Aggregate = Literal["auto", "mean", "unbiased-mean", "log-mean", "logit-mean", "min", "median", "trimmed-mean"]


class DataConfig(Section):
    """Where rows come from, and how they are read."""

    train: str = key(
        ..., "File, URL, store folder or builtin:NAME that holds the training rows.", "Always give it.", user=True
    )
    test: str | None = key(
        None, "The same for the test rows, which only `mach evaluate` reads.", "Give it to name them once.", user=True
    )
    format: Format = key("auto", "Format of files; auto goes by the ending.", "Set it where that misleads.", user=True)
    classes: str | None = key(
        None,
        "File of the classes: one name a line, a table (columns id, name, alternatives, text, uri) or SKOS.",
        "Give it where rows hold class numbers, or where a list says which classes there are and what they mean.",
        user=True,
        validation_alias=AliasChoices("classes", "class_names"),  # the name of the key in earlier versions
    )
    text_columns: list[str] = key(
        ["text"],
        "Columns of a table that hold text; they are joined by a blank.",
        "Name yours.",
        user=True,
        min_length=1,
    )
    class_column: str = key(
        "classes", "Column of a table that holds a row's classes: a list, or a string.", "Name yours.", user=True
    )
    class_separator: str | None = key(
        None,
        "What stands between class names in a string; without it the string is one name.",
        "Give it where a cell holds several classes, such as `a|b`.",
        user=True,
        min_length=1,
    )
    strong_columns: list[str] | None = key(
        None,
        "Columns of a table with one document a class, such as titles, whose text is asked for whole.",
        "Give it to train on documents of classes instead of labelled rows.",
    )
    weak_columns: list[str] | None = key(
        None,
        "Columns of such a document, such as its body, of whose text passages are asked for.",
        "As strong_columns.",
    )
    row_features: int = key(
        0,
        "Features of a sparse row that count, those of largest magnitude; 0 means all.",
        "Lower it to train faster on long texts.",
        chosen=True,
        ge=0,
    )
    validation_fraction: float = key(
        0.0,
        "Share of the training rows that is held out, for probabilities and for the order of classes.",
        "Set it to 0 to learn from every row, or raise it where probabilities must be exact.",
        user=True,
        chosen=True,
        ge=0.0,
        lt=1.0,
    )
    cache: str | None = key(
        None,
        "Folder of prepared data; without it `MACH_CACHE` of the environment, or else `~/.cache/mach`.",
        "Set it where that folder is small.",
        user=True,
    )

    @property
    def has_documents(self) -> bool:
        """Whether training rows are phrases, sampled from one document a class."""
        return bool(self.strong_columns or self.weak_columns) or self.train == DOCUMENTS


class TextConfig(Section):
    """How text becomes sparse features."""

    words: list[int] | None = key(
        [1, 1], "Shortest and longest n-gram of words.", "Set [1, 2] where word order tells classes apart.", user=True
    )
    characters: list[int] | None = key(
        None,
        "Shortest and longest n-gram of characters within words; without it there are none.",
        "Set [3, 5] for typing errors, compounds and many endings, [1, 3] for scripts without blanks between words.",
        user=True,
    )
    n_features: int = key(
        2**18,
        "Most terms of the vocabulary, or the number of columns that terms are hashed to.",
        "Raise it for millions of rows, lower it to save memory.",
        user=True,
        ge=2,
        le=2**31 - 1,
    )
    hashing: bool = key(
        False, "Whether terms are hashed to columns instead of numbered.", "Set it where no vocabulary may be kept."
    )
    min_rows: int = key(
        1, "Rows in which a term must occur to be in the vocabulary.", "Raise it to drop rare terms.", ge=1
    )
    sublinear: bool = key(
        False, "Whether a term counts 1 + log(count) in a row instead of its count.", "Try it for long texts."
    )

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
    """How classes fall into buckets."""

    repetitions: int = key(
        4,
        "R: independent networks, each over its own buckets.",
        "Raise it for accuracy, lower it for speed; raised later, it adds networks to a run.",
        user=True,
        chosen=True,
        ge=1,
        le=1024,
    )
    heads: int = key(
        1,
        "J: hash functions of a repetition, each with an output layer of its network.",
        "Leave it to the recipe.",
        chosen=True,
        ge=1,
        le=64,
    )
    buckets: int | None = key(
        None,
        "B: buckets that a hash function puts the classes into.",
        "Raise it for accuracy among similar classes, lower it for memory.",
        user=True,
        chosen=True,
        ge=2,
        le=2**20,
    )
    table: str | None = key(
        None,
        "File (.npy) of buckets, integers of shape (R J or more, K), not hash functions; identity: a bucket a class.",
        "Give it to place classes yourself, or identity to compare with one output a class.",
    )


class NetworkConfig(Section):
    """The network of one repetition."""

    hidden: list[int] = key(
        [512],
        "Widths of the hidden layers; an empty list means a linear network.",
        "Narrow it for speed and memory.",
        user=True,
        chosen=True,
    )
    dropout: float = key(
        0.3,
        "Share of the hidden activations that a training step leaves out.",
        "Lower it for many rows or few epochs.",
        user=True,
        chosen=True,
        ge=0.0,
        lt=1.0,
    )
    power: float = key(
        1.0,
        "Exponent of the features' values as networks see them; rows keep their length.",
        "Leave it to the recipe.",
        chosen=True,
        gt=0.0,
        le=8.0,
    )
    weights: Literal["int4", "int8", "bfloat16", "float32"] = key(
        "bfloat16",
        "Type of the stored weights; int4 also keeps only three tenths of a sparse input layer.",
        "Set float32 to compare with other software, int4 or int8 for small files.",
        user=True,
        chosen=True,
    )
    trunk: str | None = key(
        None,
        "Class of a torch module, package.module:Class, in place of the hidden layers; whoever trains or loads must "
        "pass it too (trunk=, --trunk), as a name in a file is never imported.",
        "Give it to train a network of your own.",
    )
    trunk_options: dict[str, Any] = key({}, "Keyword arguments of that class.", "As trunk.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden = {self.hidden}: every width must be at least 1")
        try:
            json.dumps(self.trunk_options)
        except TypeError as error:
            raise ValueError(
                f"trunk_options = {self.trunk_options}: {error}: use strings, numbers, true or false, lists and tables"
            ) from error
        return self


class TrainingConfig(Section):
    """How one repetition is fitted."""

    effort: Effort | None = key(
        None,
        "What the recipe spends on accuracy; without it balanced, and best below 5,000 rows or with dense ones.",
        "Set fast to train in half of the time, best for the last point in two to five times the time.",
        user=True,
    )
    loss: str = key(
        "auto",
        "binary, softmax or auto: softmax where every row has exactly one class, else binary.",
        "Leave it to the data.",
    )
    epochs: int = key(
        12, "Passes over the training rows.", "Lower it for speed; raise it for few rows.", user=True, chosen=True, ge=1
    )
    batch: int = key(256, "Rows of a training step.", "Lower it for few rows.", user=True, chosen=True, ge=1)
    rate: float = key(
        3e-3,
        "Largest learning rate of Adam, risen to from 0 where rows are many; then it falls to 0 in a line.",
        "Halve it where the loss jumps.",
        user=True,
        chosen=True,
        gt=0.0,
    )
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto",
        "Type of the input layer's weights, and of products where torch makes them; auto: float32 for little work.",
        "Set float32 to get the same weights on every machine of one kind.",
    )
    checkpoint_seconds: float = key(
        30.0, "Least time between two checkpoints, in seconds.", "Raise it on slow disks.", ge=0.0
    )
    seed: int = key(
        0,
        "Seed of hash functions, initial weights, row order and dropout.",
        "Change it to see how far chance matters.",
        user=True,
        ge=0,
    )
    start: str | None = key(
        None,
        "Finished run whose weights, features and classes training starts from (--from).",
        "Give it to learn new rows without forgetting old ones.",
        user=True,
    )
    replay: float | None = key(
        None,
        "Rows of that run's own data that every epoch draws for each new row; 1 where it is left out.",
        "Set it to 0 where the old rows are gone.",
        ge=0.0,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.replay is not None and self.start is None:
            raise ValueError(f"replay = {self.replay:g} needs training.start, the run whose rows it means")
        if self.effort is not None and self.start is not None:
            raise ValueError(f'effort = "{self.effort}" with training.start, whose run gives the sizes: leave it out')
        return self


class DecodingConfig(Section):
    """How the scores of R buckets become the score of a class."""

    aggregate: Aggregate = key(
        "auto",
        "What the R scores become: log-mean (auto) ranks best; see the mathematics page for the others.",
        "Leave it, or take trimmed-mean where one repetition may be bad.",
    )


class RerankingConfig(Section):
    """What else is known of a query's best classes, and puts them in a better order."""

    candidates: int = key(
        0,
        "C: best classes of a query that are put in a better order; 0 trains no re-ranker.",
        "Set it to 0 to train and answer faster, less accurately.",
        user=True,
        chosen=True,
        ge=0,
        le=MAX_CANDIDATES,
    )
    pairs: int = key(
        0,
        "Largest features of a row whose products are features of the classifiers as well; 0 means none.",
        "Set it to 0 to train faster.",
        chosen=True,
        ge=0,
        le=MAX_PAIRS,
    )
    repeats: float | None = key(
        None,
        "Weight of training rows with exactly a query's features: above 0 their classes come first, below 0 last, and "
        "0 leaves them out. Held-out rows choose it where it is left out.",
        "Set it to 0 where queries may be training rows.",
    )
    pilots: int = key(
        0,
        "Further runs on part of the rows, thrown away afterwards, that teach the order of candidates.",
        "Set it to 0 to halve the training time for a little accuracy.",
        chosen=True,
        ge=0,
        le=MAX_PILOTS,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pairs == 1:
            raise ValueError("pairs = 1: one feature has no product with another: give 0, or 2 and more")
        return self


class LaunchConfig(Section):
    """Where repetitions are trained. Of these keys only ``threads``, ``gpus`` and ``shard`` change the weights."""

    launcher: Literal["here", "local", "ray"] = key(
        "local",
        "Who trains: this process (work of a few seconds even where the key is left out), processes, or a Ray cluster.",
        "Set ray for a cluster, here where no other process may be started.",
        user=True,
    )
    address: str | None = key(
        None, "Head of the Ray cluster, host:port; without it as Ray finds one.", "Give it for a cluster.", user=True
    )
    workers: int | None = key(
        None,
        "Most workers at a time; without it one for each `threads` cores here, and one a shard on a cluster.",
        "Lower it to leave cores or memory to others.",
        user=True,
        ge=1,
    )
    threads: int = key(
        1,
        "Threads of a worker, and processors that Ray reserves for it.",
        "Raise it where there are more cores than repetitions.",
        user=True,
        ge=1,
    )
    gpus: float = key(0.0, "GPUs of a worker; a fraction shares one.", "Set it to 1 to train on GPUs.", ge=0.0, le=1.0)
    resources: dict[str, float] = key({}, "Custom Ray resources of a worker.", "Set it to choose a cluster's nodes.")
    shard: int | None = key(
        None,
        "Repetitions that a worker takes at a time, on a GPU as one network; without it 1, on a GPU of this machine as "
        "many as the ledger says fit its memory.",
        "Set it on clusters with GPUs.",
        ge=1,
        le=1024,
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
        if self.reranking.pilots and self.decoding.aggregate not in {"auto", "log-mean"}:
            given = f"reranking.pilots = {self.reranking.pilots} with decoding.aggregate = {self.decoding.aggregate!r}"
            raise ValueError(f'{given}: an order is learned from log-means: take "log-mean", or no pilots')
        if self.reranking.pilots and self.training.start is not None:
            raise ValueError(
                f"reranking.pilots = {self.reranking.pilots} with training.start: networks that started from others "
                "have seen the rows that pilots would teach from: give 0"
            )
        return self
