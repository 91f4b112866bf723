"""What a trial's driver and its workers tell each other: nobody waits for news that is there, and lost trainings end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import layerplan.train.relay
from layerplan.train.relay import Relay


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerplan.train.relay, "WAIT_S", 0.05)


def test_every_rank_gets_the_training_and_the_next_one_after_it() -> None:
    async def play() -> None:
        relay = Relay()
        assert await relay.take(0, 0) == "wait"
        waiting = [asyncio.create_task(relay.take(rank, 0)) for rank in (0, 1)]
        await relay.offer(1, "first", max_failures=0)
        assert await asyncio.gather(*waiting) == [(1, "first"), (1, "first")]
        await relay.tell(1, "report", {"step": 2})
        assert await relay.listen(1, 0) == [("report", {"step": 2})]
        assert await relay.listen(1, 1) == []
        await relay.tell(1, "done", None)
        assert await relay.listen(1, 1) == [("done", None)]
        assert await relay.take(1, 1) == "wait"
        await relay.offer(2, "second", max_failures=0)
        assert await relay.take(1, 1) == (2, "second")
        await relay.close()
        assert await relay.take(0, 2) == "close"

    asyncio.run(play())


def test_new_workers_go_on_with_the_training_that_was_lost_as_often_as_the_limit_says() -> None:
    async def play() -> list[Any]:
        relay = Relay()
        await relay.offer(7, "seventh", max_failures=2)
        for _ in range(3):
            assert await relay.take(0, 0) == (7, "seventh")
            assert await relay.take(1, 0) == (7, "seventh"), "one attempt is one, whatever the number of ranks"
        assert await relay.take(0, 0) == "wait"
        return await relay.listen(7, 0)

    ((kind, (name, args)),) = asyncio.run(play())
    assert (kind, name) == ("failed", "TrainingError") and "its workers were lost 3 times" in args[0]


def test_what_comes_after_the_end_of_a_training_is_not_heard() -> None:
    async def play() -> list[Any]:
        relay = Relay()
        await relay.offer(1, "first", max_failures=3)
        await relay.take(0, 0)
        await relay.tell(1, "failed", ("TrainingError", ("the loss is not finite",)))
        assert await relay.take(0, 0) == "wait", "it is not tried again"
        await relay.tell(1, "done", None)
        await relay.tell(0, "report", {"step": 1})
        return await relay.listen(1, 0)

    assert asyncio.run(play()) == [("failed", ("TrainingError", ("the loss is not finite",)))]
