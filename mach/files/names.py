"""Names and digests that stand in a file: the only way from such a text to a path."""

from __future__ import annotations

import re
from typing import TypeVar

from mach.errors import StorageError

_DIGEST = re.compile(r"[0-9a-f]{32}")  # of 16 bytes, as all of mach's are
_SEPARATOR = re.compile(r"[/\\:\x00-\x1f\x7f]")  # a colon parts a drive or a stream from the rest
LONGEST = 255  # bytes of a name, on the usual file systems
AnyPlace = TypeVar("AnyPlace")


def digest(text: str) -> str:
    """A digest as mach writes them: 32 hexadecimal digits; a ValueError where it is none.

    >>> digest("00ba9e54090469a3d584631ed2a4496f")
    '00ba9e54090469a3d584631ed2a4496f'
    """
    if not _DIGEST.fullmatch(text):
        raise ValueError("no digest, which is 32 hexadecimal digits")
    return text


def named(folder: AnyPlace, name: str, ending: str = "") -> AnyPlace:
    """The file or folder of this name in a folder, which it cannot leave.

    A name is neither empty nor hidden, has no separator, drive or control character, and so is no way up.

    Raises
    ------
    StorageError
        When it is no plain name.

    Examples
    --------
    >>> from pathlib import Path
    >>> named(Path("cache"), "meta", ".json")
    PosixPath('cache/meta.json')
    """
    is_plain = 0 < len(name.encode("utf-8", "surrogatepass")) + len(ending) <= LONGEST
    if not name or not is_plain or name[0] in "." or _SEPARATOR.search(name):
        raise StorageError(f"{folder}: {name!r:.80} is no plain name of a file: it does not come from mach")
    return folder / f"{name}{ending}"  # type: ignore[operator, no-any-return]
