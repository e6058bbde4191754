"""The page about a run: every section with the numbers it claims, whatever the names and however far the run is."""

from __future__ import annotations

import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mach.cli import main
from mach.cli.report import plots
from mach.cli.report.comparison import difference
from mach.cli.report.diagnosis import (
    SHOWN,
    ClassRecall,
    bucket_load,
    class_recall,
    diagnose,
    example_rows,
    mistaken_for,
)
from mach.cli.report.page import Number, Table
from mach.cli.report.sections import write_report
from mach.config import Config, parse_config
from mach.data.prepare import prepare, texts_of
from mach.data.store import Store
from mach.errors import ConfigError, DataError, TrainingStoppedError
from mach.files.visible import visible
from mach.model.accuracy import evaluate
from mach.model.loading import load
from mach.model.model import MachModel
from mach.runs.run import Run
from mach.runs.status import status
from mach.training import conductor
from mach.training.setup import set_up
from mach.training.shard import ShardJob, train_shard
from tests.conftest import N_CLASSES

VOID = {"meta", "link", "img", "br", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """A page taken apart: text and table rows of each section, all elements and their attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.texts: dict[str, str] = {}
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.feed(self.source)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
            self.texts[self.section], self.tables[self.section] = "", []
        if self.section and tag == "table":
            self.tables[self.section].append([])
        if self.section and tag == "tr":
            self.tables[self.section][-1].append([])
        if self.section and tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, "elements are nested"
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if self.section:
            self.texts[self.section] += data
            if {"td", "th"} & set(self.open):
                self.tables[self.section][-1][-1][-1] += data

    def column(self, section: str, table: int, name: str) -> list[str]:
        headings, *rows = self.tables[section][table]
        return [row[headings.index(name)] for row in rows]

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]


@pytest.fixture(scope="module")
def test_rows(model: MachModel) -> Store:
    config = model.run.config
    return prepare(config.data, config.text, str(config.data.test), like=model.run.reference())


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("report")
    return Page(Path(str(write_report(trained, output=folder / "page.html", images=folder / "images"))))


def test_every_section_is_there_and_the_page_stands_alone(page: Page):
    assert list(page.texts) == [
        "headline", "about", "training", "accuracy", "reliability", "load", "classes", "examples", "ledger",
        "configuration",
    ]  # fmt: skip
    assert "http" not in page.source
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not {"src", "srcset"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert {href[1:] for _, a in page.elements if (href := a.get("href") or "")} <= set(ids)
    assert sum(tag == "figure" for tag, _ in page.elements) == 5
    n_panels = 3 + 3 + 1 + 2 + 1
    assert sum(tag == "svg" for tag, _ in page.elements) == 5 + n_panels, "each once whole, and shown a panel at a time"
    assert sum(tag == "use" and (a.get("href") or "").endswith("-all") for tag, a in page.elements) == n_panels


def test_the_headline_is_accuracy_size_and_time(page: Page, model: MachModel, test_rows: Store):
    last, info = evaluate(model, test_rows)[-1], model.info()
    text = page.texts["headline"]
    for k in (1, 3, 5):
        assert f"P@{k}{100 * last[f'P@{k}']:.1f} %" in text
    assert f"{(info['weight_bytes'] + info['reranker_bytes']) / 1e3:,.1f} kB" in text
    assert "calibration error" not in text, "there is no calibration"
    assert next(iter(page.texts)) == "headline"


def test_every_measure_of_a_table_is_explained(page: Page):
    for section, words in {
        "training": ["loss", "bucket precision", "rows a second"],
        "accuracy": ["P@k", "nDCG@k", "PSP@k", "recall@k", "hit@k", "R:"],
        "reliability": ["calibration error (ECE)"],
        "load": ["bucket:"],
        "classes": ["expected", "often first instead"],
    }.items():
        for word in words:
            assert word in page.texts[section], (section, word)
    kinds = {name.partition("@")[0] for name in page.tables["accuracy"][0][0] if "@" in name}
    assert all(f"{kind}@k:" in page.texts["accuracy"] for kind in kinds)


def test_a_column_has_one_alignment():
    mixed = Table(["a", "b", "c"], [[1, "x", 2], ["y", "x", ""], [3, "x", Number("4")]])
    assert mixed.to_the_right == [False, False, True]


def test_accuracy_is_that_of_evaluate(page: Page, model: MachModel, test_rows: Store):
    measured = evaluate(model, test_rows)
    assert len(measured) == 3
    for name in ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "recall@5"):
        assert page.column("accuracy", 0, name) == [f"{100 * row[name]:.1f}" for row in measured]
    assert page.column("accuracy", 0, "R") == ["1", "2", "3"]
    facts = dict(page.tables["about"][0])
    assert facts["P@1, %"] == f"{100 * measured[-1]['P@1']:.1f}"
    assert (facts["classes"], facts["buckets"], facts["rows"]) == (str(N_CLASSES), "32", "3,000")
    assert facts["repetitions"] == "3 of 3 finished"


def test_training_and_ledger_are_those_of_the_run(page: Page, model: MachModel):
    for r, loss in enumerate(page.column("training", 0, "loss")):
        assert loss == f"{model.run.repetition(r).read_metrics()[-1]['loss']:,.4f}"
    assert page.column("training", 0, "epoch") == ["8 of 8"] * 3
    assert "repetition 2" in page.texts["training"], "the legend is text"
    ledger = {row[0]: row[1] for row in page.tables["ledger"][0]}
    assert ledger["parameters"] == f"{model.info()['n_parameters']:,}"
    keys = page.column("configuration", 0, "key")
    assert {"hashing.buckets", "training.epochs", "network.hidden"} <= set(keys)
    assert "training.loss" in keys, "resolved: binary instead of auto"
    assert "training.schedule" not in keys


def test_recall_of_classes(page: Page, model: MachModel, test_rows: Store):
    ids_Nk = model.search(test_rows, SHOWN).ids_Nk
    found, asked = np.zeros(N_CLASSES, int), np.zeros(N_CLASSES, int)
    for n, (begin, end) in enumerate(zip(test_rows.class_indptr, test_rows.class_indptr[1:], strict=False)):
        for k in test_rows.class_ids[begin:end].tolist():
            asked[k] += 1
            found[k] += k in ids_Nk[n]
    recall = class_recall(test_rows, ids_Nk)
    np.testing.assert_array_equal(recall.n_found_K, found)
    np.testing.assert_array_equal(recall.n_rows_K, asked)
    expected_K, surprise_K = recall.surprise(model.run.class_counts_K())
    order = sorted(np.flatnonzero(asked), key=lambda k: (surprise_K[k], -asked[k]))
    assert page.column("classes", 1, "class") == [str(k) for k in order[:15]]
    assert float(page.column("classes", 1, "expected")[0]) == pytest.approx(expected_K[order[0]], abs=0.051)
    for cells in page.tables["classes"][1][1:]:
        k = int(cells[0])
        assert cells[1] == f"class number {k}"
        assert (int(cells[3]), int(cells[4])) == (asked[k], found[k])
    groups = recall.by_training_rows(model.run.class_counts_K())
    assert sum(group["n_rows"] for group in groups) == len(test_rows.class_ids)
    assert sum(group["recall"] * group["n_rows"] for group in groups) == pytest.approx(found.sum())
    counts_K = model.run.class_counts_K()[asked > 0]
    for group in groups:
        inside = (group["least"] <= counts_K) & (counts_K <= group["most"])
        assert inside.sum() == group["n_classes"]


def test_few_rows_and_rare_classes_are_no_worst_ones():
    # three classes of 8 to 15 training rows, found in 90 of 100, 1 of 20 and 0 of 1 of their rows, and a rare one
    recall = ClassRecall(5, np.array([100, 20, 1, 40]), np.array([90, 1, 0, 2]))
    expected_K, surprise_K = recall.surprise(np.array([8, 9, 15, 1]))
    p = 91 / 121
    np.testing.assert_allclose(expected_K, [100 * p, 20 * p, p, 2])
    assert surprise_K[1] == pytest.approx((1 - 20 * p) / np.sqrt(20 * p * (1 - p)))
    assert surprise_K.argmin() == 1, "neither the class of one row nor that of one training row"
    assert surprise_K[3] == 0


def test_what_comes_first_instead(model: MachModel, test_rows: Store):
    found = diagnose(model, test_rows)
    best_N = found.top.ids_Nk[:, 0]
    for k in np.flatnonzero(found.recall.n_rows_K)[:30].tolist():
        rows = [n for n in range(test_rows.n_rows) if k in set(_own(test_rows, n))]
        wrong = [int(best_N[n]) for n in rows if best_N[n] not in _own(test_rows, n)]
        other, n_times = mistaken_for(test_rows, k, found.top, found.right_Nk)
        assert n_times == max((wrong.count(other_k) for other_k in wrong), default=0)
        assert (other == -1) if not wrong else wrong.count(other) == n_times
    shown_N = example_rows(test_rows, found.right_Nk, 4)
    assert found.right_Nk[shown_N, 0].tolist() == sorted(found.right_Nk[shown_N, 0].tolist(), reverse=True)
    assert found.right_Nk[shown_N, 0].sum() == 4
    assert len(set(shown_N.tolist())) == len(shown_N)


def _own(store: Store, n: int) -> list[int]:
    return store.class_ids[store.class_indptr[n] : store.class_indptr[n + 1]].tolist()


def test_bucket_load_counts_members(page: Page, model: MachModel):
    load_ = bucket_load(model.run)
    counts_K = model.run.class_counts_K()
    buckets_RK = model.run.assignment().buckets(np.arange(len(counts_K)))
    for r in range(3):
        for b in range(32):
            members = np.flatnonzero(buckets_RK[r] == b)
            assert load_.classes_RB[r, b] == len(members)
            assert load_.rows_RB[r, b] == counts_K[members].sum()
    assert page.column("load", 0, "rows, most") == [f"{n:,}" for n in load_.rows_RB.max(axis=1)]


def test_examples_show_rows_and_their_classes(page: Page, model: MachModel, test_rows: Store):
    text = page.texts["examples"]
    assert "first class right" in text
    for n in [int(part.split(":")[0]) for part in text.split("row ")[1:]]:
        names = ", ".join(f"class number {k}" for k in _own(test_rows, n))
        assert f"Its classes: {names}" in text
    assert "score" in text, "there is no calibration"
    assert "mach calibrate" in page.texts["reliability"]


def test_images_are_the_same_plots(page: Page, trained: Path, tmp_path: Path):
    result = CliRunner().invoke(
        main, ["report", str(trained), "-o", str(tmp_path / "x.html"), "--images", f"{tmp_path}/i"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "x.html")
    names = {path.name for path in (tmp_path / "i").iterdir()}
    assert names == {"training.png", "repetitions.png", "reliability.png", "load.png", "recall.png"}
    for path in (tmp_path / "i").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    again = Page(tmp_path / "x.html")
    assert again.tables == page.tables


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b &lt; c",
    "{{ 7 * 7 }}",
    "\u202eright to left",
    "bell \x07",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on texts and class names that try to be more than text; its first repetition alone is finished."""
    folder = tmp_path_factory.mktemp("hostile <b>")
    lines = ["text,classes"]
    words = ["<b>bold</b>", "quoted", "ampersand", "braces", "left", "bell"]
    for i in range(240):
        k = i % len(HOSTILE)
        name = HOSTILE[k].replace('"', '""')
        lines.append(f'{words[k]} word{i % 7},"{name}"')
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    tree = {
        "data": {"train": str(folder / "rows.csv"), "cache": str(folder / "cache"), "validation_fraction": 0.0},
        "hashing": {"repetitions": 2, "buckets": 4, "heads": 1},
        "network": {"hidden": [8], "dropout": 0.0},
        "reranking": {"candidates": 0},
        "training": {"epochs": 6, "batch": 32, "rate": 0.02, "precision": "float32"},
    }
    run, store = set_up(parse_config(tree, "fixture"), folder / "run <i>")
    train_shard(ShardJob(str(run.path), str(store.path), (0,)))
    return folder


def test_names_and_texts_are_only_text(hostile: Path):
    page = Page(Path(str(write_report(hostile / "run <i>", str(hostile / "rows.csv")))))
    assert (hostile / "run <i>" / "report.html").exists(), "the default place"
    tags = {tag for tag, _ in page.elements}
    assert not {"script", "img", "b", "i"} & tags
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    names = page.column("classes", 1, "name")
    assert set(names) == {visible(name) for name in HOSTILE}
    assert "\\u202eright to left" in names
    assert "49" not in names
    assert "<b>bold</b> word" in page.texts["examples"]
    assert "1 of 2 finished" in page.texts["about"]
    assert page.column("training", 0, "state") == ["finished", "waiting"]
    assert page.column("accuracy", 0, "R") == ["1"]


def test_texts_of_rows_are_read_from_the_source(hostile: Path):
    run = Run.open(hostile / "run <i>")
    source = str(hostile / "rows.csv")
    texts = texts_of(run.config.data, source, [239, 0, 7], like=run.reference())
    assert texts == ["bell word1", "<b>bold</b> word0", "quoted word0"]
    store = prepare(run.config.data, run.config.text, source, like=run.reference())
    assert texts_of(run.config.data, str(store.path), [0], like=run.reference()) is None


def test_an_unfinished_run_shows_its_curves_so_far(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mach.training.trainer.SHORT_SECONDS", 0.0)
    run, store = set_up(config, tmp_path / "run")
    waiting = Page(Path(str(write_report(run.path))))
    assert "No repetition is finished yet" in waiting.texts["accuracy"]
    assert "classes" not in waiting.texts
    assert waiting.column("training", 0, "state") == ["waiting"] * 3
    assert waiting.column("load", 0, "classes, most"), "hashing is known before training"

    def after_three_epochs() -> bool:
        return len(run.repetition(1).read_metrics()) == 3

    with pytest.raises(TrainingStoppedError):
        train_shard(ShardJob(str(run.path), str(store.path), (1,)), should_stop=after_three_epochs)
    stopped = Page(Path(str(write_report(run.path))))
    assert stopped.column("training", 0, "state") == ["waiting", "stopped", "waiting"]
    assert any(tag == "svg" for tag, _ in stopped.elements)
    assert len(run.repetition(1).read_metrics()) == 3
    assert stopped.column("training", 0, "loss")[1] == f"{status(run, 1)['loss']:,.4f}"


def test_probabilities_where_the_run_is_calibrated(trained: Path, planted: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    result = CliRunner().invoke(main, ["calibrate", str(run), str(planted / "test.txt")])
    assert result.exit_code == 0, result.output
    page = Page(Path(str(write_report(run))))
    with load(run) as model:
        calibration = model.calibration
    assert calibration is not None
    assert page.column("reliability", 0, "ECE after, %") == [f"{100 * calibration.plain.ece_after:.1f}"]
    assert "before: ECE" in page.texts["reliability"]
    assert "after: ECE" in page.texts["reliability"]
    assert "probability" in page.texts["examples"]


def test_data_that_cannot_be_read(config: Config, trained: Path, planted: Path, tmp_path: Path):
    with pytest.raises(DataError, match="none.txt"):
        write_report(trained, str(tmp_path / "none.txt"), output=tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(str(planted / "test.txt"), str(tmp_path / "gone.txt")))
    page = Page(Path(str(write_report(run))))
    assert "gone.txt" in page.texts["accuracy"]
    assert "examples" not in page.texts


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_what_is_not_installed_is_named_with_its_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'mach-classifier\[report\]'"):
        write_report(trained, output=tmp_path / "x.html")


def test_plots_keep_their_names_apart():
    with plots.style():
        first, second = (plots.svg(plots.training([[{"epoch": 1, "loss": 2.0}]]), name) for name in ("a", "b"))
    assert 'id="a-' in first
    assert first.replace("a-", "b-") == second.replace("a-", "b-")
    assert plots.INK not in first


def test_runs_beside_each_other(trained: Path, planted: Path, config: Config, tmp_path: Path):
    smaller = tmp_path / "one"
    conductor.train(config.changed(hashing={"repetitions": 1}), smaller, launcher="here").close()
    done = CliRunner().invoke(
        main, ["report", str(trained), str(smaller), str(planted / "test.txt"), "-o", str(tmp_path / "x.html")]
    )
    assert done.exit_code == 0, done.output
    page = Page(tmp_path / "x.html")
    rows = {}
    for path in (trained, smaller):
        with load(path) as model:
            store = prepare(
                model.run.config.data, model.run.config.text, str(planted / "test.txt"), like=model.reference()
            )
            rows[path] = evaluate(model, store)[-1], diagnose(model, store)
    for path in (trained, smaller):
        assert page.column("headline", 0, path.name)[0] == f"{100 * rows[path][0]['P@1']:.1f} %"
    gain, error = difference(rows[trained][1], rows[smaller][1])
    assert gain == pytest.approx(rows[smaller][0]["P@1"] - rows[trained][0]["P@1"])
    assert f"{100 * gain:+.1f} points of P@1 beside trained, ± {200 * error:.1f}" in page.texts["headline"]
    assert page.column("configuration", 1, "key") == ["hashing.repetitions"]
    assert page.tables["configuration"][1][1] == ["hashing.repetitions", "3", "1"]
    ids = page.ids()
    assert len(ids) == len(set(ids))


def test_a_comparison_needs_runs_and_one_set_of_rows(trained: Path, planted: Path, tmp_path: Path):
    wrong = CliRunner().invoke(main, ["report", str(trained), str(planted / "test.txt"), str(tmp_path / "no")])
    assert wrong.exit_code == 2
    assert "are no runs, and only one may be DATA" in wrong.stderr
