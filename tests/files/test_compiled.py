"""Kernels are compiled once a machine, however many processes need them; who waits says so."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import sys
from mach.files.compiled import hear, kernel

hear(lambda text: print(text, flush=True))

@kernel()
def inner(x):
    return x + 1

@kernel(error_model="numpy")
def outer(x):
    return inner(x) / 2

answer = outer({"int": 3, "float": 3.0}[sys.argv[1]])
misses = [sum(function.stats.cache_misses.values()) for function in (inner, outer)]
print(answer, misses)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "module.py").write_text(MODULE)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "compiled"))
    return tmp_path / "module.py"


def start(module: Path, kind: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, module, kind], stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_compiles_a_function(module: Path):
    told = [process.communicate()[0] for process in [start(module, "int") for _ in range(3)]]
    ends = [text.splitlines()[-1] for text in told]
    assert sorted(ends) == ["2.0 [0, 0]", "2.0 [0, 0]", "2.0 [1, 1]"]
    assert sum("compiling kernels for this processor, once" in text for text in told) == 1
    assert start(module, "int").communicate()[0] == "2.0 [0, 0]\n"


def test_of_several_threads_one_compiles_a_function(module: Path):
    program = module.read_text().replace("answer = ", THREADS + "answer = ")
    module.write_text(program + "print(answers, n_compiled())\n")
    assert start(module, "int").communicate()[0].splitlines()[-1] == "[2.0, 2.0, 2.0, 2.0] 2"


THREADS = """
import threading
from mach.files.compiled import n_compiled
answers, begin = [], threading.Barrier(4)

def ask():
    begin.wait()
    answers.append(outer(3))

threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_what_is_compiled_is_counted_once_with_all_that_it_calls(module: Path):
    program = module.read_text().replace("import hear, kernel", "import hear, kernel, timed")
    program = program.replace(
        "answer = ", "told = []\nwith timed(lambda n, seconds: told.append((n, seconds > 0))):\n    answer = "
    )
    module.write_text(program + "print(told)\n")
    assert start(module, "int").communicate()[0].splitlines()[-1] == "[(2, True)]"
    assert start(module, "int").communicate()[0].splitlines()[-1] == "[]"


def test_who_waits_for_another_process_says_so(module: Path):
    start(module, "int").communicate()
    (name,) = module.parent.glob("compiled/*/*outer*.lock")
    with name.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = start(module, "float")
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting for another process that compiles kernels\n"
    assert process.communicate()[0].splitlines()[-1] == "2.0 [1, 1]"


def test_a_function_that_does_not_compile_leaves_no_lock(module: Path):
    program = module.read_text().replace('answer = outer({"int": 3, "float": 3.0}[sys.argv[1]])', FAILING)
    module.write_text(program)
    assert start(module, "int").communicate()[0].splitlines()[-1].startswith("2.0 ")


FAILING = """
import fcntl, glob, os
try:
    outer("text")
except Exception:
    pass
for name in glob.glob(os.environ["NUMBA_CACHE_DIR"] + "/*/*.lock"):
    fcntl.flock(open(name), fcntl.LOCK_EX | fcntl.LOCK_NB)
answer = outer(3)
"""
