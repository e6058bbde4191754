"""Files of this machine that may be a stranger's: only regular ones are opened, and none is larger than it says."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 2**28  # of a file that is read whole


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; an OSError of one line where it is a device, a pipe or a socket, which may never end.

    Links are followed: hubs and data disks are made of them.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def create(path: Path, flags: int = os.O_TRUNC) -> BinaryIO:
    """Open a file for writing, made if it is not there; an OSError where it is a link, which may lead anywhere."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "r+b" if not flags & os.O_APPEND else "ab")


def refuse_large(n_bytes: int, most: int = MOST_BYTES) -> None:
    """Raise an OSError where a file that is to be read whole has more bytes than that."""
    if n_bytes > most:
        raise OSError(errno.EFBIG, f"it has {n_bytes:,} bytes, at most {most:,} are read")


def read_regular(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes."""
    with open_regular(path) as file:
        refuse_large(os.fstat(file.fileno()).st_size, most)
        content = file.read(most + 1)
    refuse_large(len(content), most)
    return content
