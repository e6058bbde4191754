"""Keys of earlier versions, and what took their place."""

from __future__ import annotations

from typing import Any

_DERIVED = "how classifiers are fitted follows from the rows"
_BLEND = "held-out rows choose the blend (data.validation_fraction)"
_LOST = "other ways to place classes lost to hashing; buckets of your own go into hashing.table"
# A new configuration may not name one of these; the message says why. A run that was made with one still loads, and
# `load_run_config` returns its value apart.
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
    "network.input_dropout": "features of rows are never dropped",
    "network.keep": 'weights = "int4" keeps three tenths of the input layer, other types keep all',
    "training.schedule": "the rate always falls to 0 in a line",
    "training.warmup": "it follows from the number of rows (mach.networks.steps)",
    "training.sampled": "it follows from the loss and the number of buckets (mach.networks.steps)",
    "training.patience": "every epoch is trained: validation figures fall while the order of classes still gains",
    "training.dither": "it follows from the loss and the precision (mach.networks.steps)",
    "reranking.loss": _DERIVED,
    "reranking.cost": _DERIVED,
    "reranking.power": _DERIVED,
    "reranking.threshold": _DERIVED,
    "reranking.class_weights": _DERIVED,
    "reranking.negatives": _DERIVED,
    "reranking.iterations": _DERIVED,
    "reranking.tolerance": _DERIVED,
    "reranking.bytes": "a re-ranker takes what it takes, as `mach plan` says; fewer candidates take less",
    "reranking.weight": _BLEND,
    "reranking.prior": _BLEND,
    "reranking.views": "further sets of classifiers gained less than they took",
    "reranking.inputs": "pilots keep what a learned order weighs by themselves",
}
# What those were that runs still go by: one of some words, an integer from 0 on, or a number that is at most so large.
MOST_NUMBER = 1e9
KINDS: dict[str, Any] = {
    "decoding.prior": float,
    "hashing.assignment": ("universal", "table", "random", "balanced", "clustered", "learned"),
    "hashing.seed": int,
    "network.input_dropout": float,
    "training.schedule": ("linear", "cosine", "constant"),
    "training.warmup": float,
    "training.sampled": float,
    "training.dither": float,
    "reranking.loss": ("hinge", "logistic"),
    "reranking.cost": float,
    "reranking.power": float,
    "reranking.threshold": float,
    "reranking.class_weights": int,
    "reranking.negatives": int,
    "reranking.iterations": int,
    "reranking.tolerance": float,
}
