"""What finishes a worker's checkpoints and takes what it tells while it trains, so that one process can train many plans."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from layerplan.storage.paths import StoredPath
from layerplan.train.checkpoint_writer import Publish, publish_to_ray
from layerplan.train.state import TrainState


@dataclass(frozen=True)
class Outlet:
    """What a training has beside its request."""

    publish: Publish = publish_to_ray
    """What finishes its checkpoints."""
    tell: Callable[[dict[str, Any]], None] = lambda values: None
    """Takes what is measured on the way, on rank 0."""


ALONE = Outlet()
"""Of a process that trains one plan, for Ray Train."""


class Background:
    """Finishes checkpoints in a thread, in order."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layerplan-checkpoints")
        self._last: Future[None] | None = None

    def __call__(
        self, state: TrainState, folder: StoredPath, finish: Callable[[], None], *, is_validated: bool
    ) -> None:
        """Has the save finished behind those before it."""
        self._last = self._pool.submit(finish)

    def wait(self) -> None:
        """Returns once all are finished; raises what the last one met."""
        if self._last is not None:
            self._last.result()
