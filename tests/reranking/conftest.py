"""Small training rows and queries that all signals are tested on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array, random_array

from mach.config import TextConfig
from mach.data.batch import SparseBatch
from mach.data.class_texts import ClassTexts
from mach.data.kernels.views import N_HASHED
from mach.data.store import Chunk, Store
from mach.data.text import TextFeatures
from mach.data.writer import StoreWriter
from mach.reranking.kernels.rerank import fit_classes
from mach.reranking.settings import FitSettings
from mach.reranking.signals.contract import Material, Shortlist

N, D, K, R, B = 80, 30, 7, 3, 8
# Of features 0 to D - 1, in the order of their spelling, and of the classes: names that rows mention in every way.
WORDS = sorted(
    [
        *("whale", "whales", "whaler", "whalebone", "whaleboat", "spermwhale", "oil", "oils", "oily", "sail", "sails"),
        *("iron", "irons", "ironwork", "steel", "bone", "bones", "net", "nets", "sperm", "island", "yarn", "zone"),
        *("ache", "sheetanchor", "anchor", "ear", "ears", "sea", "town"),
    ]
)
NAMES = ["whale", "Sperm whale", "Oil (Motif)", "Steel yarn", "Anchor", "steel", "quay"]
SETTINGS = FitSettings(pairs=3, power=0.5, threshold=0.01, keeps_inputs=True)


def rows_of(n_rows: int, seed: int) -> csr_array:
    x = csr_array(random_array((n_rows, D), density=0.15, rng=np.random.default_rng(seed), dtype=np.float32))
    x.indptr, x.indices = x.indptr.astype(np.int64), x.indices.astype(np.int32)
    return x


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Rows some of which are alike, the last ten held out; classifiers of two parts."""
    folder = tmp_path_factory.mktemp("material")
    generator = np.random.default_rng(0)
    x = rows_of(N, seed=1)[np.sort(generator.integers(0, N // 2, N))]
    classes = [np.sort(generator.choice(K, generator.integers(0, 4), replace=False)) for _ in range(N)]
    indptr = np.cumsum([0, *map(len, classes)])
    ids = np.concatenate(classes).astype(np.int32)
    with StoreWriter(folder / "store", source="test", n_features=D, n_classes=K) as writer:
        writer.append(Chunk(indptr, ids, (x.indptr.astype(np.int64), x.indices.astype(np.int32), x.data)))
        writer.class_names, writer.text_features = NAMES, TextFeatures(TextConfig()).fit(WORDS)
        writer.class_texts = ClassTexts.of(NAMES, [("Irons",), *[()] * (K - 1)])
    store, rows = Store.open(folder / "store"), np.arange(N - 10)
    return Material(
        store=store,
        rows=rows,
        settings=SETTINGS,
        counts_K=np.bincount(ids, minlength=K),
        learned_K=np.bincount(ids[: indptr[N - 10]], minlength=K),
        counts_repeats=True,
        teaches=False,
        parts=[fitted(store, rows, *span) for span in ((0, 3), (3, K))],
        scratch=folder,
    )


def fitted(store: Store, rows: np.ndarray, begin: int, end: int) -> dict[str, np.ndarray]:
    """Classes of a part, each told apart from all rows."""
    own = [rows[[k in store.class_ids[slice(*store.class_indptr[n : n + 2])] for n in rows]] for k in range(begin, end)]
    csr = np.cumsum([0, *map(len, own)]), np.concatenate(own).astype(np.int32)
    listed = len(rows) * np.arange(end - begin + 1), np.tile(rows, end - begin).astype(np.int32)
    found = fit_classes(
        store.feature_indptr, store.feature_indices, store.feature_values, *csr, *listed, D,
        SETTINGS.pairs, False, 1.0, 10**6, 6, 0.1, SETTINGS.threshold, D + N_HASHED, begin, SETTINGS.power,
    )  # fmt: skip
    return dict(zip(("offsets", "features", "weights", "biases"), found[:4], strict=True))


@pytest.fixture(scope="session")
def shortlist(material: Material) -> Shortlist:
    """Training rows, other rows, and one without features; some classes twice, some none."""
    generator = np.random.default_rng(5)
    matrix = material.features[:6], rows_of(4, seed=9), csr_array((1, D), dtype=np.float32)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(x.indptr) for x in matrix]))]).astype(np.int64)
    indices, values = (np.concatenate([getattr(x, name) for x in matrix]) for name in ("indices", "data"))
    values[::7] *= -1
    ids_NC = generator.integers(-1, K, (len(indptr) - 1, 9))
    scores_NC = np.where(ids_NC < 0, -np.inf, -3 * generator.random(ids_NC.shape)).astype(np.float32)
    scores_NC[0, 0] = 0
    probs_NRB = generator.random((len(indptr) - 1, R, B), np.float32) ** 3
    batch = SparseBatch(indptr, indices.astype(np.int32), values.astype(np.float32))
    return Shortlist(batch, ids_NC, scores_NC, probs_NRB)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signals")
