"""No text of a file becomes a path unseen, and nothing is written or copied through a link that leads out."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from upath import UPath

import mach
from mach.cli import main
from mach.cli.report.sections import write_report
from mach.data.transfer import fetch_store
from mach.errors import StorageError
from mach.estimator.classifier import MACHClassifier
from mach.files.names import digest, named
from mach.files.places import fetch_folder, upload_folder
from mach.runs.run import Run
from mach.training.finetuning import training_store
from tests.attacks.hostile import Hostile, ask, refusal

DIGEST = "0123456789abcdef" * 2
NO_DIGESTS = ["../../x", "/etc/x", DIGEST[:-1], f"{DIGEST}0", DIGEST.upper(), "", ".", "..", f"{DIGEST}\n", "g" * 32]
NO_NAMES = ["", ".", "..", "../x", "a/b", "/a", "a\\b", "C:a", ".hidden", "a\x00b", "a\nb", "n" * 300]


def held(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache; around it, in ``tmp_path / "home"``, nothing may appear."""
    cache = tmp_path / "home/a/b/c/cache"
    monkeypatch.setenv("MACH_CACHE", str(cache))
    monkeypatch.setattr("mach.files.places.PAUSES_SECONDS", ())
    cache.mkdir(parents=True)
    return cache


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_not_plain_is_refused(name: str):
    with pytest.raises(StorageError, match="is no plain name") as caught:
        named(Path("/cache"), name)
    assert len(str(caught.value).splitlines()) == 1
    assert named(Path("/cache"), "0001", ".safetensors") == Path("/cache/0001.safetensors")


@pytest.mark.parametrize("text", NO_DIGESTS)
def test_a_digest_has_its_form(text: str):
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        digest(text)
    assert digest(DIGEST) == DIGEST


def placed(run: Hostile, url: str) -> UPath:
    """The run behind a URL."""
    where = UPath(url)
    for step in json.loads((run / "classes/CURRENT").read_text())["steps"]:
        name = f"classes/{step['version']:04d}"
        shutil.copy(run / f"{name}.safetensors", run / f"{name}-{step['digest'][:8]}.safetensors")
    upload_folder(run.path, where)
    return where


@pytest.mark.parametrize("text", ["../../x", DIGEST[:-1]])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("manifest.json", "data_fingerprint"),
        ("repetitions/r000/DONE", "weights_digest"),
        ("RERANKED", "digest"),
        ("RERANKED", "fingerprint"),
        ("classes/CURRENT", "steps__6__digest"),
        ("calibration.json", "fingerprint"),
    ],
)
def test_a_remote_run_writes_into_the_cache_alone(file: str, key: str, text: str, tmp_path: Path, cache: Path):
    run = Hostile(tmp_path / "run")
    url = f"memory://{tmp_path.name}/{key}"
    where = placed(run, url)
    run.json(file, **{key: text})
    (where / file).write_bytes((run / file).read_bytes())
    for path in (run.path, url):
        line = refusal(path)
        assert file in line
        assert key.rsplit("__", maxsplit=1)[-1] in line
    assert all(name.startswith("a/b/c/cache") or "a/b/c".startswith(name) for name in held(tmp_path / "home"))


def test_a_remote_run_answers(tmp_path: Path, cache: Path):
    url = f"memory://{tmp_path.name}/good"
    placed(Hostile(tmp_path / "run"), url)
    ask(url)
    assert held(tmp_path / "home") > {"a/b/c/cache/weights", "a/b/c/cache/runs"}


@pytest.mark.parametrize("text", ["../../x", DIGEST[:-1], "/tmp/x"])
def test_a_remote_store_writes_into_the_cache_alone(text: str, tmp_path: Path, cache: Path):
    where = UPath(f"memory://{tmp_path.name}/store")
    (where / "meta.json").write_text(json.dumps({"fingerprint": text}))
    with pytest.raises(StorageError, match=r"meta\.json is damaged: fingerprint"):
        fetch_store(str(where))
    assert held(tmp_path / "home") == {"a", "a/b", "a/b/c", "a/b/c/cache"}


def test_a_remote_folder_has_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    where = UPath(f"memory://{tmp_path.name}/folder")
    (where / "good").write_bytes(b"1")
    (where / ".left.over").write_bytes(b"1")
    fetch_folder(where, tmp_path / "copy")
    assert held(tmp_path / "copy") == {"good"}
    root = where.fs._strip_protocol(where.path)
    monkeypatch.setattr(where.fs, "find", lambda path: [f"{root}/a/../../evil"])
    fetch_folder(where, tmp_path / "other")
    assert not (tmp_path / "evil").exists()
    monkeypatch.setattr(where.fs, "find", lambda path: [f"{root}/a\\b"])
    with pytest.raises(StorageError, match="no plain name"):
        fetch_folder(where, tmp_path / "third")


def test_no_other_way_leads_from_a_digest_to_a_path():
    """Paths are made of digests and fingerprints by `named` alone, in all of mach."""
    wild = re.compile(r"""/ (f["'][^"']*\{[^}]*(digest|fingerprint)|[\w.]*(digest|fingerprint))""")
    found = [path.name for path in Path(mach.__file__).parent.rglob("*.py") if wild.search(path.read_text())]
    assert found == []


# -- links


def test_links_to_files_elsewhere_are_read(tmp_path: Path):
    """As hubs and data disks lay folders out."""
    run = Hostile(tmp_path / "run")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(path for path in sorted(run.path.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    ask(run.path)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder outside of the run, which stays as it is."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "file").write_text("precious")
    return folder


def expect_untouched(precious: Path) -> None:
    assert held(precious) == {"file"}
    assert (precious / "file").read_text() == "precious"


def test_edits_are_not_written_through_a_link(tmp_path: Path, precious: Path):
    run = Hostile(tmp_path / "run", "-int8")
    (run / "classes").symlink_to(precious)
    with pytest.raises(StorageError, match="is a link that leads out of"):
        mach.load(run.path).classes.rename(0, "x")
    (run / "classes").unlink()
    (run / "classes").mkdir()
    (run / "classes/lock").symlink_to(precious / "file")
    with pytest.raises(StorageError, match="cannot lock"):
        mach.load(run.path).classes.rename(0, "x")
    expect_untouched(precious)


def test_training_is_not_written_through_a_link(trained: Path, tmp_path: Path, precious: Path):
    path = tmp_path / "run"
    shutil.copytree(trained, path)
    shutil.rmtree(path / "repetitions/r002")
    (path / "repetitions/r002").symlink_to(precious)
    files = Run.open(path).repetition(2)
    with pytest.raises(StorageError, match="is a link that leads out of"), files.locked():
        pass
    (path / "repetitions/r002").unlink()
    (path / "repetitions/r002").mkdir()
    for name in ("log.txt", f".metrics.jsonl.{os.uname().nodename}-{os.getpid()}.tmp"):
        (path / "repetitions/r002" / name).symlink_to(precious / "file")
    files.note("a line")
    with pytest.raises(StorageError, match="cannot write"):
        files.write_metrics([{"epoch": 1}])
    expect_untouched(precious)


def test_what_a_link_leads_to_is_not_copied(tmp_path: Path, precious: Path):
    rows, classes = np.eye(8, dtype=np.float32)[np.arange(64) % 8], np.arange(64) % 8
    fitted = MACHClassifier(epochs=1, repetitions=1, buckets=4, random_state=0).fit(rows, classes)
    fitted.save(tmp_path / "saved")
    (tmp_path / "saved/notes.txt").symlink_to(precious / "file")
    loaded = MACHClassifier.load(tmp_path / "saved")
    for action in (lambda: loaded.save(tmp_path / "again"), lambda: pickle.dumps(loaded)):
        with pytest.raises(StorageError, match="is a link that leads out of"):
            action()
    assert not (tmp_path / "again").exists()


def test_rows_to_measure_are_not_prepared_where_the_run_says(trained: Path, planted: Path, tmp_path: Path, cache: Path):
    """A folder is named as the cache in the run's configuration; a verb that reads rows writes into the user's own."""
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run/config.toml"
    theirs = tmp_path / "home/theirs"
    lines = [f'cache = "{theirs}"' if line.startswith("cache =") else line for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines))
    assert mach.load(tmp_path / "run").run.config.data.cache == str(theirs)
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run"), str(planted / "test.txt")])
    assert done.exit_code == 0, done.stderr
    training_store(Run.open(tmp_path / "run"))
    assert not theirs.exists()
    assert list(cache.glob("test-*"))
    assert list(cache.glob("train-*"))


def test_rows_that_a_run_names_are_said_and_never_fetched(trained: Path, planted: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "run")
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run"), "--no-curve"])
    assert done.exit_code == 0, done.stderr
    assert f"mach: measured on {planted}/test.txt, which {tmp_path}/run names as data.test\n" in done.stderr
    file = tmp_path / "run/config.toml"
    whole = file.read_text()
    file.write_text(whole.replace(f"{planted}/test.txt", f"{planted}/gone.txt"))
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run")])
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert "gone.txt" in line
    file.write_text(whole.replace(f'test = "{planted}/test.txt"', 'test = "memory://theirs/test.txt"'))
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "names data.test = memory://theirs/test.txt: give it as DATA if it is to be fetched" in done.stderr
    page = write_report(tmp_path / "run").read_text()
    assert "Not measured" in page
    assert "give it as DATA" in page
    done = CliRunner().invoke(main, ["report", str(tmp_path / "run"), str(trained)])
    assert done.exit_code == 2
    assert "give it as DATA if it is to be fetched" in done.stderr
