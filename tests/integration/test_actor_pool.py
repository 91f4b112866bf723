"""The one pool of actors, on Ray: what it gives in order, whose fault reaches the driver, and when it gives up."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerplan.actor_pool import ActorPool, map_over_actors
from layerplan.errors import CorpusError, ModelError
from layerplan.progress import ProgressLines

POOL = ActorPool(2, num_cpus=0.5, what="the counting process", error=CorpusError)
ROWS = [{"number": number} for number in range(8)]


class Doubler:
    """Doubles numbers, except what it is told to fail at."""

    def __init__(self, folder: str, fault: int | None = None) -> None:
        if fault == -1:
            raise ModelError("the model has no number")
        self._folder, self._fault = Path(folder), fault

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number in batch["number"]:
            if number == self._fault:
                raise ModelError(f"{number} cannot be doubled")
            yield {"doubled": [2 * int(number)]}


class Dying(Doubler):
    """Takes its process with it, once, or whenever it is asked when there is no folder."""

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        mark = self._folder / "died"
        if 3 in batch["number"] and not mark.exists():
            if self._folder.is_dir():
                mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().__call__(batch)


def test_results_come_once_each_and_in_order_though_a_process_is_killed(ray_local: None, tmp_path: Path) -> None:
    said: list[str] = []
    now = [0.0]
    progress = ProgressLines("numbers", len(ROWS), said.append, clock=lambda: now[0])
    now[0], found = 3600.0, []
    for row in map_over_actors(POOL, Dying, (str(tmp_path),), ROWS, take="rows", is_ordered=True, progress=progress):
        found.append(row["doubled"])
        now[0] += 20
    assert found == [0, 2, 4, 6, 8, 10, 12, 14]
    assert (tmp_path / "died").exists()
    # the first result took an hour, each one after it 20 s
    assert said == ["1 of 8 numbers", "4 of 8 numbers, about 80 s to go", "7 of 8 numbers, about 20 s to go"]


class Engine:
    """Says which process it is, and works long enough for a second one to be there if there is room."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.5)
        return {"pid": [os.getpid()] * len(batch["number"])}


@pytest.mark.parametrize("share", [0.6, 3.0])
def test_a_node_that_holds_one_engine_is_given_one_and_one_that_holds_none_tries(
    ray_local: None, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Two were asked for, each of more than half of what the node has, or of more than all of it."""
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    there = node["Resources"]["memory"]
    pool = dataclasses.replace(POOL, memory_bytes=share * there)
    pids = [row["pid"] for row in map_over_actors(pool, Engine, (), ROWS, take="rows")]
    assert len(pids) == len(ROWS) and len(set(pids)) == 1
    line = (
        f"the counting process needs about {3 * there / 2**30:.1f} GiB of memory; the largest node has"
        f" {there / 2**30:.1f} GiB for it"
    )
    said = [record.getMessage() for record in caplog.records if record.name == "layerplan.actor_pool"]
    assert said == ([line] if share > 1 else [])


@pytest.mark.parametrize("fault", [-1, 5])
def test_a_fault_of_ours_is_raised_as_it_is_from_the_constructor_too(
    ray_local: None, tmp_path: Path, fault: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two numbers to a batch, so that results stand before the fault in its block."""
    with pytest.raises(ModelError, match=r"^(the model has no number|5 cannot be doubled)$"):
        list(map_over_actors(POOL, Doubler, (str(tmp_path), fault), ROWS, batch_size=2))
    assert "Traceback" not in capfd.readouterr().err


def test_a_process_that_keeps_dying_ends_the_work(ray_local: None, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"^the counting process died and was restarted 2 times; its last words: "):
        list(map_over_actors(POOL, Dying, (str(tmp_path / "none"),), ROWS[2:4]))
