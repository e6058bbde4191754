"""What Prometheus is told."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mach.serving.metrics import Metrics
from mach.serving.projects import Project
from tests.serving.conftest import Started


def values(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r'[a-z_]+(\{([a-z_]+="[^"\\\n]*",?)*\})? [0-9.]+', line), line
            name, _, value = line.rpartition(" ")
            assert name not in found
            found[name] = float(value)
    return found


def test_requests_are_counted(client: TestClient):
    for text in ("red", "blue"):
        client.post("/v1/projects/things/suggest", data={"text": text})
    client.post("/v1/projects/things/suggest-batch", json={"documents": [{"text": "red"}] * 5})
    client.post("/v1/projects/nothing/suggest", data={"text": "red"})
    version = client.get("/v1/projects/things").json()["version"]
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = values(response.text)
    assert found['mach_requests_total{operation="suggest",status="200"}'] == 2
    assert found['mach_requests_total{operation="suggest",status="404"}'] == 1
    assert found['mach_request_seconds_bucket{operation="suggest",le="+Inf"}'] == 3
    assert found['mach_request_seconds_count{operation="suggest"}'] == 3
    assert found['mach_rows_total{project="things"}'] == 7
    assert found["mach_batch_rows_sum"] == 7
    assert found['mach_batch_rows_bucket{le="1"}'] == 2
    assert found['mach_batch_rows_bucket{le="8"}'] == found["mach_batch_rows_count"] == 3
    assert found["mach_queue_rows"] == 0
    assert found[f'mach_run_info{{project="things",version="{version}"}}'] == 1


def test_a_full_queue_refuses_whatever_the_body_is(start: Started, monkeypatch: pytest.MonkeyPatch):
    is_at_work, gate, answer = threading.Event(), threading.Event(), Project.answer

    def slowly(self: Project, *asked):
        is_at_work.set()
        assert gate.wait(60)
        return answer(self, *asked)

    client, path = start(queue_rows=1), "/v1/projects/things/suggest"
    monkeypatch.setattr(Project, "answer", slowly)
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(client.post, path, data={"text": "red"})]
        assert is_at_work.wait(60)
        asked.append(threads.submit(client.post, path, data={"text": "red"}))
        while not values(client.get("/metrics").text)["mach_queue_rows"]:
            time.sleep(0.01)
        refused = [client.post(path, data={"text": "red"}, headers={"Origin": "http://page.example"})]
        refused += [client.post(path, content=b"\xff"), client.post(f"{path}-batch", content=b"\xff")]
        assert client.get("/v1/projects").status_code == 200
        gate.set()
        assert [one.result(60).status_code for one in asked] == [200, 200]
    assert [one.status_code for one in refused] == [429] * 3
    assert refused[0].json()["detail"] == "1 rows wait, and 1 may: try again in a second"
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].headers["access-control-allow-origin"] == "*"
    found = values(client.get("/metrics").text)
    assert found['mach_requests_total{operation="suggest",status="429"}'] == 2
    assert found['mach_requests_total{operation="suggest_batch",status="429"}'] == 1
    assert client.post(path, content=b"\xff").status_code == 415  # once there is room


def test_processes_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = Metrics(["suggest"], ["a"], tmp_path)
    monkeypatch.setattr("os.getpid", lambda: 2**30)  # no process has this number
    gone = Metrics(["suggest"], ["a"], tmp_path)
    for metrics, n in ((one, 2), (gone, 3)):
        for _ in range(n):
            metrics.count("suggest", 429, 0.02)
        metrics.rows("a", n)
        metrics.text(n, {})
    found = values(one.text(2, {"a": "v"}))
    assert found['mach_requests_total{operation="suggest",status="429"}'] == 5
    assert found['mach_request_seconds_sum{operation="suggest"}'] == pytest.approx(0.1)
    assert found['mach_rows_total{project="a"}'] == 5
    assert found["mach_queue_rows"] == 2  # nothing waits in a process that is gone
