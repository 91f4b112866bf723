"""The watchdog over real processes that beat as training workers do; one of them is stopped."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 8.0
TIMEOUT_S = 180


class Rank:
    """Takes two steps, then waits in the third for a rank that was stopped."""

    def train(self, board: Any, rank: int) -> None:
        from layerplan.train.heartbeat import BEAT_EVERY_S, beating
        from layerplan.train.place import IN_STEP, LOGGING

        with beating(board, rank) as mark:
            for step in (1, 2):
                mark(IN_STEP[0], step)
                mark(LOGGING, step)
            mark(IN_STEP[1], 3)
            time.sleep(BEAT_EVERY_S + 1)
            if rank == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            self.wait_for_the_others()

    def wait_for_the_others(self) -> None:
        time.sleep(TIMEOUT_S)


@pytest.mark.usefixtures("ray_local")
def test_a_stopped_rank_is_named_and_ended_and_the_other_ones_stacks_are_written(tmp_path: Path) -> None:
    import ray

    from layerplan.train.heartbeat import BEAT_EVERY_S, Board
    from layerplan.train.watchdog import Watchdog

    board = ray.remote(Board).options(num_cpus=0).remote()
    ranks = [ray.remote(Rank).options(num_cpus=0).remote() for _ in range(2)]
    running = [actor.train.remote(board, rank) for rank, actor in enumerate(ranks)]
    said: list[str] = []
    dog = Watchdog(board, tmp_path, LIMIT_S, said.append)
    deadline = time.monotonic() + TIMEOUT_S
    while not any("no progress" in line for line in said) and time.monotonic() < deadline:
        time.sleep(BEAT_EVERY_S)
        dog.look(BEAT_EVERY_S, time.monotonic())

    (line,) = [line for line in said if "no progress" in line]
    assert re.search(r"rank 0 \(pid \d+ on .*\) is the slowest, its process is stopped and says nothing", line), line
    (folder,) = (tmp_path / "stalls").iterdir()
    assert str(folder) in line and "stacks of 1 of 2 ranks" in line, line
    assert "wait_for_the_others" in (folder / "rank_1.txt").read_text()
    assert "did not answer: its process is stopped" in (folder / "rank_0.txt").read_text()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(running[0], timeout=60)
    dog.look(10 * LIMIT_S, time.monotonic())
    assert len(said) == 1, "those that waited for it are not named after it"
    for actor in (*ranks, board):
        ray.kill(actor)
