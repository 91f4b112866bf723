"""Waits until a run's turn on its cluster has come, and says meanwhile which place it has."""

from __future__ import annotations

import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from layerplan.config.cluster import ClusterConfig
from layerplan.sharing.books import read_holdings, read_nodes, read_turns, remove_turn, sum_by_job, write_turn
from layerplan.sharing.demand import Demand
from layerplan.sharing.describe import describe_place
from layerplan.sharing.rule import Turn, may_start
from layerplan.waiting import PATIENCE_S, REPEAT_S

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
MOST_FAILURES = 5
"""Looks in a row that Ray did not answer; then the run goes on, and Ray decides who gets what."""


@contextmanager
def holding_turn(
    config: ClusterConfig, name: str, demands: Sequence[Demand], *, tell: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Waits for a run's turn; it is in the line until the block ends. Ray must be connected.

    Args:
        config: Priority, and whether there is a line.
        name: Of the run, for others to see.
        demands: What it will hold at once.
        tell: Takes each line about its place, and an empty one when its turn has come.
    """
    if not config.queue:
        yield
        return
    me = _introduce(config, name, demands)
    try:
        _wait(me, tell or _tell_nobody)
        yield
    finally:
        with suppress(Exception):  # the cluster may be gone, and the line with it
            remove_turn(me)


def _introduce(config: ClusterConfig, name: str, demands: Sequence[Demand]) -> Turn:
    import ray

    return Turn(
        id=uuid.uuid4().hex,
        job=ray.get_runtime_context().get_job_id(),
        name=name,
        priority=config.priority,
        demands=[demand for demand in demands if demand.count],
        since=time.time(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )


def _tell_nobody(line: str) -> None:
    """For runs whose folder says nothing of a line."""


def _wait(me: Turn, tell: Callable[[str], None]) -> None:
    said, failures = SaidPlace(), 0
    while True:
        try:
            if _try_to_start(me):
                if line := said.end(time.monotonic()):
                    logger.info(line)
                tell("")
                return
            line, failures = said.observe(lambda: _describe(me), time.monotonic()), 0
        except Exception as error:  # the line is a courtesy: no run ends for it
            failures += 1
            if failures == MOST_FAILURES:
                logger.warning("the cluster's line of runs cannot be read (%s); starting out of turn", error)
                tell("")
                return
            line = ""
        if line:
            logger.info(line)
            tell(line)
        time.sleep(LOOK_EVERY_S * random.uniform(0.8, 1.2))  # of two that gave way to each other one is first next time


def _try_to_start(me: Turn) -> bool:
    """Starts when it may, and looks again after it has said so: of two that start at once, the one that is behind gives way."""
    write_turn(me)
    if not _may_start(me):
        return False
    write_turn(me.model_copy(update={"started": time.time()}))
    if _may_start(me):
        return True
    write_turn(me)
    return False


def _may_start(me: Turn) -> bool:
    turns, nodes = read_turns(), read_nodes()
    if any(turn.started is not None and turn.job != me.job for turn in turns) or not may_start(me, turns, nodes, {}):
        return may_start(me, turns, nodes, sum_by_job(read_holdings()[0]))
    return True


def _describe(me: Turn) -> str:
    holdings, jobs = read_holdings()
    return describe_place(me, read_turns(), sum_by_job(holdings), jobs, time.time())


@dataclass
class SaidPlace:
    """Decides when a line about the place is due: after a few seconds, every minute."""

    _began: float | None = None
    _said: float | None = None

    def observe(self, describe: Callable[[], str], now: float) -> str:
        """Returns the line at `now` (seconds of a steady clock), or nothing."""
        self._began = now if self._began is None else self._began
        if now - self._began < PATIENCE_S or (self._said is not None and now - self._said < REPEAT_S):
            return ""
        self._said = now
        return describe()

    def end(self, now: float) -> str:
        """What is said once the turn has come."""
        return "" if self._said is None or self._began is None else f"its turn came after {now - self._began:.0f} s"
