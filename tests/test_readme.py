"""What a stranger reads first: sentences are short, words are explained before they are used, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
START = [ROOT / "README.md", ROOT / "docs/index.md", ROOT / "docs/start.md", ROOT / "docs/words.md"]
SHORT = [*START, *sorted((ROOT / "docs/guides").glob("*.md"))]
MOST_WORDS = 30
HARD = ("bucket", "head", "certificate", "propensity", "pilot", "re-ranker", "aggregate", "repetition")


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


def unexplained(text: str) -> list[str]:
    """Hard words that a page uses before it sets them in italics or bold, where it says what they mean."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", " ", text, flags=re.M | re.S)
    first = {word: re.search(rf"\*?\b{word}s?\b", prose, re.I) for word in HARD}
    return [word for word, found in first.items() if found and not found[0].startswith("*")]


@pytest.mark.parametrize("page", SHORT, ids=lambda page: page.stem)
def test_hard_words_are_explained_before_they_are_used(page: Path):
    assert unexplained(page.read_text().partition("## The tree")[0]) == []


def test_a_hard_word_is_found():
    assert unexplained("A head. *Buckets* are groups. A bucket.\n\n```sh\npilot\n```\nSee `heads` [x](pilot.md)\n") == [
        "head"
    ]


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([\w./-]+\.\w+)", page.read_text()):
            if "://" not in link and not link.startswith(("api/", "mailto:")):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
