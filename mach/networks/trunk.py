"""The trunk of a user's own: a class that only the caller may name, since to import a name is to run code.

What a folder or a file names (``network.trunk``) is never imported. It is compared with what the caller passed, as
``trunk=`` in Python or ``--trunk`` in a shell, and that is imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

from mach.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

Trunk: TypeAlias = "type[nn.Module] | str"  # a class, or package.module:Class

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def name_of(trunk: Trunk) -> str:
    """The name of a trunk as configurations spell it; a ConfigError if it is none. Nothing is imported.

    Examples
    --------
    >>> name_of("shop.encoders:Residual")
    'shop.encoders:Residual'
    """
    if isinstance(trunk, type):
        return f"{trunk.__module__}:{trunk.__qualname__}"
    if not isinstance(trunk, str) or not _NAME.fullmatch(trunk):
        raise ConfigError(f"trunk {trunk!r:.80}: give package.module:Class, or the class, a torch.nn.Module")
    return trunk


def agreed(named: str | None, given: Trunk | None, where: object) -> Trunk | None:
    """The trunk that the caller gave, where it is the one that ``network.trunk`` names, or neither is there.

    Otherwise a ConfigError, which says ``where`` the name stands.
    """
    ours = None if given is None else name_of(given)
    if named == ours:
        return given
    if named is None:
        raise ConfigError(f"{where}: there is no network.trunk, and trunk {ours!r} was passed: leave it out")
    but = "" if ours is None else f", and {ours!r} was passed"
    raise ConfigError(
        f"{where}: network.trunk = {named!r} is code of whoever wrote that, which mach never imports by itself{but}: "
        "if you trust it, pass this name as trunk= (--trunk package.module:Class)"
    )


def class_of(given: Trunk) -> type[nn.Module]:
    """The class that a caller passed, imported where it is a name; a ConfigError if it is no class of torch modules."""
    from torch import nn

    name = name_of(given)
    found: Any = given
    if isinstance(given, str):
        module, _, path = name.partition(":")
        try:
            found = attrgetter(path)(importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"trunk {name!r} cannot be imported ({error}): write package.module:Class, and install the package or "
                "name its folder in PYTHONPATH"
            ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"trunk {name!r} is no class of torch.nn.Module: give one")
    return found


def for_workers(given: Trunk | None) -> dict[str, Any]:
    """The part of a job that lets another process import the same trunk: its name, and where we find modules.

    A ConfigError where no other process could import it.
    """
    if given is None:
        return {}
    name = name_of(given)
    module, _, path = name.partition(":")
    try:
        is_importable = isinstance(given, str) or attrgetter(path)(sys.modules[module]) is given
    except (KeyError, AttributeError):
        is_importable = False
    if module == "__main__" or not is_importable:
        raise ConfigError(
            f"trunk {name!r}: other processes cannot import it: define it at the top of a module that is not the script"
        )
    return {"trunk": name, "path": [entry for entry in sys.path if entry]}  # the empty one is the working directory


def find_as(path: list[str]) -> None:
    """Find modules where the process that passed its trunk does, but our own ones first."""
    sys.path += [entry for entry in path if entry not in sys.path]
