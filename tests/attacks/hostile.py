"""Small hostile runs: a good one, copied and then changed as a stranger could, digests and all."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

import mach
from mach.data.text import _digest
from mach.errors import MachError
from mach.files.tensors import _NAME_OF, digest_of, map_tensors
from mach.model.classes.versions import Versions

FIXTURES = Path(__file__).parents[1] / "fixtures"
WEIGHTS = "repetitions/r001/weights.safetensors"
Arrays = dict[str, Any]


class Hostile:
    """A copy of a run of tests/fixtures, by the end of its name, in a folder that is not there yet."""

    def __init__(self, folder: Path, end: str = "-edited") -> None:
        shutil.copytree(FIXTURES / f"run-format-1{end}", folder)
        self.path = folder

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def json(self, name: str, **values: Any) -> None:
        """Other values of a JSON file; ``a__b`` is b of a, and `...` leaves one out."""
        tree = json.loads((self / name).read_text())
        for key, value in values.items():
            *path, last = key.split("__")
            node = tree
            for part in path:
                node = node[int(part) if isinstance(node, list) else part]
            if value is ...:
                del node[last]
            else:
                node[int(last) if isinstance(node, list) else last] = value
        (self / name).write_text(json.dumps(tree))

    def replaced(self, name: str, old: str, new: str) -> None:
        """Other text in a file."""
        text = (self / name).read_text()
        assert old in text
        (self / name).write_text(text.replace(old, new, 1))

    def toml(self, section: str, **values: Any) -> None:
        """Other keys of the configuration."""
        tree = tomllib.loads((self / "config.toml").read_text())
        tree[section] |= values
        (self / "config.toml").write_text(tomli_w.dumps(tree))

    def tensors(self, name: str, change: Callable[[Arrays, dict[str, Any]], Any]) -> None:
        """Other arrays or metadata."""
        arrays, metadata = map_tensors(self / name)
        arrays = {key: np.array(array) for key, array in arrays.items()}
        change(arrays, metadata)
        (self / name).write_bytes(tensor_bytes(arrays, metadata))

    def set(self, name: str, **arrays: Any) -> None:
        """Arrays in place of others; ``a__b`` is "a.b", a function takes the old array, `...` leaves it out."""

        def change(found: Arrays, metadata: dict[str, Any]) -> None:
            for spelt, value in arrays.items():
                key = spelt.replace("__", ".")
                if value is ...:
                    del found[key]
                else:
                    found[key] = np.array(value(found[key]) if callable(value) else value)

        self.tensors(name, change)
        if name.startswith("classes/"):
            self._sign(name)

    def header(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Another header of a file of tensors."""
        content = (self / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        text = json.dumps(header if changed is None else changed).encode()
        (self / name).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    def npy(self, name: str, array: Any) -> None:
        np.save(self / name, np.asarray(array))

    def text(self, idf: Any = None, terms: str | None = None, **description: Any) -> None:
        """Other text features, which belong together."""
        folder = self / "text"
        if idf is not None:
            np.save(folder / "idf.npy", idf)
        if terms is not None:
            (folder / "terms.txt").write_text(terms)
        if description:
            self.json("text/text.json", **description)
        told = json.loads((folder / "text.json").read_text())
        told.pop("fingerprint")
        digest = _digest(told, (folder / "terms.txt").read_bytes(), np.load(folder / "idf.npy").real)
        self.json("text/text.json", fingerprint=digest)

    def assign(self, **values: Any) -> None:
        """Another assignment by hash functions, with its checksum."""
        from mach.sketch.hashing import UniversalAssignment

        told = json.loads((self / "manifest.json").read_text())["assignment"] | values
        a_R, b_R = (np.array(told[name], np.int64) for name in ("multipliers", "offsets"))
        with np.errstate(all="ignore"):
            made = UniversalAssignment(told["n_classes"], told["n_buckets"], told["prime"], a_R, b_R)
            self.json("manifest.json", assignment=told | {"checksum": made.checksum()})

    def table(self, table_RK: Any) -> None:
        """Another table of buckets, with its checksum."""
        from mach.sketch.tables import TableAssignment

        self.npy("assignment.npy", table_RK)
        B = json.loads((self / "manifest.json").read_text())["assignment"]["n_buckets"]
        self.json("manifest.json", assignment=TableAssignment.from_table(table_RK, B).describe())

    def _sign(self, name: str) -> None:
        digest = digest_of(map_tensors(self / name)[0])
        current = json.loads((self / "classes/CURRENT").read_text())
        for step in current["steps"]:
            if step["version"] == int(Path(name).stem):
                step["digest"] = digest
        (self / "classes/CURRENT").write_text(json.dumps(current))


def tensor_bytes(arrays: Arrays, metadata: Any) -> bytes:
    """A file of tensors."""
    header: dict[str, Any] = {"__metadata__": metadata}
    parts, offset = [], 0
    for name, array in arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        span = [offset, offset + len(content)]
        header[name] = {"dtype": _NAME_OF[array.dtype], "shape": list(array.shape), "data_offsets": span}
        parts.append(content)
        offset = span[1]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def ask(path: Any, queries: Any = None) -> None:
    """Load a run and ask it for all that a folder can answer."""
    with mach.load(path) as model:
        if queries is None:
            queries = ["red cup ala", "brown ene"] if model.run.text_features else np.eye(model.n_features)[:2]
        scores = model.topk(queries, 3)[1]
        assert np.isfinite(scores).all()
        model.topk(queries, 3, tail=0.5)
        model.topk(queries, 3, rerank=False)
        model.topk(queries, 3, budget=4)
        model.score(queries, [0, 1])
        for name in model.classes.edits.subsets:
            model.topk(queries, 3, allowed=name)
        if model.calibration is not None:
            model.topk(queries, 3, probabilities=True)
        if model.name_function():
            model.names(range(model.n_classes))
        model.reference()
        assert model.accuracy_curve is None or isinstance(model.accuracy_curve, list)
        model.info()
        model.verify()
        Versions(model.run).current()


def refusal(path: Any) -> str:
    """What is said of a hostile run."""
    return line_of(lambda: ask(path))


def line_of(action: Callable[[], Any]) -> str:
    """What is said where something is refused: a line (`mach.errors.MachError` sees to that), and not a long one."""
    with pytest.raises(MachError) as caught:
        action()
    line = str(caught.value)
    assert len(line) < 1000, line
    return line
