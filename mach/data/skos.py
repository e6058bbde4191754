"""SKOS vocabularies (Turtle, RDF/XML, N-Triples) as classes: one a concept, read by rdflib.

Of the concepts' triples only labels, definitions and broader terms are kept, so that memory follows these. Labels of
one language count: that of a suffix to the path (``thesaurus.ttl@de``), else the one that most concepts have a
preferred label in; a concept without one in it is called by the first that it has.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from mach.data.class_texts import ClassTexts
from mach.data.limits import NAME_CHARACTERS, SKOS_BYTES
from mach.data.names import class_name, shown
from mach.data.sources import SourceFile, library_errors
from mach.errors import ConfigError, DataError

FORMATS = {".ttl": "turtle", ".rdf": "xml", ".nt": "nt"}
_PATH = re.compile(r"(.*(\.ttl|\.rdf|\.nt)(?:\.gz|\.bz2|\.xz)?)(?:@([A-Za-z]{2,3}(?:-[A-Za-z0-9]{1,8})*))?", re.DOTALL)
_CORE = "http://www.w3.org/2004/02/skos/core#"
KEPT = ("prefLabel", "altLabel", "hiddenLabel", "definition", "broader", "narrower")
Label = tuple[str, str]  # language and text


class Skos(NamedTuple):
    """A vocabulary: its path or URL, the name of its format, and the language that was asked for."""

    path: str
    format: str
    language: str | None

    @classmethod
    def of(cls, source: str) -> Skos | None:
        """What a source names by its ending; None where that is no vocabulary's.

        >>> Skos.of("stw.ttl.gz@de")
        Skos(path='stw.ttl.gz', format='turtle', language='de')
        """
        found = _PATH.fullmatch(source)
        return None if found is None else cls(found[1], FORMATS[found[2]], found[3] and found[3].lower())

    @staticmethod
    def path_of(source: str) -> str:
        """A source without the language of a vocabulary."""
        skos = Skos.of(source)
        return source if skos is None else skos.path

    def read(self, file: Path) -> tuple[list[str], ClassTexts]:
        """URIs and texts of the concepts, in the order of the file; DataError where it is damaged or has none."""
        found = _triples(self, file)
        concepts = [uri for uri, known in found.items() if "prefLabel" in known]
        if not concepts:
            raise DataError(f"{self.path} has no concept with a skos:prefLabel: give a SKOS vocabulary, or a table")
        languages = Counter(
            language for uri in concepts for language in sorted({language for language, _ in found[uri]["prefLabel"]})
        )
        language = self.language or min(languages, key=lambda name: (-languages[name], name))
        if language not in languages:
            there = ", ".join(name or "none" for name, _ in languages.most_common(20))
            raise DataError(f"{self.path} has no preferred label in the language {language!r}; there are {there}")

        def labels(uri: str, kind: str) -> list[str]:
            return [text for lang, text in found[uri].get(kind, ()) if lang in (language, "") and text]

        names = [(labels(uri, "prefLabel") or [min(found[uri]["prefLabel"])[1]])[0] for uri in concepts]
        others = [
            tuple(dict.fromkeys(text for kind in KEPT[:3] for text in labels(uri, kind) if text != name))
            for uri, name in zip(concepts, names, strict=True)
        ]
        ids = {uri: k for k, uri in enumerate(concepts)}
        above: list[set[int]] = [set() for _ in concepts]
        for uri, k in ids.items():
            above[k] |= {ids[other] for other in found[uri].get("broader", ()) if other in ids}
            for other in found[uri].get("narrower", ()):
                if other in ids:
                    above[ids[other]].add(k)
        parents = [tuple(sorted(ids_k - {k})) for k, ids_k in enumerate(above)]
        texts = ["\n".join(labels(uri, "definition")) for uri in concepts]
        return concepts, ClassTexts.of(names, others, texts, concepts, parents)


def _triples(skos: Skos, file: Path) -> dict[str, dict[str, list[Any]]]:
    """Of every subject by its URI, and every kind that is kept: labels as `Label`, concepts as URIs."""
    try:
        from rdflib import Graph, Literal, URIRef
        from rdflib.store import Store
    except ImportError as error:
        raise ConfigError(f"{skos.path} is SKOS, which needs rdflib: pip install 'mach-classifier[skos]'") from error
    found: dict[str, dict[str, list[Any]]] = {}
    kinds = {URIRef(_CORE + kind): kind for kind in KEPT}

    class Kept(Store):
        """Takes triples as the parser finds them."""

        def add(self, triple: Any, context: Any, quoted: bool = False) -> None:
            subject, predicate, value = triple
            kind = kinds.get(predicate)
            if kind is None or not isinstance(subject, URIRef):
                return
            if kind in ("broader", "narrower"):
                kept: Any = str(value)
            elif isinstance(value, Literal):
                kept = ((value.language or "").lower(), _label(str(value), kind, skos, subject))
            else:
                return
            found.setdefault(str(subject), {}).setdefault(kind, []).append(kept)

    with SourceFile(file, skos.path) as source:
        content = source.file.read(SKOS_BYTES + 1)
        if len(content) > SKOS_BYTES:
            raise DataError(f"{skos.path} has more than {SKOS_BYTES:,} bytes: write its labels into a table of classes")
        with library_errors(file, f"{skos.path} is no {skos.format} or is damaged", "correct it, or write it again"):
            Graph(store=Kept()).parse(data=content, format=skos.format)
    return found


def _label(text: str, kind: str, skos: Skos, subject: str) -> str:
    if kind == "definition":
        return shown(text).strip()
    name = class_name(" ".join(text.split()))
    if len(name) > NAME_CHARACTERS:
        raise DataError(
            f"{skos.path}: {kind} {name!r:.40}... of {subject:.100} has {len(name):,} characters, a name may have "
            f"{NAME_CHARACTERS:,}: shorten it"
        )
    return name
