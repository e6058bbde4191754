"""What Annif's own client, and what its tests ask of its REST API, works with the server."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from annif_client import AnnifClient

from mach.model.loading import load

FOX = "http://example.org/fox"


@pytest.fixture
def url(run: Path, live: Callable[..., str]) -> str:
    """A server that learns, of a run that has a class with a uri."""
    load(run).classes.add(["fox"], [["the quick brown fox"]], uris=[FOX])
    return live(learn=True)


@pytest.fixture
def annif(url: str) -> Any:
    return AnnifClient(f"{url}/v1/")


def test_it_tells_of_itself_and_its_projects(annif: Any, url: str):
    assert annif.api_info.keys() == {"title", "version"}
    [project] = annif.projects
    assert project == annif.get_project("things")
    assert (project["project_id"], project["is_trained"]) == ("things", True)
    assert requests.get(f"{url}/v1/vocabs").json() == {"vocabs": [project["vocab"]]}


def test_it_suggests_for_texts_and_files(annif: Any, run: Path):
    model = load(run)
    ids, values = model.topk("red cup", 3, probabilities=True)
    found = annif.suggest("things", "red cup", limit=3)
    assert [one["label"] for one in found] == model.names(ids)
    assert [one["score"] for one in found] == pytest.approx(values.tolist())
    assert annif.suggest("things", io.StringIO("red cup"), limit=3) == found
    assert annif.suggest("things", "red cup", limit=3, threshold=found[1]["score"]) == found[:2]
    assert len(annif.suggest("things", "red cup")) == 10
    assert {one["notation"] for one in found} == {None}


def test_it_suggests_for_batches(annif: Any):
    documents = [{"text": f"red cup {n}", "document_id": str(n)} for n in range(32)]
    answers = annif.suggest_batch("things", documents, limit=2, threshold=0.0)
    assert [one["document_id"] for one in answers] == [one["document_id"] for one in documents]
    assert answers[5]["results"] == annif.suggest("things", "red cup 5", limit=2)
    [answer] = annif.suggest_batch("things", [{"text": "red cup", "metadata": {"title": "red"}}])
    assert (answer["document_id"], len(answer["results"])) == (None, 10)
    with pytest.raises(requests.HTTPError, match="400"):
        annif.suggest_batch("things", [{"text": "red cup"}] * 33)


def test_it_learns(annif: Any):
    taught = [{"text": "example text", "subjects": [{"uri": FOX, "label": "fox"}]}]
    assert annif.learn("things", []).status_code == 204
    assert annif.learn("things", [{"text": "red ala", "subjects": taught[0]["subjects"]}]).status_code == 204
    best = annif.suggest("things", "red ala")[0]
    assert (best["uri"], best["label"]) == (FOX, "fox")


def test_what_is_not_there_has_a_reason(annif: Any, url: str):
    for ask in (
        lambda: annif.get_project("nonexistent"),
        lambda: annif.suggest("nonexistent", "example text"),
        lambda: annif.suggest_batch("nonexistent", [{"text": "example text"}]),
        lambda: annif.learn("nonexistent", []),
        lambda: annif.detect_language("example text", ["en", "fi"]),  # which is no classification
    ):
        with pytest.raises(ValueError, match="/openapi.json|there is no project 'nonexistent'"):
            ask()
    with pytest.raises(requests.HTTPError, match="413"):
        annif.suggest("things", "A" * 2**23)


def test_pages_and_fields_as_annif_sends_them(url: str):
    suggest = f"{url}/v1/projects/things/suggest"
    answer = requests.get(f"{url}/v1/projects", headers={"Origin": "http://somedomain.com"})
    assert answer.headers["access-control-allow-origin"] == "*"
    form = {"text": "the quick brown fox", "limit": "5", "project": "things", "metadata_title": "fox"}
    answer = requests.post(suggest, data=form, headers={"User-Agent": "Annif/1.4.3"})
    assert [one["uri"] for one in answer.json()["results"]] == [FOX]  # others have none
    assert requests.post(suggest, data={"text": "A" * 500}).status_code == 200
