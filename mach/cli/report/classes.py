"""The sections of a page on classes that are found badly or well, and on example rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mach.cli.report import plots
from mach.cli.report.diagnosis import SHOWN, Diagnosis, example_rows, mistaken_for
from mach.cli.report.legends import legend
from mach.cli.report.page import Block, Examples, Number, Plot, Section, Table, clean, decimals, percent
from mach.data.batch import read_classes
from mach.data.prepare import texts_of
from mach.data.store import Store
from mach.errors import ConfigError
from mach.model.model import MachModel
from mach.runs.run import Run

N_CLASSES, N_EXAMPLES = 15, 6  # of the worst and best classes; of the right and of the wrong rows
N_FEATURES = 12  # most that is shown of a row of numbers
Names = Callable[[int], str]


def classes(run: Run, diagnosis: Diagnosis, store: Store, names: Names) -> Section:
    """Recall by training rows, and the classes that are furthest from what theirs let expect."""
    recall = diagnosis.recall
    known_K = run.class_counts_K()[: store.n_classes]
    counts_K = np.pad(known_K, (0, store.n_classes - len(known_K)))
    groups = recall.by_training_rows(counts_K)
    n_present = int((recall.n_rows_K > 0).sum())
    text = f"{n_present:,} of {store.n_classes:,} classes occur in these rows. Recall@{SHOWN}: how often a class is "
    text += f"among the best {SHOWN} of the rows that have it."
    rows = []
    for group in groups:
        least, most = group["least"], group["most"]
        name = Number(f"{least:,}" if least == most else f"{least:,}–{most:,}")
        rows.append([name, group["n_classes"], group["n_rows"], percent(group["recall"])])
    blocks: list[Block] = [
        text,
        Plot("recall", plots.recall(groups, SHOWN), "Classes by their training rows."),
        Table(["training rows", "classes", "rows that have them", f"recall@{SHOWN}, %"], rows),
    ]
    headings = ["class", "name", "training rows", "rows", "found", "expected", f"recall@{SHOWN}, %"]
    headings.append("often first instead")
    expected_K, surprise_K = recall.surprise(counts_K)
    how = "standard errors away from what classes of as many training rows let expect"
    for caption, sign in (("Worst classes", 1), ("Best classes", -1)):
        table = []
        order = np.lexsort((-recall.n_rows_K, sign * surprise_K))
        for k in order[recall.n_rows_K[order] > 0][:N_CLASSES].tolist():
            other, n_times = mistaken_for(store, k, diagnosis.top, diagnosis.right_Nk)
            n_rows, n_found = int(recall.n_rows_K[k]), int(recall.n_found_K[k])
            first = f"{names(other)} ({n_times:,})" if n_times else ""
            cells = [Number(k), names(k), int(counts_K[k]), n_rows, n_found, decimals(expected_K[k], 1)]
            table.append([*cells, percent(n_found / n_rows), first])
        blocks.append(Table(headings, table, f"{caption}: the most {how}."))
    blocks.append(legend("training rows", "found", "expected", "often first instead"))
    return Section("classes", "Worst and best classes", blocks)


def examples(model: MachModel, diagnosis: Diagnosis, store: Store, source: str, names: Names) -> Section:
    """Rows whose first class is right, and others, with what was found."""
    rows = example_rows(store, diagnosis.right_Nk, N_EXAMPLES)
    ids_Nk, right_Nk = diagnosis.top.ids_Nk[rows], diagnosis.right_Nk[rows]
    values_Nk: NDArray[np.float32] = diagnosis.top.scores_Nk[rows]
    texts = texts_of(model.run.config.data, source, rows.tolist(), like=model.reference())
    try:
        values_Nk = model.probabilities(ids_Nk, values_Nk, known=diagnosis.top.known_N[rows])
        value = "probability"
    except ConfigError:
        value = "score"
    shown = []
    for i, row in enumerate(rows.tolist()):
        best = zip(ids_Nk[i, :SHOWN].tolist(), values_Nk[i], right_Nk[i], strict=False)
        shown.append(
            {
                "row": row,
                "text": _features(store, row) if texts is None else clean(texts[i]),
                "own": [names(k) for k in read_classes(store, np.array([row]))[0].tolist()],
                "best": [(names(k), f"{value:.3f}", right) for k, value, right in best if k >= 0],
                "is_right": right_Nk[i, 0],
            }
        )
    text = f"Drawn at random: {N_EXAMPLES} rows whose first class is right, {N_EXAMPLES} whose first is wrong (fewer "
    text += "where there are no more)."
    return Section("examples", "Example queries", [text, Examples(value, shown)])


def _features(store: Store, row: int) -> str:
    """The largest features of a row of numbers."""
    features = store.features(row, row + 1)
    values = np.asarray(features).ravel() if store.is_dense else features.data
    indices = np.arange(len(values)) if store.is_dense else features.indices
    order = np.argsort(-np.abs(values), kind="stable")
    pairs = [f"{indices[i]}:{values[i]:.3g}" for i in order[:N_FEATURES]]
    return " ".join([*pairs, "…"] if len(order) > N_FEATURES else pairs)
