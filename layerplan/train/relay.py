"""What the driver of a trial and the workers that train it tell each other: a small actor between them.

A group of workers that trains one plan after the other asks it for the next. A training whose workers were lost is given
out again, to the workers that Ray Train started in their place, as often as its limit allows; one that ended with a fault
of ours is not: it would end so again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

WAIT_S = 5.0
"""A question is answered after so long, whether there is news or not."""
Kind = Literal["report", "done", "failed"]


@dataclass
class _Job:
    number: int
    request: Any
    max_failures: int
    attempts: int = 0
    told: list[tuple[Kind, Any]] = field(default_factory=list)
    is_over: bool = False


class Relay:
    """One training at a time; an actor."""

    def __init__(self) -> None:
        self._job: _Job | None = None
        self._is_closed = False
        self._news = asyncio.Condition()

    async def offer(self, number: int, request: Any, max_failures: int) -> None:
        """Has a training done; numbers rise."""
        self._job = _Job(number, request, max_failures)
        await self._wake()

    async def take(self, rank: int, after: int) -> tuple[int, Any] | Literal["wait", "close"]:
        """The training that a worker does next, the same for every rank of a group.

        Args:
            rank: Of the worker; rank 0 counts as its group.
            after: Number of the training that the worker did last; 0 for a worker that was just started.
        """
        async with self._news:
            await self._wait_for(lambda: self._is_closed or self._next(after) is not None)
        if self._is_closed:
            return "close"
        job = self._next(after)
        if job is None:
            return "wait"
        if rank == 0:
            job.attempts += 1
            if job.attempts > 1 + job.max_failures:
                await self.tell(job.number, "failed", ("TrainingError", (_give_up(job.max_failures),)))
                return "wait"
        return job.number, job.request

    async def tell(self, number: int, kind: Kind, value: Any) -> None:
        """Takes what a worker has to say of a training; the first word that ends it counts."""
        job = self._job
        if job is None or job.number != number or job.is_over:
            return
        job.told.append((kind, value))
        job.is_over = kind != "report"
        await self._wake()

    async def listen(self, number: int, heard: int) -> list[tuple[Kind, Any]]:
        """What was told of a training after the first `heard` words; waits a while when there is nothing new."""
        async with self._news:
            await self._wait_for(lambda: len(self._told(number)) > heard)
        return self._told(number)[heard:]

    async def close(self) -> None:
        """Lets the workers go."""
        self._is_closed = True
        await self._wake()

    def _next(self, after: int) -> _Job | None:
        job = self._job
        return job if job is not None and job.number > after and not job.is_over else None

    def _told(self, number: int) -> list[tuple[Kind, Any]]:
        return self._job.told if self._job is not None and self._job.number == number else []

    async def _wake(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _wait_for(self, condition: Any) -> None:
        try:
            await asyncio.wait_for(self._news.wait_for(condition), timeout=WAIT_S)
        except TimeoutError:
            return


def _give_up(max_failures: int) -> str:
    times = f"{max_failures + 1} times" if max_failures else "once"
    return (
        f"training failed: its workers were lost {times}; raise train.max_failures or look into the workers' own words"
    )
