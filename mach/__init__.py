"""mach: extreme classification by hashed, independent repetitions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mach.files.caches import keep_compiled

__version__ = "0.1.0"

_HOME_OF = {
    "AsyncClient": "mach.serving.client",
    "Client": "mach.serving.client",
    "DegradedWarning": "mach.errors",
    "MACHClassifier": "mach.estimator.classifier",
    "MachError": "mach.errors",
    "MachModel": "mach.model.model",
    "load": "mach.model.loading",
    "train": "mach.training.conductor",
}
__all__ = [
    "AsyncClient",
    "Client",
    "DegradedWarning",
    "MACHClassifier",
    "MachError",
    "MachModel",
    "__version__",
    "load",
    "train",
]

if TYPE_CHECKING:
    from mach.errors import DegradedWarning, MachError
    from mach.estimator.classifier import MACHClassifier
    from mach.model.loading import load
    from mach.model.model import MachModel
    from mach.serving.client import AsyncClient, Client
    from mach.training.conductor import train


keep_compiled()


def __getattr__(name: str) -> Any:  # public names resolve on first use: `import mach` stays light
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'mach' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
