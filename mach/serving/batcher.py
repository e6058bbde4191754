"""Rows that wait together are answered together; a lone one waits for nobody.

One thread answers. While it is at work, rows of all requests wait in a queue, and then go to it together, as many as
a batch may have. The queue is bounded in rows and in bytes: what does not fit is refused at once.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mach.errors import MachError
from mach.serving.edition import Question, RowAnswer
from mach.serving.problems import RequestError
from mach.serving.projects import Project

BATCH_ROWS = 64  # a fifth less work a row than 32, and all wait for the last
QUEUE_ROWS = 64  # a batch: whoever is let in is answered after two at most
QUEUE_BYTES = 2**25  # of their texts in memory: as many rows of half a megabyte


@dataclass(eq=False)
class Job:
    """Rows of one request, and who waits for their answers."""

    project: Project
    question: Question
    rows: Sequence[str]
    n_bytes: int
    future: asyncio.Future[list[RowAnswer]]


class Batcher:
    """The queue before the thread that answers; used in one event loop.

    Parameters
    ----------
    queue_rows, queue_bytes : int
        Rows that may wait, and bytes of theirs. A request with more is taken while the queue is empty.
    batch_rows : int
        Rows that are answered together.
    observe : callable
        Is told the number of rows of every batch.
    """

    def __init__(
        self,
        queue_rows: int = QUEUE_ROWS,
        batch_rows: int = BATCH_ROWS,
        observe: Callable[[int], None] = lambda n_rows: None,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.queue_rows, self.queue_bytes, self.batch_rows, self._observe = queue_rows, queue_bytes, batch_rows, observe
        self.n_waiting, self._n_bytes = 0, 0
        self._waiting: deque[Job] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._worker: asyncio.Task[None] | None = None

    def refuse(self, n_rows: int = 1, n_bytes: int = 1) -> None:
        """Raise the RequestError of so many further rows, where they do not fit."""
        if not self.n_waiting:
            return
        if self.n_waiting + n_rows > self.queue_rows:
            told = f"{self.n_waiting} rows wait, and {self.queue_rows} may: try again in a second"
            raise RequestError(429, told, {"Retry-After": "1"})
        if self._n_bytes + n_bytes > self.queue_bytes:
            told = f"rows of {self._n_bytes:,} bytes wait, and {self.queue_bytes:,} may: try again in a second"
            raise RequestError(429, told, {"Retry-After": "1"})

    async def ask(self, project: Project, question: Question, rows: Sequence[str]) -> list[RowAnswer]:
        """Answers to rows, all by one version; a RequestError of status 429 where the queue is full."""
        n_bytes = sum(map(sys.getsizeof, rows))
        self.refuse(len(rows), n_bytes)
        job = Job(project, question, rows, n_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self.n_waiting += len(rows)
        self._n_bytes += n_bytes
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await job.future

    async def close(self) -> None:
        """Answer all that waits."""
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next():
                answers = await loop.run_in_executor(self._thread, answered, batch)
                for job, answer in zip(batch, answers, strict=True):
                    if job.future.done():
                        continue  # nobody waits any more
                    if isinstance(answer, BaseException):
                        job.future.set_exception(answer)
                    else:
                        job.future.set_result(answer)
        finally:
            self._worker = None

    def _next(self) -> list[Job]:
        """The jobs that have waited longest, as many as fit into a batch."""
        batch, n_rows = list[Job](), 0
        while self._waiting and (not batch or n_rows + len(self._waiting[0].rows) <= self.batch_rows):
            job = self._waiting.popleft()
            self.n_waiting -= len(job.rows)
            self._n_bytes -= job.n_bytes
            if not job.future.done():
                batch.append(job)
                n_rows += len(job.rows)
        if batch:
            self._observe(n_rows)
        return batch


def answered(batch: Sequence[Job]) -> list[Any]:
    """The answers to every job, or its error: one that cannot be answered does not harm those beside it."""
    groups: dict[tuple[Project, Question], list[int]] = {}
    for n, job in enumerate(batch):
        groups.setdefault((job.project, job.question), []).append(n)
    answers: list[Any] = [None] * len(batch)
    for (project, question), members in groups.items():
        rows = [row for n in members for row in batch[n].rows]
        try:
            found = project.answer(question, rows)
        except MachError as error:
            alone = [answered([batch[n]])[0] for n in members] if len(members) > 1 else [error]
            for n, answer in zip(members, alone, strict=True):
                answers[n] = answer
            continue
        except Exception as error:  # a bug, or memory: whoever asked is told
            for n in members:
                answers[n] = error
            continue
        begin = 0
        for n in members:
            answers[n] = found[begin : begin + len(batch[n].rows)]
            begin += len(batch[n].rows)
    return answers
