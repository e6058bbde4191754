"""Models on the Hugging Face hub: ``mach.load("hf://user/model")`` and `MachModel.push_to_hub`.

huggingface_hub is optional: ``pip install 'mach-classifier[hub]'``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mach.errors import ConfigError, StorageError, one_line
from mach.files.caches import cache_folder

if TYPE_CHECKING:
    from mach.model.model import MachModel

PREFIX = "hf://"
SHOWN = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5")


def fetch(name: str) -> Path:
    """The folder of a model ``hf://user/model`` or ``hf://user/model@revision``, fetched into the cache.

    ConfigError where the name is none, or huggingface_hub is not installed; StorageError where it cannot be fetched.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(f"{name} names no model: write hf://user/model, or hf://user/model@revision")
    key = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    folder, library = cache_folder(None) / "hub" / key, _library()
    try:
        library.snapshot_download(repo_id=repository, revision=revision or None, local_dir=str(folder))
    except Exception as error:  # a dozen kinds, of several libraries
        raise StorageError(f"{name} cannot be fetched ({one_line(error)}): check its name and your access") from error
    return folder


def push(model: MachModel, repository: str, *, licence: str | None, private: bool) -> str:
    """Upload the files of a run and a card about it; returns the model's name for `mach.load`.

    StorageError where the run is behind a URL, or the upload fails.
    """
    if not isinstance(model.run.path, Path):
        raise StorageError(f"{model.run.path} is no folder of this machine: copy it here, and push that")
    library = _library()
    try:
        api = library.HfApi()
        api.create_repo(repo_id=repository, private=private, exist_ok=True)
        ignored = ["lock", "*/lock", "report.html", "comparison.html", "README.md"]
        api.upload_folder(repo_id=repository, folder_path=str(model.run.path), ignore_patterns=ignored)
        content = card(model, repository, licence).encode()
        api.upload_file(repo_id=repository, path_or_fileobj=content, path_in_repo="README.md")
    except Exception as error:
        raise StorageError(f"{repository} cannot be written ({one_line(error)}): check its name and token") from error
    return PREFIX + repository


def card(model: MachModel, repository: str, licence: str | None) -> str:
    """What a model is, in Markdown, with its accuracy as ``mach evaluate`` last measured it."""
    info, curve = model.info(), model.accuracy_curve
    lines = ["---", "library_name: mach", "tags: [extreme-classification]"]
    lines += [f"license: {licence}"] if licence else []
    lines += ["---", f"# {repository}", ""]
    lines += [f"A classifier of {info['n_rows']:,} training rows into {info['n_classes']:,} classes, made by mach."]
    lines += ["```python", "import mach", "", f'model = mach.load("{PREFIX}{repository}")', "```", "", "## Accuracy"]
    if curve:
        names = [name for name in SHOWN if name in curve[-1]]
        figures = [f"{100 * curve[-1][name]:.1f}" for name in names]
        lines += [
            f"| {' | '.join(names)} |",
            f"|{'---|' * len(names)}",
            f"| {' | '.join(figures)} |",
            "",
            "In percent.",
        ]
    else:
        lines += ["It was not measured: `mach evaluate` does."]
    if model.calibration is not None:
        made = model.calibration.reranked or model.calibration.plain
        lines += [f"Probabilities are calibrated: their expected error is {100 * made.ece_after:.1f} %."]
    facts = {name: info[name] for name in ("n_repetitions", "n_buckets", "n_features", "weight_bytes", "mach_version")}
    lines += ["", "## Facts", *(f"- {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(f"the hub needs huggingface_hub ({error}): pip install 'mach-classifier[hub]'") from error
    return huggingface_hub
