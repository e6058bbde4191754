"""The figures that a page begins with, of one run, and the same of several beside each other."""

from __future__ import annotations

from typing import Any

from mach.cli.report.diagnosis import Diagnosis
from mach.cli.report.page import Headline, percent, quantity
from mach.model.model import MachModel
from mach.runs.status import spell_seconds

CUTS = (1, 3, 5)


def figures(model: MachModel, diagnosis: Diagnosis | None) -> dict[str, float]:
    """P@k and calibration error as shares, bytes on disk and seconds of training."""
    info, found = model.info(), dict[str, float]()
    if diagnosis is not None:
        found |= {f"P@{k}": diagnosis.curve[-1][f"P@{k}"] for k in CUTS}
        curves = list(diagnosis.reliability.values())[-1]
        if "after" in curves:
            found["calibration error"] = curves["after"][1]
    found["size"] = info["weight_bytes"] + info["reranker_bytes"]
    found["time"] = info["worker_seconds"] + (info.get("reranker_cpu_seconds") or 0.0)
    return found


def spelt(name: str, value: float) -> str:
    """A figure as people read it, with its unit."""
    if name == "size":
        return " ".join(quantity(value, "bytes"))
    return spell_seconds(value) if name == "time" else f"{percent(value)} %"


def headline(model: MachModel, diagnosis: Diagnosis | None) -> Headline:
    """One run's figures, each with a few words on what it is."""
    n = 0 if diagnosis is None else len(diagnosis.right_Nk)
    words: dict[str, Any] = {f"P@{k}": f"of the first {k} classes are right" for k in CUTS}
    words |= {
        "P@1": f"of {n:,} rows have a right class first",
        "calibration error": "between probabilities and what is right",
        "size": "on disk",
        "time": "of training, all workers",
    }
    return Headline([(name, spelt(name, value), words[name]) for name, value in figures(model, diagnosis).items()])
