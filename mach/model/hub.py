"""Models on the Hugging Face hub: ``mach.load("hf://user/model")`` and `MachModel.push_to_hub`.

huggingface_hub is optional: ``pip install 'mach-classifier[hub]'``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mach.errors import ConfigError, StorageError, counted, one_line
from mach.files.caches import cache_folder

if TYPE_CHECKING:
    from mach.model.curves import Curve
    from mach.model.model import MachModel

PREFIX = "hf://"
PLOT = "calibration.svg"
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
        if model.calibration is not None:
            content = drawn(model.calibration.reranked or model.calibration.plain).encode()
            api.upload_file(repo_id=repository, path_or_fileobj=content, path_in_repo=PLOT)
    except Exception as error:
        raise StorageError(f"{repository} cannot be written ({one_line(error)}): check its name and token") from error
    return PREFIX + repository


def card(model: MachModel, repository: str, licence: str | None) -> str:
    """What a model is, in Markdown, with its accuracy as ``mach evaluate`` last measured it."""
    info, curve = model.info(), model.accuracy_curve
    lines = ["---", "library_name: mach", "tags: [extreme-classification]"]
    lines += [f"license: {licence}"] if licence else []
    lines += ["---", f"# {repository}", ""]
    lines += [
        f"A classifier of {counted(info['n_rows'], 'training row')} into {counted(info['n_classes'], 'class')}, "
        "made by mach."
    ]
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
        lines += ["", f"Probabilities are calibrated: their expected error is {100 * made.ece_after:.1f} %."]
        lines += [f"![The probability that a class is right, by its score]({PLOT})"]
    facts = {name: info[name] for name in ("n_repetitions", "n_buckets", "n_features", "weight_bytes", "mach_version")}
    lines += ["", "## Facts", *(f"- {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def drawn(curve: Curve) -> str:
    """Probability by score, in percent, as SVG: a card may be written where no matplotlib is."""
    least, most = curve.scores[0], curve.scores[-1]
    across = [40 + 300 * (score - least) / max(most - least, 1e-9) for score in curve.scores]
    points = " ".join(f"{x:.1f},{170 - 150 * p:.1f}" for x, p in zip(across, curve.probabilities, strict=True))
    levels = [f'<text x="34" y="{174 - 150 * p:.0f}" text-anchor="end">{100 * p:.0f}</text>' for p in (0, 0.5, 1)]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 210" font-family="sans-serif" font-size="11">'
        f'<rect width="360" height="210" fill="#fff"/>{"".join(levels)}<path d="M40 20V170H340" fill="none" '
        f'stroke="#888"/><polyline points="{points}" fill="none" stroke="#2458b8" stroke-width="2"/>'
        f'<text x="40" y="186">{least:.1f}</text><text x="340" y="186" text-anchor="end">{most:.1f}</text>'
        '<text x="190" y="204" text-anchor="middle">score</text><text x="44" y="14">probability, %</text></svg>\n'
    )


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(f"the hub needs huggingface_hub ({error}): pip install 'mach-classifier[hub]'") from error
    return huggingface_hub
