"""The installed Annif's command line works with the backend, and its http backend with the server.

Annif pins most of what it needs, so it has an environment of its own: MACH_ANNIF names its command, or it is beside
this Python.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mach.config import load_run_config
from mach.model.loading import load
from mach.serving.server import Settings
from tests.serving.conftest import serving

ANNIF = os.environ.get("MACH_ANNIF") or shutil.which("annif", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(
    ANNIF is None,
    reason="no Annif here: pip install 'mach-classifier[annif]' into another environment, set MACH_ANNIF=.../bin/annif",
)
N_SUBJECTS = 40
SMALL = """
hashing.repetitions = 2
hashing.buckets = 32
network.hidden = 32
training.epochs = 20
training.batch = 32
reranking.candidates = 0
data.validation_fraction = 0.1
launch.launcher = here
"""
PROJECTS = f"""
[mach]
language = en
backend = mach
vocab = toy
limit = 30
allow_learn = true
{SMALL}
[rare]
language = en
backend = mach
vocab = toy
training.epoch = 3

[tfidf]
language = en
backend = tfidf
analyzer = simple
vocab = toy

[ensemble]
language = en
backend = ensemble
sources = mach:2,tfidf:1
vocab = toy

[remote]
language = en
backend = http
endpoint = ENDPOINT
vocab = toy
"""


def uri(number: int) -> str:
    return f"http://example.org/s{number}"


def write_vocabulary(path: Path, numbers: list[int]) -> None:
    rows = "".join(f"{uri(k)},Subject {k},Thema {k},{k}\n" for k in numbers)
    path.write_text("uri,label_en,label_de,notation\n" + rows)


def write_corpus(path: Path, n_rows: int, seed: int) -> None:
    """Documents of one or two subjects, each told by two of four words of its own; the last subject has none."""
    generator = random.Random(seed)
    lines = []
    for _ in range(n_rows):
        subjects = generator.sample(range(N_SUBJECTS - 1), generator.choice([1, 2]))
        words = [f"about{chr(97 + k % 26)}{k}x{i}" for k in subjects for i in generator.sample(range(4), 2)]
        words += [f"noise{generator.randrange(50)}" for _ in range(2)]
        generator.shuffle(words)
        lines.append(" ".join(words) + "\t" + " ".join(f"<{uri(k)}>" for k in subjects))
    path.write_text("\n".join(lines) + "\n")


@dataclass
class Library:
    """A folder of projects, and Annif's command in it."""

    folder: Path

    def annif(self, *arguments: str, typed: str = "", status: int = 0, config: str = "Config") -> str:
        environment = os.environ | {
            "ANNIF_CONFIG": f"mach.serving.annif.{config}",
            "NLTK_DATA": str(self.folder / "nltk"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(  # noqa: PLW1510
            [str(ANNIF), *arguments],
            cwd=self.folder,
            env=environment,
            input=typed,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + (done.stderr if status else "")

    def suggest(self, project: str, text: str, limit: int = 5) -> list[tuple[str, float]]:
        lines = self.annif("suggest", project, "-l", str(limit), typed=text).splitlines()
        return [(line.split("\t")[0].strip("<>"), float(line.split("\t")[-1])) for line in lines]

    def measured(self, project: str, metric: str, *options: str) -> float:
        found = re.search(rf"^{re.escape(metric)}:\s+(\S+)", self.annif("eval", project, "test.tsv", *options), re.M)
        assert found
        return float(found[1])

    @property
    def run(self) -> Path:
        return self.folder / "data" / "projects" / "mach" / "mach-run"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A vocabulary and two trained projects; nothing changes it."""
    made = Library(tmp_path_factory.mktemp("library"))
    (made.folder / "projects.cfg").write_text(PROJECTS)
    write_vocabulary(made.folder / "toy.csv", list(range(N_SUBJECTS)))
    write_corpus(made.folder / "train.tsv", 800, seed=1)
    write_corpus(made.folder / "test.tsv", 100, seed=2)
    punkt = made.folder / "nltk" / "tokenizers" / "punkt_tab" / "english"  # Annif would fetch it from the network
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).touch()
    made.annif("load-vocab", "toy", "toy.csv")
    made.annif("train", "mach", "train.tsv", config="ProductionConfig")
    made.annif("train", "tfidf", "train.tsv")
    return made


@pytest.fixture
def own(library: Library, tmp_path: Path) -> Library:
    """A copy to change."""
    shutil.copytree(library.folder, tmp_path / "library")
    return Library(tmp_path / "library")


def python(code: str) -> str:
    assert ANNIF is not None
    done = subprocess.run(  # noqa: PLW1510
        [str(Path(ANNIF).parent / "python"), "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_the_command_line_runs_beside_what_annif_pins(library: Library):
    assert f"{N_SUBJECTS}" in python(f"from mach.cli import main; main(['info', {str(library.run)!r}])")


def test_the_hook_is_where_it_was():
    told = python(
        "import annif.backend as b; from annif.backend.backend import AnnifLearningBackend as A\n"
        "print(isinstance(b._backend_fns, dict) and b.get_backend('tfidf') is b._backend_fns['tfidf']())\n"
        "print(all(hasattr(A, n) for n in ('_train', '_suggest_batch', '_learn', '_model_file_paths', 'initialize')))"
    )
    assert told == "True\nTrue\n", f"this release of Annif moved what mach.serving.annif hooks into: {told}"


def test_a_release_that_moved_it_is_told_so():
    told = python("import annif.backend as b; del b._backend_fns; import mach.serving.annif")
    assert "keeps its backends elsewhere" in told
    assert "install annif 1.4" in told


def test_it_suggests_as_the_model_does(library: Library):
    text = (library.folder / "test.tsv").read_text().split("\t")[0]
    model = load(library.run)
    ids, probabilities = model.topk(text, 5, probabilities=True)
    found = library.suggest("mach", text)
    assert [subject for subject, _ in found] == model.answerer.catalogue.uris(ids)
    np.testing.assert_allclose([score for _, score in found], probabilities, atol=1e-4)
    assert library.suggest("mach", "nothing known") == []
    assert "True" in next(line for line in library.annif("list-projects").splitlines() if line.startswith("mach "))
    assert model.names([N_SUBJECTS - 1]) == [f"Subject {N_SUBJECTS - 1}"]


def test_it_is_evaluated(library: Library):
    assert library.measured("mach", "Precision@1") > 0.95
    assert library.measured("mach", "NDCG") == library.measured("mach", "NDCG", "-j", "2")


def test_it_is_optimized(library: Library):
    assert re.search(r"Best +F1 score", library.annif("optimize", "mach", "test.tsv", "-d", "20"))


def test_it_is_part_of_an_ensemble(library: Library):
    assert library.measured("ensemble", "Precision@1") > 0.95


def test_it_learns(own: Library):
    text, target = "entirely new words", uri(7)
    (own.folder / "more.tsv").write_text(f"aboutd3x0 aboutd3x1 noise1\t<{target}>\n")
    assert own.suggest("mach", "aboutd3x0 aboutd3x1 noise1")[0][0] == uri(3)
    own.annif("learn", "mach", "more.tsv")
    assert own.suggest("mach", "aboutd3x0 aboutd3x1 noise1")[0][0] == target
    (own.folder / "more.tsv").write_text(f"{text}\t<{target}>\n")
    told = own.annif("learn", "mach", "more.tsv", status=1)
    assert "no query has a known feature" in told
    assert "Traceback" not in told


def test_a_subject_that_came_after_training_is_learned(own: Library):
    write_vocabulary(own.folder / "toy.csv", list(range(N_SUBJECTS + 1)))
    own.annif("load-vocab", "toy", "toy.csv")
    (own.folder / "more.tsv").write_text(f"noise1 noise2 noise3\t<{uri(N_SUBJECTS)}>\n")
    own.annif("learn", "mach", "more.tsv")
    assert own.suggest("mach", "noise1 noise2 noise3")[0][0] == uri(N_SUBJECTS)
    assert load(own.run).names([N_SUBJECTS]) == [f"Subject {N_SUBJECTS}"]


def test_a_subject_that_left_the_vocabulary_is_not_suggested(own: Library):
    text = "aboutd3x0 aboutd3x1"
    assert own.suggest("mach", text)[0][0] == uri(3)
    write_vocabulary(own.folder / "toy.csv", [k for k in range(N_SUBJECTS) if k != 3])
    own.annif("load-vocab", "--force", "toy", "toy.csv")  # all later subjects get other numbers
    found = [subject for subject, _ in own.suggest("mach", text, limit=30)]
    assert len(found) == 30
    assert uri(3) not in found


def test_it_is_trained_anew_from_cached_documents(own: Library):
    own.annif("train", "--cached", "mach", "-b", "mach.training.epochs=2", "-b", "mach.effort=fast")
    config, _ = load_run_config(own.run / "config.toml")
    assert (config.training.epochs, config.training.effort) == (2, "fast")
    assert "no cached training data" in own.annif("train", "--cached", "rare", status=1)


def test_what_cannot_be_trained_is_told_in_a_line(own: Library):
    told = own.annif("train", "rare", "train.tsv", status=1)
    assert "training.epoch" in told
    assert "Traceback" not in told
    (own.folder / "none.tsv").write_text(f"text\t<{uri(999)}>\n")
    assert "no documents" in own.annif("train", "mach", "none.tsv", status=1)
    assert own.suggest("mach", "aboutd3x0 aboutd3x1")[0][0] == uri(3)  # the old run goes on answering
    left = own.folder / "data" / "projects" / "rare" / "tmp-mach-run"  # of an interrupted training
    left.mkdir()
    (left / "manifest.json").write_text("{}")
    assert "Project is not trained" in own.annif("suggest", "rare", typed="text", status=1) + own.annif(
        "show-project", "rare"
    ).replace("Trained:           False", "Project is not trained")


def test_other_labels_of_skos_are_learned(own: Library):
    subjects = "".join(
        f'<{uri(k)}> a skos:Concept ; skos:prefLabel "Subject {k}"@en ; skos:altLabel "also{k}"@en .\n'
        for k in range(N_SUBJECTS)
    )
    head = "@prefix skos: <http://www.w3.org/2004/02/skos/core#> .\n"
    (own.folder / "toy.ttl").write_text(f"{head}{subjects}<{uri(0)}> skos:narrower <{uri(1)}> .\n")
    own.annif("load-vocab", "--force", "toy", "toy.ttl")
    own.annif("train", "mach", "train.tsv")
    texts = load(own.run).run.class_texts
    assert texts is not None
    k = list(texts.uris).index(uri(1))
    assert (texts.names[k], texts.alternatives[k]) == ("Subject 1", ("also1",))
    assert [texts.uris[parent] for parent in texts.parents[k]] == [uri(0)]


def test_its_http_backend_asks_the_server(own: Library):
    text = "aboutd3x0 aboutd3x1"
    load(own.run).classes.add(["without uri"], [[f"{text} noise1"]])
    with serving(Settings([f"toy={own.run}"])) as url:
        projects = own.folder / "projects.cfg"
        projects.write_text(PROJECTS.replace("ENDPOINT", f"{url}/v1/projects/toy/suggest"))
        found = own.suggest("remote", text, limit=30)
        assert found[0][0] == uri(3)
        assert {subject for subject, _ in found} <= {uri(k) for k in range(N_SUBJECTS)}
        assert own.measured("remote", "Precision@1") > 0.9
