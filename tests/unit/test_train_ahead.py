"""Rows prepared ahead of their step: in order, at most so many, given out again after a way back, errors told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from layerplan.corpus.rows import PackedRows
from layerplan.errors import CorpusError
from layerplan.train.ahead import DEPTH, StepsAhead
from tests.tiny_loop import make_rows

CPU = torch.device("cpu")


def first_rows(steps: list) -> list[int]:  # type: ignore[type-arg]
    return [int(step.rows.row_ids[0]) for step in steps]


def iter_steps(start: int, stop: int) -> Iterator[PackedRows]:
    return (make_rows(step, batch=1, vocab_size=9) for step in range(start, stop))


def test_steps_come_in_order_and_again_when_put_back_and_beyond_the_end_when_extended() -> None:
    with StepsAhead(iter_steps, lambda rows: [], CPU, start=3, stop=7) as ahead:
        taken = [ahead.take() for _ in range(3)]
        ahead.put_back(taken[1:])
        ahead.extend(9)
        assert first_rows([ahead.take() for _ in range(5)]) == [4, 5, 6, 7, 8]
        with pytest.raises(IndexError):
            ahead.take()


def test_no_more_than_the_depth_is_read_ahead() -> None:
    seen = []

    def watched(start: int, stop: int) -> Iterator[PackedRows]:
        for rows in iter_steps(start, stop):
            seen.append(int(rows.row_ids[0]))
            yield rows

    with StepsAhead(watched, lambda rows: [], CPU, start=0, stop=100) as ahead:
        ahead.take()
        deadline = time.monotonic() + 20
        while len(seen) < 1 + DEPTH + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert seen == list(range(1 + DEPTH + 1))  # those that lie prepared, and the one that waits for room
    assert not any(thread.name == "layerplan-rows" for thread in threading.enumerate())


def test_an_error_of_the_reader_is_raised_where_its_step_is_taken() -> None:
    def broken(start: int, stop: int) -> Iterator[PackedRows]:
        yield make_rows(0, batch=1, vocab_size=9)
        raise CorpusError("shard 3 is damaged")

    with StepsAhead(broken, lambda rows: [], CPU, start=0, stop=5) as ahead:
        ahead.take()
        with pytest.raises(CorpusError, match="shard 3 is damaged"):
            ahead.take()
