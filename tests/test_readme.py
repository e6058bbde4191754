"""The README: its sentences are short, its links lead somewhere, and what it shows of a table of one's own runs."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path

import pytest

from tests.test_tutorials import blocks_of, here, run_page

__all__ = ["here"]  # a fixture
ROOT = Path(__file__).parents[1]
SHORT = [ROOT / "README.md", ROOT / "docs/tutorials/first-model.md", ROOT / "docs/index.md"]
MOST_WORDS = 30


def sentences(text: str) -> list[str]:
    """Those of paragraphs, headings, items and quotes; code, tables, comments and directives are none."""
    text = re.sub(r"^```.*?^```$|^\|.*?$|<!--.*?-->|^!\[.*?$", "\n", text, flags=re.M | re.S if "```" in text else re.M)
    text = re.sub(r"`[^`]*`|\[([^\]]*)\]\([^)]*\)", lambda found: found[1] or "code", text)
    blocks = re.split(r"\n\s*\n|^#+ .*$|^- ", text, flags=re.M)
    return [" ".join(part.split()) for block in blocks for part in re.split(r"(?<=[.!?:])\s+", block) if part.split()]


@pytest.mark.parametrize("page", SHORT, ids=lambda page: page.stem)
def test_sentences_are_short(page: Path):
    long = [sentence for sentence in sentences(page.read_text()) if len(sentence.split()) > MOST_WORDS]
    assert long == []


def test_a_long_sentence_is_found():
    assert (
        max(len(found.split()) for found in sentences("# A\nShort. " + "word " * 31 + "end.\n\n```sh\na b\n```\n"))
        == 32
    )


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([\w./-]+\.\w+)", page.read_text()):
            if "://" not in link and not link.startswith(("api/", "mailto:")):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_table_of_ones_own(here: Path):
    draw = random.Random(0)
    words = {
        "history": "kings wars Norway",
        "whales": "hunt voyage sea",
        "cooking": "stove pan salt",
        "stars": "sky night",
    }
    words |= {"birds": "wing nest egg", "ships": "mast sail hull"}
    for name, n_rows in (("books.csv", 200), ("held-out.csv", 40)):
        with open(name, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["title", "abstract", "subjects"])
            for _ in range(n_rows):
                chosen = draw.sample(sorted(words), 2)
                text = " ".join(draw.choice(words[subject].split()) for subject in chosen)
                table.writerow([text, "a history of " + text, "|".join(chosen)])
    blocks = list(blocks_of((ROOT / "README.md").read_text()))
    [shell] = [block.code for block in blocks if "mach train books.csv" in block.code]
    [python] = [block.code for block in blocks if block.language == "python"]
    columns = 'text_columns = ["title", "abstract"]\nclass_column = "subjects"\nclass_separator = "|"\n'
    Path("run.toml").write_text(f'[data]\ntrain = "books.csv"\n{columns}')
    Path("page.md").write_text(f"```sh\n{shell}```\n```python\n{python}```\n")
    run_page(Path("page.md"), here)
    assert Path("runs/books").is_dir()
