"""Places: what is a URL, whole files or none on every backend, failures as one line, one fetch a machine."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mach.errors import ConfigError, StorageError
from mach.files import places
from mach.files.places import (
    HOST,
    atomic_file,
    fetch,
    fetch_folder,
    is_there,
    kept,
    local_copy,
    names_in,
    place,
    read_bytes,
    remove,
    remove_folder,
    sweep,
    upload_folder,
)
from tests.flaky import FlakyFileSystem


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(places, "PAUSES_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(FlakyFileSystem, "n_operations", {})


@pytest.fixture(params=["", "memory://{name}", "local://{path}", "flaky://{path}"])
def folder(request: pytest.FixtureRequest, tmp_path: Path):
    """An empty folder of this machine, of an object store, and of file systems where files are moved into place."""
    (tmp_path / "folder").mkdir()
    return place(request.param.format(name=tmp_path.name, path=tmp_path / "folder") or str(tmp_path / "folder"))


def have(monkeypatch: pytest.MonkeyPatch, operation: str, *troubles: str) -> None:
    """Troubles of the next operations of a kind, one after another, and none afterwards."""
    left = list(troubles)
    trouble = lambda kind, path: left.pop(0) if kind == operation and left else ""  # noqa: E731
    monkeypatch.setattr(FlakyFileSystem, "trouble", staticmethod(trouble))


def test_paths_stay_paths_and_cost_no_import():
    code = "import sys, mach.files.places as p; a, b = p.place('a/b'), p.place('file:///a b');"
    code += "print(type(a).__name__, type(b).__name__, "
    code += "sorted({'fsspec', 'upath', 'numpy'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "PosixPath PosixPath []"
    assert place(Path("a")) == Path("a")
    assert place("builtin:characters") == Path("builtin:characters")
    assert str(place("memory://a/b/") / "c") == "memory://a/b/c"
    found = place("memory://a")
    assert place(found) is found


def test_unknown_file_systems_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="nowhere://x cannot be used: .*nowhere"):
        place("nowhere://x")


def test_a_file_appears_whole_or_not_at_all(folder):
    with atomic_file(folder / "a") as file:
        file.write(b"first")
        assert not is_there(folder / "a")
    with pytest.raises(ZeroDivisionError), atomic_file(folder / "a") as file:
        file.write(b"second" * (1 // 0))
    assert read_bytes(folder / "a") == b"first"
    with atomic_file(folder / "a") as file:
        file.write(b"third")
    assert names_in(folder) == ["a"]
    with local_copy(folder / "a") as copy:
        assert copy.read_bytes() == b"third"
    remove(folder / "a")
    remove(folder / "a")
    assert not is_there(folder / "a")
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "a")
    assert names_in(folder / "nothing") == []


def test_folders_travel_whole(folder, tmp_path: Path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "last").write_bytes(b"1")
    (source / "deep/x").write_bytes(b"")
    upload_folder(source, folder / "copy", last="last")
    if isinstance(folder, Path):
        return
    fetch_folder(folder / "copy", tmp_path / "back")
    assert sorted(str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*")) == [
        "deep", "deep/x", "last",
    ]  # fmt: skip
    remove_folder(folder / "copy", first="last")
    assert not is_there(folder / "copy")
    remove_folder(folder / "copy")


@pytest.mark.parametrize("trouble", ["fail", "lose", "cut"])
def test_a_put_is_tried_again(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = place(f"flaky://{tmp_path}/a")
    with atomic_file(file) as out:
        out.write(b"old")
    have(monkeypatch, "put", trouble, trouble, "wait")
    with atomic_file(file) as out:
        out.write(b"newer")
    assert read_bytes(file) == b"newer"
    have(monkeypatch, "put", *[trouble] * 4)
    complaint = "cannot write flaky://.*/a: (the network is down|. of 6 bytes arrived)"
    with pytest.raises(StorageError, match=complaint) as e, atomic_file(file) as out:
        out.write(b"newest")
    assert "\n" not in str(e.value)
    assert read_bytes(file) == b"newer"
    assert names_in(tmp_path) == ["a"]


def test_a_failure_is_no_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = place(f"flaky://{tmp_path}/a")
    assert not is_there(file)
    have(monkeypatch, "info", *["fail"] * 4)
    with pytest.raises(StorageError, match=r"cannot look for flaky://.*/a: the network is down"):
        is_there(file)
    have(monkeypatch, "info", "fail")
    assert not is_there(file)


def test_a_cut_download_is_tried_again_and_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").write_bytes(b"content")
    file: Any = place(f"flaky://{tmp_path}/a")
    cache = tmp_path / "cache"
    have(monkeypatch, "get", *["cut"] * 4)
    with pytest.raises(StorageError, match=r"cannot keep flaky://.*/a in .*cache: 3 of 7 bytes arrived"):
        kept(cache / "b", lambda path: fetch(file, path))
    assert names_in(cache) == []
    have(monkeypatch, "get", "cut")
    assert kept(cache / "b", lambda path: fetch(file, path)).read_bytes() == b"content"
    assert names_in(cache) == ["b"]


def test_many_at_once_fetch_once(tmp_path: Path):
    makers = []

    def make(path: Path) -> None:
        makers.append(path)
        barrier_free.wait(0.2)
        path.write_bytes(b"x")

    barrier_free = threading.Event()
    threads = [threading.Thread(target=kept, args=(tmp_path / "cache/a", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    assert names_in(tmp_path / "cache") == ["a"]


def test_only_what_nobody_writes_any_more_is_swept(folder):
    process = subprocess.Popen(["true"])
    process.wait()
    written_by = {"dead": f"{HOST}-{process.pid}", "alive": f"{HOST}-{os.getppid()}", "elsewhere": "other-1"}
    for who in written_by.values():
        with atomic_file(folder / f".a.{who}.tmp") as file:
            file.write(b"half")
    with atomic_file(folder / "a") as file:
        file.write(b"whole")
    if isinstance(folder, Path):
        (folder / ".a.old-1.tmp").touch()
        os.utime(folder / ".a.old-1.tmp", (1, 1))
    others = [".notes.tmp", ".draft-1.tmp", "a.old-1.tmp", ".a.old-x.tmp"]  # no names that writers of ours give
    for name in others if isinstance(folder, Path) else []:
        (folder / name).touch()
        os.utime(folder / name, (1, 1))
    left = [*(f".a.{written_by[who]}.tmp" for who in ("alive", "elsewhere")), "a"]
    sweep(folder)
    assert sorted(names_in(folder)) == sorted(left + (others if isinstance(folder, Path) else []))
    sweep(folder / "nothing")


def test_who_waited_for_a_lock_that_was_removed_takes_the_next(tmp_path: Path, monkeypatch):
    """Else it would make the file beside whoever locks the name anew."""
    really, lock, waits = fcntl.flock, tmp_path / ".a.lock", []

    def flock(file: Any, how: int) -> None:
        really(file, how)
        waits.append(how)
        if len(waits) == 1:
            lock.unlink()  # as the holder does while this one waits

    def make(path: Path) -> None:
        assert lock.exists()
        path.write_text("made")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert kept(tmp_path / "a", make).read_text() == "made"
    assert (len(waits), names_in(tmp_path)) == (2, ["a"])
