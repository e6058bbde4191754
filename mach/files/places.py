"""Places: where files lie, a path of this machine or a URL of any file system that fsspec knows.

Paths and ``file://`` URLs are `pathlib.Path`: files there are mapped, locked and renamed. Every other URL is a
``UPath``: its files are put and fetched whole. An operation there is tried again after a failure; what a backend
raises in the end becomes an `OSError` of one line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, TypeVar

from mach.errors import ConfigError, MachError, StorageError, one_line
from mach.files.names import named
from mach.files.regular import MOST_BYTES, create, read_regular, refuse_large

if TYPE_CHECKING:
    from upath import UPath

Place: TypeAlias = "Path | UPath"
Result = TypeVar("Result")
AnyPlace = TypeVar("AnyPlace", "Path", "UPath")

PAUSES_SECONDS = (0.5, 2.0, 5.0)  # between attempts at a remote operation
LEFTOVER_SECONDS = 24 * 3600.0  # an unfinished file of another machine that is as old has no writer any more
HOST = os.uname().nodename
# Their PUT shows the new object whole or not at all; elsewhere a file is put under another name and moved.
ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"})
_SHORT_LIVED: ContextVar[bool] = ContextVar("_SHORT_LIVED", default=False)
_TEMPORARY = re.compile(r"\..+\..+-\d+\.tmp")  # what `temporary_name` makes
_URL = re.compile(r"[A-Za-z][\w.+-]*(::[\w.+:-]+)?://")


def place(text: str | Place) -> Place:
    """The place that a text names.

    Raises
    ------
    ConfigError
        When the URL's file system is unknown, or its package is not installed.

    Examples
    --------
    >>> place("runs/characters"), place("file:///runs/characters")
    (PosixPath('runs/characters'), PosixPath('/runs/characters'))
    >>> str(place("memory://runs/characters/"))
    'memory://runs/characters'
    """
    if not isinstance(text, str):
        if not hasattr(text, "parts"):
            raise ConfigError(f"path {text!r:.40} ({type(text).__name__}): need a text or a path")
        return text
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if not _URL.match(text):
        return Path(text)
    from upath import UPath

    try:
        found = UPath(text.rstrip("/"))
        found.fs  # noqa: B018 - it is made here, where what it lacks can be told
    except Exception as error:
        raise ConfigError(f"{text} cannot be used: {one_line(error)}") from error
    return found


def is_there(where: Place) -> bool:
    """Whether a file or folder is there; unlike pathlib and fsspec it never takes a failure, a StorageError, for no."""
    try:
        where.stat() if isinstance(where, Path) else _insist(where, lambda: where.fs.info(where.path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StorageError(f"cannot look for {where}: {error.strerror}") from error
    return True


def read_bytes(where: Place, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes."""
    if isinstance(where, Path):
        return read_regular(where, most)
    refuse_large(_insist(where, lambda: where.fs.info(where.path)["size"]) or 0, most)  # some servers do not tell
    return _insist(where, lambda: bytes(where.fs.cat_file(where.path)))


def state_of(where: UPath) -> str:
    """What tells one state of a remote file from the next: a digest of its size, time, etag and such."""
    return _insist(where, lambda: str(where.fs.ukey(where.path)))


def names_in(folder: Place) -> list[str]:
    """Names in a folder, none if it is not there."""
    try:
        if isinstance(folder, Path):
            return os.listdir(folder)
        found = _insist(folder, lambda: folder.fs.ls(folder.path, detail=False))
    except FileNotFoundError:
        return []
    return [PurePosixPath(name).name for name in found]


def remove(where: Place) -> None:
    """Remove a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        where.unlink() if isinstance(where, Path) else _insist(where, lambda: where.fs.rm_file(where.path))


@contextlib.contextmanager
def atomic_file(where: Place) -> Iterator[BinaryIO]:
    """Open a file that takes its name only when the block ends well.

    Raises StorageError when it cannot be written, for example on a full disk; then nothing is left of it.
    """
    try:
        if isinstance(where, Path):
            temporary = temporary_name(where)
            try:
                with create(temporary) as file:
                    yield file
                flush_to_disk(temporary)
                temporary.replace(where)
                flush_to_disk(where.parent)  # names appear in the order in which they were given
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
        else:
            with tempfile.NamedTemporaryFile(prefix="mach-") as copy:
                yield copy  # type: ignore[misc]
                copy.flush()
                upload(Path(copy.name), where)
    except OSError as error:
        raise StorageError(
            f"cannot write {where}: {error.strerror}; what was there before is untouched: make room or give access, "
            "then run the same command again"
        ) from error


def upload(file: Path, where: UPath) -> None:
    """Put a file; it appears whole or not at all.

    Its size is asked back, since some stores lose a write and say nothing. An older file of the same size passes: an
    older checkpoint, from which training can go on as well.
    """
    fs = where.fs

    def put(path: str) -> None:
        fs.put_file(str(file), path)
        fs.invalidate_cache()
        n_bytes = 0
        with contextlib.suppress(FileNotFoundError):
            n_bytes = fs.info(path)["size"]
        _refuse_cut(file.stat().st_size, n_bytes)

    def put_and_move() -> None:
        fs.makedirs(where.parent.path, exist_ok=True)
        temporary = temporary_name(where).path
        try:
            put(temporary)
            try:
                fs.mv(temporary, where.path)
            except Exception:
                fs.rm_file(where.path)  # hdfs does not rename over a file
                fs.mv(temporary, where.path)
        finally:
            with contextlib.suppress(Exception):  # it has mostly moved away
                fs.rm_file(temporary)

    _insist(where, (lambda: put(where.path)) if where.protocol in ATOMIC_PUT else put_and_move)


def fetch(where: UPath, file: Path, check: Callable[[Path], None] = lambda file: None) -> None:
    """Copy a remote file here, on disk when it returns; ``check`` raises a MachError where its content is wrong."""
    fs = where.fs

    def get() -> None:
        size = fs.info(where.path)["size"]  # some servers do not tell
        fs.get_file(where.path, str(file))
        _refuse_cut(file.stat().st_size if size is None else size, file.stat().st_size)
        check(file)

    _insist(where, get)
    flush_to_disk(file)


@contextlib.contextmanager
def local_copy(where: Place) -> Iterator[Path]:
    """A file of this machine with the content: itself, or a copy that is there for the length of the block."""
    if isinstance(where, Path):
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="mach-") as folder:
        file = Path(folder) / where.name
        try:
            fetch(where, file)
        except OSError as error:
            raise StorageError(f"cannot read {where}: {error.strerror}") from error
        yield file


def upload_folder(folder: Path, where: Place, last: str = "") -> None:
    """Copy the files of a folder; the one named ``last``, which says that all are there, comes at the end."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == last)
    for file in files:
        refuse_outside(folder, file)
        target = where / file.relative_to(folder).as_posix()
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            flush_to_disk(target)
        else:
            upload(file, target)


def refuse_outside(folder: Path, file: Path) -> None:
    """Raise a StorageError where a file in a folder is one outside, by a link: it is not copied, and not written."""
    if not file.resolve().is_relative_to(folder.resolve()):
        raise StorageError(f"{file} is a link that leads out of {folder}: put the file itself there")


def fetch_folder(where: UPath, folder: Path) -> None:
    """Copy all files below a remote folder into a new one here."""
    folder.mkdir()
    root = str(where.fs._strip_protocol(where.path)).rstrip("/")
    for path in _insist(where, lambda: where.fs.find(where.path)):
        name = path.removeprefix(root).lstrip("/")
        if name and "/." not in f"/{name}":  # some stores list a mark for the folder itself; what is hidden is not ours
            file = functools.reduce(named, name.split("/"), folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            fetch(where / name, file)


def remove_folder(where: UPath, first: str = "") -> None:
    """Remove a remote folder, if it is there, and before it its file ``first``."""
    if first:
        remove(where / first)
    with contextlib.suppress(FileNotFoundError):
        _insist(where, lambda: where.fs.rm(where.path, recursive=True))


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """A file or folder whose name tells its content; where it is missing one process makes it, and the others wait.

    ``make`` writes under the temporary name that it is given; what it leaves there when it fails is removed. Raises
    StorageError when it cannot be fetched or written.
    """
    try:
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                sweep(path.parent)
                temporary = temporary_name(path)
                try:
                    make(temporary)
                    temporary.rename(path)
                    flush_to_disk(path.parent)
                finally:
                    _discard(temporary)
    except OSError as error:
        raise StorageError(f"cannot keep {error.filename} in {path.parent}: {error.strerror or error}") from error
    return path


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock file, which is removed afterwards; whoever waited for a removed one takes the next."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_open_at(lock, file.fileno()):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_open_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def sweep(folder: Place) -> None:
    """Remove unfinished files of writers of this machine that died, and of other machines when they are a day old."""
    with contextlib.suppress(OSError):
        for name in names_in(folder):
            if _TEMPORARY.fullmatch(name):
                with contextlib.suppress(OSError):
                    if _is_left_over(folder / name):
                        _discard(folder / name)


def temporary_name(where: AnyPlace) -> AnyPlace:
    """The name of a file while this process writes it."""
    return where.with_name(f".{where.name}.{HOST}-{os.getpid()}.tmp")


@contextlib.contextmanager
def short_lived() -> Iterator[None]:
    """Do not wait for the disk in this block, in this thread: its files need not survive a power loss."""
    token = _SHORT_LIVED.set(True)
    try:
        yield
    finally:
        _SHORT_LIVED.reset(token)


def flush_to_disk(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power loss, unless they are `short_lived`."""
    if _SHORT_LIVED.get():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_left_over(where: Place) -> bool:
    host, _, process = where.name.removesuffix(".tmp").rpartition("-")
    if host.endswith(f".{HOST}"):
        with contextlib.suppress(PermissionError, OverflowError):  # another user's, or no number of a process
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                return True
        return False
    if isinstance(where, Path):
        modified = where.stat().st_mtime
    else:
        modified = _insist(where, lambda: where.fs.modified(where.path)).timestamp()
    return time.time() - modified > LEFTOVER_SECONDS


def _discard(where: Place) -> None:
    if isinstance(where, Path) and where.is_dir():
        shutil.rmtree(where, ignore_errors=True)
    else:
        remove(where)


def _refuse_cut(n_sent: int, n_arrived: int) -> None:
    if n_sent != n_arrived:
        raise OSError(errno.EIO, f"{n_arrived} of {n_sent} bytes arrived")


def _insist(where: UPath, operation: Callable[[], Result]) -> Result:
    """Try a remote operation some times; what is missing stays missing, other failures end as an `OSError`."""
    for pause in (*PAUSES_SECONDS, None):
        try:
            where.fs.invalidate_cache()  # other machines write there too
            return operation()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(where)) from error
        except Exception as error:  # every backend has its own kinds
            if pause is not None:
                time.sleep(pause)
            elif isinstance(error, MachError):
                raise
            else:
                raise OSError(errno.EIO, one_line(error), str(where)) from error
    raise AssertionError("the last attempt returns or raises")
