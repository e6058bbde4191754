"""SKOS vocabularies as classes: formats, languages, and what strangers put into them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mach.config import DataConfig, TextConfig
from mach.data import skos
from mach.data.class_table import read_classes
from mach.data.prepare import prepare
from mach.errors import DataError
from tests.data.test_class_texts import columns

pytest.importorskip("rdflib")

TURTLE = """
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
<http://x/2> skos:prefLabel "Obst"@de ; skos:definition "rund"@de, "round"@en ; skos:narrower <http://x/1> .
<http://x/1> a skos:Concept ; skos:prefLabel "Apfel"@de, "apple"@en ;
    skos:altLabel "Äpfel"@de, "Apfel"@de, "apples"@en ; skos:hiddenLabel "Malus" .
<http://x/3> skos:prefLabel "Auto"@de, "car"@en ; skos:broader <http://x/9>, <http://x/3> .
<http://x> skos:altLabel "no concept" . [] skos:prefLabel "blank" .
"""
XML = """<?xml version="1.0"?>{more}
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:skos="http://www.w3.org/2004/02/skos/core#">
<skos:Concept rdf:about="http://x/1"><skos:prefLabel xml:lang="de">{label}</skos:prefLabel></skos:Concept>
</rdf:RDF>"""
GERMAN = [
    ["Obst", "Apfel", "Auto"],
    [(), ("Äpfel", "Malus"), ()],
    ["rund", "", ""],
    ["http://x/2", "http://x/1", "http://x/3"],
    [(), (0,), ()],
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MACH_CACHE", str(tmp_path / "cache"))


def read(source: str, content: str | bytes) -> tuple[list[str], list[list[object]]]:
    Path(source.partition("@")[0]).write_bytes(content.encode() if isinstance(content, str) else content)
    table = read_classes(source, None, None, are_numbered=False)
    assert table.texts is not None
    return table.keys, columns(table.texts)


def test_the_language_of_most_concepts_counts_or_the_one_asked_for() -> None:
    assert read("v.ttl", TURTLE) == (GERMAN[3], GERMAN)
    assert read("v.ttl@DE", TURTLE)[1] == GERMAN
    assert read("v.ttl.gz@en", gzip.compress(TURTLE.encode()))[1][:3] == [
        ["Obst", "apple", "car"],  # one has no English name
        [(), ("apples", "Malus"), ()],
        ["round", "", ""],
    ]
    with pytest.raises(DataError, match=r"v\.ttl has no preferred label in the language 'fr'; there are de, en"):
        read("v.ttl@fr", TURTLE)


def test_xml_and_triples_are_read() -> None:
    assert read("v.rdf", XML.format(more="", label="Apfel"))[1][0] == ["Apfel"]
    assert read("v.nt", '<http://x/1> <http://www.w3.org/2004/02/skos/core#prefLabel> "Apfel"@de .\n')[1][0] == [
        "Apfel"
    ]


def test_rows_name_concepts_by_uri_or_label() -> None:
    Path("v.ttl").write_text(TURTLE)
    rows = [("ein Auto", "http://x/3"), ("rot", "Apfel")]
    Path("rows.jsonl").write_text("".join(json.dumps({"text": t, "classes": [c]}) + "\n" for t, c in rows))
    stores = {
        name: prepare(DataConfig(train="", classes=name), TextConfig(), "rows.jsonl") for name in ("v.ttl", "v.ttl@en")
    }
    assert stores["v.ttl"].class_ids.tolist() == [2, 1]
    assert stores["v.ttl@en"].class_ids.tolist() == [2]
    assert stores["v.ttl"].fingerprint != stores["v.ttl@en"].fingerprint


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("v.ttl", "<a> <b>", "is no turtle or is damaged"),
        ("v.ttl", "", "has no concept with a skos:prefLabel"),
        ("v.ttl", b"\xff\xfe", "is no turtle or is damaged"),
        ("v.ttl", "[" * 5000, "is no turtle or is damaged"),
        ("v.rdf", XML.format(more="", label="&none;"), "is no xml or is damaged"),
        ("v.ttl", TURTLE.replace("Obst", "x" * 5000), "has 5,000 characters, a name may have 4,096"),
        ("v.ttl.gz", b"none", "damaged"),
    ],
)
def test_a_strangers_vocabulary_is_refused_by_one_line(name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(name, content)
    assert said in str(caught.value)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


def test_no_other_file_is_read() -> None:
    Path("secret").write_text("secret")
    content = XML.format(more='<!DOCTYPE r [<!ENTITY e SYSTEM "secret">]>', label="&e;")
    assert read("v.rdf", content)[1][0] == [""]


def test_entities_do_not_multiply() -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 1000}">' for n in range(9))
    with pytest.raises(DataError, match=r"v\.rdf is no xml or is damaged"):
        read("v.rdf", XML.format(more=f"<!DOCTYPE r [{entities}]>", label="&e8;"))


def test_a_vocabulary_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skos, "SKOS_BYTES", 100)
    with pytest.raises(DataError, match=r"v\.ttl has more than 100 bytes: write its labels into a table of classes"):
        read("v.ttl", TURTLE)
