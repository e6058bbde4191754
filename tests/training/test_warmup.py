"""What a warm-up compiles is all that the default path needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FIRST_USE = """
import sys
import mach
from mach.files.compiled import n_compiled
from mach.networks import steps
from mach.training.warmup import warm_up

n = warm_up()
again = n_compiled()
folder = sys.argv[1]
with open(folder + "/fruits.csv", "w") as file:
    file.write("text,classes\\n" + 2600 * "sour green apple,apple\\nlong ripe yellow banana,banana\\n")
for run in ("/light", "/run"):
    model = mach.train({"data": {"train": folder + "/fruits.csv", "cache": folder}}, folder + run)
    for rerank in (True, False):
        model.topk("a green apple", k=1, rerank=rerank)
        model.topk(["a green apple"] * 100, k=2, rerank=rerank)
    assert model.info()["reranker_learned"]
    steps.LITTLE_FLOPS = 0.0
print(n, n_compiled() - again)
"""


@pytest.mark.slow
def test_after_a_warm_up_training_and_answers_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "compiled"))
    for is_first in (True, False):
        (tmp_path / str(is_first)).mkdir()
        command = [sys.executable, "-c", FIRST_USE, str(tmp_path / str(is_first))]
        n_first, n_later = map(int, subprocess.check_output(command, text=True).split())
        assert (n_first > 50) == is_first
        assert n_later == 0
