"""Rows that wait together are answered together, in order of asking; what does not fit is refused at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from mach.errors import DataError
from mach.serving.batcher import Batcher
from mach.serving.edition import Question, RowAnswer
from mach.serving.problems import RequestError
from mach.serving.projects import Project

ASKED = Question(3)


class Slow(Project):
    """Answers a row by itself, and waits for a gate before."""

    def __init__(self, *, is_open: bool = True) -> None:  # nothing of a run
        self.gate, self.calls = threading.Event(), list[tuple[Question, list[str]]]()
        if is_open:
            self.gate.set()

    def answer(self, question: Question, rows: Sequence[str]) -> list[RowAnswer]:
        assert self.gate.wait(60)
        self.calls.append((question, list(rows)))
        if "bad" in rows:
            raise DataError("bad row")
        if "bug" in rows:
            raise ZeroDivisionError
        return [RowAnswer("v", [{"label": row}], True) for row in rows]


def slow(*, is_open: bool = True) -> Any:
    return Slow(is_open=is_open)


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def held(batcher: Batcher, project: Any) -> asyncio.Task:
    """A row at which the thread is at work."""
    first = asyncio.create_task(batcher.ask(project, ASKED, ["first"]))
    while batcher.n_waiting or not first:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    return first


def test_a_lone_row_waits_for_nobody():
    async def scenario():
        project, batcher = slow(), Batcher()
        for row in "abc":
            [answer] = await batcher.ask(project, ASKED, [row])
            assert answer.results == [{"label": row}]
        assert project.calls == [(ASKED, [row]) for row in "abc"]

    run(scenario())


def test_rows_that_wait_are_answered_together():
    async def scenario():
        sizes: list[int] = []
        project, batcher = slow(is_open=False), Batcher(batch_rows=4, observe=sizes.append)
        first = await held(batcher, project)
        asked = [("ab", ASKED), ("c", Question(5)), ("d", ASKED), ("efghij", ASKED), ("k", ASKED)]
        tasks = [asyncio.create_task(batcher.ask(project, q, list(rows))) for rows, q in asked]
        await asyncio.sleep(0)
        project.gate.set()
        answers = await asyncio.gather(*tasks)
        for (rows, _), answer in zip(asked, answers, strict=True):
            assert [one.results[0]["label"] for one in answer] == list(rows)
        await first
        assert sizes == [1, 4, 6, 1]  # a request is never split, the last had no place beside six
        assert project.calls[1:] == [
            (ASKED, list("abd")),
            (Question(5), ["c"]),
            (ASKED, list("efghij")),
            (ASKED, ["k"]),
        ]

    run(scenario())


def test_a_full_queue_refuses_at_once():
    async def scenario():
        project, batcher = slow(is_open=False), Batcher(queue_rows=3)
        first = await held(batcher, project)
        waiting = asyncio.create_task(batcher.ask(project, ASKED, ["b", "c"]))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="2 rows wait, and 3 may") as refused:
            await batcher.ask(project, ASKED, ["d", "e"])
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        last = asyncio.create_task(batcher.ask(project, ASKED, ["d"]))
        await asyncio.sleep(0)
        project.gate.set()
        await asyncio.gather(first, waiting, last)
        assert len(await batcher.ask(project, ASKED, list("abcdefgh"))) == 8  # more than fit, but nobody waits
        assert batcher.n_waiting == 0

    run(scenario())


def test_a_queue_is_bounded_in_bytes():
    async def scenario():
        project, batcher = slow(is_open=False), Batcher(queue_bytes=2000)
        first = await held(batcher, project)
        waiting = asyncio.create_task(batcher.ask(project, ASKED, ["b" * 1500]))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match=r"rows of 1,5\d\d bytes wait, and 2,000 may") as refused:
            await batcher.ask(project, ASKED, ["c" * 1000])
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        small = asyncio.create_task(batcher.ask(project, ASKED, ["d"]))
        await asyncio.sleep(0)
        project.gate.set()
        await asyncio.gather(first, waiting, small)
        last = asyncio.create_task(batcher.ask(project, ASKED, ["e" * 3000]))  # more than fit, but nobody waits
        assert [one.results for one in await last] == [[{"label": "e" * 3000}]]
        after = [asyncio.create_task(batcher.ask(project, ASKED, ["f" * 500])) for _ in range(2)]
        assert len(await asyncio.gather(*after)) == 2  # bytes that were answered count no more

    run(scenario())


def test_what_cannot_be_answered_harms_nobody_else():
    async def scenario():
        project, batcher = slow(is_open=False), Batcher()
        first = await held(batcher, project)
        tasks = [asyncio.create_task(batcher.ask(project, ASKED, [row])) for row in ("a", "bad", "c")]
        await asyncio.sleep(0)
        project.gate.set()
        a, bad, c = tasks
        with pytest.raises(DataError):
            await bad
        assert [(await one)[0].results for one in (a, c)] == [[{"label": "a"}], [{"label": "c"}]]
        await first
        with pytest.raises(ZeroDivisionError):
            await batcher.ask(project, ASKED, ["bug"])
        assert len(await batcher.ask(project, ASKED, ["after"])) == 1

    run(scenario())


def test_nobody_answers_for_those_who_left():
    async def scenario():
        project, batcher = slow(is_open=False), Batcher()
        first = await held(batcher, project)
        gone = asyncio.create_task(batcher.ask(project, ASKED, ["gone"]))
        await asyncio.sleep(0)
        gone.cancel()
        stays = asyncio.create_task(batcher.ask(project, ASKED, ["stays"]))
        await asyncio.sleep(0)
        project.gate.set()
        await asyncio.gather(first, stays)
        assert project.calls == [(ASKED, ["first"]), (ASKED, ["stays"])]
        await batcher.close()

    run(scenario())
