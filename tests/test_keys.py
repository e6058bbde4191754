"""The pages of keys and commands are those of the source, and say of every key what a user must know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mach.config import RETIRED, Config

ROOT = Path(__file__).parent.parent
KEYS = {f"{s}.{k}": key for s, f in Config.model_fields.items() for k, key in f.annotation.model_fields.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["keys", "commands"])
def test_pages_that_are_made_are_of_today(name: str):
    program = f"scripts/{name}.py"
    made = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout == (ROOT / f"docs/{name}.md").read_text(), f"run: python {program} > docs/{name}.md"


@pytest.mark.parametrize("name", KEYS)
def test_a_key_says_what_it_does_and_when_to_touch_it(name: str):
    about = KEYS[name].json_schema_extra
    assert KEYS[name].description.endswith(".")
    assert about["when"].endswith(".")


def test_keys_are_few():
    assert len(KEYS) <= 50
    assert sum(key.json_schema_extra["user"] for key in KEYS.values()) <= 28
    assert not KEYS.keys() & RETIRED.keys()
